"""Runs what Python would run, in a fork of a process that has imported Kedro and Prefect.

    python forking.py SCRIPT [ARGUMENT]...
    python forking.py -m MODULE [ARGUMENT]...
    python forking.py -uc CODE

To start Python and import Kedro and Prefect takes seconds, and was more than half of the time of
most tests. So programs are forks of one process for their environment, which ends with the tests;
but a program whose environment no other has had is run by Python itself.
"""

import atexit
import gc
import importlib
import inspect
import io
import json
import os
import random
import re
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# What most programs import, some of it late. A lane may not have all of it.
MODULES = (
    *("prefect.engine", "prefect.deployments", "kedro_telemetry.plugin", "kedro.framework.session"),
    *("kedro.framework.cli.cli", "kedro_datasets.json.json_dataset", "pandas"),
    *("kedro_datasets.pickle.pickle_dataset", "register_prefect_flow"),
    "kedro_mlflow.framework.hooks.mlflow_hook",
)
OF_PREFECT_2 = ("prefect.server.api.server", "kubernetes.client", "kubernetes.config")
OF_PREFECT_3 = ("prefect.flow_engine", "prefect.task_engine", "prefect.utilities.visualization")

# Variables that do not matter at import: Prefect's settings, most of which a fork reads anew, as it
# does PYTHONPATH, and what Prefect tells a flow run, Kedro's runs, pytest a test, a shell.
OTHERS = (
    "PREFECT_",
    "PYTHONPATH",
    "PYTEST_",
    "KEDRO_ENV",
    "PWD",
    "OLDPWD",
    "_",
)
# But these matter: Prefect sets up logging when it is imported, and Prefect 2 finds its database.
KEPT = ("PREFECT_HOME", "PREFECT_LOGGING_")

# What a fork takes for Python, so that processes for nodes, which it starts, are forks as well.
EXECUTABLE = """#!/bin/sh
if [ "$1" = -uc ]; then exec "{python}" -IS "{forking}" "$@"; fi
exec "{python}" "$@"
"""


def is_first(mark: Path) -> bool:
    """Tell whether nobody has asked this before, of all processes."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def of_prefect(env: dict[str, str]) -> dict[str, str]:
    """The variables that are settings of Prefect, without what it tells a flow run."""
    return {name: value for name, value in env.items() if re.match("PREFECT_[^_]", name)}


def fork_server(folder: Path) -> str | None:
    """Where the process for this environment listens: None for the first to need an odd one."""
    env = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(KEPT) or not name.startswith(OTHERS)
    }
    path = folder / sha256(repr(env).encode()).hexdigest()[:16]
    if is_first(path) and not is_first(folder / "all"):
        return None
    if is_first(path.with_suffix(".starts")):
        subprocess.Popen(
            [sys.executable, __file__, "--serve", path.with_suffix(".socket")],
            env={**env, **of_prefect(dict(os.environ))},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # which no program can seek in, as they cannot in their own
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return str(path.with_suffix(".socket"))


def run(arguments: list[str]) -> int:
    """Have a program run, hand on signals, and return how it ended, as `subprocess` does."""
    # Kedro reads this file when it is imported, in the current folder, which the script changes.
    folders = (Path.cwd(), Path(arguments[0]).parent)
    has_logging = any((folder / "conf/logging.yml").exists() for folder in folders)
    address = None if has_logging else fork_server(Path(os.environ["FORKS"]))
    if address is None:
        os.execv(sys.executable, [sys.executable, *arguments])
    connection = socket.socket(socket.AF_UNIX)
    for _ in range(600):
        with suppress(FileNotFoundError, ConnectionRefusedError):
            connection.connect(address)
            break
        time.sleep(0.1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    job = {"arguments": arguments, "cwd": str(Path.cwd()), "env": dict(os.environ)}
    socket.send_fds(connection, [json.dumps(job).encode() + b"\n"], [0, 1, 2])
    return int(connection.makefile().readline() or 1)


def serve(address: Path) -> None:
    """Fork for each program that is asked for, until the tests, which the folder names, end."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    modules = OF_PREFECT_3 if find_spec("prefect.flow_engine") else OF_PREFECT_2
    for name in (*modules, *MODULES):
        with suppress(ImportError):
            importlib.import_module(name)
    inspect.stack()  # which Kedro's settings ask for, and which notes where all modules are
    del sys.path[0], sys.modules["register_prefect_flow"]  # projects have their own
    gc.collect()
    gc.freeze()  # else a collection in a fork would copy the memory of all modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    executable = address.with_suffix(".sh")
    executable.write_text(EXECUTABLE.format(python=sys.executable, forking=__file__))
    executable.chmod(0o700)
    sys.executable = str(executable)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()
    listener.settimeout(1)
    while address.exists() and Path("/proc", address.parent.name.split("-")[1]).exists():
        with suppress(TimeoutError):
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                watch(connection)
            connection.close()


def watch(connection: socket.socket) -> None:
    """Fork a program, send it signals, and tell how it ended; it ends with who asked for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, _, _ = socket.recv_fds(connection, 1_000_000, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1_000_000)
    os.setsid()
    child = os.fork()
    if not child:
        connection.close()
        become(json.loads(message), files)
    for file in files:
        os.close(file)
    ended = os.pidfd_open(child)
    with selectors.DefaultSelector() as selector:
        selector.register(ended, selectors.EVENT_READ)
        selector.register(connection, selectors.EVENT_READ)
        while all(key.fd != ended for key, _ in selector.select()):
            received = connection.recv(1)
            os.kill(child, received[0] if received else signal.SIGKILL)
            if not received:
                with suppress(ProcessLookupError):  # it leads no group, unless it is for nodes
                    os.killpg(child, signal.SIGKILL)
                break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(OSError):
        connection.send(f"{code}\n".encode())
    os._exit(0)


def become(job: dict[str, Any], files: list[int]) -> None:
    """Run a program as Python would."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    settings_differ = of_prefect(dict(os.environ)) != of_prefect(job["env"])
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    random.seed()
    sys.modules["numpy"].random.seed()
    program, *arguments = sys.argv = job["arguments"]
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if settings_differ:
        context = sys.modules["prefect.context"]
        context.GLOBAL_SETTINGS_CONTEXT = None  # from which Prefect 2 would take what is not set
        context.GLOBAL_SETTINGS_CONTEXT = context.root_settings_context()
    try:
        if program == "-uc":
            os.setsid()  # as who started it has said
            raw = open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115
            sys.stdout = io.TextIOWrapper(raw, write_through=True)
            sys.argv, sys.path[0] = ["-c", *arguments[1:]], ""
            exec(arguments[0], {"__name__": "__main__"})
        elif program == "-m":
            sys.argv, sys.path[0] = arguments, job["cwd"]
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(program).absolute().parent)
            runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    # As Python ends, but for the memory of all modules, which it need not free.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError):  # a program may have closed it
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(Path(sys.argv[2]))
    elif (ended_as := run(sys.argv[1:])) < 0:
        with suppress(OSError):  # nobody can handle SIGKILL
            signal.signal(-ended_as, signal.SIG_DFL)
        os.kill(os.getpid(), -ended_as)
    else:
        sys.exit(ended_as)
