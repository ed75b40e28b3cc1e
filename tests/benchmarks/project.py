"""A Kedro project whose pipelines are named by shape, number of nodes and milliseconds of waiting."""

import shutil
from pathlib import Path

import kedro

HERE = Path(__file__).parent

PYPROJECT = f"""\
[tool.kedro]
package_name = "bench"
project_name = "Benchmarks"
kedro_init_version = "{kedro.__version__}"
source_dir = "src"
"""

# Such as grid_100_0, set in PIPELINES: so that each process makes only those that it measures.
REGISTRY = '''\
import os
import time

import numpy
from kedro.pipeline import node, pipeline

from bench.dags import SHAPES


times = []  # when each node started and ended


def wait(seconds):
    def work(*inputs):
        start = time.perf_counter()
        if seconds:
            time.sleep(seconds)
        times.append((start, time.perf_counter()))
        return 0

    return work


def count_up(millions):
    """Keep a CPU busy with Python code."""

    def work(*inputs):
        number = 0
        for _ in range(millions * 1_000_000):
            number += 1
        return 0

    return work


def hand_on(megabytes):
    """Make an array, or one from those of other nodes."""

    def work(*inputs):
        if not inputs:
            return numpy.ones(megabytes * 125_000)
        total = inputs[0] + 1
        for other in inputs[1:]:
            total += other
        return total

    return work


failed = []


def fail_once(work):
    def once(*inputs):
        if not failed:
            failed.append(True)
            raise RuntimeError("once")
        return work(*inputs)

    return once


def make(name):
    shape, count, size = name.split("_")
    kind = size.lstrip("0123456789")
    if kind == "mb":
        work = hand_on(int(size[:-2]))
    elif kind == "busy":
        work = count_up(int(size[:-4]))
    else:
        work = wait(int(size.removesuffix("fail")) / 1000)
    return pipeline([
        node(fail_once(work) if (kind, number) == ("fail", 90) else work, [f"{name}_{other}" for other in needed] or None, f"{name}_{number}",
             name=f"node_{number}")
        for number, needed in SHAPES[shape](int(count)).items()
    ])


def register_pipelines():
    names = os.environ.get("PIPELINES", "stored_100_0").split()
    made = {name: make(name) for name in names}
    return {**made, "__default__": made[names[0]]}
'''

DATASET = """\
stored_100_0_{number}:
  type: json.JSONDataset
  filepath: data/{number}.json

"""

PREFECT_YML = """\
task_runner:
  max_workers: 8
"""

ENGINES = {"processes": "max_workers: 2", "dask": "n_workers: 2"}
ENGINE = "task_runner: {{type: {}, {}}}\n"

PARAMETERS = """\
model: {depth: 4, rate: 0.1, features: [a, b, c]}
split: {test: 0.2, seed: 3}
"""


def write_project(path: Path, script: Path) -> Path:
    """Write the project into a new folder, with the script copied in, and return that."""
    catalog = "".join(DATASET.format(number=number) for number in range(100))
    for name, text in {
        "pyproject.toml": PYPROJECT,
        "conf/base/catalog.yml": catalog,
        "conf/base/parameters.yml": PARAMETERS,
        "conf/base/prefect.yml": PREFECT_YML,
        "conf/default/prefect.yml": "task_runner: {is_async: false}\n",  # one node at a time
        "conf/local/.gitkeep": "",
        **{f"conf/{name}/prefect.yml": ENGINE.format(name, keys) for name, keys in ENGINES.items()},
        "data/.gitkeep": "",
        "src/bench/__init__.py": "",
        "src/bench/settings.py": "",
        "src/bench/pipeline_registry.py": REGISTRY,
        ".telemetry": "consent: false\n",
    }.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    shutil.copy(HERE / "dags.py", path / "src/bench")
    shutil.copy(script, path)
    return path
