"""A project with a pipeline for each feature of Kedro, written for whatever Kedro is installed."""

import json
from pathlib import Path

import kedro
from tiny_project import write_tiny_project

KEDRO = tuple(int(part) for part in kedro.__version__.split(".")[:3])
SET = "set" if KEDRO >= (0, 18, 12) else "Set"
PARTITIONS = "partitions." if KEDRO >= (0, 18, 12) else ""  # which were part of Kedro

CATALOG = f"""
"shared@list":
  type: json.JSONDataset
  filepath: data/shared.json

"shared@text":
  type: text.TextDataset
  filepath: data/shared.json

transcoded:
  type: json.JSONDataset
  filepath: data/transcoded.json

parts:
  type: {PARTITIONS}PartitionedData{SET}
  path: data/parts
  dataset: json.JSONDataset
  filename_suffix: .json

parts_sum:
  type: json.JSONDataset
  filepath: data/parts_sum.json

incoming:
  type: {PARTITIONS}IncrementalData{SET}
  path: data/incoming
  dataset: json.JSONDataset
  filename_suffix: .json

news:
  type: json.JSONDataset
  filepath: data/news.json

chunks:
  type: tiny.datasets.Lines
  filepath: data/chunks.txt

from_report:
  type: json.JSONDataset
  filepath: data/from_report.json

left.result:
  type: json.JSONDataset
  filepath: data/left.json

right.inner.result:
  type: json.JSONDataset
  filepath: data/right.json

nested_result:
  type: json.JSONDataset
  filepath: data/nested.json

assigned:
  type: MemoryData{SET}
  copy_mode: assign

copied:
  type: MemoryData{SET}

same:
  type: json.JSONDataset
  filepath: data/same.json

thread:
  type: tiny.datasets.ThreadName
  filepath: one

other_thread:
  type: tiny.datasets.ThreadName
  filepath: other

guarded:
  type: tiny.datasets.Guarded
  filepath: data/guarded.txt
  credentials: door

hooked_result:
  type: json.JSONDataset
  filepath: data/hooked.json
"""

FACTORY = """
"{name}_made":
  type: json.JSONDataset
  filepath: data/factory/{name}.json
"""

PARAMETERS = """\
factor: 3
pause: 0
model:
  depth: 2
  kind:
    name: tree
    leaves: 4
left:
  offset: 1
right:
  inner:
    offset: 2
"""

DATASETS = '''\
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
            file.write(f"{data}\\n")

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
'''

NODES = """

class Box:
    pass


boxes = []


def to_list(numbers):
    return [str(number) for number in numbers]


def to_text(text):
    return len([character for character in text if character in "123"])


def split(numbers):
    return {f"part{number}": number for number in numbers}


def gather(parts):
    return sum(load() for load in parts.values())


def read_news(incoming):
    return sorted(incoming)


def yield_chunks(numbers):
    yield from numbers


def count_chunks(chunks):
    return len(chunks)


def thread_names(one, other):
    return [one, other]


def from_report(report):
    return report["total"] + 1


def offset(numbers, offset):
    return [number + offset for number in numbers]


def nest(model, leaves):
    return [model, leaves]


def make_boxes():
    boxes[:] = [Box(), Box()]
    return tuple(boxes)


def compare_boxes(assigned, copied):
    return [assigned is boxes[0], copied is boxes[1]]


def hooked(added, numbers):
    return [added, numbers]
"""

REGISTRY = """\
from kedro.pipeline import node, pipeline

from tiny import nodes


def register_pipelines():
    sums = pipeline([
        node(nodes.double, "numbers", "doubled", name="double", tags="light"),
        node(nodes.scale, ["numbers", "params:factor", "params:pause"], "scaled", name="scale",
             tags=["heavy", "unlimited"]),
        node(nodes.add, ["doubled", "scaled"], "total", name="add"),
        node(nodes.report, "total", "report", name="report"),
    ])
    offset = pipeline([
        node(nodes.offset, ["numbers", "params:offset"], "shifted", name="shift"),
        node(nodes.double, "shifted", "result", name="double"),
    ])
    spaces = pipeline(offset, inputs="numbers", namespace="left") + pipeline(
        offset, inputs="numbers", namespace="right.inner"
    )
    return {
        "__default__": sums,
        "transcoding": pipeline([
            node(nodes.to_list, "numbers", "shared@list", name="to_list"),
            node(nodes.to_text, "shared@text", "transcoded", name="to_text"),
        ]),
        "partitions": pipeline([
            node(nodes.split, "numbers", "parts", name="split"),
            node(nodes.gather, "parts", "parts_sum", name="gather"),
        ]),
        "incremental": pipeline([
            node(nodes.read_news, "incoming", "news", name="read_news", confirms="incoming"),
        ]),
        "generator": pipeline([
            node(nodes.yield_chunks, "numbers", "chunks", name="yield_chunks"),
            node(nodes.count_chunks, "chunks", "news", name="count_chunks"),
        ]),
        "threads": pipeline([
            node(nodes.thread_names, ["thread", "other_thread"], "news", name="thread_names"),
        ]),
        "versions": pipeline([
            node(nodes.from_report, "report", "from_report", name="from_report"),
        ]),
        "spaces": spaces,
        "nested": pipeline([
            node(nodes.nest, ["params:model", "params:model.kind.leaves"], "nested_result",
                 name="nest"),
        ]),
        "copy_modes": pipeline([
            node(nodes.make_boxes, None, ["assigned", "copied"], name="make_boxes"),
            node(nodes.compare_boxes, ["assigned", "copied"], "same", name="compare_boxes"),
        ]),
        "credentials": pipeline([
            node(nodes.double, "numbers", "guarded", name="guard"),
        ]),
        "hooks": pipeline([
            node(nodes.hooked, ["added", "numbers"], "hooked_result", name="hooked"),
        ]),
        "factories": pipeline([
            node(nodes.double, "numbers", "first_made", name="first"),
            node(nodes.double, "first_made", "second_made", name="second"),
        ]),
        "failing": pipeline([node(nodes.fail, "numbers", "nothing", name="fail")]),
    }
"""

SETTINGS = """\
from tiny.hooks import Recorder
from tiny.more_hooks import Adding

HOOKS = (Recorder("settings"), Adding())
"""

MORE_HOOKS = """\
from kedro.framework.hooks import hook_impl
from kedro import io

MemoryDataset = getattr(io, "MemoryDataset", None) or io.MemoryDataSet  # Kedro 0.18.12


class Adding:
    @hook_impl
    def after_catalog_created(self, catalog):
        if hasattr(catalog, "add"):
            catalog.add("added", MemoryDataset("added by a hook"), replace=True)
        else:  # Kedro 1.0
            catalog["added"] = MemoryDataset("added by a hook")

    @hook_impl
    def before_node_run(self, node):
        return {"numbers": "replaced by a hook"} if node.name == "hooked" else None
"""

CUSTOM_SETTINGS = """\
from tiny.custom import CatalogClass, ConfigLoaderClass, SessionClass
from tiny.hooks import Recorder

HOOKS = (Recorder("settings"),)
CONFIG_LOADER_CLASS = ConfigLoaderClass
DATA_CATALOG_CLASS = CatalogClass
if SessionClass:
    SESSION_CLASS = SessionClass
"""

CUSTOM = """\
from kedro.framework.project import settings
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
"""


def write_features_project(path: Path) -> Path:
    """Write the project into a new folder, and return that."""
    write_tiny_project(path)
    with (path / "conf/base/catalog.yml").open("a") as catalog:
        catalog.write(CATALOG + (FACTORY if KEDRO >= (0, 18, 12) else ""))
    with (path / "src/tiny/nodes.py").open("a") as nodes:
        nodes.write(NODES)
    for name, text in {
        "conf/base/parameters.yml": PARAMETERS,
        "conf/base/credentials.yml": "door:\n  key: a key\n",
        "conf/parallel/prefect.yml": "task_runner: {is_async: true}\n",
        "other/base/catalog.yml": (path / "conf/base/catalog.yml").read_text(),
        "other/base/parameters.yml": PARAMETERS.replace("factor: 3", "factor: 7"),
        "other/base/credentials.yml": "door:\n  key: another key\n",
        "src/tiny/datasets.py": DATASETS,
        "src/tiny/more_hooks.py": MORE_HOOKS,
        "src/tiny/settings.py": SETTINGS,
        "src/tiny/pipeline_registry.py": REGISTRY,
        "data/incoming/monday.json": "1",
        "data/incoming/tuesday.json": "2",
    }.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def write_custom_project(path: Path) -> Path:
    """Write a tiny project with classes of its own for catalog, configuration and session."""
    write_tiny_project(path)
    (path / "src/tiny/settings.py").write_text(CUSTOM_SETTINGS)
    (path / "src/tiny/custom.py").write_text(CUSTOM)
    catalog = path / "conf/base/catalog.yml"
    catalog.write_text(catalog.read_text().replace("numbers:", "digits:"))
    (path / "conf/base/prefect.yml").write_text(json.dumps({"task_runner": {"max_workers": 1}}))
    return path
