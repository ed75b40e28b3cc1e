"""Nodes in other processes, here and on Dask; and what they hand on, in checkpoints."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import (
    BIN,
    PREFECT_3,
    Server,
    children,
    copy_in,
    eventually,
    fail,
    is_gone,
    register,
    run,
    stop,
    write_config,
    write_pipeline,
)
from engines import ENGINES, Proxy, dask_cluster, s3_bucket, with_dask, with_s3
from in_one_process import calls, compare
from kedro.pipeline.node import Node
from sample_projects import KEDRO, mend, ran, write_features_project, write_tiny_project
from test_features import FEATURES

pytestmark = pytest.mark.skipif(
    not PREFECT_3 or KEDRO < (0, 19), reason="needs Kedro 0.19 and Prefect 3"
)


@pytest.mark.one_lane
@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_does_what_kedro_run_does(tmp_path: Path, server: Server, engine: str) -> None:
    names = ["newest version"]
    if engine == "processes":
        names += ["everything", "nested params", "transcoding", "partitions", "hooks", "failure"]
    project = copy_in(write_features_project(tmp_path / "project"))
    report = project / "data/report.pickle/2021-01-01T00.00.00.000Z/report.pickle"
    report.parent.mkdir(parents=True)
    report.write_bytes(b"\x80\x04}\x94\x8c\x05total\x94K\xc8s.")
    write_config(project, f"task_runner: {{type: {engine}}}")
    for name, pair in zip(
        names, compare(project, server, [FEATURES[name][0] for name in names]), strict=True
    ):
        assert pair["prefect"]["error"] == pair["kedro"]["error"], name
        assert pair["prefect"]["files"] == pair["kedro"]["files"], name
        assert calls(pair["prefect"]) == calls(pair["kedro"]), name
    eventually(lambda: not children())


SAID = ("first", "second", "third", "fourth")
TALKING = """
import logging


def talk(numbers, me):
    logging.getLogger("tiny.own").info("%s: first", me)
    print(f"{me}: second")
    logging.getLogger("elsewhere").warning("%s: third", me)
    print(f"{me}: fo", end="")
    print("urth")
    for number in range(2000):
        print(f"{me}: line {number} of many")
    logging.getLogger("tiny.own").debug("%s: not shown", me)
    return me


def talk_a(numbers):
    return talk(numbers, "a")


def talk_b(numbers):
    return talk(numbers, "b")
"""


@pytest.mark.one_lane
@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_what_nodes_say_is_in_the_output_and_what_they_log_in_prefect(
    project: Path, server: Server, engine: str
) -> None:
    write_pipeline(
        project,
        TALKING,
        "node(talk_a, 'numbers', 'a', name='a'), node(talk_b, 'numbers', 'b', name='b')",
    )
    write_config(project, f"task_runner: {{type: {engine}}}")
    done = register(project, server, "--run")
    assert done.returncode == 0, done.stdout + done.stderr
    for me in "ab":
        said = re.findall(rf"\b{me}: (?:first|second|third|fo|not).*", done.stdout + done.stderr)
        assert sorted(said) == sorted(f"{me}: {what}" for what in SAID)
    # Lines of nodes that run at the same time do not mix.
    of_many = [line for line in done.stdout.splitlines() if " of many" in line]
    lines = {f"{me}: line {number} of many" for me in "ab" for number in range(2000)}
    assert len(of_many) == len(lines)
    assert {*of_many} == lines
    [flow_run] = server.post("/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})

    def shown(me: str) -> list[str]:
        """The node's own lines on the page of its task run."""
        if not (task_run := server.task_runs(flow_run["id"]).get(me)):
            return []
        lines = server.logs(flow_run["id"])
        own = [line["message"].strip() for line in lines if line["task_run_id"] == task_run["id"]]
        return [line for line in own if line.startswith(f"{me}: ")]

    # Other loggers are shown where Prefect is told so; what is printed is in the output only.
    for me in "ab":
        eventually(lambda me=me: shown(me) == [f"{me}: first"])


FAILING = """
import os
import signal
import sys
import threading
import time
from pathlib import Path


class Own(Exception):
    def __init__(self, code, why):
        super().__init__(f"{code}: {why}")
        self.code = code


class Locked(Exception):
    def __init__(self):
        super().__init__("it holds a lock")
        self.lock = threading.Lock()


def own(numbers):
    raise Own(7, "why")


def known(numbers):
    raise KeyError("this one")


class Twice(Exception):
    def __init__(self, code, why):
        super().__init__(f"{code}: {why}")


def twice(numbers):
    raise Twice(7, "why")


def locked(numbers):
    raise Locked


def ends(numbers):
    os._exit(3)


def leaves(numbers):
    sys.exit(4)


def grows(numbers):
    raise MemoryError("no room")


def interrupts(numbers):
    raise KeyboardInterrupt


def dies_once(numbers):
    path = Path("died.txt")
    if not path.exists():
        path.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return 1


def sleeps(numbers):
    Path("sleeps.txt").write_text(str(os.getpid()))
    time.sleep(30)
    Path("slept.txt").write_text("")
    return 1


def fine(numbers):
    return 1
"""
FAILURES = {
    "own": "Own: 7: why",
    "known": "KeyError: 'this one'",
    "locked": "Locked: it holds a lock",
    "twice": "Twice: 7: why",
    "ends": "RuntimeError: The process that ran node 'ends' died with exit code 3",
    "leaves": "RuntimeError: Node 'leaves' called sys.exit(4)",
    "grows": "MemoryError: no room",
}


@pytest.mark.slow
@pytest.mark.one_lane
@pytest.mark.parametrize("engine", ENGINES)
def test_nodes_fail_with_their_own_exception(project: Path, server: Server, engine: str) -> None:
    names = [*FAILURES, "dies_once", "fine"]
    nodes = ", ".join(f"node({name}, 'numbers', 'of_{name}', name='{name}')" for name in names)
    write_pipeline(project, FAILING, nodes)
    write_config(project, f"task_runner: {{type: {engine}}}\ntasks: {{dies_once: {{retries: 1}}}}")
    done = register(project, server, "--run")
    output = done.stdout + done.stderr
    assert done.returncode == 1
    for name, text in FAILURES.items():
        assert text in output
        if name in ("own", "known", "locked", "twice"):
            assert re.search(rf'own.py", line \d+, in {name}\b', output), "its own traceback"
    for name in ("dies_once", "fine"):
        assert f"Completed node: {name}\n" in output
    eventually(lambda: not children())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["threads", *ENGINES])
def test_a_node_that_is_interrupted_ends_the_run(
    project: Path, server: Server, engine: str
) -> None:
    nodes = "node(interrupts, 'numbers', 'a', name='interrupts'), node(fine, 'a', 'b', name='fine')"
    write_pipeline(project, FAILING, nodes)
    write_config(project, f"task_runner: {{type: {engine}}}")
    done = register(project, server, "--run")
    assert done.returncode == 130, done.stdout + done.stderr
    assert "Completed node" not in done.stdout + done.stderr
    eventually(lambda: not children())


@pytest.mark.one_lane
@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_node_that_takes_too_long_is_stopped(project: Path, server: Server, engine: str) -> None:
    write_pipeline(project, FAILING, "node(sleeps, 'numbers', 'slept', name='sleeps')")
    # A process takes some seconds to start.
    write_config(
        project, f"task_runner: {{type: {engine}}}\ntasks: {{sleeps: {{timeout_seconds: 12}}}}"
    )
    done = register(project, server, "--run")
    assert done.returncode == 1
    assert "TimedOut" in done.stdout + done.stderr
    if (project / "sleeps.txt").exists():
        pid = int((project / "sleeps.txt").read_text())
        eventually(lambda: not any(line.split()[0] == str(pid) for line in children()))
    assert not (project / "slept.txt").exists()


def advised(server: Server, flow_run_id: str) -> list[str]:
    """What `kedro run` is to go on with, as the flow run's log says."""
    text = "\n".join(log["message"] for log in server.logs(flow_run_id))
    return re.findall(r'--from-nodes "(.*?)"', text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [pytest.param("threads", marks=pytest.mark.one_lane), "processes"]
)
def test_with_checkpoints_nothing_that_finished_runs_again(
    server: Server, pool: str, flaky: Path, engine: str
) -> None:
    place = flaky / "handed on"
    write_config(flaky, f"task_runner: {{type: {engine}}}\ncheckpoints: {place}")
    flow_run_id = fail(server, pool, flaky)
    kept = sorted(path.name.rpartition("-")[0] for path in (place / flow_run_id).iterdir())
    assert kept == ["aside", "kept"]
    assert oct((place / flow_run_id).stat().st_mode)[-3:] == "700"
    eventually(lambda: advised(server, flow_run_id) == ["keep"])  # `kedro run` has no checkpoints
    mend(flaky)
    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert ran(flaky) == ["flaky", "last"]
    assert not list(place.iterdir())


ODD = """
def lines(numbers):
    return (number for number in numbers)


def hand_on(numbers):
    return numbers


def save(*numbers):
    return list(numbers)
"""


@pytest.mark.one_lane
def test_datasets_may_have_any_name(project: Path, server: Server) -> None:
    odd = ["a/b", "a_b", "../up", "space: *?", "ü", "CON", "x" * 300, "name.space.data"]
    nodes = ", ".join(f"node(hand_on, 'numbers', {name!r})" for name in odd)
    write_pipeline(project, ODD, f"{nodes}, node(save, {odd!r}, 'total')")
    done = register(project, server, "--run", "--checkpoints", "handed_on")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((project / "data/total.json").read_text()) == [[1, 2, 3]] * len(odd)
    assert not list((project / "handed_on").iterdir())


@pytest.mark.one_lane
def test_what_cannot_be_handed_on_is_named(project: Path, server: Server) -> None:
    write_pipeline(
        project, ODD, "node(lines, 'numbers', 'drawn', name='draw'), node(save, 'drawn', 'total')"
    )
    done = register(project, server, "--run", "--checkpoints", "handed_on")
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert "Dataset 'drawn', which node 'draw' makes, cannot be pickled to" in output
    assert "cannot pickle 'generator' object" in output
    assert not list((project / "handed_on").rglob("*.pickle"))

    (project / "full").write_text("")  # where a folder would be
    done = register(project, server, "--run", "--checkpoints", "full")
    assert done.returncode == 1
    assert f"{project}/full/" in done.stdout + done.stderr


@pytest.mark.one_lane
@pytest.mark.slow
def test_code_that_changes_in_mid_run_is_not_mixed(project: Path, server: Server) -> None:
    functions = """
import time
from pathlib import Path


def change(numbers):
    with Path(__file__).open("a") as file:
        file.write("# changed\\n")
    return 1


def wait(changed):
    time.sleep(8)
    return 1
"""
    nodes = "node(change, 'numbers', 'changed'), node(wait, 'changed', 'a', name='a'),"
    write_pipeline(project, functions, nodes + "node(wait, 'changed', 'b', name='b')")
    write_config(project, "task_runner: {type: processes, max_workers: 2}")
    done = register(project, server, "--run")
    assert done.returncode == 1
    changed = (
        r"tiny/own\.py on \S+ is not as it was when the flow run started\. Start the run again"
    )
    assert re.search(changed, done.stdout + done.stderr)


@pytest.mark.one_lane
@pytest.mark.slow
def test_code_that_a_node_generates_stops_no_other(project: Path, server: Server) -> None:
    functions = """
import time
from pathlib import Path


def generate(numbers):
    Path(__file__).with_name("generated.py").write_text("NUMBER = 1\\n")
    return 1


def wait(generated):
    time.sleep(2)
    return 1
"""
    nodes = "node(generate, 'numbers', 'generated'), node(wait, 'generated', 'a', name='a'),"
    write_pipeline(project, functions, nodes + "node(wait, 'generated', 'b', name='b')")
    write_config(project, "task_runner: {type: processes, max_workers: 2}")
    done = register(project, server, "--run")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_code_that_is_compared_is_the_projects_package(tmp_path: Path) -> None:
    import register_prefect_flow as script

    package = tmp_path / "tiny"
    for folder in (package, tmp_path / ".venv"):
        folder.mkdir()
        (folder / "nodes.py").write_text("")
    (package / ".#nodes.py").symlink_to("nowhere")  # as editors lock a file
    metadata = SimpleNamespace(source_dir=tmp_path, package_name="tiny")
    before = script._versions(metadata)
    (tmp_path / ".venv/nodes.py").write_text("changed")
    assert script._versions(metadata) == before
    (package / "nodes.py").write_text("changed")
    assert script._versions(metadata) != before


def test_a_difference_of_versions_is_named() -> None:
    import register_prefect_flow as script

    metadata = SimpleNamespace(source_dir=Path("/nowhere"), package_name="tiny")
    theirs = script._versions(metadata) | {"Python": "3.9"}
    with pytest.raises(RuntimeError, match=r"Python is 3\.1\S+ on \S+, and 3\.9 in the flow"):
        script._check_versions(metadata, theirs)


def test_a_machine_without_the_project_is_named() -> None:
    import register_prefect_flow as script

    children = script._ChildPool("/nowhere/register_prefect_flow.py")
    with pytest.raises(FileNotFoundError, match=r"has no /nowhere/register_prefect_flow\.py"):
        children.run({"node_name": "a"})


@pytest.mark.one_lane
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("task_runner: {type: proceses}", "Did you mean processes?"),
        ("task_runner: {type: processes, workers: 2}", "prefect.yml has no task_runner.workers."),
        ("tasks: {double: {resources: {GPU: 1}}}", "resources are for Dask"),
        ("checkpoints: {uri: x}", "prefect.yml has no checkpoints.uri. Did you mean url"),
    ],
)
def test_mistakes_are_named_when_registering(project: Path, config: str, message: str) -> None:
    write_config(project, config)
    done = register(project, None, "--dry_run", "--run")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.one_lane
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("checkpoints: {url: x, credentials: key}", "There are no credentials 'key'"),
        *(
            (f"task_runner: {{type: dask, {key}: {value}}}", f"with task_runner.{key}, nodes hand")
            for key, value in {
                "address": "'tcp://10.1.2.3:8786'",
                "scheduler_file": "/shared/scheduler.json",
                "host": "10.1.2.3",
                "cluster_class": "dask_jobqueue.SLURMCluster",
            }.items()
        ),
    ],
)
def test_mistakes_are_named_in_a_run(
    project: Path, server: Server, config: str, message: str
) -> None:
    write_config(project, config)
    done = register(project, server, "--run")
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.one_lane
@with_dask
def test_a_key_that_dask_does_not_take_is_named(project: Path, server: Server) -> None:
    write_config(project, "task_runner: {type: dask, proceses: true}")
    done = register(project, server, "--run")
    assert done.returncode == 1
    assert "Dask refuses a key of task_runner" in done.stderr
    assert "'proceses'" in done.stderr


@pytest.mark.one_lane
@pytest.mark.skipif(bool(find_spec("distributed")), reason="here it is there")
def test_what_has_to_be_installed_is_named(project: Path, server: Server) -> None:
    write_config(project, "task_runner: {type: dask}")
    done = register(project, server, "--run")
    assert done.returncode == 1
    assert 'pip install "distributed"' in done.stderr


@pytest.mark.one_lane
@pytest.mark.slow
def test_ctrl_c_and_a_kill_leave_no_process(project: Path, server: Server) -> None:
    write_pipeline(project, FAILING, "node(sleeps, 'numbers', 'slept', name='sleeps')")
    write_config(project, "task_runner: {type: processes}")
    command = [sys.executable, project / "register_prefect_flow.py", "--run"]
    for signal_ in ("INT", "KILL"):
        (project / "sleeps.txt").unlink(missing_ok=True)
        process = server.start(command, "flow", project, server.env)
        try:
            eventually((project / "sleeps.txt").exists, or_show=server.folder / "flow.log")
            assert children(), "else what follows shows nothing"
            subprocess.run(["kill", f"-{signal_}", str(process.pid)], check=True)
            process.wait(timeout=60)
            eventually(lambda: not children(), seconds=5)
        finally:
            stop(process)
        assert not (project / "slept.txt").exists()


# ---- Clusters that are there before a run, and after it ----


@pytest.fixture(scope="module")
def dask_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A cluster that serves several tests."""
    with dask_cluster(tmp_path_factory.mktemp("dask")) as (port, _):
        yield port


def left_on(port: int) -> dict[str, Any]:
    """What a Dask cluster has, apart from itself."""
    import distributed

    with distributed.Client(f"tcp://127.0.0.1:{port}") as client:

        def look(dask_worker: Any) -> tuple[list[str], Any]:
            mine = [name for name in sys.modules if name.startswith(("tiny", "register_prefect"))]
            return mine, [name for name in dask_worker.plugins if name.startswith("kedro")]

        tasks = client.run_on_scheduler(
            lambda dask_scheduler: [*dask_scheduler.tasks, *dask_scheduler.task_metadata]
        )
        # What a worker says of a node is its key, and a message: Dask says other things.
        events = client.run_on_scheduler(
            lambda dask_scheduler: [
                event
                for topic in dask_scheduler._broker._topics.values()
                for _, event in topic.events
                if isinstance(event, tuple) and isinstance(event[1], tuple)
            ]
        )
        return {"workers": client.run(look), "tasks": tasks, "events": events}


@pytest.mark.slow
@with_dask
def test_a_dask_cluster_serves_projects_side_by_side_and_stays_as_it_was(
    dask_port: int, tmp_path: Path, server: Server
) -> None:
    projects = [copy_in(write_tiny_project(tmp_path / name / "project")) for name in ("a", "b")]
    nodes = projects[1] / "src/tiny/nodes.py"
    nodes.write_text(nodes.read_text().replace("2 * number", "20 * number"))
    for project in projects:
        write_config(
            project, f"task_runner: {{type: dask, address: 'tcp://127.0.0.1:{dask_port}'}}"
        )
    expected = {"a": 12 + 18, "b": 120 + 18}

    def start_both() -> list[subprocess.Popen[bytes]]:
        return [
            server.start(
                [sys.executable, project / "register_prefect_flow.py", "--run"],
                f"flow-{project.parent.name}", project, server.env,
            )
            for project in projects
        ]  # fmt: skip

    for _ in range(2):
        for project, process in zip(projects, start_both(), strict=True):
            log = server.folder / f"flow-{project.parent.name}.log"
            assert process.wait(timeout=240) == 0, log.read_text()
            total = json.loads((project / "data/total.json").read_text())
            assert total == expected[project.parent.name]
        # A changed node runs as it is now, on workers that have run it as it was.
        nodes.write_text(nodes.read_text().replace("20 * number", "200 * number"))
        expected["b"] = 1200 + 18
    eventually(lambda: not children())
    left = left_on(dask_port)
    assert left["tasks"] == []
    assert left["events"] == []
    assert all(found == ([], []) for found in left["workers"].values()), left


@pytest.mark.slow
@with_dask
def test_no_credential_travels(dask_port: int, project: Path, server: Server) -> None:
    proxy = Proxy(dask_port)
    catalog = project / "conf/base/catalog.yml"
    catalog.write_text(
        catalog.read_text().replace(
            "filepath: data/numbers.json", "filepath: data/numbers.json\n  credentials: door"
        )
    )
    (project / "conf/local/credentials.yml").write_text("door: {key: xyzzy4711}\n")
    (project / "conf/local/parameters.yml").write_text("factor: 3\n")
    write_config(project, f"task_runner: {{type: dask, address: 'tcp://127.0.0.1:{proxy.port}'}}")
    done = register(project, server, "--run", "--env", "local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert b"xyzzy4711" not in proxy.said
    assert b"register_prefect_flow" in proxy.said
    assert "xyzzy4711" not in done.stdout + done.stderr


@pytest.mark.slow
@with_dask
def test_a_cluster_that_is_not_there_is_named(project: Path, server: Server) -> None:
    write_config(project, "task_runner: {type: dask, address: 'tcp://127.0.0.1:9'}")
    start = time.monotonic()
    done = register(project, server, "--run")
    assert done.returncode == 1
    assert "there is no Dask cluster with workers at tcp://127.0.0.1:9" in done.stderr
    assert time.monotonic() - start < 45, "30 s for the cluster, the rest for the flow"


@pytest.mark.slow
@with_dask
def test_resources_of_a_node_choose_its_worker(
    dask_port: int, project: Path, server: Server, tmp_path: Path
) -> None:
    address = f"tcp://127.0.0.1:{dask_port}"
    command = [BIN / "dask", "worker", address, "--nthreads", 1, "--resources", "GPU=1"]
    env = {"HAS_GPU": "yes"}
    worker = server.start([*command, "--no-dashboard"], "gpu", tmp_path, env)
    functions = "import os\n\n\ndef where(numbers):\n    return os.environ.get('HAS_GPU', 'no')\n"
    write_pipeline(project, functions, "node(where, 'numbers', 'total', name='where')")
    config = f"task_runner: {{type: dask, address: '{address}'}}\ntasks: {{where: {{resources: {{GPU: 1}}}}}}"
    write_config(project, config)
    try:
        done = register(project, server, "--run")
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((project / "data/total.json").read_text()) == "yes"
    finally:
        stop(worker)


def test_a_node_whose_end_is_not_heard_of_has_not_completed() -> None:
    import register_prefect_flow as script

    class Engine:
        def run(self, job: Any, resources: Any) -> tuple[str, bytes]:
            return "ended", b"has sent nothing"

    job = script._Job({}, "", "", False, {}, "", "")
    node = Node(lambda x: x, "x", "y", name="a")
    in_children = script._InChildren(Engine(), job, {node: "its key"}, {})
    with pytest.raises(RuntimeError, match=r"node .a. has sent nothing"):
        in_children.run(node, 1)


UNREACHABLE = """
import time
from pathlib import Path

SCRIPT = Path("register_prefect_flow.py")


def hide(numbers):
    SCRIPT.rename("hidden.py")
    return 1


def wait(numbers):
    while SCRIPT.exists():
        time.sleep(0.1)
    time.sleep(5)
    Path("hidden.py").rename(SCRIPT)
    return 1


def go_on(waited):
    return 1
"""


@pytest.mark.slow
@with_dask
def test_a_worker_that_cannot_run_a_node_takes_no_other_with_it(
    dask_port: int, project: Path, server: Server
) -> None:
    write_pipeline(
        project,
        UNREACHABLE,
        "node(wait, 'numbers', 'waited', name='wait'), node(hide, 'numbers', 'x', name='hide'),"
        "node(go_on, 'x', 'y', name='fails'), node(go_on, 'waited', 'z', name='goes_on')",
    )
    write_config(project, f"task_runner: {{type: dask, address: 'tcp://127.0.0.1:{dask_port}'}}")
    done = register(project, server, "--run")
    output = done.stdout + done.stderr
    assert done.returncode == 1
    assert "the project has to be at the same path there, with this file" in output
    assert "Completed node: goes_on" in output


QUIET = """
import logging
import multiprocessing


def say(number):
    logging.getLogger("tiny.quiet").warning("number %d in a fork", number)


def fork(numbers):
    logging.getLogger("tiny.quiet").warning("in a child")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(say, range(20))
    return 1
"""


@pytest.mark.slow
@pytest.mark.one_lane
def test_forks_log_to_loggers_that_do_not_propagate(project: Path, server: Server) -> None:
    write_pipeline(project, QUIET, "node(fork, 'numbers', 'total', name='fork')")
    (project / "conf/logging.yml").write_text(
        "version: 1\nhandlers: {own: {class: logging.StreamHandler}}\n"
        "loggers: {tiny.quiet: {handlers: [own], propagate: false}}\n"
    )
    write_config(project, "task_runner: {type: processes}")
    done = register(project, server, "--run")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("in a child\n") == 1
    for number in range(20):
        assert output.count(f"number {number} in a fork\n") == 1
    assert "Logging error" not in output


@pytest.mark.slow
@with_s3
def test_checkpoints_may_lie_on_s3(server: Server, pool: str, flaky: Path) -> None:
    with s3_bucket(flaky) as bucket:
        flow_run_id = fail(server, pool, flaky, "--env", "local")
        assert {key.key.split("/")[1] for key in bucket.objects.all()} == {flow_run_id}
        (flaky / "mended").touch()
        assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
        assert ran(flaky) == ["flaky", "last"]
        assert not list(bucket.objects.all())


CLOCK = """
import time

CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    "custom_resolvers": {"now": lambda: str(time.time_ns())},
}
"""
STAMPS = """
def stamp(stamp):
    return stamp
"""


@pytest.mark.one_lane
@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resolver_that_gives_another_value_each_time_is_one_value_or_an_error(
    project: Path, server: Server, engine: str
) -> None:
    nodes = ", ".join(f"node(stamp, 'params:stamp', '{n}', name='{n}')" for n in ("one", "two"))
    write_pipeline(project, STAMPS, nodes)
    (project / "src/tiny/settings.py").write_text(CLOCK)
    (project / "conf/base/parameters.yml").write_text("stamp: ${now:}\n")
    catalog = project / "conf/base/catalog.yml"
    entry = "\n{name}: {{type: json.JSONDataset, filepath: 'data/{name}{clock}.json'}}\n"
    with catalog.open("a") as file:
        file.writelines(entry.format(name=name, clock="") for name in ("one", "two"))
    workers = "max_workers: 2" if engine == "processes" else "n_workers: 2, threads_per_worker: 1"
    write_config(project, f"task_runner: {{type: {engine}, {workers}}}")
    done = register(project, server, "--run")
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = ((project / f"data/{name}.json").read_text() for name in ("one", "two"))
    assert one == two

    catalog.write_text(catalog.read_text().replace("data/two.json", "data/two${now:}.json"))
    done = register(project, server, "--run")
    assert done.returncode == 1
    assert "Node 'two' has other inputs, outputs or paths in its process than here" in done.stderr
    assert not list((project / "data").glob("two1*")), "nothing has been written elsewhere"


LINGERING = """
import os
import threading
import time
from pathlib import Path


def linger(numbers):
    def write():
        time.sleep(14)
        Path("data/late.txt").write_text("written")

    threading.Thread(target=write).start()
    Path("pid.txt").write_text(str(os.getpid()))
    return 1


def after(lingered):
    for name in ("one", "two"):
        Path(f"data/{name}.txt").write_text(name)
    return os.getpid()
"""


@pytest.mark.one_lane
@pytest.mark.slow
def test_a_thread_that_keeps_a_child_is_named_and_awaited(project: Path, server: Server) -> None:
    nodes = "node(linger, 'numbers', 'lingered', name='linger')"
    write_pipeline(project, LINGERING, nodes)
    write_config(project, "task_runner: {type: processes}")
    done = register(project, server, "--run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The process that ran node 'linger' goes on, and is waited for" in (
        done.stdout + done.stderr
    )
    assert (project / "data/late.txt").read_text() == "written"


def test_an_idle_child_that_has_died_gets_no_node(project: Path) -> None:
    import register_prefect_flow as script

    children = script._ChildPool(str(project / "register_prefect_flow.py"))
    first = children._take({"id": "a", "node_name": "a"})
    children._idle.append(children._busy.pop("a"))
    first.kill()
    second = children._take({"id": "b", "node_name": "b"})
    assert second is not first
    second.kill()
    assert not second.is_alive()
    second.kill()  # its number may be another's by now


SCRIBBLING = """
import os
import stat


def scribble(numbers):
    for number in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                os.write(number, (4).to_bytes(4, "big") + b"junk")
        except OSError:
            pass
    return 1
"""


@pytest.mark.one_lane
def test_a_child_that_sends_what_cannot_be_read_is_ended_with_its_node(
    project: Path, server: Server
) -> None:
    write_pipeline(project, SCRIBBLING, "node(scribble, 'numbers', 'one', name='scribble')")
    write_config(project, "task_runner: {type: processes}")
    done = register(project, server, "--run")
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert "'scribble' died with exit code -9 (killed, for what it sent cannot be read" in output


CONFIRMING = """
def read(incoming):
    return sorted(incoming)


def confirm(news):
    return len(news)
"""


@pytest.mark.one_lane
def test_a_node_that_confirms_what_another_reads_is_refused(project: Path, server: Server) -> None:
    nodes = (
        "node(read, 'incoming', 'news', name='read'),"
        "node(confirm, 'news', 'total', name='confirm', confirms='incoming')"
    )
    write_pipeline(project, CONFIRMING, nodes)
    (project / "data/incoming").mkdir()
    (project / "data/incoming/monday.json").write_text("1")
    with (project / "conf/base/catalog.yml").open("a") as catalog:
        dataset = (
            "{type: partitions.IncrementalDataset, path: data/incoming, dataset: json.JSONDataset}"
        )
        catalog.write(f"\nincoming: {dataset}\n")
    write_config(project, "task_runner: {type: processes}")
    done = register(project, server, "--run")
    assert done.returncode == 1
    assert "Node 'confirm' confirms incoming, which another node reads" in done.stderr
    assert not (project / "data/total.json").exists(), "nothing has been run"


SAME_FILE = """
def one(numbers):
    return 1


def two(numbers):
    return 2


def three(one):
    return 3
"""


@pytest.mark.one_lane
def test_hooks_of_all_processes_and_files_of_several_nodes_are_warned_of(
    project: Path, server: Server
) -> None:
    nodes = (
        "node(one, 'numbers', 'book_one', name='one'),"
        "node(two, 'numbers', 'book_two', name='two'),"
        "node(three, 'book_one', 'book_three', name='three'),"
        "node(two, 'numbers', 'shared', name='four'),"
    )
    write_pipeline(project, SAME_FILE, nodes)
    with (project / "conf/base/catalog.yml").open("a") as catalog:
        catalog.write("\nshared: {type: MemoryDataset, copy_mode: assign}\n")
        for name in ("one", "two", "three"):
            catalog.write(f"\nbook_{name}: {{type: json.JSONDataset, filepath: data/book.json}}\n")
    write_config(project, "task_runner: {type: processes, max_workers: 2}")
    done = register(project, server, "--run")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    said = re.findall(r"Nodes (\w+) and (\w+) may write \S+/book\.json at the same", output)
    assert {frozenset(pair) for pair in said} == {
        frozenset({"one", "two"}),
        frozenset({"three", "two"}),
    }
    assert len(re.findall("Hooks of Recorder are called for the pipeline in this", output)) == 2
    assert "shared has copy_mode assign" in output

    write_config(project, "")
    done = register(project, server, "--run")
    assert done.returncode == 0, done.stderr
    assert "at the same time" not in done.stdout + done.stderr


MEETING = """
import time
from pathlib import Path


def meet(name):
    def wait(numbers):
        Path(f"started_{name}").touch()
        for _ in range(900):
            if len(list(Path().glob("started_*"))) > 1:
                return 1
            time.sleep(0.1)
        raise TimeoutError("alone")

    return wait
"""


@pytest.mark.slow
@with_dask
def test_more_nodes_run_at_once_when_the_cluster_has_grown(
    project: Path, server: Server, tmp_path: Path
) -> None:
    nodes = ", ".join(f"node(meet('{n}'), 'numbers', 'of_{n}', name='{n}')" for n in "abc")
    write_pipeline(project, MEETING, nodes)
    with dask_cluster(tmp_path) as (port, processes):
        stop(processes.pop())
        write_config(project, f"task_runner: {{type: dask, address: 'tcp://127.0.0.1:{port}'}}")
        command = [sys.executable, project / "register_prefect_flow.py", "--run"]
        flow = server.start(command, "growing", project, server.env)
        eventually(lambda: list(project.glob("started_*")))
        time.sleep(2)
        assert len(list(project.glob("started_*"))) == 1
        worker = ["worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1", "--no-dashboard"]
        processes.append(
            subprocess.Popen([str(BIN / "dask"), *worker], cwd=tmp_path, start_new_session=True)
        )
        assert flow.wait(timeout=120) == 0, (server.folder / "growing.log").read_text()[-3000:]
    log = (server.folder / "growing.log").read_text()
    assert "Waiting up to 20 s for Dask workers at tcp://127.0.0.1:" in log


# ---- What is left behind on a machine ----

PARALLEL = """
import os
import time
from pathlib import Path

import numpy
from joblib import Parallel, delayed


def total(array, number):
    Path(f"worker_{number}.txt").write_text(str(os.getpid()))
    while Path("hang").exists():
        time.sleep(0.1)
    return type(array).__name__, int(array.sum())


def fit(numbers):
    array = numpy.ones(500_000)  # above a megabyte, joblib writes it into shared memory
    Path("pid.txt").write_text(str(os.getpid()))
    return Parallel(n_jobs=2)(delayed(total)(array, number) for number in numbers)
"""


def in_shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def in_session(leader: int) -> list[str]:
    """The processes of a child, and of all that it has started."""
    found = subprocess.run(["ps", "-A", "-o", "sid=,stat=,args="], capture_output=True, text=True)
    lines = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
    return [args for sid, stat, args in lines if sid == str(leader) and stat[0] != "Z"]


@pytest.fixture
def parallel(project: Path) -> Path:
    """A project with a node that computes with joblib."""
    pytest.importorskip("joblib")
    write_pipeline(project, PARALLEL, "node(fit, 'numbers', 'total', name='fit')")
    return project


@pytest.mark.one_lane
@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_joblib_leaves_no_process_and_no_shared_memory(
    parallel: Path, server: Server, engine: str
) -> None:
    write_config(parallel, f"task_runner: {{type: {engine}}}")
    before = in_shared_memory()
    done = run(sys.executable, "register_prefect_flow.py", "--run", cwd=parallel, env=server.env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((parallel / "data/total.json").read_text()) == [["memmap", 500_000]] * 3
    pid = (parallel / "pid.txt").read_text()
    workers = {path.read_text() for path in parallel.glob("worker_*.txt")}
    assert pid not in workers, "joblib has had processes of its own"
    assert not in_session(int(pid))
    assert not [name for name in in_shared_memory() - before if pid in name]


@pytest.mark.one_lane
@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_joblib_leaves_no_shared_memory_when_a_run_is_killed(
    parallel: Path, server: Server, engine: str
) -> None:
    (parallel / "hang").touch()
    write_config(parallel, f"task_runner: {{type: {engine}}}")
    before = in_shared_memory()
    command = [sys.executable, parallel / "register_prefect_flow.py", "--run"]
    flow = server.start(command, "flow", parallel, server.env)
    try:
        eventually(lambda: len(list(parallel.glob("worker_*.txt"))) == 2)
        pid = (parallel / "pid.txt").read_text()
        flow.kill()
        eventually(lambda: not in_session(int(pid)), seconds=5)
    finally:
        stop(flow)
    left = [name for name in in_shared_memory() - before if pid in name]
    for name in left:
        path = Path("/dev/shm", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not left


IDLING = """
import os
import time
from pathlib import Path


def meet(name):
    def run(numbers):
        Path(f"pid_{name}.txt").write_text(str(os.getpid()))
        while not Path(f"end_{name}").exists():
            time.sleep(0.1)
        return 1

    return run
"""


@contextmanager
def waiting_on_dask(
    project: Path, server: Server, folder: Path
) -> Iterator[tuple[int, subprocess.Popen[bytes], dict[str, int]]]:
    """A cluster, a flow, and its children there: one that is busy, and one that waits."""
    nodes = ", ".join(f"node(meet('{n}'), 'numbers', '{n}', name='{n}')" for n in ("busy", "idle"))
    write_pipeline(project, IDLING, nodes)
    with dask_cluster(folder) as (port, processes):
        write_config(project, f"task_runner: {{type: dask, address: 'tcp://127.0.0.1:{port}'}}")
        command = [sys.executable, project / "register_prefect_flow.py", "--run"]
        flow = server.start(command, "flow", project, server.env)
        try:
            paths = {name: project / f"pid_{name}.txt" for name in ("busy", "idle")}
            eventually(lambda: all(path.exists() and path.read_text() for path in paths.values()))
            (project / "end_idle").touch()
            log = server.folder / "flow.log"
            eventually(lambda: "Completed node: idle" in log.read_text())
            yield port, flow, {name: int(path.read_text()) for name, path in paths.items()}
        finally:  # the cluster itself does not end when a test fails
            for process in [flow, *reversed(processes)]:
                stop(process)


@pytest.mark.slow
@with_dask
def test_ctrl_c_leaves_no_child_and_nothing_else_on_a_cluster(
    project: Path, server: Server, tmp_path: Path
) -> None:
    with waiting_on_dask(project, server, tmp_path) as (port, flow, pids):
        flow.send_signal(signal.SIGINT)
        assert flow.wait(timeout=20) == 130
        eventually(lambda: all(map(is_gone, pids.values())), seconds=5)
        left = left_on(port)
        assert left["tasks"] == left["events"] == []
        assert all(found == ([], []) for found in left["workers"].values()), left


@pytest.mark.slow
@with_dask
def test_a_flow_that_is_killed_leaves_no_busy_child_on_a_cluster(
    project: Path, server: Server, tmp_path: Path
) -> None:
    with waiting_on_dask(project, server, tmp_path) as (port, flow, pids):
        flow.kill()
        eventually(lambda: is_gone(pids["busy"]), seconds=5)
        assert not [key for key in left_on(port)["tasks"] if key.startswith("busy-")]


@pytest.mark.slow
@with_dask
def test_a_flow_that_is_killed_leaves_no_idle_child_and_nothing_else_on_a_cluster(
    project: Path, server: Server, tmp_path: Path
) -> None:
    with waiting_on_dask(project, server, tmp_path) as (port, flow, pids):
        flow.kill()
        eventually(lambda: is_gone(pids["busy"]), seconds=5)
        time.sleep(10)
        left = left_on(port)
        assert is_gone(pids["idle"])
        assert left["tasks"] == [], "events Dask forgets by itself, an hour later"
        assert all(found == ([], []) for found in left["workers"].values()), left
