"""Measure what the script costs.

    python tests/benchmarks/run.py [name ...]

Starts a Prefect server on SQLite, with the settings that the README recommends, or --as_it_comes.
Every figure is a ratio against a reference of the same run, the median of some rounds in which both
take turns. Writes them with versions and machine to results.json, and into the tables of both
READMEs. Names choose measurements (--help shows them), --readme those that the README in the
project's root shows; others' figures stay. Everything takes about 20 minutes, --readme 10.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TESTS_OWN = ("COLUMNS", "SSL_CERT_FILE")  # which users do not have: see conftest.py
BEFORE = {name: value for name, value in os.environ.items() if name in TESTS_OWN}
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import kedro  # noqa: E402
import prefect  # noqa: E402
from conftest import SCRIPT, Server, eventually, stop  # noqa: E402
from dags import WORKERS  # noqa: E402
from project import write_project  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "3"))
RECORDER = "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_"
RECOMMENDED = {"BATCH_SIZE": "100", "READ_BATCH_SIZE": "100", "FLUSH_INTERVAL": "1"}
KEDRO_DAGSTER = "0.8.1"

Rounds = list[dict[str, float]]


def environment() -> dict[str, str]:
    """Return that of the tests, but what they only set for width and speed."""
    return {name: value for name, value in os.environ.items() if name not in TESTS_OWN} | BEFORE


class Bench:
    """A server, a project, and measurements in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.server = Server(folder)
        eventually(self.server.is_up)
        self.server.post("/work_pools/", {"name": "bench", "type": "process"})
        self.project = write_project(folder / "project", SCRIPT)
        self.folder = folder

    def process(
        self, command: list[Any], pipelines: str, python: Path = Path(sys.executable), **env: str
    ) -> float:
        """Run a process, its output in a file, and return its seconds."""
        with tempfile.NamedTemporaryFile("w+", dir=self.folder) as out:
            env = {**self.server.env, "PREFECT_LOGGING_LEVEL": "INFO", **env}
            began = time.perf_counter()
            done = subprocess.run(
                [python, *command],
                env={**environment(), **env, "PIPELINES": pipelines},
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
            self.process(command, f"{pipeline} grid_100_0", **(env or {}))
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


def with_floor(figure: dict[str, Any], floor: dict[str, Any]) -> dict[str, Any]:
    """Show beside a figure what Prefect alone has, with the same reference."""
    return figure | {"floor": floor["ratio"]}


def row(
    what: str, reference: str, target: float | None, figure: dict[str, Any], *, in_readme: bool
) -> dict[str, Any]:
    about = {"what": what, "reference": reference, "target": target, "in_readme": in_readme}
    return {**about, **figure}


readme_row = partial(row, in_readme=True)  # in the root of the project
other_row = partial(row, in_readme=False)
Rows = Iterator[dict[str, Any]]


def overhead(bench: Bench, count: int, how: str, target: float) -> Rows:
    env = {"one at a time": "default", f"in {WORKERS} threads": "base"}[how]
    is_small = count == 100  # Kedro draws lines so slowly that a thousand nodes take 15 s
    rounds = bench.measure("overhead", f"grid_{count}_0", rounds=ROUNDS, in_env=env, drawn=is_small)
    what = f"{count} nodes, {how}"
    reference = "`kedro run` and bare tasks"
    logging = ratio(rounds, "ours", "kedro, plain lines", "bare, with lines")
    yield readme_row(what, "`kedro run` and tasks that log", target, logging)
    silent = ratio(rounds, "ours", "kedro, plain lines", "bare")
    yield other_row(what, f"{reference}, which log nothing", 1.05, silent)
    if is_small:
        reference = "`kedro run` that draws its lines, and bare tasks, which log nothing"
        yield other_row(what, reference, 1.25, ratio(rounds, "ours", "kedro", "bare"))
    recorded = ratio(rounds, "recorded", "ours")
    yield other_row(f"until the server shows {what}, from the run's end", "the run", None, recorded)


def command(bench: Bench) -> Rows:
    name = "grid_100_0"
    kedro_run = ["-m", "kedro", "run", "--env", "base", "--pipeline", name]
    ours = [SCRIPT.name, "--run", "--env", "default", "--pipeline", name]
    rounds = [
        {
            "kedro": bench.process(kedro_run, name),
            "ours": bench.process(ours, name),
            "bare": bench.process([HERE / "bare_flow.py", "100", "0"], name),
            "bare, with lines": bench.process([HERE / "bare_flow.py", "100", "5"], name),
        }
        for _ in range(ROUNDS)
    ]
    what = "the whole command, 100 nodes"
    reference = "`kedro run` and a bare flow"
    silent = ratio(rounds, "ours", "kedro", "bare")
    yield readme_row(what, reference, 1.0, silent)
    logging = ratio(rounds, "ours", "kedro", "bare, with lines")
    yield other_row(what, f"{reference}, 5 lines a task", None, logging)


def python_with_kedro_dagster() -> Path:
    """Find or make an environment that has it: it does not go with all that is installed here."""
    version = f"{KEDRO_DAGSTER}-kedro-{kedro.__version__}-python-{platform.python_version()}"
    env = Path(tempfile.gettempdir(), f"kedro-dagster-{version}")
    made = env / "made"
    if not made.exists():  # whole
        packages = [
            f"kedro-dagster=={KEDRO_DAGSTER}",
            f"kedro=={kedro.__version__}",
            f"numpy=={importlib.metadata.version('numpy')}",
        ]
        subprocess.run([sys.executable, "-m", "venv", "--clear", env], check=True)
        install = [env / "bin/python", "-m", "pip", "install", "-qq", *packages]
        subprocess.run(install, check=True, env=environment())
        made.touch()
    return env / "bin/python"


def dagster(bench: Bench) -> Rows:
    name, python = "grid_100_0", python_with_kedro_dagster()
    seconds = bench.folder / "seconds"
    rounds = []
    for _ in range(ROUNDS):
        ours = bench.measure("one_run", name, in_env="default")
        bench.process([HERE / "dagster_run.py", bench.project, seconds], name, python)
        rounds.append({"ours": ours, "dagster": float(seconds.read_text())})
    what = "100 nodes, one at a time"
    yield readme_row(what, "kedro-dagster, in process", None, ratio(rounds, "ours", "dagster"))


def makespan(
    bench: Bench, shapes: Iterable[str], milliseconds: int, target: float, rounds: int = ROUNDS
) -> Rows:
    for shape in shapes:
        # The best schedule knows neither Kedro nor Prefect: bare tasks show what Prefect needs.
        others = {"wide": ["bare"], "random": ["bare", "recipe"]}.get(shape, [])
        others = others if milliseconds < 1000 else []  # the recipe would take 100 s
        name = f"{shape}_100_{milliseconds}"
        found = bench.measure("schedule", name, rounds=rounds, others=others)
        about = f"{milliseconds} ms, {WORKERS} workers"
        what, best = f"{shape}, 100 nodes of {about}", "best schedule"
        shown = readme_row if "recipe" in others else other_row
        figure = ratio(found, "ours", "best")
        figure = with_floor(figure, ratio(found, "bare", "best")) if "bare" in others else figure
        yield shown(what, best, target, figure)
        if "recipe" in others:
            yield shown(what, "Kedro's recipe", None, ratio(found, "ours", "recipe"))


def growth(bench: Bench) -> Rows:
    some, many = (bench.measure("growth", f"grid_{n}_0") for n in (1000, 5000))
    for what, name in {"time": "seconds", "memory": "bytes"}.items():
        rounds = [{"some": some[name], "many": many[name]}]
        yield other_row(f"{what} per node, 5000 nodes", "1000 nodes", 1.2,
                      ratio(rounds, "many", "some"))  # fmt: skip


def memory(bench: Bench, pipeline: str, what: str, make_row: Any, rounds: int = ROUNDS) -> Rows:
    found = [
        {how: bench.measure("memory", pipeline, how=how) for how in ("kedro", "ours")}
        for _ in range(rounds)
    ]
    yield make_row(f"peak memory, {what}", "`kedro run`", 1.1, ratio(found, "ours", "kedro"))


def start(bench: Bench) -> Rows:
    rounds = bench.measure("start", "stored_100_0", rounds=ROUNDS)
    what = "until the first of 100 nodes"
    # Kedro's part of the floor is that of `kedro run`, Prefect's that of a bare flow.
    figure = with_floor(ratio(rounds, "ours", "kedro"), ratio(rounds, "floor", "kedro"))
    yield readme_row(what, "`kedro run`", 1.15, figure)
    threads = f"{what}, in {WORKERS} threads"
    yield other_row(threads, "`kedro run`", 1.15, ratio(rounds, "threads", "kedro"))
    yield other_row(what, "session, context and catalog", None, ratio(rounds, "ours", "load"))
    yield other_row("`kedro run` to the first of 100 nodes", "session, context and catalog", None,
                  ratio(rounds, "kedro", "load"))  # fmt: skip


def register(bench: Bench) -> Rows:
    name, load = "stored_100_0", [HERE / "load_project.py", bench.project]
    script = [bench.project / SCRIPT.name, "--work_pool_name", "bench"]
    rounds = [
        {
            "load": bench.process(load, name),
            "ours": bench.process(script, name),
            "floor": bench.process([*load, "bench"], name),
        }
        for _ in range(ROUNDS)
    ]
    reference = "importing and loading"
    # The floor is Prefect's own `deploy` of a bare flow, after the reference.
    figure = with_floor(ratio(rounds, "ours", "load"), ratio(rounds, "floor", "load"))
    yield readme_row("registering", reference, 1.25, figure)


def compare_settings(
    bench: Bench, setting: str, ours: str, reference: str, rounds: int
) -> dict[str, Any]:
    """Compare runs of 100 nodes that do nothing, with one and another value of a setting."""
    found = [
        {
            value: bench.measure("one_run", "grid_100_0", env={setting: value})
            for value in (ours, reference)
        }
        for _ in range(rounds)
    ]
    return ratio(found, ours, reference)


def level(bench: Bench) -> Rows:
    found = compare_settings(bench, "PREFECT_LOGGING_LEVEL", "DEBUG", "INFO", rounds=1)
    yield other_row("100 nodes that do nothing, at DEBUG", "at INFO", None, found)


def log_lines(bench: Bench) -> Rows:
    found = compare_settings(bench, "PREFECT_LOGGING_TO_API_ENABLED", "true", "false", ROUNDS)
    yield other_row("100 nodes that do nothing, with log lines in Prefect", "without", 1.1, found)


def engine(bench: Bench, name: str, target: float) -> Rows:
    if name == "dask" and not find_spec("prefect_dask"):
        print("  left out: pip install distributed prefect-dask", file=sys.stderr)
        return
    rounds = bench.measure("engine", "wide_500_0", name=name, rounds=1)
    what = f"500 nodes that do nothing, with the start of {name}"
    reference = "bare tasks on Prefect's own task runner of that engine, with its start"
    yield other_row(what, reference, target, ratio(rounds, "ours", "own"))
    yield other_row(what, "the same nodes in threads", None, ratio(rounds, "ours", "threads"))


def busy(bench: Bench) -> Rows:
    rounds = bench.measure("busy", "wide_8_100busy", rounds=1)
    what = "8 nodes of Python code that keeps a CPU busy, 2 processes, with their start"
    yield other_row(what, "threads", 0.59, ratio(rounds, "processes", "threads"))


def resume(bench: Bench) -> Rows:
    rounds = bench.measure("resume", "chain_100_100fail", rounds=1)
    what = "resuming a run of 100 nodes that wait 100 ms, which failed at node 90"
    yield other_row(what, "the whole run", 0.2, ratio(rounds, "resumed", "whole"))


def checkpoint(bench: Bench) -> Rows:
    rounds = bench.measure("checkpoint", "chain_2_200mb", rounds=ROUNDS)
    what = "handing on an array of 200 MB from node to node, processes"
    yield other_row(what, "pickle, written and read", 1.2, ratio(rounds, "ours", "pickle"))


Measurements = dict[str, Callable[[Bench], Rows]]
IN_README: Measurements = {
    "default-100": partial(overhead, count=100, how="one at a time", target=0.95),
    "default-1000": partial(overhead, count=1000, how="one at a time", target=0.85),
    "threads-100": partial(overhead, count=100, how=f"in {WORKERS} threads", target=0.95),
    "threads-1000": partial(overhead, count=1000, how=f"in {WORKERS} threads", target=0.85),
    "command": command,
    "dagster": dagster,
    "makespan-random": partial(makespan, shapes=["random"], milliseconds=100, target=1.13),
    "start": start,
    "register": register,
    "memory": partial(
        memory,
        pipeline="diamond_12_100mb",
        what="10 arrays of 100 MB",
        make_row=readme_row,
    ),
}
OTHERS: Measurements = {
    "makespan-100": partial(
        makespan, shapes=["wide", "grid", "diamond"], milliseconds=100, target=1.13
    ),
    "makespan-1000": partial(
        makespan,
        shapes=["wide", "grid", "diamond", "random"],
        milliseconds=1000,
        target=1.05,
        rounds=1,
    ),
    "memory-chain": partial(
        memory,
        pipeline="chain_20_100mb",
        what="chain of 20 nodes with arrays of 100 MB",
        make_row=other_row,
        rounds=1,
    ),
    "level": level,
    "log-lines": log_lines,
    "growth": growth,
    "resume": resume,
    "checkpoint": checkpoint,
    "busy": busy,
    "processes": partial(engine, name="processes", target=0.2),
    "dask": partial(engine, name="dask", target=0.25),
}
MEASUREMENTS = IN_README | OTHERS


@contextmanager
def bench(*, recommended: bool) -> Iterator[Bench]:
    """Start a server, with or without the settings that the README recommends."""
    for name, value in RECOMMENDED.items() if recommended else ():
        os.environ[RECORDER + name] = value
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        made = Bench(Path(folder))
        try:
            yield made
        finally:
            stop(made.server.process)


def show(results: dict[str, Any], *, in_readme: bool) -> str:
    """Draw the table of the README, or that of all other rows."""
    lines = ["| what | reference | target | ratio | bare Prefect |", "|---|---|---|---|---|"]
    for found in results["rows"]:
        if found["in_readme"] is in_readme:
            target = f"≤{found['target']}" if found["target"] else ""
            floor = f"{found['floor']:.2f}" if "floor" in found else ""
            cells = [found["what"], found["reference"], target, f"{found['ratio']:.2f}", floor]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table(path: Path, table: str) -> None:
    """Put a table in the place of the one that a README has."""
    before, marker, after = path.read_text().partition("<!-- benchmarks -->\n")
    path.write_text(before + marker + table + "\n" + after.partition("\n\n")[2])


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    listed = f"measurements; all, if none is named: {', '.join(MEASUREMENTS)}"
    parser.add_argument("names", nargs="*", metavar="name", help=listed)
    parser.add_argument("--readme", action="store_true", help="those that README.md shows")
    parser.add_argument("--as_it_comes", action="store_true", help="a server without settings")
    parser.add_argument("--out", type=Path, help="another file than results.json, and no tables")
    options = parser.parse_args()
    if unknown := set(options.names) - MEASUREMENTS.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    names = options.names + list(IN_README) * options.readme or list(MEASUREMENTS)
    out = options.out or HERE / "results.json"
    old = json.loads(out.read_text())["rows"] if out.exists() else []
    rows = [found for found in old if found["name"] in MEASUREMENTS.keys() - set(names)]
    results = {**machine(), "rows": rows}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the server would be left
    with bench(recommended=not options.as_it_comes) as made:
        for name in names:
            print(f"{time.strftime('%T')} {name}", file=sys.stderr, flush=True)
            for found in MEASUREMENTS[name](made):
                rows.append({"name": name, **found})
                rows.sort(key=lambda found: list(MEASUREMENTS).index(found["name"]))
                out.write_text(json.dumps(results, indent=1) + "\n")
                print(f"  {found['what']}: {found['ratio']:.3f}", file=sys.stderr, flush=True)
    for in_readme, folder in ((True, SCRIPT.parent), (False, HERE)):
        table = show(results, in_readme=in_readme)
        print(table)
        if not options.out:
            write_table(folder / "README.md", table)


if __name__ == "__main__":
    main()
