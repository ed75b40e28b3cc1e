"""Writes down each call of each hook that Kedro has, with what can be compared between two runs.

Once as a hook of the project's settings, once as that of an installed plugin.
"""

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
            trace.write(json.dumps([hook, self.owner, call], sort_keys=True) + "\n")

    scope = {"record": record}
    pairs = ", ".join(f"{name}={name}" for name in names)
    exec(f"def {hook}(self, {', '.join(names)}): record(self, {pairs})", scope)
    return hook_impl(scope[hook])


class Recorder:
    def __init__(self, owner):
        self.owner = owner


for _specs in (
    specs.NodeSpecs,
    specs.PipelineSpecs,
    specs.DatasetSpecs,
    specs.DataCatalogSpecs,
    specs.KedroContextSpecs,
):
    for _hook, _spec in inspect.getmembers(_specs, inspect.isfunction):
        setattr(Recorder, _hook, _recorder(_hook, list(inspect.signature(_spec).parameters)[1:]))

plugin = Recorder("plugin")
