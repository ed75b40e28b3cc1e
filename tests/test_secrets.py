"""What nobody else may see, and who may come in."""

import os
import re
import stat
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import KEDRO_1, PREFECT_3, Server, eventually, register_and_forget, stop, write_config
from engines import ENGINES
from test_deployments import save_secret
from test_end_to_end import assert_kept_nowhere
from test_faults import cancel, own_worker, resume

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PREFECT_3 and KEDRO_1 and find_spec("distributed")), reason="its lane has it"
    ),
]
ALL_ENGINES = ["threads", *ENGINES]
# Of conf/local, of the worker's environment, of a block: none is in any text that Prefect is told.
SECRETS = [f"{number}-s3cret-{os.getpid()}" for number in ("eleventh", "twelfth", "thirteenth")]
CONFIG = """
task_runner: {type: %s}
checkpoints: kept
"""


def hide_secrets(server: Server, project: Path) -> None:
    """Give the project credentials, and a node that reads variables of its environment."""
    (project / "conf/local/credentials.yml").write_text(f"door: {{key: {SECRETS[0]}}}\n")
    (project / "conf/local/parameters.yml").write_text("")
    catalog = project / "conf/base/catalog.yml"
    text = catalog.read_text().replace("numbers.json\n", "numbers.json\n  credentials: door\n")
    catalog.write_text(re.sub(r"(saved\.pickle|data/end\.json)", r"\1, credentials: door", text))
    nodes = project / "src/tiny/nodes.py"
    text = nodes.read_text()
    read = "    seen = [os.environ.get(name, '') for name in ('DOOR', 'OF_BLOCK')]\n"
    write = "    Path('seen.txt').write_text(''.join(seen))\n"
    nodes.write_text(text.replace('    note("flaky", 0)\n', f'    note("flaky", 0)\n{read}{write}'))
    save_secret(server, "door", SECRETS[2])


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_secrets_are_kept_nowhere(server: Server, flaky: Path, tmp_path: Path, engine: str) -> None:
    hide_secrets(server, flaky)
    pool = f"secret-{engine}"

    def search() -> None:
        assert_kept_nowhere(server, SECRETS)
        own = list(server.folder.glob(f"worker-{pool}*.log"))
        places = [flaky / "kept", flaky / "ran.txt"]
        own += [path for place in places for path in place.rglob("*") if path.is_file()]
        for content in (path.read_bytes() for path in own):
            assert not any(secret.encode() in content for secret in SECRETS)

    with own_worker(server, tmp_path, pool, {"DOOR": SECRETS[1]}) as start:
        start()
        (flaky / "hang").touch()
        write_config(flaky, CONFIG % engine)
        arguments = ("-p", "flaky", "--env", "local", "--deployment_name", pool)
        deployment = register_and_forget(flaky, server, pool, *arguments)
        found = server.request("GET", f"/deployments/name/{deployment}")
        env = found["job_variables"]["env"] | {"OF_BLOCK": "{{ prefect.blocks.secret.door }}"}
        variables = {"job_variables": found["job_variables"] | {"env": env}}
        server.request("PATCH", f"/deployments/{found['id']}", variables)
        flow_run_id = server.start_run(deployment)
        eventually((flaky / "seen.txt").exists)
        assert (flaky / "seen.txt").read_text() == SECRETS[1] + SECRETS[2]
        (flaky / "seen.txt").unlink()
        [own] = (flaky / "kept").iterdir()
        assert stat.S_IMODE(own.stat().st_mode) == 0o700, "for the user alone"
        search()
        cancel(server, flow_run_id)
        flow_run = server.finished(flow_run_id)
        assert flow_run["state_type"] == "CANCELLED", flow_run["state"]["message"]
        search()
        (flaky / "hang").unlink()
        assert server.retry(flow_run_id)["state_type"] == "FAILED"
        search()
        (flaky / "seen.txt").unlink()
        assert "last" in resume(server, flaky, flow_run_id)
        search()


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_nothing_listens_but_the_engine(server: Server, flaky: Path, engine: str) -> None:
    import psutil

    (flaky / "hang").touch()
    write_config(flaky, f"task_runner: {{type: {engine}}}")
    command = [sys.executable, flaky / "register_prefect_flow.py", "--run", "-p", "flaky"]
    process = server.start(command, "flow", flaky, server.env)
    try:
        eventually((flaky / "pid.txt").exists)
        flow = psutil.Process(process.pid)
        found = {
            one.pid: {connection.laddr.ip for connection in one.net_connections("inet")
                      if connection.status == psutil.CONN_LISTEN}
            for one in (flow, *flow.children(recursive=True))
        }  # fmt: skip
        node = int((flaky / "pid.txt").read_text())
        assert engine == "threads" or found[node] == set()
        assert set().union(*found.values()) == ({"127.0.0.1"} if engine == "dask" else set())
    finally:
        stop(process)
