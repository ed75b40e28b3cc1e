"""Measure what the script costs.

    python tests/benchmarks/run.py [name ...]

Starts a Prefect server on SQLite, with the settings that the README recommends; --as_it_comes adds
figures with a second server, without these. Every figure is a ratio against a reference of the same
run, the median of some rounds in which both take turns. Prints two tables, and writes them with
versions and machine to results.json. Names choose measurements (`--list` shows them), and the
others' figures stay. Everything takes about 25 minutes, with --as_it_comes 40.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import kedro  # noqa: E402
import prefect  # noqa: E402
from conftest import PREFECT_3, SCRIPT, Server, eventually, stop  # noqa: E402
from dags import WORKERS  # noqa: E402
from project import write_project  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "3"))
RECORDER = "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_"
RECOMMENDED = {"BATCH_SIZE": "100", "READ_BATCH_SIZE": "100", "FLUSH_INTERVAL": "1"}
SHAPES = ("wide", "grid", "diamond", "random")

# What the README shows, with its target; tests/benchmarks/README.md has the rest.
IN_README = {
    ("100 nodes that do nothing", 1.05),
    ("1000 nodes that do nothing", 1.05),
    ("random, 100 nodes that wait 100 ms, 8 workers", 1.13),
    ("from entering the flow to entering the first of 100 nodes", 1.15),
    ("registering, whole process", 1.25),
    ("peak memory, fan-out to 10 arrays of 100 MB, and fan-in", 1.1),
}

Rounds = list[dict[str, float]]


class Bench:
    """A server, a project, and measurements in processes of their own."""

    def __init__(self, folder: Path, recommended: bool) -> None:
        self.recommended = recommended  # settings of the server
        self.makespans: dict[str, Rounds] = {}
        self.server = Server(folder)
        eventually(self.server.is_up)
        self.project = write_project(folder / "project", SCRIPT)
        self.folder = folder

    def process(self, command: list[Any], env: dict[str, str]) -> float:
        """Run a process, its output in a file, and return its seconds."""
        with tempfile.NamedTemporaryFile("w+", dir=self.folder) as out:
            env = {**os.environ, **self.server.env, "PREFECT_LOGGING_LEVEL": "INFO", **env}
            del env["COLUMNS"]  # of the tests: a worker's output has no width
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *command],
                env=env,
                cwd=self.project,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            seconds = time.perf_counter() - began
            out.seek(0)
            assert not done.returncode, out.read()[-5000:]
        return seconds

    def measure(self, what: str, pipeline: str, env: dict[str, str] | None = None, **options: Any):
        """Run a function of measure.py on a pipeline, and return its answer."""
        with tempfile.NamedTemporaryFile("r", dir=self.folder) as answer:
            options["pipeline"] = pipeline
            job = {"project": str(self.project), "measure": what, "options": options}
            job["answer"] = answer.name
            command = [HERE / "measure.py", json.dumps(job)]
            self.process(command, {"PIPELINES": f"{pipeline} grid_100_0", **(env or {})})
            return json.load(answer)["found"]


def ratio(rounds: Rounds, ours: str, *reference: str) -> dict[str, Any]:
    """Compare one with the sum of others in each round."""
    found = [one[ours] / sum(one[name] for name in reference) for one in rounds]
    return {
        "ratio": statistics.median(found),
        "from": min(found),
        "to": max(found),
        "rounds": rounds,
    }


def row(what: str, reference: str, target: float | None, figure: dict[str, Any]) -> dict[str, Any]:
    return {"what": what, "reference": reference, "target": target, **figure}


Rows = Iterator[dict[str, Any]]


def overhead(bench: Bench, count: int) -> Rows:
    rounds = bench.measure("overhead", f"grid_{count}_0", rounds=ROUNDS)
    what = f"{count} nodes that do nothing"
    plain = ratio(rounds, "ours", "kedro, plain lines", "bare")
    yield row(what, "`kedro run` that prints plainly, plus bare Prefect tasks", 1.05, plain)
    drawn = ratio(rounds, "ours", "kedro", "bare")
    yield row(what, "`kedro run` that draws its log lines, plus bare Prefect tasks", 1.25, drawn)
    yield row(
        f"until the server shows {count} ended tasks, from the run's end",
        "the run",
        None,
        ratio(rounds, "recorded", "ours"),
    )


def default(bench: Bench) -> Rows:
    rounds = bench.measure("default", "grid_100_0", rounds=ROUNDS)
    what = "100 nodes that do nothing, one at a time (the default)"
    reference = (
        "`kedro run` that prints plainly, plus bare Prefect tasks called one after the other"
    )
    yield row(what, reference, 1.05, ratio(rounds, "ours", "kedro, plain lines", "bare"))


def makespan(bench: Bench, milliseconds: int, target: float) -> Rows:
    for shape in SHAPES:
        pipeline = f"{shape}_100_{milliseconds}"
        # The recipe takes 100 s for what waits 1 s: see below
        others = ["recipe"] * (bench.recommended and milliseconds < 1000) + ["bare"] * (
            shape == "wide"
        )
        rounds = bench.measure("schedule", pipeline, rounds=ROUNDS, others=others)
        what = f"{shape}, 100 nodes that wait {milliseconds} ms, {WORKERS} workers"
        yield row(what, "best list schedule", target, ratio(rounds, "ours", "best"))
        if "bare" in others:
            bare = ratio(rounds, "bare", "best")
            yield row(
                f"bare Prefect tasks that wait {milliseconds} ms", "best list schedule", None, bare
            )
        if "recipe" in others:
            yield row(what, "Kedro's recipe", None, ratio(rounds, "ours", "recipe"))
        bench.makespans[shape] = rounds


def recipe(bench: Bench) -> Rows:
    """Run the recipe on what waits 1 s: all runs side by side, for they do little but wait."""
    pipelines = [f"{shape}_100_1000" for shape in SHAPES for _ in range(ROUNDS)]
    with ThreadPoolExecutor(len(pipelines)) as threads:
        found = list(threads.map(lambda name: bench.measure("recipe", name), pipelines))
    for index, shape in enumerate(SHAPES):
        recipes = found[index * ROUNDS :][:ROUNDS]
        rounds = [
            {"ours": one["ours"], "recipe": seconds}
            for one, seconds in zip(bench.makespans[shape], recipes, strict=True)
        ]
        what = f"{shape}, 100 nodes that wait 1000 ms, {WORKERS} workers"
        yield row(what, "Kedro's recipe", None, ratio(rounds, "ours", "recipe"))


def growth(bench: Bench) -> Rows:
    rounds: Rounds = []
    for _ in range(ROUNDS):
        some, many = (bench.measure("growth", f"grid_{n}_0") for n in (1000, 5000))
        rounds.append({"some": some["seconds"], "many": many["seconds"]})
        rounds[-1] |= {"some_bytes": some["bytes"], "many_bytes": many["bytes"]}
    yield row("time per node, 5000 nodes", "1000 nodes", 1.2, ratio(rounds, "many", "some"))
    memory = ratio(rounds, "many_bytes", "some_bytes")
    yield row("memory per node, 5000 nodes", "1000 nodes", 1.2, memory)


def memory(bench: Bench) -> Rows:
    for pipeline, what in {
        "chain_20_100mb": "chain of 20 nodes with arrays of 100 MB",
        "diamond_12_100mb": "fan-out to 10 arrays of 100 MB, and fan-in",
    }.items():
        rounds = [
            {how: bench.measure("memory", pipeline, how=how) for how in ("kedro", "ours")}
            for _ in range(ROUNDS)
        ]
        yield row(f"peak memory, {what}", "`kedro run`", 1.1, ratio(rounds, "ours", "kedro"))


def start(bench: Bench) -> Rows:
    rounds = bench.measure("start", "stored_100_0", rounds=ROUNDS)
    what = "from entering the flow to entering the first of 100 nodes"
    yield row(what, "`kedro run`", 1.15, ratio(rounds, "ours", "kedro"))
    yield row(what, "session, context and catalog", None, ratio(rounds, "ours", "load"))
    what = "`kedro run` to the first of 100 nodes"
    yield row(what, "session, context and catalog", None, ratio(rounds, "kedro", "load"))


def register(bench: Bench) -> Rows:
    env = {"PIPELINES": "stored_100_0"}
    pool = {"name": "bench", "type": "process"}
    bench.server.post("/work_pools/", pool)
    script = [bench.project / SCRIPT.name, "--work_pool_name", "bench"]
    rounds = [
        {
            "load": bench.process([HERE / "load_project.py", bench.project], env),
            "ours": bench.process(script, env),
        }
        for _ in range(ROUNDS)
    ]
    yield row("registering, whole process", "importing, and loading the project", 1.25,
              ratio(rounds, "ours", "load"))  # fmt: skip


def compare_settings(bench: Bench, setting: str, ours: str, reference: str) -> dict[str, Any]:
    """Compare runs of 100 nodes that do nothing, with one and another value of a setting."""
    rounds = [
        {
            value: bench.measure("level", "grid_100_0", env={setting: value})
            for value in (ours, reference)
        }
        for _ in range(ROUNDS)
    ]
    return ratio(rounds, ours, reference)


def level(bench: Bench) -> Rows:
    found = compare_settings(bench, "PREFECT_LOGGING_LEVEL", "DEBUG", "INFO")
    yield row("100 nodes that do nothing, at DEBUG", "at INFO", None, found)


def log_lines(bench: Bench) -> Rows:
    found = compare_settings(bench, "PREFECT_LOGGING_TO_API_ENABLED", "true", "false")
    yield row("100 nodes that do nothing, with log lines in Prefect", "without", 1.1, found)


def engine(bench: Bench, name: str) -> Rows:
    rounds = bench.measure("engine", "wide_500_0", name=name, rounds=ROUNDS)
    what = f"500 nodes that do nothing, with the start of {name}"
    reference = "bare tasks on Prefect's own task runner of that engine, with its start"
    yield row(what, reference, 0.3, ratio(rounds, "ours", "own"))
    yield row(what, "the same nodes in threads", None, ratio(rounds, "ours", "threads"))


def busy(bench: Bench) -> Rows:
    rounds = bench.measure("busy", "wide_8_100busy", rounds=ROUNDS)
    what = "8 nodes of Python code that keeps a CPU busy, 2 processes, with their start"
    yield row(what, "threads", 0.59, ratio(rounds, "processes", "threads"))


def resume(bench: Bench) -> Rows:
    rounds = bench.measure("resume", "chain_100_100fail", rounds=ROUNDS)
    what = "resuming a run of 100 nodes that wait 100 ms, which failed at node 90"
    yield row(what, "the whole run", 0.2, ratio(rounds, "resumed", "whole"))


def checkpoint(bench: Bench) -> Rows:
    rounds = bench.measure("checkpoint", "grid_100_0", rounds=ROUNDS)
    what = "checkpoint of an array of 200 MB, written and read"
    yield row(what, "pickle, written and read", 1.2, ratio(rounds, "ours", "pickle"))


MEASUREMENTS: dict[str, Callable[[Bench], Rows]] = {
    "default": default,
    "overhead-100": lambda bench: overhead(bench, 100),
    "overhead-1000": lambda bench: overhead(bench, 1000),
    "makespan-100": lambda bench: makespan(bench, 100, target=1.13),
    "start": start,
    "register": register,
    "memory": memory,
    "level": level,
    "log-lines": log_lines,
    "makespan-1000": lambda bench: makespan(bench, 1000, target=1.05),
    "recipe-1000": recipe,  # after makespan-1000, with which it is compared
    "growth": growth,
    "resume": resume,
    "checkpoint": checkpoint,
    "busy": busy,
    "processes": lambda bench: engine(bench, "processes"),
    "dask": lambda bench: engine(bench, "dask"),  # pip install prefect-dask
}
DEPEND_ON_SERVER = ("overhead-100", "overhead-1000", "makespan-100")


@contextmanager
def bench(recommended: bool) -> Iterator[Bench]:
    """Start a server, with or without the settings that the README recommends."""
    for name, value in RECOMMENDED.items():
        os.environ.pop(RECORDER + name, None)
        if recommended:
            os.environ[RECORDER + name] = value
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        made = Bench(Path(folder), recommended)
        try:
            yield made
        finally:
            stop(made.server.process)


def show(results: dict[str, Any], in_readme: bool) -> str:
    """Draw the table of the README, or that of all other rows."""
    rows: dict[tuple[str, ...], dict[bool, float]] = {}
    for found in results["rows"]:
        if ((found["what"], found["target"]) in IN_README) is in_readme:
            target = f"≤ {found['target']}" if found["target"] else ""
            key = (found["what"], found["reference"], target)
            rows.setdefault(key, {})[found["recommended"]] = found["ratio"]
    columns = ["what", "reference", "target", "ratio"]
    if not in_readme and any(False in ratios for ratios in rows.values()):
        columns.append("server as it comes")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for key, ratios in rows.items():
        figures = [f"{ratios[kind]:.2f}" if kind in ratios else "-" for kind in (True, False)]
        lines.append(f"| {' | '.join([*key, *figures[: len(columns) - 3]])} |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "kedro": kedro.__version__,
        "prefect": prefect.__version__,
        "python": platform.python_version(),
        "rounds": ROUNDS,
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="measurements; all, if none is named")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--as_it_comes", action="store_true", help="measure that server, too")
    parser.add_argument("--list", action="store_true", help="show the names of measurements")
    options = parser.parse_args()
    names = options.names or list(MEASUREMENTS)
    if options.list or set(names) - set(MEASUREMENTS):
        parser.exit(not options.list, f"Measurements: {', '.join(MEASUREMENTS)}\n")
    old = json.loads(options.out.read_text()) if options.names and options.out.exists() else {}
    kept = [found for found in old.get("rows", []) if found["name"] not in names]
    results: dict[str, Any] = {**machine(), "rows": kept}
    for recommended in [True, False] if PREFECT_3 and options.as_it_comes else [True]:
        chosen = [name for name in names if recommended or name in DEPEND_ON_SERVER]
        if not chosen:
            continue
        with bench(recommended) as made:
            for name in chosen:
                print(f"{time.strftime('%T')} {name}", file=sys.stderr, flush=True)
                for found in MEASUREMENTS[name](made):
                    results["rows"].append({"name": name, "recommended": recommended, **found})
                    options.out.write_text(json.dumps(results, indent=1) + "\n")
                    print(f"  {found['what']}: {found['ratio']:.3f}", file=sys.stderr, flush=True)
    order = list(MEASUREMENTS)
    results["rows"].sort(key=lambda found: order.index(found["name"]))
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(show(results, in_readme=True))
    print(show(results, in_readme=False))


if __name__ == "__main__":
    main()
