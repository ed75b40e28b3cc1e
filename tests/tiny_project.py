"""A tiny, complete Kedro project, written for whatever Kedro is installed."""

import json
from pathlib import Path

import kedro

PYPROJECT = f"""\
[tool.kedro]
package_name = "tiny"
project_name = "Tiny project"
kedro_init_version = "{kedro.__version__}"
source_dir = "src"
"""

CATALOG = """\
numbers:
  type: json.JSONDataset
  filepath: data/numbers.json

total:
  type: json.JSONDataset
  filepath: data/total.json

report:
  type: pickle.PickleDataset
  filepath: data/report.pickle
  versioned: true

side:
  type: json.JSONDataset
  filepath: data/side.json
"""

PARAMETERS = """\
factor: 3
pause: 0
"""

SETTINGS = """\
from tiny.hooks import Recorder

HOOKS = (Recorder("settings"),)
"""

# Writes down each call of each hook that Kedro has, with what can be compared between two runs:
# once as a hook of the project's settings, once as that of an installed plugin.
HOOKS = """\
import inspect
import json
import threading
from pathlib import Path

from kedro.framework.hooks import hook_impl, specs

_lock = threading.Lock()
_trace = Path(__file__).parents[2] / "trace.jsonl"


def _comparable(name, value):
    if value is None or isinstance(value, (str, bool, int, float)):
        # ids and versions are those of the run
        return "ID" if value and name in ("run_id", "session_id", "save_version") else value
    if name == "node":
        return value.name
    if name == "error":
        return repr(value)
    if name in ("inputs", "outputs", "run_result"):
        return sorted(value)
    if name == "data":
        return repr(value)
    if name == "pipeline":
        return sorted(node.name for node in value.nodes)
    if name == "run_params":
        own = {"run_id", "session_id", "project_path", "runner"}
        # `kedro run` puts the names into a set, whose order differs from process to process.
        value = {**value, "pipeline_names": sorted(value.get("pipeline_names") or [])}
        return {key: item or None for key, item in value.items() if key not in own}
    return type(value).__name__


def _recorder(hook, names):
    def record(self, **arguments):
        call = {name: _comparable(name, arguments[name]) for name in names}
        with _lock, open(_trace, "a") as trace:
            trace.write(json.dumps([hook, self.owner, call], sort_keys=True) + "\\n")

    scope = {"record": record}
    pairs = ", ".join(f"{name}={name}" for name in names)
    exec(f"def {hook}(self, {', '.join(names)}): record(self, {pairs})", scope)
    return hook_impl(scope[hook])


class Recorder:
    def __init__(self, owner):
        self.owner = owner


for _specs in (specs.NodeSpecs, specs.PipelineSpecs, specs.DatasetSpecs, specs.DataCatalogSpecs,
               specs.KedroContextSpecs):
    for _hook, _spec in inspect.getmembers(_specs, inspect.isfunction):
        setattr(Recorder, _hook, _recorder(_hook, list(inspect.signature(_spec).parameters)[1:]))

plugin = Recorder("plugin")
"""

NODES = """\
import logging
import time
from pathlib import Path


def double(numbers):
    return [2 * number for number in numbers]


def scale(numbers, factor, pause):
    time.sleep(pause)
    return [factor * number for number in numbers]


def add(doubled, scaled):
    logging.getLogger(__name__).info("adding %d numbers", len(doubled) + len(scaled))
    return sum(doubled) + sum(scaled)


def report(total):
    return {"total": total, "cwd": Path.cwd().name}


def fail(numbers):
    raise ZeroDivisionError("no number left")  # the user's line


def behind(nothing):
    return nothing


def side(numbers):
    time.sleep(0.5)
    return len(numbers)
"""

REGISTRY = """\
from kedro.pipeline import node, pipeline

from tiny import nodes


def register_pipelines():
    sums = pipeline([
        node(nodes.double, "numbers", "doubled", name="double"),
        node(nodes.scale, ["numbers", "params:factor", "params:pause"], "scaled", name="scale",
             tags=["heavy", "unlimited"]),
        node(nodes.add, ["doubled", "scaled"], "total", name="add"),
        node(nodes.report, "total", "report", name="report"),
    ])
    broken = pipeline([
        node(nodes.fail, "numbers", "nothing", name="fail"),
        node(nodes.behind, "nothing", "more_nothing", name="behind"),
        node(nodes.side, "numbers", "side", name="side"),
    ])
    return {"__default__": sums, "broken": broken, "empty": pipeline([])}
"""


def write_tiny_project(path: Path) -> Path:
    """Write the project into a new folder, and return that."""
    for name, text in {
        "pyproject.toml": PYPROJECT,
        "conf/base/catalog.yml": CATALOG,
        "conf/base/parameters.yml": PARAMETERS,
        "conf/local/parameters.yml": "factor: 100\n",
        "data/numbers.json": json.dumps([1, 2, 3]),
        "src/tiny/__init__.py": "",
        "src/tiny_plugin-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-plugin\nVersion: 1.0\n",
        "src/tiny_plugin-1.0.dist-info/entry_points.txt": "[kedro.hooks]\ntiny = tiny.hooks:plugin\n",
        "src/tiny/settings.py": SETTINGS,
        "src/tiny/hooks.py": HOOKS,
        "src/tiny/nodes.py": NODES,
        "src/tiny/pipeline_registry.py": REGISTRY,
    }.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path
