"""Run `kedro run` and the script's flow with the same options, in turns, in one process.

Start it in a project's folder, with a list of option lists as JSON; it writes what each run left
behind, and what it raised, to runs.json.
"""

import inspect
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from kedro.framework.cli.cli import KedroCLI

PROJECT = Path.cwd()
sys.path.insert(0, str(PROJECT))
from register_prefect_flow import my_flow, prefect_deploy  # noqa: E402


def kedro_run(options: list[str]) -> None:
    KedroCLI(PROJECT)(args=["run", *options], prog_name="kedro", standalone_mode=False)


def prefect_run(options: list[str]) -> None:
    own = [option for option in options if option != "--async"]  # here that is task_runner.is_async
    given = prefect_deploy.make_context("register_prefect_flow", own).params
    my_flow(**{name: given[name] for name in inspect.signature(my_flow.fn).parameters})


def left_by(run: Any, options: list[str]) -> dict[str, Any]:
    """Run from the same data as always, and tell what came of it."""
    for name in ("data", "kept"):
        shutil.rmtree(PROJECT / name, ignore_errors=True)
    shutil.copytree(PROJECT / "start", PROJECT / "data")
    trace = PROJECT / "trace.jsonl"
    trace.unlink(missing_ok=True)
    error = None
    try:
        run(options)
    except (Exception, SystemExit) as raised:  # noqa: BLE001
        error = f"{type(raised).__name__}: {raised}"
    files = {
        path.relative_to(PROJECT).as_posix(): path.read_bytes().decode("latin-1")
        for path in sorted((PROJECT / "data").rglob("*"))
        if path.is_file()
    }
    calls = trace.read_text() if trace.exists() else ""
    calls = re.sub(r"0x[0-9a-f]{6,}", "ADDRESS", calls)
    return {"files": files, "trace": sorted(calls.splitlines()), "error": error}


if __name__ == "__main__":
    shutil.copytree(PROJECT / "data", PROJECT / "start")
    runs = [
        {"kedro": left_by(kedro_run, options), "prefect": left_by(prefect_run, options)}
        for options in json.loads(sys.argv[1])
    ]
    (PROJECT / "runs.json").write_text(json.dumps(runs))
