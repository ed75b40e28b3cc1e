"""The flow against `kedro run`: environments, sessions, versions, exit codes."""

import io
import json
import logging
import pickle
from pathlib import Path

import pytest
from conftest import Server, register
from kedro.logging import RichHandler
from rich.console import Console

import register_prefect_flow


def test_the_environment_is_base_unless_another_is_asked_for(project: Path, server: Server) -> None:
    # As in Kedro's recipe: `kedro run` would read conf/local as well, where the factor is 100.
    assert register(project, server, "--run").returncode == 0
    assert json.loads((project / "data/total.json").read_text()) == 30
    assert register(project, server, "--run", "--env", "local").returncode == 0
    assert json.loads((project / "data/total.json").read_text()) == 612


def test_all_nodes_of_a_run_share_one_save_version(project: Path, server: Server) -> None:
    catalog = project / "conf/base/catalog.yml"
    versioned = "\n{}:\n  type: json.JSONDataset\n  filepath: data/{}.json\n  versioned: true\n"
    with catalog.open("a") as file:
        file.write("".join(versioned.format(name, name) for name in ("doubled", "scaled")))
    for _ in range(2):
        assert register(project, server, "--run").returncode == 0
    versions = [
        sorted(path.name for path in (project / "data" / name).iterdir())
        for name in ("doubled.json", "scaled.json", "report.pickle")
    ]
    assert versions[0] == versions[1] == versions[2]
    assert len(versions[0]) == 2


def test_nodes_run_in_the_projects_folder(project: Path, server: Server) -> None:
    assert register(project, server, "--run", cwd=project.parent).returncode == 0
    [report] = (project / "data/report.pickle").glob("*/report.pickle")
    assert pickle.loads(report.read_bytes()) == {"total": 30, "cwd": "project"}


def test_the_project_is_loaded_once(project: Path, server: Server) -> None:
    registry = project / "src/tiny/pipeline_registry.py"
    note = "def register_pipelines():\n    open('loaded.txt', 'a').write('once ')"
    registry.write_text(registry.read_text().replace("def register_pipelines():", note))
    assert register(project, server, "--run").returncode == 0
    assert (project / "loaded.txt").read_text() == "once "


def test_a_failing_run_has_exit_code_1_and_says_why(project: Path, server: Server) -> None:
    done = register(project, server, "--run", "--pipeline", "broken")
    assert done.returncode == 1
    assert "Error: The flow run ended as Failed." in done.stderr
    assert "no number left" in done.stderr
    assert json.loads((project / "data/side.json").read_text()) == 3


@pytest.mark.parametrize("terminal", [True, False])
def test_log_lines_are_drawn_in_terminals_only(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    out = io.StringIO()
    drawing = RichHandler(console=Console(file=out, force_terminal=terminal, width=60))
    other = logging.NullHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [drawing, other])
    register_prefect_flow._print_plain_lines()
    handler, still_other = logging.getLogger().handlers
    assert (handler is drawing) == terminal
    assert still_other is other
    name = "a_dataset_with_a_name_that_takes_more_than_one_line_of_a_narrow_terminal"
    logging.getLogger("kedro.io").warning(
        "Loading data from %s", name, extra={"rich_format": ["red"]}
    )
    lines = out.getvalue().splitlines()
    if terminal:
        assert len(lines) > 1
    else:
        assert lines[0].endswith(f" | WARNING | kedro.io - Loading data from {name}")
