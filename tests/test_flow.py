"""The flow against `kedro run`: environments, sessions, versions, exit codes."""

import io
import json
import logging
import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import KEDRO_OLD, Server, kedro_run, register
from kedro.logging import RichHandler
from rich.console import Console

import register_prefect_flow


@pytest.mark.outer_lanes
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


@pytest.mark.outer_lanes
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


def calls(project: Path) -> Counter[str]:
    """The hook calls of the project's runs, how often each; and forget them."""
    trace = project / "trace.jsonl"
    found = Counter(trace.read_text().splitlines())
    trace.unlink()
    return found


def test_hooks_are_called_as_often_as_by_kedro_run(project: Path, server: Server) -> None:
    assert register(project, server, "--run").returncode == 0
    ours = calls(project)
    assert kedro_run(project).returncode == 0
    assert ours == calls(project)
    assert sum(ours.values()) > 40


def without_hooks(project: Path) -> Path:
    """Remove the project's own hooks: one that gets the catalog may put into it what is missing."""
    (project / "src/tiny/settings.py").write_text("")
    return project


@pytest.mark.outer_lanes
def test_an_input_that_a_filter_cuts_off_is_explained_when_registering(project: Path) -> None:
    done = register(without_hooks(project), None, "--dry_run", "--run", "--nodes", "add")
    assert done.returncode == 1
    message = done.stderr[done.stderr.index("Error: ") :]
    assert "provides pipeline input doubled, scaled." in message
    assert "The entries are: " in message
    assert "Add it to the catalog in conf, or run what makes it." in message
    assert "Traceback" not in done.stderr


@pytest.mark.outer_lanes
def test_an_input_that_a_hook_may_bring_is_a_note(project: Path) -> None:
    done = register(project, None, "--dry_run", "--run", "--nodes", "add")
    assert done.returncode == 0, done.stderr
    assert (
        "Note: No catalog entry, pattern or parameter provides pipeline input doubled, scaled."
        in (done.stdout)
    )


@pytest.mark.outer_lanes
@pytest.mark.slow
@pytest.mark.parametrize("how", ["registering", "running"])
@pytest.mark.parametrize("missing", ["dataset", "credentials"])
def test_what_only_conf_local_has_is_named(
    project: Path, server: Server, missing: str, how: str
) -> None:
    catalog = without_hooks(project) / "conf/base/catalog.yml"
    if missing == "dataset":
        entry = "numbers:\n  type: json.JSONDataset\n  filepath: data/numbers.json\n"
        catalog.write_text(catalog.read_text().replace(entry, ""))
        (project / "conf/local/catalog.yml").write_text(entry)
        name = "numbers"
    else:
        (project / "conf/local/credentials.yml").write_text("door: {key: xyzzy4711}\n")
        guarded = catalog.read_text().replace(
            "data/numbers.json", "data/numbers.json\n  credentials: door"
        )
        catalog.write_text(guarded)
        name = "door"
    arguments = ["--dry_run"] if how == "registering" else []
    done = register(project, server, "--run", *arguments)
    assert done.returncode == 1
    message = done.stderr[done.stderr.index("Error: ") :]
    assert name in message
    output = message if how == "registering" else done.stdout + done.stderr
    assert "`kedro run` reads environment local, too: try --env local." in output
    assert "xyzzy4711" not in done.stdout + done.stderr


@pytest.mark.outer_lanes
def test_an_environment_that_has_nothing_is_not_advised(project: Path) -> None:
    for path in (without_hooks(project) / "conf/local").iterdir():
        path.unlink()
    done = register(project, None, "--run", "--dry_run", "--nodes", "add")
    assert done.returncode == 1
    assert done.stderr.endswith("Add it to the catalog in conf, or run what makes it.\n")


FLAT = 'CONFIG_LOADER_ARGS = {"base_env": ".", "default_run_env": "."}\n'
OWN_LOADER = """\
from kedro.config import AbstractConfigLoader

PROJECT_CONF = {
    "catalog": {name: {"type": "json.JSONDataset", "filepath": f"data/{name}.json"}
                for name in ("numbers", "total", "report")},
    "parameters": {"factor": 3, "pause": 0},
    "credentials": {},
}


class Loader(AbstractConfigLoader):
    def __getitem__(self, key):
        return PROJECT_CONF[key]

    def get(self, key, default=None):
        return PROJECT_CONF.get(key, default)

    def keys(self):
        return PROJECT_CONF.keys()


CONFIG_LOADER_CLASS = Loader
"""


@pytest.mark.outer_lanes
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flat", "nested", "own loader"])
def test_environments_that_kedro_run_takes(project: Path, server: Server, layout: str) -> None:
    if layout == "own loader" and KEDRO_OLD:
        pytest.skip("Kedro 0.18 asks a config loader for more")
    arguments, settings = [], project / "src/tiny/settings.py"
    conf = project / "conf"
    if layout == "flat":
        settings.write_text(FLAT)
        for name in ("catalog", "parameters"):
            (conf / f"base/{name}.yml").rename(conf / f"{name}.yml")
        shutil.rmtree(conf / "base")
        shutil.rmtree(conf / "local")
    elif layout == "nested":
        (conf / "eu/prod").mkdir(parents=True)
        (conf / "eu/prod/parameters.yml").write_text("factor: 10\n")
        arguments = ["--env", "eu/prod"]
    else:
        settings.write_text(OWN_LOADER)
        shutil.rmtree(conf)
        conf.mkdir()
    env = arguments or (["--env", "."] if layout == "flat" else [])
    assert kedro_run(project, *env).returncode == 0
    expected = json.loads((project / "data/total.json").read_text())
    assert expected == (12 + 60 if layout == "nested" else 30)
    (project / "data/total.json").unlink()
    for how in (["--dry_run"], []):
        done = register(project, server, "--run", *arguments, *how)
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((project / "data/total.json").read_text()) == expected


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_log_lines_are_drawn_in_terminals_only(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    out = io.StringIO()
    drawing = RichHandler(console=Console(file=out, force_terminal=terminal, width=60))
    other = logging.NullHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [drawing, other])
    register_prefect_flow._log_plain_lines()
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
