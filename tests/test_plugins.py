"""Plugins in flow runs: they do what they do in `kedro run`."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import QUEUE, Server, kedro_run, register

pytestmark = pytest.mark.slow
needs_mlflow = pytest.mark.skipif(
    not find_spec("kedro_mlflow"), reason="for the environment with tests/requirements-plugins.txt"
)
needs_pandera = pytest.mark.skipif(
    not find_spec("pandera"), reason="for the environment with tests/requirements-plugins.txt"
)


MLFLOW = """
server:
  mlflow_tracking_uri: sqlite:///mlflow.db
"""


@pytest.fixture(autouse=True)
def mlflow_yml(project: Path) -> None:
    """Where kedro-mlflow is installed, it takes part in every run."""
    (project / "conf/base/mlflow.yml").write_text(MLFLOW)


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    """A proxy that lets nothing through, and what it was asked for."""
    asked: list[str] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(1000).decode("latin-1").splitlines()[0])
                    connection.sendall(b"HTTP/1.1 503 Closed\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked


@pytest.mark.outer_lanes
@pytest.mark.parametrize("consent", ["true", "false"])
def test_telemetry_is_sent_only_with_consent(
    project: Path, server: Server, proxy: tuple[str, list[str]], consent: str
) -> None:
    url, asked = proxy
    (project / ".telemetry").write_text(f"consent: {consent}\n")
    names = {"HTTPS_PROXY": url, "https_proxy": url, "NO_PROXY": "127.0.0.1"}
    env = {**names, "no_proxy": "127.0.0.1", "DO_NOT_TRACK": ""}
    done = register(project, server, "--run", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any("heap" in line for line in asked) is (consent == "true"), asked


METRIC = """
score:
  type: kedro_mlflow.io.metrics.MlflowMetricDataset
"""

MLFLOW_PIPELINE = """
    scored = pipeline([
        *sums.nodes,
        node(float, "total", "score", name="score"),
    ])
    return {"scored": scored, """


def mlflow_runs(project: Path) -> list[tuple[str, dict[str, str], dict[str, float]]]:
    """Status, parameters and metrics of each run, the newest first."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments)
    return [(run.info.status, dict(run.data.params), dict(run.data.metrics)) for run in found]


@needs_mlflow
@pytest.mark.filterwarnings("default")  # MLflow's own
def test_each_flow_run_is_one_mlflow_run(project: Path, server: Server, pool: str) -> None:
    with (project / "conf/base/catalog.yml").open("a") as catalog:
        catalog.write(METRIC)
    registry = project / "src/tiny/pipeline_registry.py"
    registry.write_text(registry.read_text().replace("\n    return {", MLFLOW_PIPELINE))

    assert kedro_run(project, "--pipeline", "scored").returncode == 0
    [reference] = mlflow_runs(project)
    assert reference == ("FINISHED", {"factor": "3", "pause": "0"}, {"score": 30})

    pools = ("--work_pool_name", pool, "--work_queue_name", QUEUE)
    done = register(project, server, *pools, "--pipeline", "scored")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(mlflow_runs(project)) == 1, "registering is no run"
    for _ in range(2):
        flow_run = server.finished(server.start_run("tiny/example"))
        assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
    assert mlflow_runs(project) == [reference] * 3


@needs_mlflow
@pytest.mark.filterwarnings("default")
def test_a_failed_flow_run_is_a_failed_mlflow_run(project: Path, server: Server) -> None:
    assert kedro_run(project, "--pipeline", "broken").returncode == 1
    assert register(project, server, "--run", "--pipeline", "broken").returncode == 1
    assert [status for status, _, _ in mlflow_runs(project)] == ["FAILED", "FAILED"]


PANDERA_HOOKS = """\
import pandera.pandas as pa
from kedro.framework.hooks import hook_impl

SCHEMAS = {"table": pa.DataFrameSchema({"age": pa.Column(int, pa.Check.ge(0))})}


class Validation:
    @hook_impl
    def after_dataset_loaded(self, dataset_name, data):
        if dataset_name in SCHEMAS:
            SCHEMAS[dataset_name].validate(data)
"""

PANDERA_NODES = """

def oldest(table):
    return int(table["age"].max())
"""

PANDERA_PIPELINE = """
    ages = pipeline([node(nodes.oldest, "table", "total", name="oldest")])
    return {"ages": ages, """

TABLE = """
table:
  type: pandas.CSVDataset
  filepath: data/table.csv
"""


@needs_pandera
def test_a_validation_hook_fails_the_run_as_it_fails_kedro_run(
    project: Path, server: Server
) -> None:
    (project / "src/tiny/validation.py").write_text(PANDERA_HOOKS)
    (project / "src/tiny/settings.py").write_text(
        "from tiny.validation import Validation\n\nHOOKS = (Validation(),)\n"
    )
    for name, text in (
        ("src/tiny/nodes.py", PANDERA_NODES),
        ("conf/base/catalog.yml", TABLE),
    ):
        with (project / name).open("a") as file:
            file.write(text)
    registry = project / "src/tiny/pipeline_registry.py"
    registry.write_text(registry.read_text().replace("\n    return {", PANDERA_PIPELINE))

    table = project / "data/table.csv"
    table.write_text("age\n31\n42\n")
    done = register(project, server, "--run", "--pipeline", "ages")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((project / "data/total.json").read_text()) == 42

    table.write_text("age\n31\n-1\n")
    reference: Any = kedro_run(project, "--pipeline", "ages")
    done = register(project, server, "--run", "--pipeline", "ages")
    assert reference.returncode == done.returncode == 1
    message = re.search(r"Column 'age' failed.+?-1", reference.stdout + reference.stderr)[0]
    assert message in done.stderr
