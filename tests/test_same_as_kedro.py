"""What ordinary data science code does in nodes: a flow run writes what `kedro run` writes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    DASK,
    DOCUMENTED,
    KEDRO_1,
    KEDRO_OLD,
    PREFECT_3,
    Server,
    copy_in,
    eventually,
    kedro_run,
    register,
    register_and_forget,
    run,
    write_config,
    written_files,
)
from in_one_process import compare
from sample_projects import write_project

# From the name of a habit to the options of `kedro run`.
HABITS = {
    name: ["--pipeline", name]
    for name in (
        "plots", "seeds", "folders", "signals", "warnings", "asyncio", "flows", "variables", "databases", "caches",
        "lazy", "incremental", "tables", "generators", "hooks", "lambdas", "keys", "names", "handed on",
    )
}  # fmt: skip
HABITS["one copy"] = ["--pipeline", "copies"]
HABITS["three copies"] = ["--pipeline", "copies", "--params", "copies=3"]
HABITS["two copies"] = ["--pipeline", "copies", "--params", "copies=2"]

MODES = [
    "default",
    pytest.param(
        "processes",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not (PREFECT_3 and KEDRO_1), reason="not in this lane"),
        ],
    ),
    DASK,
]


@pytest.fixture(scope="module", params=MODES)
def runs(request: Any, server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All habits, run in one process: starting one takes longer than its runs."""
    if not server.request("POST", "/variables/filter", {}):
        server.post("/variables/", {"name": "habit", "value": "coffee"})
    mode = request.param
    project = copy_in(write_project(tmp_path_factory.mktemp("habits") / "project", "habits"))
    if mode == "default":
        return dict(zip(HABITS, compare(project, server, [*HABITS.values()]), strict=True))
    # Children take longest to start: one run of all pipelines, and one for each with parameters.
    plain = [options[-1] for options in HABITS.values() if "--params" not in options]
    others = [name for name, options in HABITS.items() if "--params" in options]
    options = [["--pipelines", ",".join(plain)], *(HABITS[name] for name in others)]
    together, *found = compare(project, server, [["--env", mode, *each] for each in options])
    return dict.fromkeys(HABITS, together) | dict(zip(others, found, strict=True))


@pytest.mark.parametrize("habit", HABITS)
def test_a_flow_run_writes_what_kedro_run_writes(runs: dict[str, Any], habit: str) -> None:
    if DOCUMENTED and habit == "flows":
        pytest.skip("Prefect 2.10 runs no flow inside of a task")
    if habit in ("signals", "databases") and not PREFECT_3:
        pytest.skip("Prefect 2 runs tasks in other threads: README says so")
    kedro, prefect = runs[habit]["kedro"], runs[habit]["prefect"]
    assert kedro["error"] is None, "else this test shows nothing"
    assert prefect["error"] is None
    assert prefect["files"].keys() == kedro["files"].keys()
    assert [name for name, data in kedro["files"].items() if prefect["files"][name] != data] == []


@pytest.fixture
def habits(tmp_path: Path) -> Path:
    return copy_in(write_project(tmp_path / "project", "habits"))


RETRIED = [
    "",
    pytest.param(
        "type: processes",
        marks=pytest.mark.skipif(not (PREFECT_3 and KEDRO_1), reason="not in this lane"),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("runner", RETRIED)
def test_a_task_that_is_retried_replaces_what_it_has_saved(
    habits: Path, tmp_path: Path, server: Server, runner: str
) -> None:
    write_config(habits, f"tasks: {{default: {{retries: 2}}}}\ntask_runner: {{{runner}}}\n")
    done = register(habits, server, "--run", "--pipeline", "trips")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (habits / "was_away").exists()
    assert (habits / "yielded").exists()
    assert (habits / "was_told").exists()
    undisturbed = copy_in(write_project(tmp_path / "undisturbed", "habits"))
    for name in ("was_away", "yielded", "was_told"):
        (undisturbed / name).touch()
    reference = kedro_run(undisturbed, "--pipeline", "trips")
    assert reference.returncode == 0, reference.stderr
    assert written_files(habits) == written_files(undisturbed)


@pytest.mark.slow
def test_what_a_hook_changes_before_the_run_is_no_reason_to_run_again(
    habits: Path, server: Server
) -> None:
    retries = {"PREFECT_FLOW_DEFAULT_RETRIES": "1"}
    done = register(habits, server, "--run", "--pipeline", "late", env=retries)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = (habits / "ran.txt").read_text().split()
    assert sorted(ran) == ["fail_once", "fail_once", "to_name", "use_late"]


SPELL = """
from register_prefect_flow import _digest
print(_digest({"a": {"x", "y", "z", "w"}, 1: frozenset("abc"), None: [object(), True]}))
"""


@pytest.mark.one_lane
@pytest.mark.slow
def test_keys_are_the_same_in_each_process(habits: Path) -> None:
    said = {
        run(sys.executable, "-c", SPELL, cwd=habits, env={"PYTHONHASHSEED": seed}).stdout.split()[
            -1
        ]
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1
    assert len(said.pop()) == 16


@pytest.mark.slow
def test_pipelines_are_those_that_the_parameters_make(
    habits: Path, server: Server, pool: str
) -> None:
    arguments = ("--pipeline", "copies", "--params", "copies=3")
    done = register(habits, None, "--dry_run", "--run", *arguments, "--nodes", "make_2")
    assert done.returncode == 0, done.stdout + done.stderr
    deployment = register_and_forget(habits, server, pool, *arguments)
    flow_run = server.finished(server.start_run(deployment))
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
    assert json.loads((habits / "data/made_sum.json").read_text()) == 0 + 1 + 2


@pytest.mark.slow
@pytest.mark.skipif(KEDRO_OLD, reason="Kedro 0.19 brought runtime_params")
def test_values_that_come_with_the_run_are_named_when_registering(
    habits: Path, server: Server, pool: str
) -> None:
    with (habits / "conf/base/catalog.yml").open("a") as catalog:
        catalog.write(
            "of_day: {type: json.JSONDataset, filepath: 'data/${runtime_params:day}.json'}\n"
        )
    arguments = ("--pipeline", "brought")
    checked = register(habits, None, "--dry_run", "--run", *arguments)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "Each run has to bring runtime_params. Runtime parameter 'day' not found" in (
        checked.stdout
    )
    given = register(habits, None, "--dry_run", "--run", *arguments, "--params", "day=monday")
    assert given.returncode == 0, given.stdout + given.stderr
    assert "Each run has to bring 'reason' in runtime_params, or a hook." in given.stdout
    deployment = register_and_forget(habits, server, pool, *arguments)
    without = server.finished(server.start_run(deployment))
    assert without["state_type"] == "FAILED"
    assert "Runtime parameter 'day' not found" in without["state"]["message"]
    brought = {"day": "monday", "reason": "rain"}
    flow_run = server.finished(
        server.start_run(deployment, pipeline_name="brought", runtime_params=brought)
    )
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
    assert json.loads((habits / "data/monday.json").read_text()) == ["rain"]
    catalog = habits / "conf/base/catalog.yml"
    catalog.write_text(catalog.read_text().replace("of_day: {type: json.", "of_day: {type: no."))
    arguments = (*arguments, "--params", "day=monday")
    refused = register(habits, None, "--dry_run", "--run", *arguments)
    assert refused.returncode == 1, "all else is checked"
    assert "no.JSONDataset" in refused.stderr


LOGGING = """
version: 1
disable_existing_loggers: False
handlers: {file: {class: logging.FileHandler, filename: of_project.log, level: INFO}}
root: {handlers: [file]}
loggers: {kedro: {level: INFO}}
"""


@pytest.mark.slow
@pytest.mark.skipif(KEDRO_OLD, reason="Kedro 0.19 brought conf/logging.yml")
def test_the_projects_logging_counts_wherever_it_is_started(habits: Path, server: Server) -> None:
    (habits / "conf/logging.yml").write_text(LOGGING)
    done = register(habits, server, "--run", "--pipeline", "lambdas", cwd=habits.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Completed 2 out of 2 tasks" in (habits / "of_project.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("runner", RETRIED)
def test_a_run_loads_the_versions_it_has_saved(habits: Path, server: Server, runner: str) -> None:
    write_config(habits, f"task_runner: {{{runner}}}\n")
    done = register(habits, server, "--run", "--pipeline", "versions")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((habits / "data/own_version.json").read_text()) == {"mine": 6}


@pytest.mark.slow
@pytest.mark.skipif(not PREFECT_3, reason="Prefect 2 runs tasks in threads")
def test_a_timeout_ends_a_node_that_sleeps(habits: Path, server: Server) -> None:
    write_config(habits, "tasks: {rest: {timeout_seconds: 1}}\n")
    start = time.monotonic()
    done = register(habits, server, "--run", "--pipeline", "rests")
    assert done.returncode == 1
    assert time.monotonic() - start < 50
    assert "TimedOut" in done.stdout + done.stderr
    assert (habits / "ran.txt").read_text().split() == ["rest60"]


@pytest.mark.one_lane
@pytest.mark.slow
def test_ctrl_c_interrupts_the_running_node(habits: Path, server: Server) -> None:
    command = [sys.executable, habits / "register_prefect_flow.py", "--run", "-p", "rests"]
    process = server.start(command, "interrupted", habits, server.env)
    eventually((habits / "ran.txt").exists)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    try:
        code = process.wait(timeout=25)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code = None
    log = (server.folder / "interrupted.log").read_text()
    assert code == 130, log
    assert "Stopping: no other node starts." in log
    assert (habits / "ran.txt").read_text().split() == ["rest60"]
    [flow_run] = server.post("/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    assert flow_run["state_type"] in ("CRASHED", "FAILED")


@pytest.mark.slow
def test_cancelling_ends_the_running_node(habits: Path, server: Server, pool: str) -> None:
    flow_run_id = server.start_run(register_and_forget(habits, server, pool, "-p", "rests"))
    eventually((habits / "ran.txt").exists)
    start = time.monotonic()
    server.post(f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": "CANCELLING"}})
    assert server.finished(flow_run_id)["state_type"] == "CANCELLED"
    assert time.monotonic() - start < 30
    assert (habits / "ran.txt").read_text().split() == ["rest60"]


# The names of Python that Windows does not have.
WITHOUT_POSIX = """
import os
import runpy
import signal
import sys
import types

import kedro.framework.project
import kedro.framework.session
import kedro_datasets.json
import kedro_telemetry.plugin
import prefect
import prefect.server.api.server
import rich.live

windows = "SIGINT SIGTERM SIGABRT SIGFPE SIGILL SIGSEGV SIG_DFL SIG_IGN Signals".split()
posix_only = [name for name in dir(signal) if name.startswith("SIG") and name not in windows]
posix_only += ["pthread_sigmask", "pthread_kill", "setitimer", "alarm", "sigwait"]


class Windows(types.ModuleType):
    def __getattr__(self, name):
        if name in posix_only or name in ("fork", "getuid", "killpg", "setsid", "getpgid"):
            raise AttributeError(name)
        return getattr(self.real, name)


for module in (signal, os):
    sys.modules[module.__name__] = Windows(module.__name__)
    sys.modules[module.__name__].real = module
    sys.modules[module.__name__].__all__ = []
source = open("register_prefect_flow.py").read()
script = types.ModuleType("register_prefect_flow")
script.__file__ = os.path.abspath("register_prefect_flow.py")
exec(compile(source, script.__file__, "exec"), vars(script))
for module in (signal, os):
    sys.modules[module.__name__] = sys.modules[module.__name__].real
sys.modules["register_prefect_flow"] = script
assert isinstance(script.os, Windows) and isinstance(script.signal, Windows)
script.prefect_deploy(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not KEDRO_1, reason="one lane tells")
def test_nothing_needs_names_that_windows_does_not_have(
    habits: Path, server: Server, pool: str
) -> None:
    for arguments in (
        ("--run", "--pipeline", "lambdas"),
        ("--run", "--pipeline", "lambdas", "--env", "processes"),
        ("--work_pool_name", pool, "--work_queue_name", "nightly"),
    ):
        done = run(sys.executable, "-c", WITHOUT_POSIX, *arguments, cwd=habits, env=server.env)
        assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("Registered deployment", done.stdout)
