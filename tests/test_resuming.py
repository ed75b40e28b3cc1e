"""A flow run that is retried goes on where it failed."""

import json
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import (
    Server,
    eventually,
    fail,
    register,
    register_and_forget,
    stop,
    write_config,
    write_pipeline,
)
from sample_projects import ALL, mend, ran
from test_end_to_end import edges, trace


def logged(server: Server, flow_run_id: str) -> list[str]:
    """What the flow run logged about resuming."""
    logs = server.logs(flow_run_id)
    starts = ("Resuming", "4 of 6", "Runs again", "All nodes run again")
    return sorted(log["message"] for log in logs if log["message"].startswith(starts))


def test_only_what_has_not_completed_runs_again(server: Server, pool: str, flaky: Path) -> None:
    flow_run_id = fail(server, pool, flaky)
    [first] = (flaky / "data/saved.pickle").iterdir()
    mend(flaky)

    # Another run writes newer versions.
    other = server.finished(server.start_run("tiny/example"))
    assert other["state_type"] == "COMPLETED", other["state"]
    newer = json.loads((flaky / "data/end.json").read_text())["saved"]
    ran(flaky)
    before = trace(flaky)

    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert ran(flaky) == ["flaky", "keep", "last"]
    assert json.loads((flaky / "data/end.json").read_text())["saved"] < newer
    versions = {path.name for path in (flaky / "data/result.json").iterdir()}
    assert first.name in versions, "the save version is that of the first attempt"
    assert len(versions) == len(list((flaky / "data/saved.pickle").iterdir())) == 2
    [again] = (flaky / "data/kept.pickle").glob(f"{first.name}/*")
    assert again.stat().st_mtime > first.stat().st_mtime, "saved anew, in the same version"

    calls = [json.loads(call) for call in (trace(flaky) - before).elements()]
    [params] = [c[2] for c in calls if c[0] == "before_pipeline_run" and c[1] == "plugin"]
    assert params["run_params"]["node_names"] is None
    assert params["pipeline"] == sorted([*ALL, "last"]), "hooks see the whole pipeline"
    counts = Counter(hook for hook, owner, _ in calls if owner == "plugin")
    once = ("after_context_created", "after_catalog_created", "after_pipeline_run")
    assert [counts[hook] for hook in (*once, "before_node_run")] == [1, 1, 1, 3]

    eventually(lambda: len(logged(server, flow_run_id)) == 5)
    assert logged(server, flow_run_id) == [
        "4 of 6 nodes had completed",
        f"Resuming session {first.name}",
        "Runs again: flaky (Failed)",
        "Runs again: keep (kept was only in memory)",
        "Runs again: last (NotReady)",
    ]
    expected = {("save", "flaky"), ("keep", "flaky"), ("flaky", "last"), ("aside", "finish_aside")}
    eventually(lambda: edges(server, flow_run_id) >= expected)
    states = {name: run["state_name"] for name, run in server.task_runs(flow_run_id).items()}
    assert states["save"] == states["finish_aside"] == "Completed"


@pytest.mark.one_lane
@pytest.mark.slow
def test_a_retry_can_be_retried(server: Server, pool: str, flaky: Path) -> None:
    flow_run_id = fail(server, pool, flaky)
    (flaky / "mended").touch()
    (flaky / "last_fails").touch()
    assert server.retry(flow_run_id)["state_type"] == "FAILED"
    assert ran(flaky) == ["flaky", "keep", "last"]
    (flaky / "last_fails").unlink()
    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert ran(flaky) == ["last"], "what the second attempt has completed does not run again"
    # The third attempt failed nowhere: there is nothing left that could run.
    before = trace(flaky)
    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert ran(flaky) == []
    calls = [json.loads(call)[0] for call in (trace(flaky) - before).elements()]
    assert calls.count("after_pipeline_run") == 2, "hooks of the pipeline are called all the same"
    assert "before_node_run" not in calls


@pytest.mark.one_lane
@pytest.mark.slow
def test_after_a_kill_only_what_was_running_runs_again(
    server: Server, pool: str, flaky: Path
) -> None:
    (flaky / "hang").touch()
    deployment = register_and_forget(flaky, server, pool, "--pipeline", "flaky")
    flow_run_id = server.start_run(deployment)
    eventually(lambda: (flaky / "pid.txt").exists() and (flaky / "data/side.json").exists())
    done = ["save", "keep", "aside", "finish_aside"]
    eventually(
        lambda: {
            server.task_runs(flow_run_id).get(name, {}).get("state_name") for name in done
        } == {"Completed"}
    )  # fmt: skip
    os.kill(int((flaky / "pid.txt").read_text()), signal.SIGKILL)
    assert server.finished(flow_run_id)["state_type"] == "CRASHED"
    assert ran(flaky) == ALL
    (flaky / "hang").unlink()
    (flaky / "mended").touch()
    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert ran(flaky) == ["flaky", "keep", "last"]


@pytest.mark.one_lane
@pytest.mark.slow
def test_with_other_parameters_all_nodes_run_again(server: Server, pool: str, flaky: Path) -> None:
    flow_run_id = fail(server, pool, flaky)
    said = "All nodes run again: the run has other parameters than before"
    body = {"parameters": {"pipeline_name": "flaky", "runtime_params": {"factor": 4}}}
    server.request("PATCH", f"/flow_runs/{flow_run_id}", body)
    assert server.retry(flow_run_id)["state_type"] == "FAILED"
    assert ran(flaky) == ALL
    eventually(lambda: logged(server, flow_run_id) == [said])

    (flaky / "mended").touch()
    (flaky / "conf/base/prefect.yml").write_text("task_runner: {resume: false}\n")
    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert ran(flaky) == sorted([*ALL, "last"])
    assert logged(server, flow_run_id) == [said]


@pytest.mark.one_lane
@pytest.mark.slow
def test_a_pipeline_that_has_changed_runs_again_only_where_it_has(
    server: Server, pool: str, flaky: Path
) -> None:
    flow_run_id = fail(server, pool, flaky)
    registry = flaky / "src/tiny/pipeline_registry.py"
    added = 'node(nodes.save, "numbers", "more", name="more"),\n        node(nodes.last'
    text = registry.read_text().replace("node(nodes.last", added)
    registry.write_text(
        text.replace('node(nodes.finish_aside, ["aside"]', 'node(nodes.finish_aside, "aside"')
    )
    (flaky / "mended").touch()
    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert ran(flaky) == ["flaky", "keep", "last", "save"], "save is the one that has been added"


@pytest.mark.one_lane
@pytest.mark.slow
def test_what_has_changed_or_is_gone_runs_again(server: Server, pool: str, flaky: Path) -> None:
    flow_run_id = fail(server, pool, flaky)
    (flaky / "mended").touch()
    (flaky / "data/side.json").unlink()
    catalog = flaky / "conf/base/catalog.yml"
    catalog.write_text(catalog.read_text().replace("data/saved.pickle", "data/stored.pickle"))
    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert ran(flaky) == sorted([*ALL, "last"])
    eventually(lambda: len(logged(server, flow_run_id)) == 8)
    lines = logged(server, flow_run_id)
    changed = "its inputs, outputs, parameters or catalog entries have changed"
    assert f"Runs again: save ({changed})" in lines
    assert "Runs again: finish_aside (side is gone)" in lines


@pytest.mark.one_lane
@pytest.mark.slow
def test_a_version_that_is_gone_is_made_again_though_there_is_an_older_one(
    server: Server, pool: str, flaky: Path
) -> None:
    flow_run_id = fail(server, pool, flaky)
    (flaky / "mended").touch()
    [version] = (flaky / "data/saved.pickle").iterdir()
    version.rename(version.with_name("2021-01-01T00.00.00.000Z"))
    assert server.retry(flow_run_id)["state_type"] == "COMPLETED"
    assert "save" in ran(flaky)
    assert version.exists()
    eventually(lambda: "Runs again: save (saved is gone)" in logged(server, flow_run_id))


RETRIES = {"PREFECT_FLOW_DEFAULT_RETRIES": "2", "PREFECT_FLOW_DEFAULT_RETRY_DELAY_SECONDS": "1"}


def succeed_at_the_second_time(project: Path) -> None:
    nodes = project / "src/tiny/nodes.py"
    at_first = 'open("ran.txt").read().count("flaky") > 1'
    nodes.write_text(nodes.read_text().replace('Path("mended").exists()', at_first))


@pytest.mark.slow
def test_a_flow_may_retry_itself(server: Server, flaky: Path) -> None:
    succeed_at_the_second_time(flaky)
    done = register(flaky, server, "--run", "--pipeline", "flaky", env=RETRIES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ran(flaky) == sorted([*ALL, "flaky", "keep", "last"])
    outputs = done.stdout.partition("Its outputs:\n")[2]
    assert re.findall(r"(?m)^  (\w+): ", outputs) == ["end", "kept_copy", "side"], "of all nodes"


CONFIRMING = """
from pathlib import Path


def read(incoming):
    return sorted(incoming)


def total(news):
    if not Path("failed").exists():
        Path("failed").touch()
        raise RuntimeError("once")
    return news
"""


@pytest.mark.one_lane
@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [True, False])
def test_what_has_been_confirmed_is_not_lost_in_a_retry(
    project: Path, server: Server, checkpoints: bool
) -> None:
    nodes = "node(read, 'incoming', 'news', name='read', confirms='incoming'), "
    write_pipeline(project, CONFIRMING, nodes + "node(total, 'news', 'total', name='total')")
    (project / "data/incoming").mkdir()
    (project / "data/incoming/monday.json").write_text("1")
    dataset = (
        "{type: partitions.IncrementalDataset, path: data/incoming, dataset: json.JSONDataset}"
    )
    with (project / "conf/base/catalog.yml").open("a") as catalog:
        catalog.write(f"\nincoming: {dataset}\n")
    write_config(project, "checkpoints: kept" if checkpoints else "")
    done = register(project, server, "--run", env=RETRIES)
    output = done.stdout + done.stderr
    if checkpoints:
        assert done.returncode == 0, output
        assert json.loads((project / "data/total.json").read_text()) == ["monday.json"]
    else:
        assert done.returncode == 1, output
        assert "Node 'read' has confirmed incoming, and cannot run again" in output
        assert not (project / "data/total.json").exists()


@pytest.mark.one_lane
@pytest.mark.slow
def test_the_server_may_be_away_for_a_while(
    flaky: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    succeed_at_the_second_time(flaky)
    (flaky / "hang").touch()
    server = Server(tmp_path_factory.mktemp("restarted-server"))
    try:
        eventually(server.is_up)
        command = [sys.executable, flaky / "register_prefect_flow.py", "--run", "-p", "flaky"]
        process = server.start(command, "flow", flaky, server.env | RETRIES)
        eventually(lambda: (flaky / "pid.txt").exists() and (flaky / "data/side.json").exists())
        stop(server.process)
        server.start_server()
        eventually(server.is_up)
        (flaky / "hang").unlink()
        assert process.wait(timeout=120) == 0, (server.folder / "flow.log").read_text()[-5000:]
        assert ran(flaky) == sorted([*ALL, "flaky", "keep", "last"])
    finally:
        stop(server.process)
