"""What nobody thought of: pipelines, parameters, settings and names that Hypothesis makes."""

import json
import os
import re
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import FORKING, KEDRO_1, PREFECT_3, Server, copy_in, run, write_config
from test_engines import calls
from test_features import compare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PREFECT_3 and KEDRO_1 and find_spec("hypothesis")), reason="its lane has it"
    ),
]
TESTS = Path(__file__).parent

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
    (project / "pairs.json").write_text(json.dumps(pairs))
    done = run(*FORKING, TESTS / "try_inputs.py", project / "pairs.json", cwd=project)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    found = json.loads((project / "inputs.json").read_text())
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
