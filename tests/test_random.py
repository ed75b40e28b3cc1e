"""What nobody thought of: pipelines, parameters, settings and names that Hypothesis makes."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    DASK,
    KEDRO_1,
    PREFECT_3,
    Server,
    copy_in,
    kedro_run,
    process_of,
    register_and_forget,
    write_config,
)
from in_one_process import calls, compare, try_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PREFECT_3 and KEDRO_1 and find_spec("hypothesis")), reason="its lane has it"
    ),
]

# How many examples; "60 10" takes a quarter of an hour.
PIPELINES = dict(
    zip(("threads", "processes"), map(int, os.environ.get("RANDOM", "6 1").split()), strict=True)
)


def write_examples(path: Path, engine: str, with_failure: bool) -> tuple[Path, list[Any]]:
    from random_project import draw, pipelines, write_random_project

    examples = draw(pipelines(with_failure=with_failure), PIPELINES[engine])
    return copy_in(write_random_project(path, examples)), examples


def compare_from_the_start(
    project: Path, server: Server, config: str, options: list[list[str]], **env: str
) -> list[dict[str, Any]]:
    """Compare as often as wanted: each time from the data that the project came with."""
    write_config(project, f"artifacts: false\n{config}")
    if (project / "start").exists():
        shutil.rmtree(project / "data")
        (project / "start").rename(project / "data")
    return compare(project, server, options, **env)


def results(run_: dict[str, Any]) -> dict[str, str]:
    """What nodes saved, without the notes of which have been run."""
    notes = re.compile(r"data/(ran\.txt|failed_.*)")
    return {name: text for name, text in run_["files"].items() if not notes.fullmatch(name)}


def ran(run_: dict[str, Any]) -> list[str]:
    return sorted(run_["files"].get("data/ran.txt", "").split())


@pytest.mark.parametrize("engine", PIPELINES)
def test_a_random_pipeline_does_what_kedro_run_does(
    tmp_path: Path, server: Server, engine: str
) -> None:
    project, examples = write_examples(tmp_path / "project", engine, with_failure=False)
    options = [
        ["--pipeline", f"p{number}-never", *each["filter"]] for number, each in enumerate(examples)
    ]
    pairs = compare_from_the_start(project, server, f"task_runner: {{type: {engine}}}", options)
    completed = 0
    for example, pair in zip(examples, pairs, strict=True):
        ours, kedros = pair["prefect"], pair["kedro"]
        if kedros["error"]:  # a filter has cut off what nodes need
            assert ours["error"], example
            assert set(ran(kedros)) <= set(ran(ours)), "independent branches go on"
            continue
        completed += 1
        assert ours["error"] is None, (example, ours["error"])
        assert ran(ours) == ran(kedros), example
        assert results(ours) == results(kedros), example
        assert calls(ours) == calls(kedros), example
    assert completed >= len(examples) / 4


@pytest.mark.parametrize("engine", PIPELINES)
def test_a_random_pipeline_that_failed_ends_as_if_it_had_not(
    tmp_path: Path, server: Server, engine: str
) -> None:
    project, examples = write_examples(tmp_path / "project", engine, with_failure=True)
    config = f"task_runner: {{type: {engine}}}"

    def runs(fails: str, **env: str) -> list[dict[str, Any]]:
        options = [["--pipeline", f"p{number}-{fails}"] for number in range(len(examples))]
        return compare_from_the_start(project, server, config, options, **env)

    failed, undisturbed = runs("always"), runs("never")
    retried = runs("once", PREFECT_FLOW_DEFAULT_RETRIES="1")
    for example, fails, never, once in zip(examples, failed, undisturbed, retried, strict=True):
        ours, kedros = fails["prefect"], fails["kedro"]
        assert ours["error"] == kedros["error"], example
        assert "fails" in ours["error"], example
        assert set(ran(kedros)) <= set(ran(ours)), "independent branches go on"
        assert results(kedros).items() <= results(ours).items(), example
        assert once["prefect"]["error"] is None, (example, once["prefect"]["error"])
        assert results(once["prefect"]) == results(never["kedro"]), example
        kinds = example["kinds"]
        in_files = [
            n["name"] for n in example["nodes"] if all(kinds[o] != "memory" for o in n["outputs"])
        ]
        again = [name for name in in_files if ran(once["prefect"]).count(name) > 1]
        assert set(again) <= {n["name"] for n in example["nodes"] if n["fails"]}, example


def test_any_input_is_taken_or_refused_in_one_message(project: Path) -> None:
    from random_project import INPUTS, draw

    pairs = [
        (config, ["--dry_run", "--run", *arguments])
        for config, arguments in draw(INPUTS, 200)
        if "\0" not in "".join(arguments)  # no argument has it
    ]
    found = try_inputs(project, pairs)
    for pair, (code, printed) in zip(pairs, found, strict=True):
        assert "Traceback" not in printed, (pair, printed)
        assert code == 0 or re.search(r"Error: \S", printed), (pair, code, printed)
    counts = Counter(code == 0 for code, _ in found)
    assert min(counts[True], counts[False]) > 20, counts


@pytest.mark.parametrize("engine", PIPELINES)
def test_any_name_that_kedro_takes_is_taken(tmp_path: Path, server: Server, engine: str) -> None:
    from random_project import NAMES, accepted_by_kedro, draw, write_named_project

    names = [found for found in draw(NAMES, 150) if accepted_by_kedro(found)]
    names = names[: 4 * PIPELINES[engine]]
    project = copy_in(write_named_project(tmp_path / "project", names))
    options = [["--pipeline", f"p{number}"] for number in range(len(names))]
    pairs = compare_from_the_start(project, server, f"task_runner: {{type: {engine}}}", options)
    for name, pair in zip(names, pairs, strict=True):
        assert pair["prefect"]["error"] == pair["kedro"]["error"], name
        assert pair["prefect"]["files"] == pair["kedro"]["files"], name
    assert sum(pair["kedro"]["error"] is None for pair in pairs) > len(pairs) / 2


ENDED_EARLY = 4  # how many random pipelines for each engine, RANDOM above is not asked


def test_a_random_pipeline_that_failed_on_dask_ends_as_if_it_had_not(
    tmp_path: Path, server: Server
) -> None:
    pytest.importorskip("distributed")
    from random_project import draw, pipelines, write_random_project

    examples = draw(pipelines(with_failure=True), ENDED_EARLY)
    project = copy_in(write_random_project(tmp_path / "project", examples))
    options = [["--pipeline", f"p{number}-once"] for number in range(len(examples))]
    undisturbed = [["--pipeline", f"p{number}-never"] for number in range(len(examples))]
    config, env = "task_runner: {type: dask}", {"PREFECT_FLOW_DEFAULT_RETRIES": "1"}
    retried = compare_from_the_start(project, server, config, options, **env)
    expected = compare_from_the_start(project, server, "", undisturbed)
    for example, once, never in zip(examples, retried, expected, strict=True):
        assert "fails" in once["kedro"]["error"], "else nothing has failed"
        assert once["prefect"]["error"] is None, (example, once["prefect"]["error"])
        assert results(once["prefect"]) == results(never["kedro"]), example
        failing = [node["name"] for node in example["nodes"] if node["fails"]]
        assert all(ran(once["prefect"]).count(name) == 2 for name in failing), example


# Each node notes that it was run. One raises when it is run for the first time, and one, which may
# be the same, does not end then: in its function, or when it has saved the first of its outputs.
ENDING_EARLY = """\
import json
import time
import zlib
from pathlib import Path

from kedro.framework.hooks import hook_impl


def is_first(what, name):
    if name not in json.loads(Path("ends.json").read_text()).get(what, []):
        return False
    try:
        Path(f"{what}_{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def make(name, outputs, fails):
    def compute(*inputs):
        with open("ran.txt", "a") as file:
            file.write(name + "\\n")
        if fails == "once":
            if is_first("running", name):
                time.sleep(1000)
            if is_first("failing", name):
                raise RuntimeError(f"{name} fails")
        return [zlib.crc32(repr((name, index, inputs)).encode()) for index in range(outputs)]

    return compute


class Saving:
    @hook_impl
    def after_dataset_saved(self, node):
        if is_first("saving", node.name):
            time.sleep(1000)
"""


def is_first(mark: Path) -> bool:
    """Tell whether nobody has asked this before."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def write_pipelines_that_end_early(path: Path, seed: int) -> tuple[Path, list[str]]:
    """Write a project, and return for each of its pipelines the mark of the node that hangs."""
    from random_project import draw, pipelines, write_random_project

    chosen, hanging = random.Random(seed), []
    examples = draw(pipelines(with_failure=False), ENDED_EARLY)
    ends: dict[str, list[str]] = {"running": [], "saving": [], "failing": []}
    for number, example in enumerate(examples):
        kinds = example["kinds"]
        for node in example["nodes"]:
            # All run at once, in one folder.
            node.update(name=f"p{number}_{node['name']}", namespace=None, fails=True)
        versioned = [n for n in example["nodes"] if kinds[n["outputs"][0]] == "versioned"]
        how = "saving" if versioned and number % 2 else "running"
        hangs = chosen.choice(versioned if how == "saving" else example["nodes"])["name"]
        ends[how].append(hangs)
        ends["failing"].append(chosen.choice(example["nodes"])["name"])
        hanging.append(f"{how}_{hangs}")
    write_random_project(path, examples)
    (path / "src/tiny/functions.py").write_text(ENDING_EARLY)
    with (path / "src/tiny/settings.py").open("a") as settings:
        settings.write("\nfrom tiny.functions import Saving\n\nHOOKS = (*HOOKS, Saving())\n")
    (path / "ends.json").write_text(json.dumps(ends))
    return copy_in(path), hanging


def end_attempts(server: Server, project: Path, left: dict[str, str]) -> dict[str, str]:
    """Kill each flow run as soon as its node hangs, and return how all of them ended."""
    start = asked = time.monotonic()
    states = dict.fromkeys(left, "RUNNING")
    while {*states.values()} - {"COMPLETED", "FAILED", "CRASHED"}:
        for flow_run_id, hangs in left.items():
            if (project / hangs).exists() and is_first(project / f"killed_{hangs}"):
                os.kill(process_of(server, flow_run_id), signal.SIGKILL)
        assert time.monotonic() < start + 180, states
        if time.monotonic() > asked + 2:
            states = {each: server.flow_run(each)["state_type"] for each in left}
            asked = time.monotonic()
        time.sleep(0.01)
    return states


def files_below(project: Path) -> dict[str, int]:
    """All data with what is in it, with save versions made alike, and how often each is there."""
    version = re.compile(r"\d{4}-\d\d-\d\dT\d\d\.\d\d\.\d\d\.\d{3,6}Z")
    data = [path for path in (project / "data").rglob("*") if path.is_file()]
    names = [version.sub("VERSION", path.relative_to(project).as_posix()) for path in data]
    return Counter(f"{name}: {path.read_text()}" for name, path in zip(names, data, strict=True))


@pytest.mark.parametrize("engine", ["processes", DASK])
def test_a_random_pipeline_that_is_killed_and_fails_ends_as_if_it_had_not(
    tmp_path: Path, server: Server, pool: str, engine: str
) -> None:
    project, hanging = write_pipelines_that_end_early(tmp_path / "project", seed=1)
    reference = tmp_path / "reference"
    shutil.copytree(project, reference)
    (reference / "ends.json").write_text("{}")
    for number in range(ENDED_EARLY):
        done = kedro_run(reference, "--pipeline", f"p{number}-never")
        assert done.returncode == 0, done.stdout + done.stderr
    write_config(project, f"artifacts: false\ntask_runner: {{type: {engine}}}")
    deployment = register_and_forget(project, server, pool)
    left = {
        server.start_run(deployment, pipeline_name=f"p{number}-once"): hangs
        for number, hangs in enumerate(hanging)
    }
    attempts: list[Counter[str]] = []
    while left:
        assert len(attempts) < 4, "killed once, failed once: the third attempt completes"
        states = end_attempts(server, project, left)
        attempts.append(Counter(states.values()))
        left = {run_: left[run_] for run_, state in states.items() if state != "COMPLETED"}
        server.await_idle_worker()
        for flow_run_id in left:  # as the button in the UI does
            state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
            done = server.post(f"/flow_runs/{flow_run_id}/set_state", {"state": state})
            assert done["status"] == "ACCEPT", done
    total = sum(attempts, start=Counter[str]())
    assert total["CRASHED"] == total["COMPLETED"] == ENDED_EARLY, attempts
    assert total["FAILED"], "else a run that failed was killed each time before it had ended"
    assert len(list(project.glob("failing_*"))) == ENDED_EARLY
    assert files_below(project) == files_below(reference)
