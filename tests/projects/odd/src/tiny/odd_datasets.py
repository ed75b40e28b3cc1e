"""Datasets as people write them."""

import json
from pathlib import Path

try:
    from kedro.io import AbstractDataset
except ImportError:  # Kedro 0.18.12 renamed it
    from kedro.io import AbstractDataSet as AbstractDataset


class Described(AbstractDataset):
    """Describes itself by a text, where Kedro's own give a dict."""

    def __init__(self, filepath):
        self._filepath = Path(filepath)

    def _load(self):
        return json.loads(self._filepath.read_text())

    def _save(self, data):
        self._filepath.write_text(json.dumps(data))

    def _describe(self):
        return f"the file {self._filepath}"


class Locking(Described):
    """Takes a lock as soon as it is made, as a database does that one process may open."""

    def __init__(self, filepath):
        super().__init__(filepath)
        lock = Path(f"{filepath}.lock")
        lock.touch(exist_ok=False)


class Asking(Described):
    """Has a version of its own, and metadata that it asks a table for."""

    def __init__(self, filepath):
        super().__init__(filepath)
        self._version = 7

    @property
    def metadata(self):
        """Fail: there is no connection."""
        raise RuntimeError("no connection")
