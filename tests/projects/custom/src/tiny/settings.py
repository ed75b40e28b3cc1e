"""What Kedro takes from the project instead of its own classes."""

from tiny.custom import CatalogClass, ConfigLoaderClass, SessionClass
from tiny.hooks import Recorder

HOOKS = (Recorder("settings"),)
CONFIG_LOADER_CLASS = ConfigLoaderClass
DATA_CATALOG_CLASS = CatalogClass
if SessionClass:
    SESSION_CLASS = SessionClass
