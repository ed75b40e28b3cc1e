"""The hooks that are written down, and one that changes something."""

from tiny.hooks import Recorder
from tiny.more_hooks import Adding

HOOKS = (Recorder("settings"), Adding())
