"""One series of measurements, in a process of its own: python measure.py '<job as JSON>'.

A job names the project, what to measure (a function below), its options, and the file that gets
the answer. Times are in seconds, memory in bytes.
"""

import asyncio
import gc
import importlib
import inspect
import json
import logging
import os
import pickle
import queue
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

JOB = json.loads(sys.argv[1])
PROJECT = Path(JOB["project"])
os.chdir(PROJECT)
sys.path.insert(0, str(PROJECT))

import numpy as np  # noqa: E402
import prefect  # noqa: E402
from dags import SHAPES, WORKERS, best_schedule  # noqa: E402
from kedro.framework.project import LOGGING  # noqa: E402
from kedro.framework.session import KedroSession  # noqa: E402
from prefect import flow, task  # noqa: E402

import register_prefect_flow as script  # noqa: E402

LOGGING.configure(dict(LOGGING))  # as in a worker, where Kedro comes after Prefect
KEDROS_HANDLERS = logging.getLogger().handlers[:]
PARAMETERS = {
    name: p.default for name, p in inspect.signature(script.my_flow.fn).parameters.items()
}
script._bootstrap()

from bench.pipeline_registry import times  # noqa: E402  # when each node began and ended

entered = [0.0]  # when the last run began
Rounds = list[dict[str, float]]
lags: list[float] = []  # how long after each flow run its task runs were recorded


async def count_recorded(flow_run_id: Any) -> int:
    """Count the task runs of a flow run that the server knows to have ended."""
    this_run = {"id": {"any_": [str(flow_run_id)]}}
    async with prefect.get_client() as client:
        answer = await client._client.post(
            "/task_runs/count",
            json={"flow_runs": this_run, "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}},
        )
        return answer.json()


def await_recorder(flow_run_id: Any, expected: int, patience: float = 8) -> None:
    """Wait until the server has recorded the task runs: it would disturb what is measured next.

    Prefect's server loses some of thousands: give up when none comes for `patience` seconds.
    """
    ended = changed = time.perf_counter()
    recorded = 0
    while recorded < expected and time.perf_counter() - changed < patience:
        time.sleep(0.5)
        now = asyncio.run(count_recorded(flow_run_id))
        if now != recorded:
            recorded, changed = now, time.perf_counter()
    lags.append(changed - ended)
    gc.collect()


def began() -> None:
    times.clear()
    entered[0] = time.perf_counter()


def in_flow(function: Callable[[], Any], tasks: int) -> float:
    """Time a function in a flow: without what Prefect does before and after, to a whole second."""
    took: list[float] = []

    @flow
    def any_flow() -> None:
        began()
        function()
        took.append(time.perf_counter() - entered[0])

    state: Any = any_flow(return_state=True)
    assert state.is_completed(), state
    await_recorder(state.state_details.flow_run_id, tasks)
    script.APILogHandler().flush()  # or the next one pays for what is left of this one's log lines
    return took[0]


def count(pipeline: str) -> int:
    return int(pipeline.split("_")[1])


def run_ours(pipeline: str, env: str = "base") -> float:
    """Run my_flow's function."""
    parameters = {**PARAMETERS, "pipeline_name": pipeline, "env": env}
    return in_flow(lambda: script.my_flow.fn(**parameters), count(pipeline) + 1)


def run_kedro(pipeline: str, handlers: list[logging.Handler] = KEDROS_HANDLERS) -> float:
    """Do what `kedro run` does, with the log lines that it prints, or with others."""
    logger = logging.getLogger()
    logger.handlers, ours = handlers[:], logger.handlers
    began()
    with KedroSession.create(project_path=PROJECT, env="base") as session:
        name = "pipeline_names" if script._KEDRO_1 else "pipeline_name"
        session.run(**{name: [pipeline] if script._KEDRO_1 else pipeline})
    seconds = time.perf_counter() - entered[0]
    logger.handlers = ours
    return seconds


def run_bare(pipeline: str) -> float:
    """Run as many tasks that do the same, without Kedro and dependencies."""
    milliseconds = int(pipeline.split("_")[2])

    @task(persist_result=False)
    def wait() -> None:
        start = time.perf_counter()
        if milliseconds:
            time.sleep(milliseconds / 1000)
        times.append((start, time.perf_counter()))

    def run() -> None:
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with script._task_runner(WORKERS) as start:
            for _ in range(count(pipeline)):
                start(wait, [], ended.put)
            for _ in range(count(pipeline)):
                ended.get()

    return in_flow(run, count(pipeline))


def run_recipe(pipeline: str) -> float:
    from documented_recipe import run

    return in_flow(lambda: run(PROJECT, pipeline), count(pipeline) + 1)


def timed(run: Callable[[str], float], pipeline: str) -> float:
    """Run, and return the time from the first node's start to the last one's end."""
    run(pipeline)
    return max(end for _, end in times) - min(start for start, _ in times)


def peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def until_first_node() -> float:
    return min(start for start, _ in times) - entered[0]


def overhead(pipeline: str, rounds: int) -> Rounds:
    """Nodes that do nothing: ours, Kedro alone, and Prefect alone."""
    run_ours("grid_100_0"), run_kedro("grid_100_0"), run_bare("grid_100_0")
    return [
        {
            "kedro": run_kedro(pipeline),
            "kedro, plain lines": run_kedro(pipeline, logging.getLogger().handlers),
            "ours": run_ours(pipeline),
            "recorded": lags[-1],  # how long after the run's end
            "bare": run_bare(pipeline),
        }
        for _ in range(rounds)
    ]


def default(pipeline: str, rounds: int) -> Rounds:
    """Nodes that do nothing, one at a time: ours, Kedro alone, and Prefect's tasks called."""

    @task(persist_result=False)
    def nothing() -> None:
        return None

    def call_all() -> None:
        for _ in range(count(pipeline)):
            nothing(return_state=True)

    def run_bare_one_by_one() -> float:
        return in_flow(call_all, count(pipeline))

    run_ours(pipeline, env="default"), run_kedro(pipeline), run_bare_one_by_one()
    return [
        {
            "kedro, plain lines": run_kedro(pipeline, logging.getLogger().handlers),
            "ours": run_ours(pipeline, env="default"),
            "bare": run_bare_one_by_one(),
        }
        for _ in range(rounds)
    ]


def growth(pipeline: str) -> dict[str, float]:
    """Time and memory per node."""
    run_ours("grid_100_0")
    before = peak_memory()
    seconds = run_ours(pipeline)
    return {
        "seconds": seconds / count(pipeline),
        "bytes": (peak_memory() - before) / count(pipeline),
    }


def schedule(pipeline: str, rounds: int, others: list[str]) -> Rounds:
    """Nodes that wait: the best schedule, ours, and bare tasks or the documented recipe."""
    shape, number, milliseconds = pipeline.split("_")
    best = best_schedule(SHAPES[shape](int(number))) * int(milliseconds) / 1000
    runs = {"ours": run_ours, "bare": run_bare, "recipe": run_recipe}
    run_ours("grid_100_0")
    return [
        {"best": best, **{name: timed(runs[name], pipeline) for name in ["ours", *others]}}
        for _ in range(rounds)
    ]


def recipe(pipeline: str) -> float:
    """Nodes that wait, in the documented recipe."""
    return timed(run_recipe, pipeline)


def memory(pipeline: str, how: str) -> float:
    """The most memory that the process ever had, in bytes."""
    {"ours": run_ours, "kedro": run_kedro}[how](pipeline)
    return peak_memory()


def start(pipeline: str, rounds: int) -> Rounds:
    """From entering the flow, or `kedro run`, to entering the first node."""

    def load() -> float:
        began()
        with KedroSession.create(project_path=PROJECT, env="base") as session:
            assert session.load_context().catalog
        return time.perf_counter() - entered[0]

    def ours() -> float:
        run_ours(pipeline)
        return until_first_node()

    def kedro_run() -> float:
        run_kedro(pipeline)
        return until_first_node()

    load(), ours(), kedro_run()
    return [{"load": load(), "ours": ours(), "kedro": kedro_run()} for _ in range(rounds)]


def run_on_prefects_own(engine: str, pipeline: str) -> float:
    """Run as many tasks that do nothing on Prefect's own task runner of an engine."""
    modules = {"processes": "prefect.task_runners", "dask": "prefect_dask"}
    names = {"processes": "ProcessPool", "dask": "Dask"}
    make = getattr(importlib.import_module(modules[engine]), f"{names[engine]}TaskRunner")
    own: dict[str, dict[str, Any]] = {
        "processes": {"max_workers": 2},
        "dask": {"cluster_kwargs": {"n_workers": 2}},
    }

    @task(persist_result=False)
    def nothing() -> None:
        return None

    def run() -> None:
        with make(**own[engine]) as runner:
            for future in [runner.submit(nothing, {}) for _ in range(count(pipeline))]:
                future.wait()

    return in_flow(run, count(pipeline))


def engine(pipeline: str, name: str, rounds: int) -> Rounds:
    """Nodes that do nothing, on an engine, from its start to its end."""
    return [
        {
            "ours": run_ours(pipeline, env=name),
            "threads": run_ours(pipeline),
            "own": run_on_prefects_own(name, pipeline),
        }
        for _ in range(rounds)
    ]


def busy(pipeline: str, rounds: int) -> Rounds:
    """Nodes that keep a CPU busy."""
    return [
        {"processes": run_ours(pipeline, env="processes"), "threads": run_ours(pipeline)}
        for _ in range(rounds)
    ]


def resume(pipeline: str, rounds: int) -> Rounds:
    """A run that fails late, its retry, and a run that does not fail; with checkpoints."""
    from bench.pipeline_registry import failed

    parameters = {**PARAMETERS, "pipeline_name": pipeline, "checkpoints": "data/checkpoints"}
    found = []
    for _ in range(rounds):
        took: list[tuple[float, int]] = []

        @flow(retries=1)
        def any_flow(took: Any = took) -> None:
            began()
            try:
                script.my_flow.fn(**parameters)
            finally:
                took.append((time.perf_counter() - entered[0], len(times)))

        failed.clear()
        assert any_flow(return_state=True).is_completed()
        any_flow()
        assert [nodes for _, nodes in took] == [90, 10, 100], took
        found.append({"resumed": took[1][0], "whole": took[2][0]})
    return found


def checkpoint(pipeline: str, rounds: int) -> Rounds:
    """Write and read an array of 200 MB: as a checkpoint, and with pickle alone."""
    data = np.ones(25_000_000)
    path = PROJECT / "data/array.pickle"

    def ours() -> None:
        made = script._Checkpoint(str(PROJECT / "data"), {}, "array")
        made.save(data)
        made.load()

    def plain() -> None:
        with path.open("wb") as file:
            pickle.dump(data, file, protocol=pickle.HIGHEST_PROTOCOL)
        with path.open("rb") as file:
            pickle.load(file)

    def seconds(function: Callable[[], None]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    ours(), plain()
    return [{"ours": seconds(ours), "pickle": seconds(plain)} for _ in range(3 * rounds)]


def level(pipeline: str) -> float:
    """A run at the logging level that the environment sets."""
    run_ours("grid_100_0")
    return run_ours(pipeline)


if __name__ == "__main__":
    answer = globals()[JOB["measure"]](**JOB["options"])
    Path(JOB["answer"]).write_text(json.dumps({"found": answer}))
