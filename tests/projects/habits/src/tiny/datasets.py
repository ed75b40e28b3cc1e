"""Datasets of the project's own."""

from pathlib import Path

try:
    from kedro.io import AbstractDataset
except ImportError:  # Kedro 0.18.12
    from kedro.io import AbstractDataSet as AbstractDataset


class Lines(AbstractDataset):
    """Appends what is saved."""

    def __init__(self, filepath):
        self._filepath = filepath

    def _load(self):
        return Path(self._filepath).read_text().splitlines()

    def _save(self, data):
        with open(self._filepath, "a") as file:
            file.write(f"{data}\n")

    def _describe(self):
        return {"filepath": self._filepath}


class AwayAtFirst(Lines):
    """Cannot be reached the first time."""

    def _save(self, data):
        first = Path("was_away")
        if not first.exists():
            first.touch()
            raise ConnectionError("the database is away")
        super()._save(data)


class Named(Lines):
    """Keeps a name where a cache keeps a dataset, as GBQTableDataset does."""

    _dataset = "numbers_of_a_project"
