"""What goes wrong around a run and inside of nodes, each with its expected end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    BIN,
    KEDRO_1,
    PREFECT_3,
    QUEUE,
    Server,
    children,
    eventually,
    fail,
    is_gone,
    process_of,
    register,
    register_and_forget,
    run,
    stop,
    write_config,
    write_pipeline,
)
from engines import Proxy, dask_cluster, s3_bucket, with_dask, with_s3
from sample_projects import ALL, ran
from test_projects import suspend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PREFECT_3 and KEDRO_1 and find_spec("distributed")), reason="its lane has it"
    ),
]


def flow_process(server: Server) -> int:
    """The process of the flow run that goes on."""
    found = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [line.split() for line in found.splitlines()]
    [pid] = [pid for pid, parent in pairs if parent == str(server.worker.pid)]
    return int(pid)


def hang(
    server: Server,
    pool: str,
    project: Path,
    engine: str = "threads",
    more: str = "",
) -> tuple[str, int]:
    """Start a flow run, and wait until one node hangs, and all before it are recorded."""
    (project / "hang").touch()
    write_config(project, f"task_runner: {{type: {engine}}}\n{more}")
    deployment = register_and_forget(project, server, pool, "--pipeline", "flaky")
    flow_run_id = server.start_run(deployment)
    before = set(ALL) - {"flaky"}

    def recorded() -> bool:
        runs = server.task_runs(flow_run_id)
        return before <= {name for name, run in runs.items() if run["state_name"] == "Completed"}

    def started() -> bool:
        state = server.flow_run(flow_run_id)["state"]
        assert state["type"] in ("SCHEDULED", "PENDING", "RUNNING"), state["message"]
        return (project / "pid.txt").exists()

    eventually(started)
    eventually(recorded)
    return flow_run_id, int((project / "pid.txt").read_text())


def resume(server: Server, project: Path, flow_run_id: str) -> list[str]:
    """Let the node succeed, retry the flow run, and return what has been run then."""
    ran(project)
    (project / "hang").unlink(missing_ok=True)
    (project / "mended").touch()
    flow_run = server.retry(flow_run_id)
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
    return ran(project)


def kill_flow(server: Server, flow_run_id: str) -> None:
    os.kill(flow_process(server), signal.SIGKILL)


def terminate_flow(server: Server, flow_run_id: str) -> None:
    os.kill(flow_process(server), signal.SIGTERM)


def cancel(server: Server, flow_run_id: str) -> None:
    state = {"type": "CANCELLING"}
    server.post(f"/flow_runs/{flow_run_id}/set_state", {"state": state})


@pytest.mark.parametrize(
    ("engine", "end", "state"),
    [
        ("processes", kill_flow, "CRASHED"),
        ("processes", terminate_flow, "CRASHED"),
        ("processes", cancel, "CANCELLED"),
        ("dask", kill_flow, "CRASHED"),
        ("dask", cancel, "CANCELLED"),
    ],
)
def test_a_run_that_is_ended_stops_its_nodes_at_once_and_can_be_resumed(
    server: Server,
    pool: str,
    flaky: Path,
    engine: str,
    end: Callable[[Server, str], None],
    state: str,
) -> None:
    flow_run_id, pid = hang(server, pool, flaky, engine)
    end(server, flow_run_id)
    eventually(lambda: is_gone(pid), seconds=20)
    assert server.finished(flow_run_id)["state_type"] == state
    eventually(lambda: not children(), seconds=5)
    assert ran(flaky) == ALL, "no other node has started"
    assert resume(server, flaky, flow_run_id) == ["flaky", "last"]


def test_a_cancelled_run_in_threads_ends_within_prefects_patience(
    server: Server, pool: str, flaky: Path
) -> None:
    flow_run_id, pid = hang(server, pool, flaky)
    cancel(server, flow_run_id)
    assert server.finished(flow_run_id)["state_type"] == "CANCELLED"
    assert is_gone(pid)
    assert resume(server, flaky, flow_run_id) == ["flaky", "keep", "last"]


def test_a_terminated_run_in_threads_starts_no_other_node(
    server: Server, pool: str, flaky: Path
) -> None:
    flow_run_id, _ = hang(server, pool, flaky)
    (flaky / "mended").touch()
    terminate_flow(server, flow_run_id)
    time.sleep(1)
    (flaky / "hang").unlink()
    assert server.finished(flow_run_id)["state_type"] == "CRASHED"
    assert ran(flaky) == ALL, "the node that ran has ended, and no other has started"
    assert resume(server, flaky, flow_run_id) == ["last"], "and what it saved counts"


@contextmanager
def own_worker(
    server: Server, folder: Path, name: str, env: dict[str, str] | None = None
) -> Iterator[Callable[[], Any]]:
    """Make a work pool, and yield what starts a worker for it."""
    server.create_pool(name)
    command = [BIN / "prefect", "worker", "start", "--pool", name, "--work-queue", QUEUE]
    workers: list[Any] = []
    before = vars(server).get("worker")

    def start() -> Any:
        log = f"worker-{name}-{len(workers)}"
        server.worker = server.start(command, log, folder, {**server.env, **(env or {})})
        workers.append(server.worker)
        return server.worker

    yield start
    for worker in workers:
        stop(worker)
    server.worker = before


def test_a_worker_may_be_killed_and_started_again(
    server: Server, flaky: Path, tmp_path: Path
) -> None:
    with own_worker(server, tmp_path, "killed") as start:
        worker = start()
        flow_run_id, _ = hang(server, "killed", flaky)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        start()
        time.sleep(5)
        (flaky / "mended").touch()
        (flaky / "hang").unlink()
        assert server.finished(flow_run_id)["state_type"] == "COMPLETED"
        assert ran(flaky) == sorted([*ALL, "last"]), "nothing has been run twice"


BARE = """
import time

from prefect import flow, task


@task
def wait():
    open("started", "w").close()
    time.sleep(300)


@flow
def bare():
    wait.submit().result()


if __name__ == "__main__":
    bare.from_source(".", "bare.py:bare").deploy("x", "terminated", work_queue_name="nightly")
"""


def test_a_terminated_worker_ends_its_runs_and_prefect_does_not_record_it(
    server: Server, flaky: Path, tmp_path: Path
) -> None:
    (tmp_path / "bare.py").write_text(BARE)
    with own_worker(server, tmp_path, "terminated") as start:
        start()
        flow_run_id, pid = hang(server, "terminated", flaky)
        done = run(sys.executable, "bare.py", cwd=tmp_path, env=server.env)
        assert done.returncode == 0, done.stdout + done.stderr
        bare = server.start_run("bare/x")
        eventually((tmp_path / "started").exists)
        os.kill(server.worker.pid, signal.SIGTERM)
        server.worker.wait(timeout=30)
        eventually(lambda: is_gone(pid))
        time.sleep(5)
        for found in (bare, flow_run_id):
            assert server.flow_run(found)["state_type"] == "RUNNING", "this is Prefect's own limit"
        # What the UI's "Change state" does; then it can be retried.
        crashed = {"state": {"type": "CRASHED"}, "force": True}
        server.post(f"/flow_runs/{flow_run_id}/set_state", crashed)
        start()
        assert resume(server, flaky, flow_run_id) == ["flaky", "keep", "last"]


@contextmanager
def slow_and_lossy(port: int) -> Iterator[str]:
    """What is said to a server comes half a second late; each 20th time the line is cut."""

    class Lossy(Proxy):
        count = 0
        dropped = 0

        def hand_on(self, source: socket.socket, target: socket.socket) -> None:
            try:
                to_server = target.getpeername()[1] == port
                while data := source.recv(65536):
                    if to_server:
                        self.count += 1
                        time.sleep(0.5)
                        if self.count % 20 == 8:  # in a short run, too, which sends few
                            self.dropped += 1
                            break
                    target.sendall(data)
            except OSError:
                pass
            for end in (source, target):
                end.close()

    proxy = Lossy(port)
    yield f"http://127.0.0.1:{proxy.port}/api"
    proxy.listener.close()
    assert proxy.dropped, "else this test shows nothing"


def test_a_slow_network_that_loses_requests_is_borne(server: Server, flaky: Path) -> None:
    (flaky / "mended").touch()
    with slow_and_lossy(server.port) as url:
        command = [sys.executable, flaky / "register_prefect_flow.py", "--run", "-p", "flaky"]
        process = server.start(command, "flow", flaky, {"PREFECT_API_URL": url})
        code = process.wait(timeout=170)
    assert code == 0, (server.folder / "flow.log").read_text()[-5000:]
    assert ran(flaky) == sorted([*ALL, "last"])
    [flow_run] = server.post("/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    assert flow_run["state_type"] == "COMPLETED"


MISBEHAVING = """
import logging
import logging.config
import os
import resource
import signal
import subprocess
import sys
import threading
import time


def forks(numbers):
    if os.fork() == 0:
        os._exit(7)
    os.wait()
    return 1


def never_ends(numbers):
    threading.Thread(target=lambda: time.sleep(1_000_000), daemon=True).start()
    return 2


def moves(numbers):
    os.chdir("/")
    sys.path.clear()
    return 3


def closes(numbers):
    print("before it is closed")
    sys.stdout.close()
    return 4


def replaces(numbers):
    logging.config.dictConfig({"version": 1, "root": {"handlers": []}})
    return 5


def after(*numbers):
    return sum(numbers)
"""


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_a_node_that_misbehaves_spoils_neither_its_run_nor_the_next(
    server: Server, pool: str, project: Path, engine: str
) -> None:
    names = ["forks", "never_ends", "moves", "closes", "replaces"]
    nodes = ", ".join(f"node({name}, 'numbers', 'of_{name}', name='{name}')" for name in names)
    inputs = [f"of_{name}" for name in names]
    write_pipeline(project, MISBEHAVING, f"{nodes}, node(after, {inputs}, 'total', name='after')")
    write_config(project, f"task_runner: {{type: {engine}, max_workers: 1}}")
    deployment = register_and_forget(project, server, pool)
    for _ in range(2):
        flow_run = server.finished(server.start_run(deployment))
        assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
        assert json.loads((project / "data/total.json").read_text()) == 15
        (project / "data/total.json").unlink()
    eventually(lambda: not children())


FULL = """
import resource
from pathlib import Path


class Large:
    def __init__(self):
        self.text = "x" * 400_000


def large(numbers):
    if not Path("mended").exists():  # as on a full disk: writing fails half way
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    return Large()


def reads(large):
    return len(large.text)
"""


@pytest.mark.parametrize("what", ["data", "checkpoint"])
def test_a_full_disk_fails_the_node_and_half_a_file_is_never_read(
    server: Server, pool: str, project: Path, what: str
) -> None:
    entry = "{type: pickle.PickleDataset, filepath: data/large.pickle, versioned: true}"
    if what == "data":
        with (project / "conf/base/catalog.yml").open("a") as catalog:
            catalog.write(f"\nlarge: {entry}\n")
    nodes = (
        "node(large, 'numbers', 'large', name='large'), node(reads, 'large', 'total', name='reads')"
    )
    write_pipeline(project, FULL, nodes)
    write_config(project, f"task_runner: {{type: processes}}\ncheckpoints: {project / 'kept'}")
    deployment = register_and_forget(project, server, pool)
    flow_run_id = server.start_run(deployment)
    flow_run = server.finished(flow_run_id)
    assert flow_run["state_type"] == "FAILED"
    assert "File too large" in flow_run["state"]["message"]
    place = "DatasetError: large: " if what == "data" else f"kept/{flow_run_id}/large-"
    assert place in flow_run["state"]["message"], "PickleDataset names itself, and no path"
    assert not (project / "data/total.json").exists()
    (project / "mended").touch()
    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert json.loads((project / "data/total.json").read_text()) == 400_000


LOGGING = """
version: 1
disable_existing_loggers: False
handlers:
  full: {class: logging.FileHandler, filename: /dev/full}
root: {handlers: [full]}
"""


def test_a_full_disk_for_log_files_ends_no_run(flaky: Path, server: Server) -> None:
    (flaky / "conf/logging.yml").write_text(LOGGING)
    (flaky / "mended").touch()
    env = {"KEDRO_LOGGING_CONFIG": str(flaky / "conf/logging.yml")}
    done = register(flaky, server, "--run", "-p", "flaky", env=env)
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr
    assert ran(flaky) == sorted([*ALL, "last"])


@with_s3
def test_a_denied_bucket_fails_the_node_with_the_path(
    server: Server, pool: str, flaky: Path
) -> None:
    import moto.settings

    with s3_bucket(flaky) as bucket:
        (flaky / "mended").touch()
        deployment = register_and_forget(flaky, server, pool, "-p", "flaky", "--env", "local")
        moto.settings.INITIAL_NO_AUTH_ACTION_COUNT = 0  # nobody has any rights
        try:
            flow_run_id = server.start_run(deployment)
            flow_run = server.finished(flow_run_id)
        finally:
            moto.settings.INITIAL_NO_AUTH_ACTION_COUNT = float("inf")
        assert flow_run["state_type"] == "FAILED"
        message = flow_run["state"]["message"]
        assert re.search(r"Dataset '(kept|aside)', which node '(keep|aside)' makes", message)
        assert f"s3://bucket/handed_on/{flow_run_id}/" in message
        assert "does not exist in our records" in message, "the bucket's own words"
        assert not list(bucket.objects.all())
        ran(flaky)
        assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
        assert ran(flaky) == ["aside", "finish_aside", "flaky", "keep", "last"]


PLANTED = """
import os
import pickle
import sys


class Planted:
    def __reduce__(self):
        return os.mkdir, (sys.argv[2],)


with open(sys.argv[1], "wb") as file:
    pickle.dump(Planted(), file)
"""


def test_only_a_runs_own_checkpoints_are_unpickled(server: Server, pool: str, flaky: Path) -> None:
    place = flaky / "kept"
    write_config(flaky, f"checkpoints: {place}")
    flow_run_id = fail(server, pool, flaky)
    (flaky / "plant.py").write_text(PLANTED)
    own = place / flow_run_id
    [name] = [path.name for path in own.iterdir() if path.name.startswith("kept-")]
    other = place / "00000000-0000-4000-8000-000000000000"
    other.mkdir()
    for path in (place / name, other / name, own / f"{name}.part", own / "more.pickle"):
        run(sys.executable, "plant.py", path, flaky / "was read", cwd=flaky)
    assert resume(server, flaky, flow_run_id) == ["flaky", "last"]
    assert not (flaky / "was read").exists()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@with_dask
@pytest.mark.parametrize("retries", [0, 1])
def test_a_lost_dask_worker_fails_its_node_which_runs_again_as_retries_say(
    server: Server, pool: str, flaky: Path, tmp_path: Path, retries: int
) -> None:
    with dask_cluster(tmp_path) as (port, _):
        runner = f"dask, address: 'tcp://127.0.0.1:{port}'"
        tasks = f"tasks: {{flaky: {{retries: {retries}}}}}"
        flow_run_id, pid = hang(server, pool, flaky, runner, tasks)
        (flaky / "mended").touch()
        os.kill(parent_of(pid), signal.SIGKILL)
        eventually(lambda: is_gone(pid), seconds=5)
        (flaky / "hang").unlink()
        flow_run = server.finished(flow_run_id)
        if retries:
            assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
            assert ran(flaky) == sorted([*ALL, "flaky", "last"])
        else:
            assert "ran node 'flaky' is lost with its worker" in flow_run["state"]["message"]
            assert ran(flaky) == ALL
            assert resume(server, flaky, flow_run_id) == ["flaky", "last"]


@with_dask
def test_a_lost_dask_scheduler_ends_the_run(
    server: Server, pool: str, flaky: Path, tmp_path: Path
) -> None:
    with dask_cluster(tmp_path) as (port, processes):
        runner = f"dask, address: 'tcp://127.0.0.1:{port}'"
        flow_run_id, pid = hang(server, pool, flaky, runner)
        os.kill(processes[0].pid, signal.SIGKILL)
        assert server.finished(flow_run_id)["state_type"] == "FAILED"
        assert ran(flaky) == ALL
        eventually(lambda: is_gone(pid))


def test_a_server_may_be_away_for_minutes_in_mid_run(flaky: Path) -> None:
    for name in ("hang", "mended", "last_hangs"):
        (flaky / name).touch()
    away = Server(flaky.parent)
    try:
        eventually(away.is_up)
        command = [sys.executable, flaky / "register_prefect_flow.py", "--run", "-p", "flaky"]
        process = away.start(command, "flow", flaky, away.env)
        eventually(lambda: (flaky / "pid.txt").exists() and (flaky / "data/side.json").exists())
        stop(away.process)
        time.sleep(60)
        (flaky / "hang").unlink()  # one node ends and another one starts without a server
        time.sleep(60)
        away.start_server()
        eventually(away.is_up)
        (flaky / "last_hangs").unlink()
        assert process.wait(timeout=120) == 0, (away.folder / "flow.log").read_text()[-5000:]
        assert ran(flaky) == sorted([*ALL, "last"]), "nothing has been run twice"
        [flow_run] = away.post("/flow_runs/filter", {})
        assert flow_run["state_type"] == "COMPLETED"
        states = dict.fromkeys(["kedro_init", *ALL, "last"], "Completed")
        away.await_states(flow_run["id"], states)
    finally:
        stop(away.process)


CLOCK = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.mark.skipif(CLOCK is None, reason="needs Debian's libfaketime")
def test_a_clock_may_be_set_back_between_attempts(server: Server, pool: str, flaky: Path) -> None:
    own = ("--deployment_name", "past")  # for a deployment keeps its job variables
    flow_run_id = fail(server, pool, flaky, *own)
    [version] = [path.name for path in (flaky / "data/saved.pickle").iterdir()]
    (flaky / "mended").touch()
    (flaky / "last_fails").touch()
    past = {"LD_PRELOAD": str(CLOCK), "FAKETIME": "-1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    deployment = server.flow_run(flow_run_id)["deployment_id"]
    server.request("PATCH", f"/deployments/{deployment}", {"job_variables": {"env": past}})
    assert server.retry(flow_run_id)["state_type"] == "FAILED"
    assert ran(flaky) == ["flaky", "keep", "last"]
    runs = server.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run_id]}}})
    first, second = sorted(
        (run["flow_run_run_count"], run["start_time"]) for run in runs if run["name"] == "flaky"
    )
    assert second[1] < first[1], "else the clock was not set back"
    (flaky / "last_fails").unlink()
    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert ran(flaky) == ["last"], "the second attempt counts, though it seems to be older"
    for name in ("saved.pickle", "kept.pickle", "result.json"):
        assert [path.name for path in (flaky / "data" / name).iterdir()] == [version]


def test_flow_runs_that_start_in_the_same_millisecond_have_versions_of_their_own(
    server: Server, pool: str, flaky: Path
) -> None:
    (flaky / "mended").touch()
    with (flaky / "src/tiny/settings.py").open("a") as settings:
        settings.write(
            "import kedro.io.core as core\n"
            "core.generate_timestamp = lambda: '2026-11-25T03.00.00.000Z'\n"
        )
    deployment = register_and_forget(flaky, server, pool, "--pipeline", "flaky")
    flow_runs = [server.start_run(deployment) for _ in range(2)]
    for flow_run_id in flow_runs:
        flow_run = server.finished(flow_run_id)
        assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
    versions = [path.name for path in (flaky / "data/result.json").iterdir()]
    assert len(versions) == 2
    assert all(version.startswith("2026-11-25T03.00.00.000") for version in versions)


# How many flow runs at once, and how many after each other; LOAD="20 50" takes half an hour.
AT_ONCE, IN_A_ROW = (int(number) for number in os.environ.get("LOAD", "4 4").split())


def test_many_runs_complete_and_leave_nothing_with_the_worker(
    server: Server, project: Path, tmp_path: Path
) -> None:
    temporary, home = tmp_path / "temporary", tmp_path / "home"
    temporary.mkdir()
    env = {"TMPDIR": str(temporary), "PREFECT_HOME": str(home)}
    with own_worker(server, tmp_path, "loaded", env) as start:
        worker = start()
        deployment = register_and_forget(project, server, "loaded")

        def run_many(count: int, at_once: int) -> None:
            for _ in range(count // at_once):
                flow_runs = [server.start_run(deployment) for _ in range(at_once)]
                for flow_run_id in flow_runs:
                    flow_run = server.finished(flow_run_id)
                    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]["message"]
            server.await_idle_worker(worker)

        def left() -> dict[str, int]:
            status = Path(f"/proc/{worker.pid}/status").read_text()
            return {
                "open files": len(list(Path(f"/proc/{worker.pid}/fd").iterdir())),
                "temporary files": len(list(temporary.rglob("*"))),
                "stored files": len([p for p in home.rglob("*") if p.is_file()]),
                "kB": int(re.search(r"VmRSS:\s+(\d+)", status)[1]),
            }

        run_many(AT_ONCE, at_once=AT_ONCE)
        before = left()
        run_many(IN_A_ROW, at_once=1)
        after = left()
        print("load", AT_ONCE, IN_A_ROW, before, after)
        versions = list((project / "data/report.pickle").iterdir())
        assert len(versions) == AT_ONCE + IN_A_ROW
        assert after.pop("kB") < before.pop("kB") + 20_000
        assert all(after[what] <= before[what] + 2 for what in before), (before, after)


# ---- Faults with each of the engines; Dask is a cluster that is there before and after ----


@contextmanager
def engine_of(kind: str, folder: Path) -> Iterator[str]:
    """What prefect.yml says of an engine, which is there meanwhile."""
    if kind == "processes":
        yield kind
        return
    with dask_cluster(folder) as (port, processes):
        try:
            yield f"dask, address: 'tcp://127.0.0.1:{port}'"
        finally:  # the cluster itself does not end when a test fails
            for process in reversed(processes):
                stop(process)


@pytest.mark.parametrize(
    ("end", "state"),
    [(kill_flow, "CRASHED"), (terminate_flow, "CRASHED"), (cancel, "CANCELLED")],
)
def test_a_run_that_is_ended_stops_its_nodes_on_a_cluster(
    server: Server,
    pool: str,
    flaky: Path,
    tmp_path: Path,
    end: Callable[[Server, str], None],
    state: str,
) -> None:
    with engine_of("dask", tmp_path) as engine:
        flow_run_id, pid = hang(server, pool, flaky, engine)
        end(server, flow_run_id)
        eventually(lambda: is_gone(pid), seconds=5)
        assert server.finished(flow_run_id)["state_type"] == state
        assert ran(flaky) == ALL, "no other node has started"
        assert resume(server, flaky, flow_run_id) == ["flaky", "last"]


@pytest.mark.parametrize(
    ("kind", "more", "again"),
    [
        # Its own checkpoints are lost with a machine: what was in them is made again.
        ("processes", "", ["aside", "finish_aside", "flaky", "keep", "last"]),
        ("processes", "checkpoints: shared", ["flaky", "last"]),
        ("dask", "checkpoints: shared", ["flaky", "last"]),
    ],
)
def test_a_run_whose_machine_is_lost_goes_on_with_another_worker(
    server: Server, flaky: Path, tmp_path: Path, kind: str, more: str, again: list[str]
) -> None:
    name, other = f"lost-{kind}-{bool(more)}", tmp_path / "other"
    other.mkdir()
    home = {"PREFECT_HOME": str(tmp_path / "home")}
    with engine_of(kind, tmp_path) as engine, own_worker(server, tmp_path, name, home) as start:
        first = start()
        flow_run_id, pid = hang(server, name, flaky, engine, more)
        flow = flow_process(server)
        for lost in (first.pid, flow):  # the worker first, or it would tell
            os.kill(lost, signal.SIGKILL)
        first.wait()
        eventually(lambda: is_gone(pid), seconds=5)
        assert server.flow_run(flow_run_id)["state_type"] == "RUNNING", "Prefect knows no better"
        # What the UI's "Change state" does; then it can be retried.
        crashed = {"state": {"type": "CRASHED"}, "force": True}
        server.post(f"/flow_runs/{flow_run_id}/set_state", crashed)
        pool = ["--pool", name, "--work-queue", QUEUE, "--name", "other"]
        env = {**server.env, "PREFECT_HOME": str(other / "home")}
        command = [BIN / "prefect", "worker", "start", *pool]
        server.worker = server.start(command, f"worker-{name}-other", other, env)
        try:
            assert resume(server, flaky, flow_run_id) == again
        finally:
            stop(server.worker)


AT_ONCE_NODES = """
import os
import time
from pathlib import Path


def own(numbers, factor):
    return factor, time.time_ns()


def meet(own, factor):
    Path(f"pid_{factor}.txt").write_text(str(os.getpid()))
    while Path(f"hang_{factor}").exists():
        time.sleep(0.1)
    return own, factor


def compare(own, met, factor):
    return [*own, *met[0], met[1], factor]
"""


@pytest.mark.parametrize("kind", ["processes", "dask"])
def test_two_runs_of_a_deployment_at_once_have_nothing_in_common(
    server: Server, pool: str, project: Path, tmp_path: Path, kind: str
) -> None:
    nodes = (
        "node(own, ['numbers', 'params:factor'], 'own', name='own'),"
        "node(meet, ['own', 'params:factor'], 'met', name='meet'),"
        "node(compare, ['own', 'met', 'params:factor'], 'compared', name='compare')"
    )
    write_pipeline(project, AT_ONCE_NODES, nodes)
    with (project / "conf/base/catalog.yml").open("a") as catalog:
        entry = "{type: json.JSONDataset, filepath: data/compared.json, versioned: true}"
        catalog.write(f"\ncompared: {entry}\n")
    flow_runs: dict[int, str] = {}
    with engine_of(kind, tmp_path) as engine:
        write_config(project, f"task_runner: {{type: {engine}}}")
        deployment = register_and_forget(project, server, pool)
        for factor in (5, 7):
            (project / f"hang_{factor}").touch()
            flow_runs[factor] = server.start_run(deployment, runtime_params={"factor": factor})
        pids = {factor: project / f"pid_{factor}.txt" for factor in flow_runs}
        eventually(lambda: all(path.exists() and path.read_text() for path in pids.values()))
        os.kill(process_of(server, flow_runs[7]), signal.SIGKILL)
        eventually(lambda: is_gone(int(pids[7].read_text())), seconds=5)
        assert server.finished(flow_runs[7])["state_type"] == "CRASHED"
        assert not is_gone(int(pids[5].read_text())), "that of the other one runs"
        for factor in flow_runs:
            (project / f"hang_{factor}").unlink()
        flow_run = server.finished(flow_runs[5])
        assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
        compared = project / "data/compared.json"
        [first] = compared.glob("*/compared.json")
        flow_run = server.retry(flow_runs[7])
        assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
    found = [json.loads(path.read_text()) for path in compared.glob("*/compared.json")]
    for factor, drawn, *others in found:
        assert others == [factor, drawn, factor, factor]
    assert sorted(values[0] for values in found) == [5, 7]
    assert json.loads(first.read_text())[0] == 5


@contextmanager
def full_disk(folder: Path) -> Iterator[Path]:
    """A disk of 1 MB with nothing but a file that takes it up."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr}")
    try:
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        yield folder / "filler"
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


LARGE = """
def large(numbers, factor):
    return factor * 133_000 * "x"


def reads(large):
    return len(large)
"""


@pytest.mark.parametrize("kind", ["processes", "dask"])
def test_a_full_disk_for_checkpoints_fails_the_run_which_goes_on_when_there_is_room(
    server: Server, pool: str, project: Path, tmp_path: Path, kind: str
) -> None:
    nodes = (
        "node(large, ['numbers', 'params:factor'], 'large', name='large'),"
        "node(reads, 'large', 'total', name='reads')"
    )
    write_pipeline(project, LARGE, nodes)
    with full_disk(tmp_path / "disk") as filler, engine_of(kind, tmp_path) as engine:
        write_config(project, f"task_runner: {{type: {engine}}}\ncheckpoints: {filler.parent}")
        flow_run_id = server.start_run(register_and_forget(project, server, pool))
        own = filler.parent / flow_run_id

        def failure(flow_run: dict[str, Any]) -> str:
            assert flow_run["state_type"] == "FAILED"
            assert "No space left on device" in flow_run["state"]["message"]
            assert not (project / "data/total.json").exists()
            assert not list(own.glob("large-*.pickle")), "it has half a file"
            return flow_run["state"]["message"]

        assert f"cannot be pickled to {own}/parameters" in failure(server.finished(flow_run_id))
        os.truncate(filler, filler.stat().st_size - 200_000)
        assert f"cannot be pickled to {own}/large" in failure(server.retry(flow_run_id))
        filler.unlink()
        flow_run = server.retry(flow_run_id)
        assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
        assert json.loads((project / "data/total.json").read_text()) == 399_000
        assert not list(filler.parent.iterdir()), "what was half written is gone as well"


def test_a_run_that_is_suspended_on_dask_ends_and_goes_on_where_it_was(
    server: Server, pool: str, flaky: Path, tmp_path: Path
) -> None:
    with engine_of("dask", tmp_path) as engine:
        flow_run_id, pid = hang(server, pool, flaky, engine)
        (flaky / "mended").touch()
        suspend(server, flow_run_id)
        eventually(lambda: server.flow_run(flow_run_id)["state_name"] == "Suspended")
        time.sleep(12)  # a process looks for this every 10 s, or is told
        (flaky / "hang").unlink()
        server.await_idle_worker()
        assert server.flow_run(flow_run_id)["state_name"] == "Suspended"
        assert ran(flaky) == ALL, "nothing new has started"
        eventually(lambda: is_gone(pid), seconds=5)
        server.post(f"/flow_runs/{flow_run_id}/resume", {})
        flow_run = server.finished(flow_run_id)
        assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
        assert ran(flaky) == ["last"]
