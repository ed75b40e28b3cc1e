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
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JOB = json.loads(sys.argv[1])
PROJECT = Path(JOB["project"])
os.chdir(PROJECT)
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]

from prefect.logging.configuration import setup_logging  # noqa: E402

setup_logging()  # before Kedro, whose configuration takes the place of Prefect's
PREFECTS = logging.getLogger().handlers[:]

import numpy as np  # noqa: E402
from bench.pipeline_registry import times  # noqa: E402  # when each node began and ended
from dags import SHAPES, WORKERS, best_schedule  # noqa: E402
from kedro.framework.project import LOGGING  # noqa: E402
from kedro.framework.session import KedroSession  # noqa: E402
from kedro.framework.startup import bootstrap_project  # noqa: E402
from prefect import flow, get_client, get_run_logger, task  # noqa: E402
from prefect.futures import PrefectFuture  # noqa: E402
from prefect.logging.handlers import APILogHandler  # noqa: E402
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402

from register_prefect_flow import my_flow  # noqa: E402

LOGGING.configure(dict(LOGGING))  # as in a worker, where Kedro comes after Prefect
DRAWN = logging.getLogger().handlers[:]  # Kedro's own, with Rich
PLAIN: list[logging.Handler] = [logging.StreamHandler()]  # about as the script's lines
PLAIN[0].setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(name)s - %(message)s"))
PARAMETERS = {name: p.default for name, p in inspect.signature(my_flow.fn).parameters.items()}
LINES = 5  # that Kedro logs for a node with an input and an output

entered = [0.0]  # when the last run began
Rounds = list[dict[str, float]]
lags: list[float] = []  # how long after each flow run its task runs were recorded


async def count_recorded(flow_run_id: Any) -> int:
    """Count the task runs of a flow run that the server knows to have ended."""
    this_run = {"id": {"any_": [str(flow_run_id)]}}
    async with get_client() as client:
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


def in_flow(function: Callable[[], Any], tasks: int, **options: Any) -> float:
    """Time a function in a flow: without what Prefect does before and after, to a whole second."""
    took: list[float] = []

    @flow(**options)
    def any_flow() -> None:
        began()
        function()
        took.append(time.perf_counter() - entered[0])

    state: Any = any_flow(return_state=True)
    assert state.is_completed(), state
    await_recorder(state.state_details.flow_run_id, tasks)
    APILogHandler().flush()  # or the next one pays for what is left of this one's log lines
    return took[0]


def count(pipeline: str) -> int:
    return int(pipeline.split("_")[1])


def run_ours(pipeline: str, env: str = "base") -> float:
    """Run my_flow's function; in the Kedro environment `default`, nodes run one at a time."""
    parameters = {**PARAMETERS, "pipeline_name": pipeline, "env": env}
    return in_flow(lambda: my_flow.fn(**parameters), count(pipeline) + 1)


@contextmanager
def printed_by(handlers: list[logging.Handler]) -> Iterator[None]:
    """Let log lines look as these handlers print them."""
    logger = logging.getLogger()
    logger.handlers, others = handlers[:], logger.handlers
    yield
    logger.handlers = others


def run_kedro(pipeline: str, handlers: list[logging.Handler] = DRAWN) -> float:
    """Do what `kedro run` does, with the log lines that it prints, or with others."""
    began()
    with printed_by(handlers), KedroSession.create(project_path=PROJECT, env="base") as session:
        session.run(pipeline_names=[pipeline])
    return time.perf_counter() - entered[0]


def run_bare(pipeline: str, workers: int, lines: int = 0) -> float:
    """Run as many tasks that do and need the same, without Kedro: in threads, or called."""
    shape, number, milliseconds = pipeline.split("_")
    needed = SHAPES[shape](int(number))

    @task(persist_result=False)
    def bare(number: int) -> None:
        start = time.perf_counter()
        for line in range(lines):
            get_run_logger().info("Line %d of what a node's task says: task %d", line, number)
        if milliseconds != "0":
            time.sleep(int(milliseconds) / 1000)
        times.append((start, time.perf_counter()))

    def call_all() -> None:
        for number in needed:
            bare(number, return_state=True)

    def submit_all() -> None:
        futures: dict[int, PrefectFuture[None]] = {}
        for number, others in needed.items():
            futures[number] = bare.submit(number, wait_for=[futures[other] for other in others])
        for future in futures.values():
            future.wait()

    run, runner = call_all if workers == 1 else submit_all, ThreadPoolTaskRunner(workers)
    with printed_by(PREFECTS):
        return in_flow(run, count(pipeline), task_runner=runner)


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


def overhead(pipeline: str, rounds: int, in_env: str, drawn: bool) -> Rounds:
    """Nodes that do nothing: ours, Kedro alone, and Prefect alone, with log lines and without."""
    workers = 1 if in_env == "default" else WORKERS
    runs = {
        "kedro, plain lines": lambda name: run_kedro(name, PLAIN),
        **({"kedro": run_kedro} if drawn else {}),
        "ours": lambda name: run_ours(name, in_env),
        "bare": lambda name: run_bare(name, workers),
        "bare, with lines": lambda name: run_bare(name, workers, LINES),
    }
    for run in reversed(runs.values()):  # ours before Kedro, for it opens the project
        run("grid_100_0")
    found = []
    for _ in range(rounds):
        found.append({})
        for name, run in runs.items():
            found[-1][name] = run(pipeline)
            if name == "ours":
                found[-1]["recorded"] = lags[-1]  # how long after the run's end
    return found


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
    runs: dict[str, Callable[[str], float]] = {
        "ours": run_ours,
        "bare": lambda name: run_bare(name, WORKERS),
        "recipe": run_recipe,
    }
    run_ours("grid_100_0")
    return [
        {"best": best, **{name: timed(runs[name], pipeline) for name in ["ours", *others]}}
        for _ in range(rounds)
    ]


def memory(pipeline: str, how: str) -> float:
    """The most memory that the process ever had, in bytes."""
    if how == "kedro":
        bootstrap_project(PROJECT)
        run_kedro(pipeline)
    else:
        run_ours(pipeline)
    return peak_memory()


def start(pipeline: str, rounds: int) -> Rounds:
    """From entering the flow, or `kedro run`, to entering the first node."""

    def load() -> float:
        began()
        with KedroSession.create(project_path=PROJECT, env="base") as session:
            assert session.load_context().catalog
        return time.perf_counter() - entered[0]

    def ours() -> float:
        run_ours(pipeline, env="default")
        return until_first_node()

    def in_threads() -> float:
        run_ours(pipeline)
        return until_first_node()

    def kedro_run() -> float:
        run_kedro(pipeline, PLAIN)
        return until_first_node()

    def bare() -> float:
        run_bare(pipeline, workers=1)
        return until_first_node()

    runs = {"ours": ours, "load": load, "kedro": kedro_run, "threads": in_threads, "bare": bare}
    found = [{name: run() for name, run in runs.items()} for _ in range(1 + rounds)]  # one is cold
    return [{**one, "floor": one["kedro"] + one["bare"]} for one in found[1:]]


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
                my_flow.fn(**parameters)
            finally:
                took.append((time.perf_counter() - entered[0], len(times)))

        failed.clear()
        assert any_flow(return_state=True).is_completed()
        any_flow()
        assert [nodes for _, nodes in took] == [90, 10, 100], took
        found.append({"resumed": took[1][0], "whole": took[2][0]})
    return found


def checkpoint(pipeline: str, rounds: int) -> Rounds:
    """Hand on an array from node to node, each in a child; and write and read it with pickle."""
    data = np.ones(25_000_000)
    path, log = PROJECT / "data/array.pickle", PROJECT / "data/handed_on.jsonl"

    def ours() -> float:
        log.unlink(missing_ok=True)
        run_ours(pipeline, env="processes")
        # All processes of a machine have the same clock.
        (_, made), (used, _) = map(json.loads, log.read_text().splitlines())
        return float(used - made)

    def plain() -> float:
        start = time.perf_counter()
        with path.open("wb") as file:
            pickle.dump(data, file, protocol=pickle.HIGHEST_PROTOCOL)
        with path.open("rb") as file:
            pickle.load(file)
        return time.perf_counter() - start

    ours(), plain()
    return [{"ours": ours(), "pickle": plain()} for _ in range(rounds)]


def one_run(pipeline: str, in_env: str = "base") -> float:
    """A run in a process that has run something before."""
    run_ours("grid_100_0", in_env)
    return run_ours(pipeline, in_env)


if __name__ == "__main__":
    answer = globals()[JOB["measure"]](**JOB["options"])
    Path(JOB["answer"]).write_text(json.dumps({"found": answer}))
