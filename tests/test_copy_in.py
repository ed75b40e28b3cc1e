"""The file copied into a fresh project, and run without a server: Prefect's embedded one serves."""

import sqlite3
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

from conftest import PREFECT_3, copy_in, register, run
from tiny_project import write_tiny_project

# Prefect 3's server records some 30 task runs a second, and lists them 200 at a time: so many that
# they cannot be recorded by chance, and do not fit on a page.
WIDTH = 220 if PREFECT_3 else 12

REGISTRY = f"""\
from kedro.pipeline import node, pipeline


def one():
    return 1


def register_pipelines():
    return {{
        "__default__": pipeline([
            node(one, None, f"output_{{i}}", name=f"node_{{i}}") for i in range({WIDTH})
        ])
    }}
"""


def test_run_on_the_embedded_server_ends_with_every_task_run_recorded(tmp_path: Path) -> None:
    project = copy_in(write_tiny_project(tmp_path / "my project"))
    (project / "src/tiny/pipeline_registry.py").write_text(REGISTRY)
    home = tmp_path / "prefect-home"
    done = register(project, None, "--run", cwd=tmp_path, env={"PREFECT_HOME": str(home)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The flow run has completed. Its outputs:" in done.stdout
    with closing(sqlite3.connect(home / "prefect.db")) as database:
        states = Counter(row[0] for row in database.execute("select state_name from task_run"))
        [[flow_name]] = database.execute("select name from flow")
    assert states == {"Completed": WIDTH + 1}
    assert flow_name == "tiny"


def test_it_leaves_nothing_in_the_project_but_the_outputs(tmp_path: Path) -> None:
    project = copy_in(write_tiny_project(tmp_path / "project"))
    before = {path for path in project.rglob("*") if "__pycache__" not in path.parts}
    done = register(project, None, "--run", env={"PREFECT_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stdout + done.stderr
    after = {path for path in project.rglob("*") if "__pycache__" not in path.parts}
    new = {path.relative_to(project).as_posix() for path in after - before if path.is_file()}
    assert {name for name in new if not name.startswith("data/report.pickle/")} == {
        "data/total.json",
        "trace.jsonl",
    }


def test_the_copied_file_is_a_module_that_others_can_import(project: Path) -> None:
    code = "from register_prefect_flow import PrefectRunner, my_flow, prefect_deploy; print('fine')"
    done = run(sys.executable, "-c", code, cwd=project)
    assert done.stdout.split()[-1:] == ["fine"], done.stderr
