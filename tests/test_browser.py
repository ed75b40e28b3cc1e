"""What Prefect's UI shows, in a real browser; BROWSER_PYTHON is a Python that has Playwright."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import PREFECT_3, Server, eventually, register_and_forget, run
from sample_projects import KEDRO, mend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (os.environ.get("BROWSER_PYTHON") and (KEDRO >= (1,) or KEDRO < (0, 19))),
        reason="needs BROWSER_PYTHON, in the oldest and the newest lane",
    ),
]
# Prefect 3 has two user interfaces.
UIS = ["", "/v2"] if PREFECT_3 else [""]
RUNS = "runs" if PREFECT_3 else "flow-runs"


def browse(server: Server, folder: Path, *steps: tuple[str, str]) -> None:
    base = server.url.removesuffix("/api")
    folder.mkdir(exist_ok=True)
    script = Path(__file__).with_name("browse.py")
    done = run(os.environ["BROWSER_PYTHON"], script, base, folder, json.dumps(steps), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def newest_run(server: Server) -> dict[str, Any]:
    found = server.post("/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})
    return found[0] if found else {}


def artifact(server: Server, flow_run_id: str, key: str) -> dict[str, Any]:
    def find() -> Any:
        found = server.post("/artifacts/filter", {})
        return [a for a in found if (a["flow_run_id"], a["key"]) == (flow_run_id, key)]

    return eventually(find)[0]


@pytest.mark.parametrize("ui", UIS)
def test_a_user_sees_pipeline_run_and_results(
    server: Server, pool: str, project: Path, tmp_path: Path, ui: str
) -> None:
    catalog = project / "conf/base/catalog.yml"
    catalog.write_text(
        catalog.read_text().replace(
            "filepath: data/total.json",
            "filepath: data/total.json\n  metadata: {prefect: {preview: true}}",
        )
    )
    nodes = project / "src/tiny/nodes.py"
    nodes.write_text(
        nodes.read_text().replace(
            "def double(numbers):\n",
            "def double(numbers):\n    import logging\n"
            "    logging.getLogger(__name__).warning('doubling')\n",
        )
    )
    assert "doubling" in nodes.read_text()
    deployment = register_and_forget(project, server, pool)
    found = server.request("GET", f"/deployments/name/{deployment}")["id"]
    before = newest_run(server).get("id")
    browse(
        server, tmp_path / "start",
        ("go to", f"{ui}/deployments/deployment/{found}"),
        ("click", "Description"),
        ("see picture", "the pipeline"),
        ("start", "Quick run"),
    )  # fmt: skip
    eventually(lambda: newest_run(server).get("id") != before)
    flow_run = server.finished(newest_run(server)["id"])
    assert flow_run["state_type"] == "COMPLETED"
    task_runs = eventually(lambda: server.task_runs(flow_run["id"]))
    steps = [
        ("go to", f"{ui}/{RUNS}/flow-run/{flow_run['id']}"),
        ("see", "Completed"),
        ("go to", f"{ui}/{RUNS}/task-run/{task_runs['double']['id']}"),
        ("see", "doubling"),
    ]
    if KEDRO >= (1,):  # kedro-datasets 1 has no preview of this
        total = artifact(server, flow_run["id"], "tiny-total")
        steps += [("go to", f"{ui}/artifacts/artifact/{total['id']}"), ("see", "30")]
    browse(server, tmp_path / "end", *steps)


@pytest.mark.one_lane
@pytest.mark.parametrize("ui", UIS)
def test_retry_in_the_browser_resumes(
    server: Server, pool: str, flaky: Path, tmp_path: Path, ui: str
) -> None:
    deployment = register_and_forget(flaky, server, pool, "--pipeline", "flaky")
    flow_run_id = server.start_run(deployment)
    assert server.finished(flow_run_id)["state_type"] == "FAILED"
    browse(
        server, tmp_path / "failed",
        ("go to", f"{ui}/{RUNS}/flow-run/{flow_run_id}"),
        ("see", "Failed"),
    )  # fmt: skip
    mend(flaky)
    server.await_idle_worker()
    browse(
        server, tmp_path / "retry",
        ("go to", f"{ui}/{RUNS}/flow-run/{flow_run_id}"),
        *[("open menu", "of the flow run"), ("click", "Retry")] if ui else [("press", "Retry")],
        ("press", "Retry"),
    )  # fmt: skip
    eventually(lambda: server.flow_run(flow_run_id)["run_count"] == 2)
    assert server.finished(flow_run_id)["state_type"] == "COMPLETED"
    browse(
        server, tmp_path / "retried",
        ("go to", f"{ui}/{RUNS}/flow-run/{flow_run_id}"),
        ("see", "Completed"),
    )  # fmt: skip
    lines = [log["message"] for log in server.logs(flow_run_id)]
    assert "4 of 6 nodes had completed" in lines
    assert any("--from-nodes" in line for line in lines)
