"""The file copied into a fresh project, and run without a server: Prefect's embedded one serves."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

import pytest
from conftest import (
    KEDRO_1,
    PREFECT_3,
    SCRIPT,
    Server,
    copy_in,
    eventually,
    kedro_run,
    prefect_home,
    register,
    run,
    stop,
    written_files,
)
from sample_projects import write_tiny_project

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


@pytest.mark.slow
def test_run_on_the_embedded_server_ends_with_every_task_run_recorded(tmp_path: Path) -> None:
    project = copy_in(write_tiny_project(tmp_path / "my project"))
    (project / "src/tiny/pipeline_registry.py").write_text(REGISTRY)
    home = prefect_home(tmp_path / "prefect-home")
    done = register(project, None, "--run", cwd=tmp_path, env={"PREFECT_HOME": str(home)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The flow run has completed. Its outputs:" in done.stdout
    with closing(sqlite3.connect(home / "prefect.db")) as database:
        states = Counter(row[0] for row in database.execute("select state_name from task_run"))
        [[flow_name]] = database.execute("select name from flow")
    assert states == {"Completed": WIDTH + 1}
    assert flow_name == "tiny"


SLOW = "import time\n\n\ndef slow():\n    time.sleep(4)\n    open('ended.txt', 'w').write('')\n    return 1\n"

SLOW_REGISTRY = """\
from kedro.pipeline import node, pipeline

from tiny.slow import slow


def register_pipelines():
    return {"__default__": pipeline([
        node(slow, None, "output", name="slow"),
        node(lambda output: open("late.txt", "w").write(""), "output", None, name="late"),
    ])}
"""


def is_alive(group: int) -> bool:
    """Tell whether there is a process of a group."""
    command = ["ps", "-A", "-o", "pgid=,stat="]
    rows = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return str(group) in {found for found, state in map(str.split, rows) if "Z" not in state}


def interrupt(project: Path, home: Path, times: int) -> tuple[int, str, bool]:
    """Run the project at a terminal, press Ctrl-C while a node runs; return code and output."""
    (project / "src/tiny/slow.py").write_text(SLOW)
    (project / "src/tiny/pipeline_registry.py").write_text(SLOW_REGISTRY)
    log = home.parent / "run.log"
    with log.open("w") as out:
        process = subprocess.Popen(  # with the server in a process group, as a terminal has it
            [sys.executable, project / "register_prefect_flow.py", "--run"],
            env={**os.environ, "PREFECT_HOME": str(prefect_home(home))},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            eventually(lambda: "Running node: slow" in log.read_text(), or_show=log)
            for _ in range(times):
                os.killpg(process.pid, signal.SIGINT)
                eventually(lambda: "Stopping: no other node starts" in log.read_text())
            code = process.wait(timeout=60)
            left = True
            with suppress(AssertionError):
                left = not eventually(lambda: not is_alive(process.pid), seconds=5)
            return code, log.read_text(), left
        finally:
            stop(process)


@pytest.mark.slow
@pytest.mark.parametrize("max_workers", [None, pytest.param(2, marks=pytest.mark.one_lane)])
def test_ctrl_c_ends_a_run_in_order_and_leaves_nothing_running(
    tmp_path: Path, max_workers: int | None
) -> None:
    project = copy_in(write_tiny_project(tmp_path / "project"))
    if max_workers:
        config = f"task_runner: {{max_workers: {max_workers}}}\n"
        (project / "conf/base/prefect.yml").write_text(config)
    code, output, left = interrupt(project, tmp_path / "home", times=1)
    assert code == 130, output
    assert not left
    assert "Stopped by Ctrl-C." in output
    assert "Traceback" not in output
    if PREFECT_3 or not max_workers:  # Prefect 2 stops a thread between two lines of Python
        waited_for = (project / "ended.txt").exists()
        assert waited_for is bool(max_workers), "in threads nodes are waited for"
    assert not (project / "late.txt").exists()
    with closing(sqlite3.connect(tmp_path / "home/prefect.db")) as database:
        [[state]] = database.execute("select state_type from flow_run")
    assert state in ("CRASHED", "CANCELLED")


@pytest.mark.one_lane
@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    project = copy_in(write_tiny_project(tmp_path / "project"))
    (project / "conf/base/prefect.yml").write_text("task_runner: {max_workers: 2}\n")
    code, output, left = interrupt(project, tmp_path / "home", times=2)
    assert code == 130, output
    assert not left
    assert not (project / "ended.txt").exists()


@pytest.mark.one_lane
@pytest.mark.slow
def test_no_record_is_waited_for_that_cannot_come(tmp_path: Path) -> None:
    project = copy_in(write_tiny_project(tmp_path / "project"))
    with (project / "src/tiny/hooks.py").open("a") as hooks:
        hooks.write(RAISING_HOOK)
    settings = project / "src/tiny/settings.py"
    settings.write_text("from tiny.hooks import Raising\n\nHOOKS = (Raising(),)\n")
    env = {"PREFECT_HOME": str(prefect_home(tmp_path / "home"))}
    done = run(sys.executable, "-c", WAITING, cwd=project, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the flow run ended as Failed" in done.stdout


RAISING_HOOK = """

class Raising:
    @hook_impl
    def before_pipeline_run(self):
        raise RuntimeError("not today")
"""

# With a patience that no test has, an answer can only come from what was recorded.
WAITING = """
import functools
import register_prefect_flow as script

read_task_runs = script._read_task_runs
script._read_task_runs = lambda id, expected, patience: read_task_runs(id, expected, 1000)
try:
    script.prefect_deploy(["--run"], standalone_mode=False)
except script.click.ClickException as error:
    print(error.message.lower().replace("failed.", "Failed."))
"""


@pytest.mark.one_lane
@pytest.mark.slow
def test_it_leaves_nothing_in_the_project_but_the_outputs(project: Path, server: Server) -> None:
    before = {path for path in project.rglob("*") if "__pycache__" not in path.parts}
    done = register(project, server, "--run")
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


# ---- The sample project of the README, in the lane it is written for ----

for_the_sample = pytest.mark.skipif(
    not (KEDRO_1 and PREFECT_3), reason="it is written for the current lane"
)


def copy_of_the_sample(path: Path) -> Path:
    """What a fresh clone has of it, with the script copied in."""
    made = shutil.ignore_patterns("0[2-9]*", "__pycache__", "register_prefect_flow.py")
    return copy_in(Path(shutil.copytree(SCRIPT.parent / "tests/wine", path, ignore=made)))


@pytest.mark.slow
@for_the_sample
def test_the_sample_gives_what_kedro_run_gives(tmp_path: Path, server: Server) -> None:
    project, reference = (copy_of_the_sample(tmp_path / name / "wine") for name in "ab")
    done = register(project, server, "--run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"plot: MatplotlibDataset {project}/data/08_reporting/accuracy.png" in done.stdout
    assert kedro_run(reference).returncode == 0

    files = written_files(project)
    assert files == written_files(reference)
    assert set(files) == {
        "01_raw/README.md",
        "01_raw/wine.csv",
        "04_feature/features.csv",
        "06_models/best.pickle/VERSION/best.pickle",
        "06_models/forest.pickle",
        "06_models/logistic.pickle",
        "06_models/neighbours.pickle",
        "08_reporting/accuracy.png",
        "08_reporting/metrics.json",
    }
    metrics = json.loads(files["08_reporting/metrics.json"])
    assert metrics["accuracy"][metrics["best"]] == max(metrics["accuracy"].values()) > 0.9
    assert files["08_reporting/accuracy.png"].startswith(b"\x89PNG")


@pytest.mark.slow
@for_the_sample
def test_the_sample_has_three_pipelines(tmp_path: Path) -> None:
    project = copy_of_the_sample(tmp_path / "wine")
    message = register(project, None, "--dry_run", "--run", "--pipeline", "none").stderr
    assert "The pipelines are: __default__, modelling, processing." in message
