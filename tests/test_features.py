"""Each feature of `kedro run` and of Kedro projects: same outputs, hook calls and errors."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from conftest import KEDRO_1, Server, copy_in, register
from in_one_process import compare
from sample_projects import KEDRO, write_features_project, write_project

PATTERNS = KEDRO >= (0, 18, 12)
OLD_VERSION = "2020-01-01T00.00.00.000Z"

# From the name of a feature to the options of `kedro run`, the file it writes, and what is in it.
FEATURES: dict[str, tuple[list[str], str, Any]] = {
    "everything": ([], "total.json", 30),
    "params": (["--params", "factor=5,model.depth=7"], "total.json", 42),
    "nested params": (
        ["--pipeline", "nested", "--params", "model.kind.leaves=9"],
        "nested.json",
        [{"depth": 2, "kind": {"name": "tree", "leaves": 9}}, 9],
    ),
    "tags": (["--tags", "light,heavy"], "total.json", None),
    "nodes": (["--pipeline", "transcoding", "--nodes", "to_list"], "shared.json", ["1", "2", "3"]),
    "to nodes": (["--to-nodes", "add"], "total.json", 30),
    "from nodes": (
        ["--pipeline", "partitions", "--from-nodes", "split"],
        "parts_sum.json",
        6,
    ),
    "from inputs": (["--from-inputs", "numbers"], "total.json", 30),
    "to outputs": (["--to-outputs", "total"], "total.json", 30),
    "namespace": (
        ["--pipeline", "spaces", "--namespaces" if KEDRO_1 else "--namespace", "right"],
        "right.json",
        [6, 8, 10],
    ),
    "load versions": (
        ["--pipeline", "versions", "--load-versions", f"report:{OLD_VERSION}"],
        "from_report.json",
        101,
    ),
    "newest version": (["--pipeline", "versions"], "from_report.json", 201),
    "conf source": (["--conf-source", "other"], "total.json", 54),
    "transcoding": (["--pipeline", "transcoding"], "transcoded.json", 3),
    "partitions": (["--pipeline", "partitions"], "parts_sum.json", 6),
    "incremental": (["--pipeline", "incremental"], "news.json", ["monday", "tuesday"]),
    "generator": (["--pipeline", "generator"], "news.json", 3),
    "namespaces of pipelines": (["--pipeline", "spaces"], "left.json", [4, 6, 8]),
    "copy modes": (["--pipeline", "copy_modes"], "same.json", [True, False]),
    "credentials": (["--pipeline", "credentials"], "guarded.txt", "a key opens [2, 4, 6]\n"),
    "hooks": (
        ["--pipeline", "hooks"],
        "hooked.json",
        ["added by a hook", "replaced by a hook"],
    ),
    "failure": (["--pipeline", "failing"], "nothing", None),
    "unknown node": (["--nodes", "doubel"], "nothing", None),
}
if PATTERNS:
    FEATURES["factories"] = (["--pipeline", "factories"], "factory/second.json", [4, 8, 12])
if KEDRO_1:
    FEATURES["several namespaces"] = (
        ["--pipeline", "spaces", "--namespaces", "left,right.inner"],
        "right.json",
        [6, 8, 10],
    )
    FEATURES["several pipelines"] = (
        ["--pipelines", "transcoding,partitions"],
        "parts_sum.json",
        6,
    )
    FEATURES["only missing outputs"] = (
        ["--pipeline", "transcoding", "--only-missing-outputs"],
        "transcoded.json",
        "done before",
    )


@pytest.fixture(scope="module")
def runs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All features, run in one process: starting one takes longer than its runs."""
    project = copy_in(write_features_project(tmp_path_factory.mktemp("features") / "project"))
    for year, total in (("2020", 100), ("2021", 200)):
        report = project / f"data/report.pickle/{year}{OLD_VERSION[4:]}/report.pickle"
        report.parent.mkdir(parents=True)
        report.write_bytes(pickle.dumps({"total": total}))
    (project / "data/transcoded.json").write_text('"done before"')
    (project / "data/shared.json").write_text('["old"]')
    options = [options for options, _, _ in FEATURES.values()]
    return dict(zip(FEATURES, compare(project, server, options), strict=True))


@pytest.mark.parametrize("feature", FEATURES)
def test_a_flow_run_does_what_kedro_run_does(runs: dict[str, Any], feature: str) -> None:
    kedro, prefect = runs[feature]["kedro"], runs[feature]["prefect"]
    assert prefect["files"] == kedro["files"]
    assert prefect["trace"] == kedro["trace"]
    _, file, expected = FEATURES[feature]
    if feature not in ("failure", "unknown node"):
        assert prefect["error"] is kedro["error"] is None
    if expected is not None:
        written = prefect["files"][f"data/{file}"]
        assert written == expected if file.endswith(".txt") else json.loads(written) == expected


@pytest.mark.outer_lanes
@pytest.mark.parametrize("pipeline", ["hooks", "transcoding", "spaces", "credentials"])
def test_what_runs_is_not_refused(tmp_path: Path, pipeline: str) -> None:
    project = copy_in(write_features_project(tmp_path / "project"))
    checked = register(project, None, "--run", "--dry_run", "--pipeline", pipeline)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_errors_are_those_of_kedro(runs: dict[str, Any]) -> None:
    assert runs["failure"]["prefect"]["error"] == "ZeroDivisionError: no number left"
    unknown = runs["unknown node"]
    assert unknown["prefect"]["error"] == unknown["kedro"]["error"]
    assert "doubel" in unknown["kedro"]["error"]


def test_confirmed_partitions_are_not_read_again(runs: dict[str, Any]) -> None:
    files = runs["incremental"]["prefect"]["files"]
    assert files["data/incoming/CHECKPOINT"] == "tuesday"


@pytest.mark.slow
def test_nodes_load_and_save_asynchronously_if_asked_to(tmp_path: Path, server: Server) -> None:
    project = copy_in(write_features_project(tmp_path / "project"))
    # prefect.yml of this environment says what `kedro run` is told by --async.
    [pair] = compare(project, server, [["--env", "parallel", "--pipeline", "threads", "--async"]])
    assert pair["prefect"]["files"] == pair["kedro"]["files"]
    threads = json.loads(pair["prefect"]["files"]["data/news.json"])
    assert len(threads) == 2
    assert len({*threads, "MainThread"}) == 3


@pytest.mark.slow
def test_catalog_config_loader_and_session_may_be_classes_of_the_project(
    tmp_path: Path, server: Server
) -> None:
    project = copy_in(write_project(tmp_path / "project", "custom"))
    checked = register(project, None, "--dry_run", "--run")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    pair, with_params = compare(project, server, [[], ["--params", "factor=6"]])
    assert pair["prefect"] == pair["kedro"]
    assert with_params["prefect"] == with_params["kedro"]
    # 1000 comes from the catalog's class, and the factor of 4 from that of the config loader.
    # Kedro 0.18 hands nodes a copy of the catalog that is not of this class.
    total = json.loads(pair["prefect"]["files"]["data/total.json"])
    assert total == (2 + 4) * (1 + 2 + 3 + (1000 if KEDRO >= (0, 19) else 0))
    assert with_params["prefect"]["files"]["data/total.json"] != str(total)
