"""A catalog, a config loader and a session of the project's own."""

from kedro import io

Parent = getattr(io, "KedroDataCatalog", None) or io.DataCatalog  # in Kedro 0.19 the newer one
try:
    from kedro.framework.session import KedroServiceSession as Session
except ImportError:  # Kedro 1.3
    Session = None
try:
    from kedro.config import OmegaConfigLoader as Loader
except ImportError:
    from kedro.config import ConfigLoader as Loader


class CatalogClass(Parent):
    @classmethod
    def from_config(cls, catalog, *args, **kwargs):
        numbers = {"type": "json.JSONDataset", "filepath": "data/numbers.json"}
        return super().from_config({**catalog, "numbers": numbers}, *args, **kwargs)

    def load(self, name, *args, **kwargs):
        data = super().load(name, *args, **kwargs)
        return [*data, 1000] if name == "numbers" else data


class ConfigLoaderClass(Loader):
    def __getitem__(self, key):
        config = super().__getitem__(key)
        return {**config, "factor": config["factor"] + 1} if key == "parameters" else config


SessionClass = Session and type("SessionClass", (Session,), {})
