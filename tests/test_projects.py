"""Projects as people have them: several in one process, in one repository, with parts of their own."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import (
    BIN,
    DOCUMENTED,
    KEDRO_1,
    KEDRO_OLD,
    PREFECT_3,
    QUEUE,
    Server,
    copy_in,
    eventually,
    fail,
    kedro_run,
    register,
    register_and_forget,
    run,
    write_config,
    write_pipeline,
)
from sample_projects import ran, write_project, write_tiny_project

ODD_ENTRY = "\n{}: {{type: tiny.odd_datasets.{}, filepath: data/{}.json}}\n"
DOUBLE = "def double(numbers):\n    return [2 * number for number in numbers]\n"


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A project with parts of its own, which the settings do not name yet."""
    return copy_in(write_project(tmp_path / "project", "odd"))


def add_settings(project: Path, *lines: str) -> None:
    with (project / "src/tiny/settings.py").open("a") as settings:
        settings.write("\n".join(["", *lines, ""]))


def write_odd_pipeline(project: Path, kind: str) -> None:
    """Let one node write a dataset of a kind of its own."""
    write_pipeline(project, DOUBLE, "node(double, 'numbers', 'odd', name='double')")
    with (project / "conf/base/catalog.yml").open("a") as catalog:
        catalog.write(ODD_ENTRY.format("odd", kind, "odd"))


@pytest.mark.parametrize("kind", ["Described", "Locking", "Asking"])
def test_datasets_are_made_once_and_may_describe_themselves_as_they_like(
    odd: Path, server: Server, kind: str
) -> None:
    write_odd_pipeline(odd, kind)
    done = register(odd, server, "--run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((odd / "data/odd.json").read_text()) == [2, 4, 6]
    (odd / "data/odd.json.lock").unlink(missing_ok=True)
    checked = register(odd, None, "--run", "--dry_run")
    assert checked.returncode == 0, checked.stderr
    assert f"odd: {kind}" in checked.stdout


TWO_PROJECTS = """
import importlib.util, sys
from prefect import flow


def load(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.my_flow


first, second = (load(f"{path}/register_prefect_flow.py") for path in sys.argv[1:])


@flow
def both():
    return [first(), second(), first()]


both()
"""
NOTING = """
from pathlib import Path
from kedro.framework.hooks import hook_impl


class Noting:
    @hook_impl
    def before_pipeline_run(self, run_params, pipeline):
        with open({path!r}, "a") as file:
            file.write({package!r} + " ")


HOOKS = (Noting(),)
"""


def test_two_projects_in_one_flow_keep_their_own_hooks(tmp_path: Path, server: Server) -> None:
    paths = []
    for package in ("alpha", "beta"):
        path = copy_in(write_tiny_project(tmp_path / package))
        (path / "src/tiny").rename(path / f"src/{package}")
        shutil.rmtree(path / "src/tiny_plugin-1.0.dist-info")
        pyproject = path / "pyproject.toml"
        pyproject.write_text(pyproject.read_text().replace('"tiny"', f'"{package}"'))
        registry = path / f"src/{package}/pipeline_registry.py"
        registry.write_text(registry.read_text().replace("from tiny", f"from {package}"))
        noting = NOTING.format(path=str(tmp_path / "noted.txt"), package=package)
        (path / f"src/{package}/settings.py").write_text(noting)
        paths.append(path)
    (tmp_path / "two.py").write_text(TWO_PROJECTS)
    done = run(sys.executable, tmp_path / "two.py", *paths, cwd=tmp_path, env=server.env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "noted.txt").read_text().split() == ["alpha", "beta", "alpha"]
    for path in paths:
        assert json.loads((path / "data/total.json").read_text()) == 30
        assert len(list((path / "data/report.pickle").iterdir())) == (
            2 if path.name == "alpha" else 1
        )


AT_ONCE = """
import os, threading
from register_prefect_flow import my_flow

failed = []


def go(name):
    try:
        my_flow(pipeline_name=name)
    except BaseException as error:
        failed.append(repr(error))


threads = [threading.Thread(target=go, args=(f"p{number}",)) for number in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
"""
SIX = """
from pathlib import Path

from kedro.pipeline import node, pipeline


def writer(name):
    def write(numbers):
        Path(f"data/{name}.txt").write_text(name)
        return 1

    return write


def register_pipelines():
    made = {
        f"p{n}": pipeline([node(writer(f"p{n}"), "numbers", f"out{n}", name=f"node{n}")])
        for n in range(6)
    }
    return {"__default__": pipeline([]), **made}
"""


@pytest.mark.skipif(not PREFECT_3, reason="flows of Prefect 2 run in threads one after the other")
def test_several_runs_in_one_process_load_their_own_pipelines(
    project: Path, server: Server
) -> None:
    (project / "src/tiny/pipeline_registry.py").write_text(SIX)
    (project / "at_once.py").write_text(AT_ONCE)
    done = run(sys.executable, "at_once.py", cwd=project, env=server.env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.stem for p in (project / "data").glob("p*.txt")} == {f"p{n}" for n in range(6)}


def test_the_environment_is_that_of_the_job_variables_unless_a_parameter_says_more(
    project: Path, server: Server, pool: str
) -> None:
    own = ("--deployment_name", "by_variable")  # for a deployment keeps its job variables
    deployment = register_and_forget(project, server, pool, *own)
    found = server.request("GET", f"/deployments/name/{deployment}")
    assert "env" not in found["parameters"]
    key = "job_variables" if "job_variables" in found else "infra_overrides"
    env = {**found[key]["env"], "KEDRO_ENV": "local"}
    server.request("PATCH", f"/deployments/{found['id']}", {key: {**found[key], "env": env}})
    for parameters, total in (({}, 12 + 600), ({"env": "base"}, 30)):
        flow_run = server.finished(server.start_run(deployment, **parameters))
        assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
        assert json.loads((project / "data/total.json").read_text()) == total


PREFECT_YAML = """
pull:
  - prefect.deployments.steps.set_working_directory: {{directory: "{root}"}}
deployments:
  - name: forecast
    entrypoint: services/forecast/register_prefect_flow.py:my_flow
    work_pool: {{name: {pool}, work_queue_name: {queue}}}
"""


@pytest.mark.slow
@pytest.mark.skipif(DOCUMENTED, reason="it has agents, and other files for deployments")
def test_a_project_in_a_monorepo_runs_in_its_own_folder(
    tmp_path: Path, server: Server, pool: str
) -> None:
    root = tmp_path / "monorepo"
    project = copy_in(write_tiny_project(root / "services/forecast"))
    text = PREFECT_YAML.format(root=root, pool=pool, queue=QUEUE)
    (root / "prefect.yaml").write_text(text)
    done = run(BIN / "prefect", "--no-prompt", "deploy", "--all", cwd=root, env=server.env)
    assert done.returncode == 0, done.stdout + done.stderr
    write_pipeline(
        project,
        "from pathlib import Path\n\n\ndef where(numbers):\n    return Path.cwd().name\n",
        "node(where, 'numbers', 'total', name='where')",
    )
    flow_run = server.finished(server.start_run("tiny/forecast"))
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
    assert json.loads((project / "data/total.json").read_text()) == "forecast"


SUBFLOW = """
import os, sys
sys.path.insert(0, sys.argv[1])
from prefect import flow
from register_prefect_flow import my_flow


@flow
def outer():
    my_flow()


outer()
print("it is in", os.getcwd())
"""


def test_as_a_subflow_it_changes_no_folder(project: Path, server: Server, tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text(SUBFLOW)
    done = run(sys.executable, "outer.py", project, cwd=tmp_path, env=server.env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"it is in {tmp_path}\n" in done.stdout
    assert json.loads((project / "data/total.json").read_text()) == 30


def test_sessions_are_stored_under_the_id_that_versions_have(odd: Path, server: Server) -> None:
    add_settings(odd, "from tiny.odd_sessions import Files as SESSION_STORE_CLASS")
    done = register(odd, server, "--run")
    assert done.returncode == 0, done.stdout + done.stderr
    [session] = (odd / "sessions").glob("*.json")
    [version] = (odd / "data/report.pickle").iterdir()
    assert session.stem == version.name == json.loads(session.read_text())["session_id"]


@pytest.mark.skipif(not KEDRO_1, reason="Kedro 1.3 brought it")
def test_a_service_session_keeps_its_version_in_a_retry(
    flaky: Path, server: Server, pool: str
) -> None:
    add_settings(
        flaky,
        "from kedro.framework.session.service_session import KedroServiceSession",
        "SESSION_CLASS = KedroServiceSession",
    )
    flow_run_id = fail(server, pool, flaky)
    [version] = [path.name for path in (flaky / "data/saved.pickle").iterdir()]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d\.\d\d\.\d\d\.\d{6}Z", version)
    (flaky / "mended").touch()
    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert ran(flaky) == ["flaky", "keep", "last"]
    for name in ("saved.pickle", "kept.pickle", "result.json"):
        assert [path.name for path in (flaky / "data" / name).iterdir()] == [version]


def test_hooks_may_ask_prefect_which_flow_run_it_is(odd: Path, server: Server) -> None:
    add_settings(odd, "from tiny.odd_hooks import AsksPrefect", "HOOKS = (AsksPrefect(),)")
    assert register(odd, server, "--run").returncode == 0
    [flow_run] = server.post("/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    assert (odd / "flow_run.txt").read_text() == flow_run["id"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", ["threads", pytest.param("processes", marks=pytest.mark.skipif(
        not (PREFECT_3 and KEDRO_1), reason="not in this lane"))],
)  # fmt: skip
def test_a_renamed_copy_registers_itself_and_its_children_start(
    project: Path, server: Server, pool: str, engine: str
) -> None:
    name = "deploy-me.py"
    (project / "register_prefect_flow.py").rename(project / name)
    write_config(project, f"task_runner: {{type: {engine}}}")
    arguments = ("--work_pool_name", pool, "--work_queue_name", QUEUE)
    done = run(sys.executable, name, *arguments, cwd=project, env=server.env)
    assert done.returncode == 0, done.stdout + done.stderr
    found = server.request("GET", "/deployments/name/tiny/example")
    assert found["entrypoint"] == f"{name}:my_flow"
    flow_run = server.finished(server.start_run("tiny/example"))
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
    assert json.loads((project / "data/total.json").read_text()) == 30


def test_an_option_that_the_projects_session_does_not_take_is_refused(
    odd: Path, server: Server
) -> None:
    add_settings(odd, "from tiny.odd_sessions import Plain as SESSION_CLASS")
    if not KEDRO_1:
        pytest.skip("Kedro 1.3 made it a setting")
    refused = register(odd, None, "--run", "--dry_run", "--tags", "heavy")
    assert refused.returncode == 1
    assert "Error: Plain of Kedro 1" in refused.stderr
    assert "does not take tags (" in refused.stderr
    done = register(odd, server, "--run", "--tags", "heavy")
    assert done.returncode == 1
    assert "does not take tags (" in done.stderr
    assert register(odd, server, "--run").returncode == 0


def test_hooks_may_load_what_the_last_run_has_saved(odd: Path, server: Server) -> None:
    add_settings(
        odd, "from tiny.odd_hooks import ComparesVersions", "HOOKS = (ComparesVersions(),)"
    )
    for factor in (1, 2):
        assert register(odd, server, "--run", "--params", f"factor={factor}").returncode == 0
    (odd / "src/tiny/cli.py").unlink()  # or that would be `kedro run`
    noted = (odd / "data/last.txt").read_text()
    shutil.rmtree(odd / "data/report.pickle")
    (odd / "data/last.txt").unlink()
    for factor in (1, 2):
        assert kedro_run(odd, "--params", f"factor={factor}").returncode == 0
    assert noted == (odd / "data/last.txt").read_text()
    assert "'total': 18" in noted, "of the run before"


@pytest.mark.skipif(KEDRO_OLD, reason="Kedro 0.18 asks a config loader for more")
def test_a_config_loader_may_know_nothing_of_prefect_yml(odd: Path, server: Server) -> None:
    add_settings(odd, "from tiny.odd_loader import Fixed as CONFIG_LOADER_CLASS")
    done = register(odd, server, "--run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((odd / "data/total.json").read_text()) == 30


SECRET = "hunter2"
DASK = f"""
task_runner:
  type: dask
  cluster_class: distributed.LocalCluster
  cluster_kwargs: {{token: {SECRET}}}
"""


def test_nothing_that_is_printed_or_registered_may_be_secret(
    project: Path, server: Server, pool: str
) -> None:
    if PREFECT_3:
        write_config(project, DASK)
    url = f"s3://me:{SECRET}@host/bucket" if PREFECT_3 and not KEDRO_OLD else ""
    arguments = ("--params", f"token={SECRET}", *(("--checkpoints", url) if url else ()))
    shown = register(project, None, "--run", "--dry_run", *arguments)
    assert shown.returncode == 0, shown.stderr
    assert "runtime_params: token" in shown.stdout
    assert SECRET not in shown.stdout + shown.stderr
    done = register(
        project, server, "--work_pool_name", pool, "--work_queue_name", QUEUE, *arguments
    )
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    found = server.request("GET", "/deployments/name/tiny/example")
    assert SECRET not in found["description"]


def test_a_missing_parameter_with_a_name_that_is_close_is_noted(project: Path) -> None:
    registry = project / "src/tiny/pipeline_registry.py"
    registry.write_text(registry.read_text().replace("params:factor", "params:facter"))
    done = register(project, None, "--run", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "has to bring 'facter' in runtime_params" in done.stdout
    assert "did you mean params:factor?" in done.stdout


PROGRESS = """
import time

from rich.progress import track


def show(numbers):
    return sum(number for number in track(numbers) if not time.sleep(0.2))
"""


def test_a_node_may_show_progress_on_a_terminal(project: Path, server: Server) -> None:
    write_pipeline(project, PROGRESS, "node(show, 'numbers', 'total', name='show')")
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, project / "register_prefect_flow.py", "--run"],
        env={**os.environ, **server.env, "TERM": "xterm", "COLUMNS": "200", "LINES": "50"},
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    written = b""
    with suppress(OSError):  # at its end
        while part := os.read(screen, 65536):
            written += part
    os.close(screen)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    assert process.wait(timeout=60) == 0, text
    assert "100%" in text
    assert len(re.findall(r"Completed node: show\b", text)) == 1
    assert json.loads((project / "data/total.json").read_text()) == 6


def suspend(server: Server, flow_run_id: str) -> None:
    """Do what the button in the UI does."""
    details = {"pause_reschedule": True}
    state = {"type": "PAUSED", "name": "Suspended", "state_details": details}
    body = {"state": state, "force": True}
    server.post(f"/flow_runs/{flow_run_id}/set_state", body)


@pytest.mark.one_lane
@pytest.mark.slow
@pytest.mark.parametrize("runner", ["", "max_workers: 2", "type: processes"])
def test_a_suspended_run_ends_and_goes_on_where_it_was(
    flaky: Path, server: Server, pool: str, runner: str
) -> None:
    (flaky / "hang").touch()
    (flaky / "mended").touch()
    write_config(flaky, f"task_runner: {{{runner}}}")
    deployment = register_and_forget(flaky, server, pool, "--pipeline", "flaky")
    flow_run_id = server.start_run(deployment)
    eventually((flaky / "pid.txt").exists)
    suspend(server, flow_run_id)
    # A process looks for this every 10 s, or is told.
    eventually(lambda: server.flow_run(flow_run_id)["state_name"] == "Suspended")
    threading.Event().wait(12)
    (flaky / "hang").unlink()
    server.await_idle_worker()
    assert server.flow_run(flow_run_id)["state_name"] == "Suspended"
    before = ran(flaky)
    assert "last" not in before, "nothing new has started"
    assert "flaky" in before
    server.post(f"/flow_runs/{flow_run_id}/resume", {})
    flow_run = server.finished(flow_run_id)
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
    after = ran(flaky)
    assert "last" in after
    in_files = {"save", "finish_aside", "flaky"}
    assert not in_files & set(before) & set(after), "what has completed is not run again"


PROXY = """
import os


def set_proxy(numbers):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        os.environ[name] = "http://127.0.0.1:9"
    return 1
"""


@pytest.mark.one_lane
@pytest.mark.slow
def test_a_run_on_the_embedded_server_is_done_when_it_is(project: Path) -> None:
    write_pipeline(project, PROXY, "node(set_proxy, 'numbers', 'total', name='set_proxy')")
    command = (sys.executable, "register_prefect_flow.py", "--run")
    done = run(*command, cwd=project, env={"PREFECT_API_URL": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The flow run has completed. Its outputs:\n  total: JSONDataset" in done.stdout


def test_a_free_output_in_memory_is_no_reason_to_run_its_node_again(
    flaky: Path, server: Server, pool: str
) -> None:
    registry = flaky / "src/tiny/pipeline_registry.py"
    added = 'node(nodes.aside, "numbers", "only_returned", name="mail"),\n        node(nodes.last'
    registry.write_text(registry.read_text().replace("node(nodes.last", added))
    deployment = register_and_forget(flaky, server, pool, "--pipeline", "flaky")
    flow_run_id = server.start_run(deployment)
    assert server.finished(flow_run_id)["state_type"] == "FAILED"
    assert ran(flaky).count("aside") == 2
    (flaky / "mended").touch()
    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert ran(flaky) == ["flaky", "keep", "last"]
