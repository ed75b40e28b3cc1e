"""The whole way, as a user goes it: server, pool, agent or worker, registration, runs."""

import base64
import functools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import (
    KEDRO_OLD,
    PREFECT_3,
    Server,
    copy_in,
    eventually,
    kedro_run,
    register,
    register_and_forget,
    run,
    written_files,
)
from sample_projects import write_tiny_project


def trace(project: Path) -> Counter[str]:
    """The hook calls of the project's runs, how often each."""
    return Counter((project / "trace.jsonl").read_text().splitlines())


def edges(server: Server, flow_run_id: str) -> set[tuple[str, str]]:
    """What the graph of a flow run in the UI shows: which task runs waited for which."""
    runs = server.task_runs(flow_run_id)
    names = {run["id"]: name for name, run in runs.items()}
    return {
        (names[parent["id"]], name)
        for name, run in runs.items()
        for parent in run["task_inputs"].get("wait_for", [])
        if parent["id"] in names  # recorded later, or run again since
    }


def traceback_in_the_log(server: Server, flow_run_id: str) -> str | None:
    logs = server.logs(flow_run_id)
    return next((log["message"] for log in logs if "Traceback" in log["message"]), None)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """A second copy of the project, at a path of the same name."""
    return copy_in(write_tiny_project(tmp_path / "reference" / "project"))


def test_a_run_gives_what_kedro_run_gives(
    server: Server, pool: str, project: Path, reference: Path
) -> None:
    deployment = register_and_forget(project, server, pool)
    assert deployment == "tiny/example"
    flow_run = server.finished(server.trigger(deployment, cwd=project))
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]

    assert kedro_run(reference).returncode == 0
    assert written_files(project) == written_files(reference)
    assert len(written_files(project)) == 3
    assert trace(project) == trace(reference)
    owners = Counter(json.loads(call)[1] for call in trace(project).elements())
    assert owners["settings"] == owners["plugin"] > 20
    assert not (project / ".prefectignore").exists()

    expected = dict.fromkeys(["kedro_init", "double", "scale", "add", "report"], "Completed")
    server.await_states(flow_run["id"], expected)
    assert edges(server, flow_run["id"]) == {("double", "add"), ("scale", "add"), ("add", "report")}

    # Another run is a session of its own, with a save version of its own.
    flow_run = server.finished(server.start_run(deployment))
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
    assert len(list((project / "data/report.pickle").iterdir())) == 2


LOGGING = """

def add(doubled, scaled):
    import threading
    import warnings

    log = logging.getLogger(__name__)
    log.warning("adding %d numbers", len(doubled) + len(scaled))
    log.debug("not at this level")
    logging.getLogger("elsewhere").warning("not one of the project's")
    thread = threading.Thread(target=lambda: log.warning("from a thread \\udc80"))
    thread.start()
    thread.join()
    log.warning("%s", "x" * 3_000_000)
    return sum(doubled) + sum(scaled)
"""


@pytest.mark.outer_lanes
def test_log_lines_are_shown_with_the_node_that_wrote_them(
    server: Server, pool: str, project: Path
) -> None:
    with (project / "src/tiny/nodes.py").open("a") as nodes:
        nodes.write(LOGGING)
    deployment = register_and_forget(project, server, pool)
    flow_run = server.finished(server.start_run(deployment))
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]

    def lines(*names: str) -> Counter[tuple[str | None, str]]:
        runs = {run["id"]: name for name, run in server.task_runs(flow_run["id"]).items()}
        return Counter(
            (runs.get(log["task_run_id"]), log["message"].strip())
            for log in server.logs(flow_run["id"])
            if log["name"].split(".")[0] in names
        )

    last = (None, "Completed 4 out of 4 tasks")
    eventually(lambda: lines("kedro")[last] and lines("kedro")["report", RUNNING])
    assert set(lines("kedro", "tiny").values()) == {1}, "no line is there twice"
    for node in ("double", "scale", "add", "report"):
        assert lines("prefect")[node, "Finished in state Completed()"] == 1
    kedro = lines("kedro")
    runs = [text for name, text in kedro if name == "add" and text.startswith("Running node: add")]
    assert len(runs) == 1
    loads = [text for name, text in kedro if name == "double" and text.startswith("Loading data")]
    assert len(loads) == 1
    assert kedro[None, "Completed node: add"]
    tiny = {(name, text[:50]) for name, text in lines("tiny")}
    assert tiny == {
        ("add", "adding 6 numbers"),
        (None, "from a thread \\udc80"),
        ("add", "x" * 50),
    }
    assert not lines("elsewhere")


RUNNING = "Running node: report: report([total]) -> [report]"

TWO_RUNS = """
import threading
import register_prefect_flow
threads = [threading.Thread(target=register_prefect_flow.my_flow) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.one_lane
@pytest.mark.slow
@pytest.mark.skipif(not PREFECT_3, reason="Prefect 2 cancels what runs beside a flow that ends")
def test_of_runs_at_once_in_one_process_each_has_its_own_log_lines(
    server: Server, project: Path
) -> None:
    (project / "conf/base/parameters.yml").write_text("factor: 3\npause: 5\n")
    earlier = {run["id"] for run in server.post("/flow_runs/filter", {})}
    done = run(sys.executable, "-c", TWO_RUNS, cwd=project, env=server.env)
    assert done.returncode == 0, done.stderr
    runs = {run["id"] for run in server.post("/flow_runs/filter", {})} - earlier
    assert len(runs) == 2
    for flow_run_id in runs:

        def last_lines(flow_run_id: str = flow_run_id) -> list[str]:
            messages = [log["message"] for log in server.logs(flow_run_id)]
            return [text for text in messages if text == "Completed 4 out of 4 tasks"]

        assert len(eventually(last_lines)) == 1


LOGGING_OF_REQUESTS = """
version: 1
disable_existing_loggers: False
loggers: {httpx: {level: INFO}}
"""


@pytest.mark.one_lane
@pytest.mark.slow
def test_log_lines_about_sending_log_lines_do_not_multiply(server: Server, project: Path) -> None:
    (project / "conf/base/parameters.yml").write_text("factor: 3\npause: 8\n")
    (project / "conf/logging.yml").write_text(LOGGING_OF_REQUESTS)
    env = {"KEDRO_LOGGING_CONFIG": str(project / "conf/logging.yml")}
    env["PREFECT_LOGGING_EXTRA_LOGGERS"] = "httpx"
    done = register(project, server, "--run", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    [flow_run] = server.post("/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    sent = [log for log in server.logs(flow_run["id"]) if "/api/logs/" in log["message"]]
    assert 0 < len(sent) < 20


LOGGING_OF_THE_PROJECT = """
version: 1
disable_existing_loggers: False
handlers: {api: {class: prefect.logging.handlers.APILogHandler, level: WARNING}}
loggers:
  kedro: {level: INFO}
  kedro.runner: {handlers: [api]}
  tiny: {level: INFO, handlers: [api]}
"""


@pytest.mark.one_lane
@pytest.mark.slow
def test_what_a_project_sends_itself_is_sent_once_at_its_level(
    server: Server, project: Path
) -> None:
    with (project / "src/tiny/nodes.py").open("a") as nodes:
        nodes.write(LOGGING.replace("log.debug", "log.info"))
    (project / "conf/logging.yml").write_text(LOGGING_OF_THE_PROJECT)
    env = {"KEDRO_LOGGING_CONFIG": str(project / "conf/logging.yml")}
    env["KEDRO_LOGGING_MODULE_ALLOWLIST"] = "prefect.logging.handlers"  # Kedro 1.7 asks for it
    done = register(project, server, "--run", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    [flow_run] = server.post("/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    messages = Counter(log["message"].strip() for log in server.logs(flow_run["id"]))
    assert messages["adding 6 numbers"] == 1
    assert messages["not at this level"] == 0
    assert messages["Completed node: add"] == 1


@pytest.mark.one_lane
@pytest.mark.slow
def test_runs_of_two_deployments_at_once_both_succeed(
    server: Server, pool: str, project: Path
) -> None:
    (project / "conf/base/parameters.yml").write_text("factor: 3\npause: 8\n")
    deployments = [
        register_and_forget(project, server, pool, "--deployment_name", name)
        for name in ("example", "other")
    ]
    assert len(set(deployments)) == 2
    with ThreadPoolExecutor() as threads:
        trigger = functools.partial(server.trigger, cwd=project)
        flow_runs = list(threads.map(trigger, deployments))
    runs = [server.finished(flow_run) for flow_run in flow_runs]
    assert [run["state_type"] for run in runs] == ["COMPLETED", "COMPLETED"]
    last_start, first_end = (
        choose(run[key] for run in runs) for choose, key in ((max, "start_time"), (min, "end_time"))
    )
    assert last_start < first_end, "they did not overlap"
    assert len(list((project / "data/report.pickle").iterdir())) == 2


@pytest.mark.outer_lanes
def test_a_failing_pipeline_fails_as_kedro_run_fails(
    server: Server, pool: str, project: Path, reference: Path
) -> None:
    deployment = register_and_forget(project, server, pool, "--pipeline", "broken")
    flow_run = server.finished(server.start_run(deployment))
    assert flow_run["state_type"] == "FAILED"
    assert "ZeroDivisionError: no number left" in flow_run["state"]["message"]

    traceback = eventually(lambda: traceback_in_the_log(server, flow_run["id"]))
    last_lines = traceback.rstrip().splitlines()[-3:]
    assert "# the user's line" in "".join(last_lines), traceback
    assert last_lines[-1] == "ZeroDivisionError: no number left"

    expected = {
        "kedro_init": "Completed",
        "fail": "Failed",
        "behind": "NotReady",
        "side": "Completed",
    }
    server.await_states(flow_run["id"], expected)

    # `kedro run` stops at once; here the independent branch went on. All else is the same.
    assert kedro_run(reference, "--pipeline", "broken").returncode == 1
    assert json.loads((project / "data/side.json").read_text()) == 3
    assert not (reference / "data/side.json").exists()
    of_errors = [
        Counter(call for call in trace(path).elements() if "error" in call.split('"')[1])
        for path in (project, reference)
    ]
    assert of_errors[0] == of_errors[1]
    assert sum(of_errors[0].values()) == 4, "on_node_error and on_pipeline_error, for two hooks"


@pytest.mark.outer_lanes
def test_each_run_may_have_parameters_of_its_own(server: Server, pool: str, project: Path) -> None:
    deployment = register_and_forget(project, server, pool, "--params", "factor=5")

    # A pipeline that the form of the deployment does not know.
    registry = project / "src/tiny/pipeline_registry.py"
    registry_text = registry.read_text()
    registry.write_text(registry_text.replace("return {", 'return {"later": sums, '))
    parameters = {"pipeline_name": "later", "env": "local", "to_nodes": ["add"]}
    flow_run = server.finished(server.trigger(deployment, project, **parameters))
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
    assert json.loads((project / "data/total.json").read_text()) == 12 + 5 * 6
    assert not (project / "data/report.pickle").exists()

    # A wrong one ends the run before any node, with Kedro's own error.
    registry.write_text(registry_text)
    flow_run = server.finished(server.start_run(deployment, pipeline_name="brokn"))
    assert flow_run["state_type"] == "FAILED"
    assert "Failed to find the pipeline named 'brokn'" in flow_run["state"]["message"]
    server.await_states(flow_run["id"], {"kedro_init": "Completed"})


# The first time `before` is quick and `flaky` fails; the second time `beside` is quick, so that the
# nodes behind them start in another order.
FLAKY_NODES = """

def note(name, seconds=0):
    time.sleep(seconds)
    with open("ran.txt", "a") as file:
        file.write(name + " ")
    return 1


def before(numbers):
    return note("before", 2 if Path("mended").exists() else 0)


def beside(numbers):
    return note("beside", 0 if Path("mended").exists() else 2)


def flaky(one):
    note("flaky")
    if not Path("mended").exists():
        raise RuntimeError("not yet")
    return 2 * one


def late(one):
    return note("late") + one


def both(flaky, late):
    return 10 * flaky + late
"""

FLAKY_PIPELINE = """
    flaky = pipeline([
        node(nodes.before, "numbers", "one", name="before"),
        node(nodes.beside, "numbers", "other", name="beside"),
        node(nodes.flaky, "one", "flaky_output", name="flaky"),
        node(nodes.late, "other", "late_output", name="late"),
        node(nodes.both, ["flaky_output", "late_output"], "side", name="both"),
    ])
    return {"flaky": flaky, """


@pytest.mark.one_lane
@pytest.mark.slow
def test_a_retried_flow_run_runs_all_nodes_again(server: Server, pool: str, project: Path) -> None:
    with (project / "src/tiny/nodes.py").open("a") as nodes:
        nodes.write(FLAKY_NODES)
    registry = project / "src/tiny/pipeline_registry.py"
    registry.write_text(registry.read_text().replace("\n    return {", FLAKY_PIPELINE))
    deployment = register_and_forget(project, server, pool, "--pipeline", "flaky")
    flow_run_id = server.start_run(deployment)
    assert server.finished(flow_run_id)["state_type"] == "FAILED"
    assert not (project / "data/side.json").exists()
    server.await_idle_worker()

    (project / "mended").touch()
    (project / "ran.txt").unlink()
    retry = {"type": "SCHEDULED", "name": "AwaitingRetry"}  # what the button in the UI does
    server.post(f"/flow_runs/{flow_run_id}/set_state", {"state": retry})
    eventually(lambda: server.flow_run(flow_run_id)["state_type"] != "FAILED")
    assert server.finished(flow_run_id)["state_type"] == "COMPLETED"
    assert json.loads((project / "data/side.json").read_text()) == 22
    assert sorted((project / "ran.txt").read_text().split()) == [
        "before",
        "beside",
        "flaky",
        "late",
    ]


CREDENTIALS = """\
door: {key: first-s3cret}
token: "${oc.env:NO_SUCH_VARIABLE}"
database: {con: "postgresql://me:second-s3cret@db/x"}
"""

ROWS_NODE = """

class Invalid(Exception):
    def __init__(self, text, rows=None):
        super().__init__(text)
        self.rows = rows


def check(numbers):
    raise Invalid("invalid rows", rows=["-".join(["third", "s3cret "]) * 1000] * 100)
"""

ROWS_PIPELINE = """
    checked = pipeline([node(nodes.check, "numbers", "side", name="check")])
    return {"checked": checked, """


def spellings(secret: str) -> Iterator[bytes]:
    """A text as it is, and within a longer one that is encoded in base 64."""
    yield secret.encode()
    for before in range(3):  # of three bytes each, four characters are made
        encoded = base64.b64encode(b" " * before + secret.encode())
        yield encoded[4 if before else 0 : -4]


def assert_kept_nowhere(server: Server, secrets: list[str]) -> None:
    """Search the database and the result storage of server and runs."""
    homes = [server.folder, Path(os.environ["PREFECT_HOME"])]
    files = [path for home in homes for path in home.rglob("*") if path.is_file()]
    searched = [text for secret in secrets for text in spellings(secret)]
    # What leaves the write-ahead log is in the database by then, and the log may be gone.
    for path in sorted(files, key=lambda path: not path.name.endswith("-wal")):
        with suppress(FileNotFoundError):
            content = path.read_bytes().replace(b"\\n", b"")
            assert not [text for text in searched if text in content], path
    logs = json.dumps(server.post("/logs/filter", {}))
    assert not [secret for secret in secrets if secret in logs]


@pytest.mark.outer_lanes
@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [pytest.param("success", marks=pytest.mark.one_lane), "credentials", "rows"]
)
def test_what_an_exception_refers_to_is_kept_nowhere(
    server: Server, pool: str, project: Path, how: str
) -> None:
    catalog, arguments = project / "conf/base/catalog.yml", []
    if how == "rows":
        with (project / "src/tiny/nodes.py").open("a") as nodes:
            nodes.write(ROWS_NODE)
        registry = project / "src/tiny/pipeline_registry.py"
        registry.write_text(registry.read_text().replace("\n    return {", ROWS_PIPELINE))
        arguments = ["--pipeline", "checked"]
    deployment = register_and_forget(project, server, pool, *arguments)
    if how == "credentials":
        entry = "data/numbers.json\n  credentials: door"
        catalog.write_text(catalog.read_text().replace("data/numbers.json", entry))
        settings = project / "src/tiny/settings.py"
        if KEDRO_OLD:
            with settings.open("a") as file:
                file.write("from kedro.config import OmegaConfigLoader\n")
                file.write("CONFIG_LOADER_CLASS = OmegaConfigLoader\n")
    text = CREDENTIALS if how == "credentials" else re.sub(r'".*NO_SUCH.*"', "any", CREDENTIALS)
    (project / "conf/local/credentials.yml").write_text(text)
    flow_run_id = server.start_run(deployment, env="local")
    ended = server.finished(flow_run_id)
    assert ended["state_type"] == ("COMPLETED" if how == "success" else "FAILED"), ended["state"]
    secrets = ["first-s3cret", "second-s3cret", "third-s3cret"]
    assert_kept_nowhere(server, secrets)
    if how == "success":
        return
    message = ended["state"]["message"]
    assert ("invalid rows" if how == "rows" else "NO_SUCH_VARIABLE") in message
    assert eventually(lambda: traceback_in_the_log(server, flow_run_id)), "the log has it"
    server.await_idle_worker()
    retry = {"type": "SCHEDULED", "name": "AwaitingRetry"}
    server.post(f"/flow_runs/{flow_run_id}/set_state", {"state": retry})
    eventually(lambda: server.flow_run(flow_run_id)["state_type"] != "FAILED")
    assert server.finished(flow_run_id)["state_type"] == "FAILED"
    assert_kept_nowhere(server, secrets)
