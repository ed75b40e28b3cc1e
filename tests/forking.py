"""Forks of a process that has imported Kedro and Prefect, for comparisons of a hundred programs.

Starting Python and importing both is most of the time of a program that does little. A fork has the
environment of the first one, and does not see a `conf/logging.yml`, which Kedro reads when it is
imported; all that is about these starts Python.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

# What most programs import; a lane may not have all of it.
MODULES = (
    *("kedro.framework.cli.cli", "kedro.framework.session", "kedro_telemetry.plugin"),
    *("prefect.deployments", "prefect.engine", "prefect.flow_engine", "prefect.task_engine"),
    *("kedro_datasets.json.json_dataset", "kedro_datasets.pickle.pickle_dataset", "pandas"),
)


class Forks:
    """A process that forks for each program it is told to run, one after the other."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        command, pipe = [sys.executable, __file__], subprocess.PIPE
        env = {**os.environ, **env}
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=pipe, stdout=pipe, text=True
        )

    def run(
        self, *arguments: str | Path, cwd: Path, timeout: float = 180
    ) -> subprocess.CompletedProcess[str]:
        """Run what `python ARGUMENTS` would run, nobody at the keyboard, and return its output."""
        given = [str(part) for part in arguments]
        files = [str(self.folder / name) for name in ("out", "err")]
        job = {"arguments": given, "cwd": str(cwd), "files": files, "timeout": timeout}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        code = json.loads(self.process.stdout.readline())
        output = [Path(file).read_text(errors="backslashreplace") for file in files]
        for file in files:  # a program that lives on goes on writing to the old one
            Path(file).unlink()
        if code is None:
            raise subprocess.TimeoutExpired(given, timeout, *output)
        return subprocess.CompletedProcess(given, code, *output)

    def end(self) -> None:
        self.process.communicate()


def serve() -> None:
    """Fork for each program, until nobody can ask for one any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for what modules say when they are imported
    for name in MODULES:
        with suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else a collection in a fork would copy the memory of all modules
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            become(**job)
            return  # and the fork ends as any program in Python does
        end = os.pidfd_open(child)
        has_ended, _, _ = select.select([end], [], [], job["timeout"])
        os.close(end)
        if not has_ended:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(status) if has_ended else None
        print(json.dumps(code), file=answers, flush=True)


def become(arguments: list[str], cwd: str, files: list[str], **_: Any) -> None:
    for number, file in enumerate((os.devnull, *files)):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    os.environ["PWD"] = cwd  # as a shell does
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], cwd
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(cwd, arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    serve()
