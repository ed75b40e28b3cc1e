"""Check many inputs with the script in one process; see test_random.py.

Start it in a project's folder, with a JSON file of pairs, the text of prefect.yml and arguments; it
writes what came of each to inputs.json: nothing, a message, or what should never come.
"""

import json
import sys
import traceback
from pathlib import Path

import click

PROJECT = Path.cwd()
sys.path.insert(0, str(PROJECT))
from register_prefect_flow import prefect_deploy  # noqa: E402


def outcome(config: str, arguments: list[str]) -> dict[str, str]:
    (PROJECT / "conf/base/prefect.yml").write_text(config)
    try:
        prefect_deploy.main(["--dry_run", "--run", *arguments], standalone_mode=False)
    except click.ClickException as error:
        return {"message": error.format_message()}
    except BaseException:  # noqa: BLE001
        return {"traceback": traceback.format_exc()}
    return {}


if __name__ == "__main__":
    pairs = json.loads(Path(sys.argv[1]).read_text())
    (PROJECT / "inputs.json").write_text(json.dumps([outcome(*pair) for pair in pairs]))
