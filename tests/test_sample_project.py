"""The sample project of the README, in the lane it is written for."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import KEDRO_1, PREFECT_3, SCRIPT, Server, copy_in, kedro_run, register, written_files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (KEDRO_1 and PREFECT_3), reason="it is written for the current lane"),
]


def copy_of_the_sample(path: Path) -> Path:
    """What a fresh clone has of it, with the script copied in."""
    made = shutil.ignore_patterns("0[2-9]*", "__pycache__", "register_prefect_flow.py")
    return copy_in(Path(shutil.copytree(SCRIPT.parent / "tests/wine", path, ignore=made)))


def test_it_gives_what_kedro_run_gives(tmp_path: Path, server: Server) -> None:
    project, reference = (copy_of_the_sample(tmp_path / name / "wine") for name in "ab")
    done = register(project, server, "--run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"plot: MatplotlibDataset {project}/data/08_reporting/accuracy.png" in done.stdout
    assert kedro_run(reference).returncode == 0

    files = written_files(project)
    assert files == written_files(reference)
    assert set(files) == {
        "01_raw/README.md",
        "01_raw/wine.csv",
        "04_feature/features.csv",
        "06_models/best.pickle/VERSION/best.pickle",
        "06_models/forest.pickle",
        "06_models/logistic.pickle",
        "06_models/neighbours.pickle",
        "08_reporting/accuracy.png",
        "08_reporting/metrics.json",
    }
    metrics = json.loads(files["08_reporting/metrics.json"])
    assert metrics["accuracy"][metrics["best"]] == max(metrics["accuracy"].values()) > 0.9
    assert files["08_reporting/accuracy.png"].startswith(b"\x89PNG")


def test_it_has_three_pipelines(tmp_path: Path) -> None:
    project = copy_of_the_sample(tmp_path / "wine")
    message = register(project, None, "--dry_run", "--run", "--pipeline", "none").stderr
    assert "The pipelines are: __default__, modelling, processing." in message
