"""Copies of the Kedro project beside this file, with the script copied in."""

import shutil
from pathlib import Path

import kedro

HERE = Path(__file__).parent
DATASET = """
stored_100_0_{number}:
  type: json.JSONDataset
  filepath: data/{number}.json
"""


def write_project(path: Path, script: Path) -> Path:
    """Copy the project to a new folder, and return that."""
    shutil.copytree(HERE / "project", path, ignore=shutil.ignore_patterns("__pycache__"))
    pyproject = path / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("KEDRO_VERSION", kedro.__version__))
    catalog = "".join(DATASET.format(number=number) for number in range(100))
    (path / "conf/base/catalog.yml").write_text(catalog)
    shutil.copy(HERE / "dags.py", path / "src/bench")
    shutil.copy(script, path)
    return path
