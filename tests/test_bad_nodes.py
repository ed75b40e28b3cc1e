"""Nodes that behave badly: a flow run ends as `kedro run` does, whatever they do."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import (
    DASK,
    DOCUMENTED,
    KEDRO_1,
    PREFECT_3,
    Server,
    children,
    copy_in,
    eventually,
    is_gone,
    write_config,
    written_files,
)
from forking import Forks
from sample_projects import write_project

pytestmark = pytest.mark.slow
KEDRO_RUN = ("-m", "kedro", "run", "--env", "base", "--pipeline")
LIMIT = 100  # seconds, after which a run counts as one that hangs

# From node to what the failure of a run says; nothing: it completes.
ENDS = {
    "panic": "PanicException: called `Option::unwrap()` on a `None` value",
    "cancelled": "CancelledError: by a library",
    "closed_generator": "GeneratorExit: too early",
    "stop_iteration": "StopIteration",
    "stop_async_iteration": "StopAsyncIteration: no more",
    "false_error": "Empty: of no length",
    "untold_error": "LookupError",  # Kedro itself stumbles over it
    "locked_error": "Locked: 7: why",
    "long_error": "ValueError: many rows many rows",
    "error_without_unicode": "ValueError: \\udc80 of a file name",
    "recursive": "RecursionError: maximum recursion depth exceeded",
    "out_of_memory": "MemoryError: no room",
    "times_out_itself": "a query took too long",
    "asks": "EOFError: EOF when reading a line",
    "coroutine": "JSON",
    "exits_at_once": "",
    "kills_itself": "",
    "closes_stdout": "",
    "closes_stderr": "",
    "moves": "",
    "forgets_its_path": "",
    "clears_the_environment": "",
    "sets_a_proxy": "",
    "sets_certificates": "",
    "sets_a_socket_timeout": "",
    "replaces_logging": "",
    "makes_warnings_errors": "",
    "lives_elsewhere": "",
    "sets_an_event_loop": "",
    "writes_bytes": "",
    "forks_a_pool": "",
    "terminates_a_fork": "",
    "interrupts_a_program": "",
    "logs_what_cannot_be_read": "",
    "leaves_a_thread": "",
    "writes_at_exit": "",
    "starts_a_program": "",
    "seeds_and_draws": "",
    "handles_signals": "",
}
ONLY_IN_THE_MAIN_THREAD = {"handles_signals"}
NOT_IN_THREADS = {"seeds_and_draws"} | ONLY_IN_THE_MAIN_THREAD  # README's table says so
MODES = [
    "default",
    pytest.param(
        "threads", marks=pytest.mark.skipif(not (PREFECT_3 and KEDRO_1), reason="one lane tells")
    ),
]


def write_bad_project(path: Path) -> Path:
    return copy_in(write_project(path, "badly_behaved"))


@pytest.fixture(scope="module")
def forks(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """For some two hundred runs: to start Python for each would take ten minutes more."""
    forks = Forks(tmp_path_factory.mktemp("forks"), server.env)
    yield forks
    forks.end()


def end_program(project: Path) -> bool:
    """End the program that a node may have started, and tell whether it lived on."""
    if not (project / "pid.txt").exists():
        return False
    pid = int((project / "pid.txt").read_text())
    lived_on = not is_gone(pid)
    if lived_on:
        os.kill(pid, signal.SIGKILL)
    return lived_on


def run_in(mode: str, project: Path, forks: Forks, name: str) -> tuple[int, str]:
    """Run the pipeline of a node, and return the exit code and what was printed."""
    if mode != "default":
        runner = "max_workers: 2" if mode == "threads" else f"type: {mode}, n_workers: 1"
        runner = runner if mode != "processes" else "type: processes, max_workers: 2"
        write_config(project, f"task_runner: {{{runner}}}")
    command = (project / "register_prefect_flow.py", "--run", "--pipeline", name)
    try:
        done = forks.run(*command, cwd=project, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"it hangs: {(error.stdout or '')[-3000:]!r}")
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENDS)
def test_a_run_ends_as_with_kedro_run(tmp_path: Path, forks: Forks, name: str, mode: str) -> None:
    if name in ONLY_IN_THE_MAIN_THREAD and not PREFECT_3:
        pytest.skip("Prefect 2 runs tasks in threads")
    if mode == "threads" and name in NOT_IN_THREADS:
        pytest.skip("threads share it")
    reference = write_bad_project(tmp_path / "reference")
    kedro = forks.run(*KEDRO_RUN, name, cwd=reference)
    project = write_bad_project(tmp_path / "project")
    code, output = run_in(mode, project, forks, name)
    if name == "closes_stderr" and not PREFECT_3:
        assert code == 1, "Prefect 2 itself writes there: a bare flow fails, too"
        return  # and in the oldest lane, so does `kedro run`
    assert bool(ENDS[name]) == (kedro.returncode == 1), kedro.stdout + kedro.stderr
    assert code == kedro.returncode, output
    files, expected = written_files(project), written_files(reference)
    if name == "untold_error" and DOCUMENTED:
        output = output.replace("<exception str() failed>", "LookupError")
    if code < 0 or code > 1:
        assert expected.items() <= files.items()  # in threads, others have been running
    elif not ENDS[name]:
        assert files == expected, output
    else:
        assert ENDS[name] in output
        assert expected.items() <= files.items()
        assert "beside.json" in files, "others run"
        assert "behind.json" not in files
    assert end_program(project) == end_program(reference)


# In a child of their own, these end it: their node fails, and nothing else.
DYING = {"exits_at_once": "died with exit code 3", "kills_itself": "died with exit code -9"}
ON_DASK = {
    "panic", "cancelled", "stop_iteration", "locked_error", "exits_at_once", "kills_itself",
    "closes_stdout", "clears_the_environment", "forks_a_pool", "leaves_a_thread", "writes_at_exit",
    "starts_a_program",
}  # fmt: skip


@pytest.mark.skipif(not (PREFECT_3 and KEDRO_1), reason="one lane tells")
@pytest.mark.parametrize("mode", ["processes", DASK])
@pytest.mark.parametrize("name", ENDS)
def test_a_run_on_an_engine_ends_as_with_kedro_run(
    tmp_path: Path, forks: Forks, name: str, mode: str
) -> None:
    if mode == "dask" and name not in ON_DASK:
        pytest.skip("children are the same there")
    reference = write_bad_project(tmp_path / "reference")
    kedro = forks.run(*KEDRO_RUN, name, cwd=reference)
    project = write_bad_project(tmp_path / "project")
    code, output = run_in(mode, project, forks, name)
    assert code == (1 if kedro.returncode else 0), output
    files, expected = written_files(project), written_files(reference)
    if code == 0:
        assert files == expected, output
    else:
        assert (ENDS[name] or DYING[name]) in output
        assert expected.items() <= files.items()
        assert "beside.json" in files, "others run"
        assert "behind.json" not in files
    assert end_program(project) == end_program(reference)
    eventually(lambda: not children(), seconds=10)
