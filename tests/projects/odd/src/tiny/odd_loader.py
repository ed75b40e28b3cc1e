"""A config loader that knows four kinds of configuration."""

from kedro.config import AbstractConfigLoader

NAMES = ("numbers", "total", "report", "side")


class Fixed(AbstractConfigLoader):
    """Says in its own way that there is no other kind."""

    def __getitem__(self, key):
        return getattr(self, f"load_{key}")()

    def load_catalog(self):
        """Give each dataset a file."""
        return {n: {"type": "json.JSONDataset", "filepath": f"data/{n}.json"} for n in NAMES}

    def load_parameters(self):
        """Give those of the tiny project."""
        return {"factor": 3, "pause": 0}

    def load_credentials(self):
        """Give none."""
        return {}
