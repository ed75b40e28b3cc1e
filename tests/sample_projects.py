"""Copies of the sample projects, which are folders beside this file, for whatever Kedro is installed.

Each is the tiny one, over which what makes another one of it is copied.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

import kedro

KEDRO = tuple(int(part) for part in kedro.__version__.split(".")[:3])
PROJECTS = Path(__file__).parent / "projects"

# What stands in the files, and what it is called where an older version is installed.
NAMES = {"KEDRO_VERSION": kedro.__version__}
if KEDRO < (0, 18, 12):  # partitions were a part of Kedro, and there are no dataset factories
    kinds = ("Partitioned", "Incremental")
    NAMES |= {f"partitions.{kind}Dataset": f"{kind}DataSet" for kind in kinds}
    NAMES |= {f"{kind}Dataset": f"{kind}DataSet" for kind in ("Memory", "Cached")}
if not find_spec("kedro_datasets.matplotlib.matplotlib_dataset"):
    NAMES["MatplotlibDataset"] = "MatplotlibWriter"

# The nodes of the flaky pipeline that run until it is mended.
ALL = ["aside", "finish_aside", "flaky", "keep", "save"]


def write_project(path: Path, *names: str) -> Path:
    """Copy the tiny project, and what others change in it, to a new folder, and return that."""
    without = shutil.ignore_patterns("__pycache__", *["*_factory.yml"] * (KEDRO < (0, 18, 12)))
    for name in ("tiny", *names):
        shutil.copytree(PROJECTS / name, path, dirs_exist_ok=True, ignore=without)
    for file in (path / "pyproject.toml", *path.glob("conf/base/catalog*.yml")):
        text = file.read_text(encoding="utf-8")
        for ours, theirs in NAMES.items():
            text = text.replace(ours, theirs)
        file.write_text(text, encoding="utf-8")
    return path


def write_tiny_project(path: Path) -> Path:
    """Three pipelines, the hooks of which are written down."""
    return write_project(path)


def write_features_project(path: Path) -> Path:
    """A pipeline for each feature of Kedro."""
    write_project(path, "features")
    for catalog in path.glob("conf/base/catalog*.yml"):
        shutil.copy(catalog, path / "other/base")
    return path


def ran(project: Path) -> list[str]:
    """The nodes of the flaky pipeline that have been run since this was asked for."""
    path = project / "ran.txt"
    names = sorted(path.read_text().split()) if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def mend(project: Path) -> None:
    """Mend the flaky node's code: what runs then is another function, in a node of the same name."""
    nodes = project / "src/tiny/nodes.py"
    nodes.write_text(nodes.read_text().replace('Path("mended").exists()', "True"))
