"""A project as data scientists write them: nodes use what is global to a process.

Each pipeline is a habit, in which `kedro run` and a flow run must write the same files.
"""

import importlib.util
from pathlib import Path

from features_project import KEDRO, PARTITIONS, SET
from tiny_project import write_tiny_project

FIGURE = "matplotlib.MatplotlibDataset"
if not importlib.util.find_spec("kedro_datasets.matplotlib.matplotlib_dataset"):
    FIGURE = "matplotlib.MatplotlibWriter"
KINDS = ("plots", "seeds", "folders")  # each a pipeline of four nodes that could run side by side

CATALOG = f"""
"äöü.größe":
  type: json.JSONDataset
  filepath: data/größe.json

cached:
  type: CachedData{SET}
  dataset:
    type: json.JSONDataset
    filepath: data/cached.json

lazy_parts:
  type: {PARTITIONS}PartitionedData{SET}
  path: data/lazy
  dataset: json.JSONDataset
  filename_suffix: .json

incoming:
  type: {PARTITIONS}IncrementalData{SET}
  path: data/incoming
  dataset: json.JSONDataset
  filename_suffix: .json

table:
  type: pandas.SQLTableDataset
  table_name: numbers
  credentials: database
  save_args: {{if_exists: replace, index: false}}

lines:
  type: tiny.datasets.Lines
  filepath: data/lines.txt

model:
  type: pickle.PickleDataset
  filepath: data/model.pickle
  versioned: true

first_chunk:
  type: json.JSONDataset
  filepath: data/first_chunk.json
  versioned: true

told:
  type: json.JSONDataset
  filepath: data/told.json
  versioned: true

scores:
  type: tiny.datasets.AwayAtFirst
  filepath: data/scores.txt

named:
  type: tiny.datasets.Named
  filepath: data/named.txt

middle:
  type: json.JSONDataset
  filepath: data/middle.json
  versioned: true
"""
JSON = [
    "alarm",
    "warned",
    "asyncio_ran",
    "flow_ran",
    "variable",
    "database_ran",
    "read_cache",
    "sum_parts",
    "news",
    "table_sum",
    "line_count",
    "hooked",
    "keyed",
    "made_sum",
    "own_version",
    "read_named",
    "late_sum",
    "late_text",
]
for _name in JSON:
    CATALOG += f"\n{_name}:\n  type: json.JSONDataset\n  filepath: data/{_name}.json\n"
for _number in range(4):
    CATALOG += f"""
plot{_number}:
  type: {FIGURE}
  filepath: data/plot{_number}.png

sample{_number}:
  type: json.JSONDataset
  filepath: data/sample{_number}.json

folder{_number}:
  type: json.JSONDataset
  filepath: data/folder{_number}.json
"""

PARAMETERS = """\
factor: 3
pause: 0
prefixes: {DE: 49, NO: 47, SE: 46}
weights: {0: 0.2, 1.5: 0.1, default: 0.5}
"""

DATASETS = '''\
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
            file.write(f"{data}\\n")

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
'''

NODES = """\
import asyncio
import os
import random
import signal
import sqlite3
import threading
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from prefect import flow

connection = sqlite3.connect("habits.db", isolation_level=None)
connection.execute("create table if not exists numbers (number integer)")


def plot(number):
    def draw():
        plt.figure(figsize=(2, 1.5))
        for line in range(4):
            plt.plot([0, 1, 2], [line, number, line * number])
            time.sleep(0.02)
        plt.title(f"plot {number}")
        time.sleep(0.02)
        return plt.gcf()

    return draw


def sample(number):
    def draw():
        np.random.seed(number)
        random.seed(number)
        # At once, because Prefect's client draws from this generator, too: see README.
        numbers = [random.random() for _ in range(20)]
        for _ in range(20):
            time.sleep(0.002)
            numbers.append(float(np.random.rand()))
        return numbers

    return draw


def visit(number):
    def look():
        before, there = os.getcwd(), Path(f"data/folder_{number}")
        there.mkdir()
        os.chdir(there)
        time.sleep(0.05)
        Path("here.txt").write_text(str(number))
        time.sleep(0.05)
        found = sorted(path.name for path in Path().iterdir())
        os.chdir(before)
        return found

    return look


def alarm():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append("rung"))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(0.2)
    signal.signal(signal.SIGALRM, before)
    return rung, threading.current_thread() is threading.main_thread()


def warn():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(5):
            warnings.warn(f"number {number}")
            time.sleep(0.01)
    return [str(warning.message) for warning in caught]


def warn_not():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        time.sleep(0.02)
    return 1


def run_asyncio():
    async def add():
        await asyncio.sleep(0.01)
        return 1 + 1

    return asyncio.run(add())


@flow
def inner(number: int):
    return number + 1


def run_flow():
    return inner(41)


def read_variable():
    try:
        from prefect.variables import Variable
    except ImportError:  # Prefect 2.10
        from prefect import variables as Variable
    found = Variable.get("habit")
    return getattr(found, "value", found)


def fill():
    connection.execute("delete from numbers")
    connection.executemany("insert into numbers values (?)", [(1,), (2,), (3,)])
    return "filled"


def query(filled):
    return connection.execute("select sum(number) from numbers").fetchone()[0]


def to_cache():
    return {"cached": [1, 2, 3]}


def from_cache(cached):
    return cached["cached"]


def make_parts(numbers):
    return {f"part{number}": lambda number=number: number * 10 for number in numbers}


def sum_parts(parts):
    return sum(load() for load in parts.values())


def read_news(incoming):
    return sorted(incoming)


def to_table(numbers):
    return pd.DataFrame({"number": numbers})


def from_table(table):
    return int(table["number"].sum())


def yield_lines(numbers):
    for number in numbers:
        time.sleep(0.01)
        yield f"line {number}"


def replaced(numbers):
    return numbers


def keyed(prefixes, weights, chosen):
    pairs = [*prefixes.items(), *weights.items()]
    return [sorted(map(repr, pairs)), sorted(chosen)]


def write_middle(numbers):
    return {"mine": sum(numbers)}


def someone_else_writes(middle):
    newer = Path("data/middle.json/2099-01-01T00.00.00.000Z/middle.json")
    newer.parent.mkdir(parents=True)
    newer.write_text("{\\"mine\\": \\"no\\"}")
    return 1


def read_middle(middle, written):
    return middle


def note(name):
    with open("ran.txt", "a") as file:
        file.write(name + " ")


def to_name():
    note("to_name")
    return "a name"


def train(numbers):
    return {"model": sum(numbers)}, len(numbers)


def yield_and_fail(numbers):
    yield {"chunk": sum(numbers)}
    if not Path("yielded").exists():
        Path("yielded").touch()
        raise RuntimeError("after the first chunk")


def tell(numbers):
    return numbers


def use_late(late):
    note("use_late")
    return late


def fail_once(read, late):
    note("fail_once")
    if not Path("failed").exists():
        Path("failed").touch()
        raise RuntimeError("the first time")
    return [read, late]


def rest(seconds):
    def sleep():
        note(f"rest{seconds}")
        time.sleep(seconds)
        return seconds

    return sleep


def from_name(lines):
    return lines
"""

REGISTRY = """\
from kedro.pipeline import node, pipeline

from tiny import hooks_of_habits, nodes


def register_pipelines():
    copies = range(hooks_of_habits.copies)
    made = pipeline([
        *(node(lambda _, copy=copy: copy, "numbers", f"made_{copy}", name=f"make_{copy}")
          for copy in copies),
        node(lambda *made: sum(made), [f"made_{copy}" for copy in copies], "made_sum",
             name="sum_made"),
    ])
    made_of = {
        "plots": pipeline([node(nodes.plot(n), None, f"plot{n}", name=f"plot{n}")
                           for n in range(4)]),
        "seeds": pipeline([node(nodes.sample(n), None, f"sample{n}", name=f"sample{n}")
                           for n in range(4)]),
        "folders": pipeline([node(nodes.visit(n), None, f"folder{n}", name=f"visit{n}")
                             for n in range(4)]),
        "signals": pipeline([node(nodes.alarm, None, "alarm", name="alarm")]),
        "warnings": pipeline([
            node(nodes.warn, None, "warned", name="warn"),
            node(nodes.warn_not, None, "nothing", name="warn_not"),
        ]),
        "asyncio": pipeline([node(nodes.run_asyncio, None, "asyncio_ran", name="run_asyncio")]),
        "flows": pipeline([node(nodes.run_flow, None, "flow_ran", name="run_flow")]),
        "variables": pipeline([node(nodes.read_variable, None, "variable", name="read_variable")]),
        "databases": pipeline([
            node(nodes.fill, None, "filled", name="fill"),
            node(nodes.query, "filled", "database_ran", name="query"),
        ]),
        "caches": pipeline([
            node(nodes.to_cache, None, "cached", name="to_cache"),
            node(nodes.from_cache, "cached", "read_cache", name="from_cache"),
        ]),
        "lazy": pipeline([
            node(nodes.make_parts, "numbers", "lazy_parts", name="make_parts"),
            node(nodes.sum_parts, "lazy_parts", "sum_parts", name="sum_parts"),
        ]),
        "incremental": pipeline([
            node(nodes.read_news, "incoming", "news", name="read_news", confirms="incoming"),
        ]),
        "tables": pipeline([
            node(nodes.to_table, "numbers", "table", name="to_table"),
            node(nodes.from_table, "table", "table_sum", name="from_table"),
        ]),
        "generators": pipeline([
            node(nodes.yield_lines, "numbers", "lines", name="yield_lines"),
            node(len, "lines", "line_count", name="count_lines"),
        ]),
        "hooks": pipeline([node(nodes.replaced, "numbers", "hooked", name="replaced")]),
        "lambdas": pipeline([
            node(lambda numbers: [n * 2 for n in numbers], "numbers", "äöü.doppelt", name="zähle"),
            node(lambda doubled: len(doubled), "äöü.doppelt", "äöü.größe", name="größe.messen"),
        ]),
        "keys": pipeline([
            node(nodes.keyed, ["params:prefixes", "params:weights", "params:chosen"], "keyed",
                 name="keyed"),
        ]),
        "copies": made,
        "versions": pipeline([
            node(nodes.write_middle, "numbers", "middle", name="write_middle"),
            node(nodes.someone_else_writes, "middle", "written", name="someone_else_writes"),
            node(nodes.read_middle, ["middle", "written"], "own_version", name="read_middle"),
        ]),
        "trips": pipeline([
            node(nodes.train, "numbers", ["model", "scores"], name="train"),
            node(nodes.yield_and_fail, "numbers", "first_chunk", name="yield_and_fail"),
            node(nodes.tell, "numbers", "told", name="tell"),
        ]),
        "late": pipeline([
            node(nodes.to_name, None, "named", name="to_name"),
            node(nodes.use_late, "params:late", "keyed", name="use_late"),
            node(nodes.fail_once, ["named", "keyed"], "hooked", name="fail_once"),
        ]),
        "rests": pipeline([
            node(nodes.rest(60), None, "rested", name="rest"),
            node(lambda _: nodes.note("after"), "rested", None, name="after"),
        ]),
        "brought": pipeline([
            node(lambda reason: [reason], "params:reason", "of_day", name="bring"),
        ]),
        "handed on": pipeline([
            node(sum, "late_in", "late_sum", name="sum_late"),
            node(lambda late: late, "params:late", "late_text", name="late_text"),
        ]),
        "names": pipeline([
            node(nodes.to_name, None, "named", name="to_name"),
            node(nodes.from_name, "named", "read_named", name="from_name"),
        ]),
    }
    return {"__default__": made_of["lambdas"], **made_of}
"""

SETTINGS = """\
from tiny.hooks_of_habits import Habits

HOOKS = (Habits(),)
"""

HOOKS = f"""\
from pathlib import Path

from kedro import io
from kedro.framework.hooks import hook_impl

MemoryDataset = io.MemoryData{SET}
copies = 1


class Habits:
    @hook_impl
    def after_context_created(self, context):
        global copies
        given = getattr(context.config_loader, "runtime_params", None) or {{}}
        copies = int(given.get("copies", 1))

    @hook_impl
    def after_catalog_created(self, catalog):
        chosen = MemoryDataset({{"oslo", "bergen", "tromsø"}})
        if hasattr(catalog, "add"):
            catalog.add("params:chosen", chosen)
        else:  # Kedro 1.0
            catalog["params:chosen"] = chosen

    @hook_impl
    def before_pipeline_run(self, catalog):
        if hasattr(catalog, "add"):
            catalog.add("params:late", MemoryDataset("late"), replace=True)
            catalog.add("late_in", MemoryDataset([1, 2, 3]), replace=True)
        else:
            catalog["params:late"] = MemoryDataset("late")
            catalog["late_in"] = MemoryDataset([1, 2, 3])

    @hook_impl
    def after_dataset_saved(self, dataset_name):
        if dataset_name == "told" and not Path("was_told").exists():
            Path("was_told").touch()
            raise RuntimeError("after the save")

    @hook_impl
    def before_node_run(self, node):
        return {{"numbers": [7, 8, 9]}} if node.name == "replaced" else None
"""

# From the name of a habit to the options of `kedro run`.
HABITS = {
    name: ["--pipeline", name]
    for name in (
        *KINDS, "signals", "warnings", "asyncio", "flows", "variables", "databases", "caches",
        "lazy", "incremental", "tables", "generators", "hooks", "lambdas", "keys", "names", "handed on",
    )
}  # fmt: skip
HABITS["one copy"] = ["--pipeline", "copies"]
HABITS["three copies"] = ["--pipeline", "copies", "--params", "copies=3"]
HABITS["two copies"] = ["--pipeline", "copies", "--params", "copies=2"]


def write_habits_project(path: Path) -> Path:
    """Write the project into a new folder, and return that."""
    write_tiny_project(path)
    with (path / "conf/base/catalog.yml").open("a", encoding="utf-8") as catalog:
        catalog.write(CATALOG)
    for name, text in {
        "conf/base/parameters.yml": PARAMETERS,
        "conf/base/credentials.yml": "database:\n  con: sqlite:///numbers.db\n",
        "conf/processes/prefect.yml": "task_runner: {type: processes, max_workers: 2}\n",
        "conf/dask/prefect.yml": "task_runner: {type: dask, n_workers: 2, threads_per_worker: 1}\n",
        "conf/threads/prefect.yml": "task_runner: {max_workers: 4}\n",
        "src/tiny/datasets.py": DATASETS,
        "src/tiny/hooks_of_habits.py": HOOKS,
        "src/tiny/nodes.py": NODES,
        "src/tiny/settings.py": SETTINGS,
        "src/tiny/pipeline_registry.py": REGISTRY,
        "data/incoming/monday.json": "1",
        "data/incoming/tuesday.json": "2",
    }.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    return path


__all__ = ["HABITS", "KEDRO", "KINDS", "write_habits_project"]
