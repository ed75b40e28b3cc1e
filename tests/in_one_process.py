"""Many runs, or many inputs, in one process, because starting one takes longer than they do.

    python in_one_process.py compare '[["--pipeline", "a"], ["--pipeline", "b"]]'
    python in_one_process.py try '[["text of prefect.yml", ["--dry_run"]]]'

is started in a project's folder, and writes what came of each to found.json. The functions `compare`
and `try_inputs` are for tests, and do that.
"""

import inspect
import io
import json
import re
import shutil
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

# Each process that runs nodes opens the project, and so has a context and a catalog of its own.
PER_PROCESS = ("after_context_created", "after_catalog_created")


def compare(project: Path, server: Any, options: list[list[str]], **env: str) -> list[Any]:
    """Run the project by `kedro run` and by the script, with each list of options.

    What each of them left behind, and what it raised, is under `kedro` and `prefect`.
    """
    arguments = [["--env", "base", *each] if "--env" not in each else each for each in options]
    text = start("compare", project, arguments, server.env | env)
    # Save versions are those of the run.
    return json.loads(
        re.sub(r"(?!2020|2021)\d{4}-\d\d-\d\dT\d\d\.\d\d\.\d\d\.\d{3,6}Z", "NOW", text)
    )


def calls(run_: dict[str, Any]) -> list[str]:
    """The calls of hooks in a run of `compare`, as they are in any number of processes."""
    return [call for call in run_["trace"] if json.loads(call)[0] not in PER_PROCESS]


def try_inputs(project: Path, inputs: list[Any]) -> list[tuple[Any, str]]:
    """Give the script pairs of prefect.yml and arguments; return exit codes and what is printed."""
    return [tuple(pair) for pair in json.loads(start("try", project, inputs))]


def start(what: str, project: Path, given: Any, env: dict[str, str] | None = None) -> str:
    from conftest import run  # which this process of its own does not need

    (project / "given.json").write_text(json.dumps(given))
    (project / "found.json").unlink(missing_ok=True)
    command = (sys.executable, __file__, what)
    done = run(*command, cwd=project, env=env, timeout=1200)  # there may be many
    assert (project / "found.json").exists(), done.stdout + done.stderr
    return (project / "found.json").read_text()


# ---- What that process does ----


def run_by_kedro(project: Path, options: list[str]) -> None:
    from kedro.framework.cli.cli import KedroCLI

    KedroCLI(project)(args=["run", *options], prog_name="kedro", standalone_mode=False)


def run_by_prefect(_: Path, options: list[str]) -> None:
    from register_prefect_flow import my_flow, prefect_deploy

    own = [option for option in options if option != "--async"]  # here that is task_runner.is_async
    given = prefect_deploy.make_context("register_prefect_flow", own).params
    my_flow(**{name: given[name] for name in inspect.signature(my_flow.fn).parameters})


def left_by(run_by: Any, project: Path, options: list[str]) -> dict[str, Any]:
    """Run from the same data as always, and tell what came of it."""
    for name in ("data", "kept"):
        shutil.rmtree(project / name, ignore_errors=True)
    shutil.copytree(project / "start", project / "data")
    trace = project / "trace.jsonl"
    trace.unlink(missing_ok=True)
    error = None
    try:
        run_by(project, options)
    except (Exception, SystemExit) as raised:  # noqa: BLE001
        error = f"{type(raised).__name__}: {raised}"
    files = {
        path.relative_to(project).as_posix(): path.read_bytes().decode("latin-1")
        for path in sorted((project / "data").rglob("*"))
        if path.is_file()
    }
    made = trace.read_text() if trace.exists() else ""
    made = re.sub(r"0x[0-9a-f]{6,}", "ADDRESS", made)
    return {"files": files, "trace": sorted(made.splitlines()), "error": error}


def compared(project: Path, options: list[str]) -> dict[str, Any]:
    if not (project / "start").exists():
        shutil.copytree(project / "data", project / "start")
    return {
        "kedro": left_by(run_by_kedro, project, options),
        "prefect": left_by(run_by_prefect, project, options),
    }


def tried(project: Path, config_and_arguments: tuple[str, list[str]]) -> tuple[Any, str]:
    from register_prefect_flow import prefect_deploy

    config, arguments = config_and_arguments
    (project / "conf/base/prefect.yml").write_text(config)
    printed, code = io.StringIO(), None
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            prefect_deploy.main(arguments)
        except SystemExit as ended:
            code = ended.code
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
    return code, printed.getvalue()


if __name__ == "__main__":
    here = Path.cwd()
    sys.path[0] = str(here)  # for register_prefect_flow
    do = compared if sys.argv[1] == "compare" else tried
    found = [do(here, each) for each in json.loads((here / "given.json").read_text())]
    (here / "found.json").write_text(json.dumps(found))
