"""Datasets of the project's own."""

import threading
import time
from pathlib import Path

try:
    from kedro.io import AbstractDataset
except ImportError:  # Kedro 0.18.12
    from kedro.io import AbstractDataSet as AbstractDataset


class Lines(AbstractDataset):
    """Appends what is saved: what a generator yields comes in pieces."""

    def __init__(self, filepath):
        self._filepath = filepath

    def _load(self):
        return Path(self._filepath).read_text().splitlines()

    def _save(self, data):
        with open(self._filepath, "a") as file:
            file.write(f"{data}\n")

    def _describe(self):
        return {"filepath": self._filepath}


class ThreadName(Lines):
    """Gives the thread that loads it, as a word that does not change from run to run."""

    def _load(self):
        time.sleep(0.1)  # long enough for another thread to load the other one
        name = threading.current_thread().name
        return name if name == "MainThread" else "thread " + name[-1]


class Guarded(Lines):
    """Writes nothing without the key."""

    def __init__(self, filepath, credentials):
        super().__init__(filepath)
        self._key = credentials["key"]

    def _save(self, data):
        super()._save(f"{self._key} opens {data}")
