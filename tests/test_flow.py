"""The flow against `kedro run`: environments, sessions, versions, exit codes."""

import json
import pickle
from pathlib import Path

import kedro
import pytest
from conftest import Server, kedro_run, register, written_files


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


@pytest.mark.skipif(kedro.__version__ == "0.18.10", reason="patterns came with Kedro 0.18.12")
def test_catalog_patterns_apply(project: Path, server: Server) -> None:
    with (project / "conf/base/catalog.yml").open("a") as catalog:
        pattern = "{name}led"  # doubled and scaled, which would stay in memory
        catalog.write(f"\n'{pattern}':\n  type: json.JSONDataset\n  filepath: data/{{name}}.json\n")
    assert register(project, server, "--run").returncode == 0
    assert json.loads((project / "data/doub.json").read_text()) == [2, 4, 6]
    assert json.loads((project / "data/sca.json").read_text()) == [3, 6, 9]


def test_a_failing_run_has_exit_code_1_and_says_why(project: Path, server: Server) -> None:
    done = register(project, server, "--run", "--pipeline", "broken")
    assert done.returncode == 1
    assert "Error: The flow run ended as Failed." in done.stderr
    assert "no number left" in done.stderr
    assert json.loads((project / "data/side.json").read_text()) == 3


def test_generator_nodes_and_async_saving_are_kedros(project: Path, server: Server) -> None:
    nodes = project / "src/tiny/nodes.py"
    text = nodes.read_text().replace(
        "def report(total):\n    return", "def report(total):\n    yield"
    )
    nodes.write_text(text)
    catalog = project / "conf/base/catalog.yml"
    catalog.write_text(catalog.read_text().replace("  versioned: true\n", ""))
    assert kedro_run(project).returncode == 0
    expected = written_files(project)
    (project / "data/report.pickle").unlink()
    assert register(project, server, "--run").returncode == 0
    assert written_files(project) == expected
