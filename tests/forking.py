"""Runs scripts in forks of a process that has imported what they import.

Reads jobs from standard input, a line of JSON each, and writes each script's exit code to the file
descriptor of its argument. Starting Python, Kedro and Prefect anew takes seconds for each script.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import kedro_telemetry.plugin  # noqa: F401

import register_prefect_flow  # noqa: F401


def run(job: dict[str, Any]) -> int:
    """Run a script as Python would, nobody at the keyboard, and return its exit code."""
    signal.alarm(180)
    os.chdir(job["cwd"])
    for number, path, mode in ((0, os.devnull, "r"), (1, job["out"], "w"), (2, job["err"], "w")):
        with open(path, mode) as file:
            os.dup2(file.fileno(), number)
    sys.argv = [job["script"], *job["arguments"]]
    sys.path[0] = str(Path(job["script"]).parent)
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if not child:
            sys.exit(run(json.loads(line)))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(int(sys.argv[1]), f"{code}\n".encode())
