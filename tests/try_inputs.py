"""Give the script many inputs in one process, because starting one takes longest.

Start it in a project's folder, with a JSON file of pairs, the text of prefect.yml and arguments; it
writes what came of each to inputs.json: the exit code and what was printed.
"""

import io
import json
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

PROJECT = Path.cwd()
sys.path.insert(0, str(PROJECT))
from register_prefect_flow import prefect_deploy  # noqa: E402


def outcome(config: str, arguments: list[str]) -> tuple[Any, str]:
    (PROJECT / "conf/base/prefect.yml").write_text(config)
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
    pairs = json.loads(Path(sys.argv[1]).read_text())
    (PROJECT / "inputs.json").write_text(json.dumps([outcome(*pair) for pair in pairs]))
