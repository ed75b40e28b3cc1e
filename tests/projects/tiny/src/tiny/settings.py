"""Each hook is called twice: for the project, and for a plugin that the environment seems to have."""

from tiny.hooks import Recorder

HOOKS = (Recorder("settings"),)
