"""A real Prefect server, agents and workers, and a tiny real Kedro project, for every lane."""

import atexit
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "register_prefect_flow.py"
BIN = Path(sys.executable).parent

# What this run of the tests keeps; it goes after all that would still write into it.
OWN = Path(tempfile.mkdtemp(prefix="tests-"))
atexit.register(shutil.rmtree, OWN, ignore_errors=True)

# Before anything imports Prefect or Kedro: nothing of this machine's user may leak in.
os.environ.update(
    TESTS=str(OWN),
    PREFECT_HOME=str(OWN / "prefect-home"),
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_API_BLOCKS_REGISTER_ON_START="false",  # a third of what a server does when it starts
    PREFECT_WORKER_QUERY_SECONDS="3",  # each second, it was most of what an idle server did
    PREFECT_AGENT_QUERY_INTERVAL="3",
    COLUMNS="200",  # rich would break messages to the width of a terminal that is not there
)
for _name in ("PREFECT_API_URL", "PREFECT_PROFILE", "KEDRO_ENV", "KEDRO_LOGGING_CONFIG"):
    os.environ.pop(_name, None)

# What a shell starts in the background ignores Ctrl-C, and so would what is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

import kedro  # noqa: E402
import kedro.io  # noqa: E402
import prefect  # noqa: E402
from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: E402
from sample_projects import ALL, ran, write_project, write_tiny_project  # noqa: E402

PREFECT_3 = int(prefect.__version__.split(".")[0]) >= 3
DOCUMENTED = prefect.__version__ == "2.10.17"
KEDRO_OLD = kedro.__version__.startswith("0.18")
KEDRO_1 = int(kedro.__version__.split(".")[0]) >= 1
MemoryDataset = getattr(kedro.io, "MemoryDataset", None) or kedro.io.MemoryDataSet  # 0.18.12
DASK = pytest.param(
    "dask",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(not find_spec("distributed"), reason="not installed"),
    ],
)
POOL_TYPE = "prefect-agent" if DOCUMENTED else "process"
QUEUE = "nightly"


def pytest_report_header() -> str:
    """Say which lane this is."""
    python = sys.version.split()[0]
    return f"Kedro {kedro.__version__}, Prefect {prefect.__version__}, Python {python}"


def run(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None, timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, nobody at the keyboard, and return its output."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PWD": str(cwd), **(env or {})},  # as a shell does
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",  # nodes may write anything
        timeout=timeout,
    )


@lru_cache
def new_database() -> list[Path]:
    """The files of Prefect's database as its first start makes them, which takes ten seconds."""
    # `.ci/run` names a folder, in which suites of one lane find what the first of them has made.
    home = Path(os.environ.get("NEW_DATABASES", OWN), prefect.__version__)
    if not home.exists():
        made = OWN / "home"
        command = (BIN / "prefect", "server", "database", "upgrade", "--yes")
        done = run(*command, cwd=made.parent, env={"PREFECT_HOME": str(made)})
        assert done.returncode == 0, done.stdout + done.stderr
        with suppress(OSError):  # another suite may have been faster
            made.rename(home)
    return list(home.glob("prefect.db*"))


def prefect_home(folder: Path) -> Path:
    """A folder for all that Prefect keeps, with a database that has nothing in it yet."""
    folder.mkdir(exist_ok=True)
    for path in new_database():
        shutil.copy(path, folder)
    return folder


def eventually(ask: Callable[[], Any], seconds: float = 180, or_show: Any = "") -> Any:
    """Ask until the answer is true, and return it; where several suites run, that takes long."""
    start = time.monotonic()
    while not (answer := ask()):
        waited = time.monotonic() - start
        assert waited < seconds, f"not so within {seconds} s: {or_show}"
        time.sleep(min(0.3 + waited / 4, 2))  # a server that is asked all the time is slower
    return answer


class Server:
    """A Prefect server process, and what tests ask it and do with it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.env = {"PREFECT_API_URL": self.url}
        self.folder = prefect_home(folder)
        self.worker: subprocess.Popen[bytes]
        self.start_server()

    def start_server(self) -> None:
        """Start the server, for the first time or again, with the same address and database."""
        eventually(self.port_is_free)  # its last connections may linger
        command = [BIN / "prefect", "server", "start", "--port", str(self.port)]
        env = {"PREFECT_HOME": str(self.folder), "PREFECT_UI_API_URL": self.url}
        self.process = self.start(command, "server", cwd=self.folder, env=env)

    def port_is_free(self) -> bool:
        with socket.socket() as trial, suppress(OSError):
            trial.bind(("127.0.0.1", self.port))
            return True
        return False

    def start(
        self, command: list[Any], name: str, cwd: Path, env: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a process that goes on, in a group of its own, its output in a file."""
        with open(self.folder / f"{name}.log", "wb") as log:
            return subprocess.Popen(
                [str(part) for part in command],
                cwd=cwd,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_up(self) -> bool:
        assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=2).status == 200
        except OSError:
            return False

    def post(self, path: str, body: Any) -> Any:
        return self.request("POST", path, body)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    return json.loads(response.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != 503:  # its database is busy: Prefect's client waits as well
                    raise
                time.sleep(1)

    def prefect(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return run(BIN / "prefect", *arguments, cwd=cwd, env=self.env)

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        return self.request("GET", f"/flow_runs/{flow_run_id}")

    def task_runs(self, flow_run_id: str) -> dict[str, dict[str, Any]]:
        """The task runs of a flow run, by the names of their tasks."""
        body = {"flow_runs": {"id": {"any_": [flow_run_id]}}}
        # Those of a node that has been run again come in any order: the last one counts.
        runs = sorted(self.post("/task_runs/filter", body), key=lambda run: run["created"])
        # Prefect adds a number to a task's name where the run has no name of its own: kedro_init,
        # and on Prefect 2 what was not run.
        return {re.sub(r"-\w{1,3}$", "", run["name"]): run for run in runs}

    def logs(self, flow_run_id: str) -> list[dict[str, Any]]:
        """The log lines of a flow run and its task runs, in the order of their times."""
        logs = {"flow_run_id": {"any_": [flow_run_id]}}
        return self.post("/logs/filter", {"logs": logs, "sort": "TIMESTAMP_ASC"})

    def await_states(self, flow_run_id: str, expected: dict[str, str]) -> None:
        """Wait until the task runs are in these states; Prefect 3 records them late."""
        states: dict[str, str] = {}

        def as_expected() -> bool:
            runs = self.task_runs(flow_run_id)
            states.clear()
            states.update({name: run["state_name"] for name, run in runs.items()})
            return states == expected

        eventually(as_expected, or_show=states)

    def trigger(self, deployment: str, cwd: Path, **parameters: Any) -> str:
        """Start a run of a deployment from the command line, and return its id."""
        given = [f"--param={name}={json.dumps(value)}" for name, value in parameters.items()]
        done = self.prefect("deployment", "run", deployment, *given, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr
        return re.search(r"flow-runs?/flow-run/([0-9a-f-]{36})|UUID: ([0-9a-f-]{36})", done.stdout)[
            0
        ][-36:]

    def create_pool(self, name: str) -> None:
        """Create a work pool, of the lane's type, and its queue."""
        # The agent lane's Prefect knows its own pool type only online: so not from the command line.
        self.post("/work_pools/", {"name": name, "type": POOL_TYPE})
        self.post(f"/work_pools/{name}/queues", {"name": QUEUE})

    def start_run(self, deployment: str, **parameters: Any) -> str:
        """Start a run of a deployment as the UI does, which takes less than the command line."""
        found = self.request("GET", f"/deployments/name/{deployment}")["id"]
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return self.post(f"/deployments/{found}/create_flow_run", body)["id"]

    def await_idle_worker(self, worker: subprocess.Popen[bytes] | None = None) -> None:
        """Wait until the agent or worker has seen its flow runs' processes end.

        It may call a flow run crashed that is retried before.
        """

        def has_no_child() -> bool:
            parents = subprocess.run(["ps", "-A", "-o", "ppid="], capture_output=True, text=True)
            return str((worker or self.worker).pid) not in parents.stdout.split()

        eventually(has_no_child)
        time.sleep(5)  # for what it then tells the server: where several suites run, 3 s later

    def finished(self, flow_run_id: str) -> dict[str, Any]:
        """Wait until a flow run has ended, and return it."""

        def ended() -> dict[str, Any] | None:
            flow_run = self.flow_run(flow_run_id)
            final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
            return flow_run if flow_run["state_type"] in final else None

        return eventually(ended)

    def retry(self, flow_run_id: str) -> dict[str, Any]:
        """Do what the button in the UI does, and wait for the end."""
        self.await_idle_worker()
        state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
        before = self.flow_run(flow_run_id)["state"]["id"]
        self.post(f"/flow_runs/{flow_run_id}/set_state", {"state": state})
        eventually(lambda: self.flow_run(flow_run_id)["state"]["id"] != before)
        return self.finished(flow_run_id)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a process that was started here, and what it started, by their own group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of the lane."""
    server = Server(tmp_path_factory.mktemp("prefect-server"))
    try:
        eventually(server.is_up)
        yield server
    finally:
        stop(server.process)


@pytest.fixture
def in_process(server: Server) -> Iterator[Server]:
    """Let flows of this process use the server."""
    with temporary_settings(updates={PREFECT_API_URL: server.url}):
        yield server


@pytest.fixture(scope="session")
def pool(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A work pool, and an agent or worker that was started far from any project."""
    name, elsewhere = "pool", tmp_path_factory.mktemp("elsewhere")
    server.create_pool(name)
    kind = "agent" if DOCUMENTED else "worker"
    command = [BIN / "prefect", kind, "start", "--pool", name, "--work-queue", QUEUE]
    server.worker = server.start(command, kind, elsewhere, server.env)
    yield name
    stop(server.worker)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The tiny Kedro project with the script copied in."""
    return copy_in(write_tiny_project(tmp_path / "project"))


@pytest.fixture
def flaky(tmp_path: Path) -> Path:
    """A project whose pipeline fails until it is mended."""
    return copy_in(write_project(tmp_path / "project", "flaky"))


def copy_in(project: Path) -> Path:
    """Do what the README tells a user to do."""
    shutil.copy(SCRIPT, project)
    shutil.copy(SCRIPT.parent / ".telemetry.example", project / ".telemetry")
    return project


def register(project: Path, server: Server | None, *arguments: str, **options: Any) -> Any:
    """Run the script in a process of its own."""
    env = {**(server.env if server else {}), **options.pop("env", {})}
    script = project / "register_prefect_flow.py"
    return run(sys.executable, script, *arguments, cwd=options.pop("cwd", project), env=env)


def schedules_of(deployment: dict[str, Any]) -> list[Any]:
    """The schedules of a deployment, and whether each is active."""
    if "schedules" in deployment:
        return [(found["schedule"], found["active"]) for found in deployment["schedules"]]
    return [(deployment["schedule"], deployment["is_schedule_active"])]


def kedro_run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The reference: `kedro run` of the same project."""
    return run(sys.executable, "-m", "kedro", "run", "--env", "base", *arguments, cwd=project)


def written_files(project: Path) -> dict[str, bytes]:
    """Every file below data/, by its path, with save versions made alike."""
    version = re.compile(r"\d{4}-\d\d-\d\dT\d\d\.\d\d\.\d\d\.\d{3,6}Z")
    data = project / "data"
    return {
        version.sub("VERSION", path.relative_to(data).as_posix()): path.read_bytes()
        for path in sorted(data.rglob("*"))
        if path.is_file()
    }


def write_config(project: Path, text: str) -> None:
    (project / "conf/base/prefect.yml").write_text(text + "\n")


def write_pipeline(project: Path, functions: str, nodes: str) -> None:
    """Give the project one pipeline, of these nodes."""
    (project / "src/tiny/own.py").write_text(functions)
    (project / "src/tiny/pipeline_registry.py").write_text(
        "from kedro.pipeline import node, pipeline\nfrom tiny.own import *\n\n\n"
        f"def register_pipelines():\n    return {{'__default__': pipeline([{nodes}])}}\n"
    )


def register_and_forget(project: Path, server: Server, pool: str, *arguments: str) -> str:
    """Register, remove the traces of that, and return the deployment's full name."""
    arguments = ("--work_pool_name", pool, "--work_queue_name", QUEUE, *arguments)
    done = register(project, server, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (project / "trace.jsonl").unlink()
    return re.search(r"Registered deployment '(.+)' with id", done.stdout)[1]


def fail(server: Server, pool: str, project: Path, *arguments: str) -> str:
    """Let a flow run fail, and return its id."""
    deployment = register_and_forget(project, server, pool, "--pipeline", "flaky", *arguments)
    flow_run_id = server.start_run(deployment)
    assert server.finished(flow_run_id)["state_type"] == "FAILED"
    assert ran(project) == ALL
    return flow_run_id


def children() -> list[str]:
    """The processes that run nodes, of these tests: others may run beside them."""
    found = subprocess.run(["ps", "-A", "-o", "pid=,args="], capture_output=True, text=True).stdout
    words = {sys.executable, "-c", "importlib.util,"}
    lines = [line for line in found.splitlines() if words <= {*line.split()}]
    return [line for line in lines if has_started_here(line.split()[0])]


def has_started_here(pid: str) -> bool:
    with suppress(OSError):  # it may have ended
        return f"TESTS={OWN}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    return False


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def process_of(server: Server, flow_run_id: str) -> int:
    """The process of one of several flow runs that go on."""
    command = ["ps", "axeww", "-o", "ppid=,pid=,args="]  # and the environment
    found = subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
    lines = [line.split() for line in found.splitlines() if flow_run_id in line]
    [pid] = [int(pid) for parent, pid, *_ in lines if parent == str(server.worker.pid)]
    return pid
