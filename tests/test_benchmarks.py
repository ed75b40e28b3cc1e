"""The benchmarks can be run, and the README shows what they found. No test depends on a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KEDRO_1, PREFECT_3
from test_readme import README

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from dags import SHAPES, best_schedule  # noqa: E402


@pytest.mark.parametrize(
    ("shape", "count", "workers", "steps"),
    [
        ("wide", 100, 8, 13),
        ("grid", 100, 8, 13),
        ("chain", 7, 8, 7),
        ("diamond", 100, 8, 15),
        ("diamond", 6, 1, 6),
        ("random", 100, 8, 16),  # the longest path
    ],
)
def test_best_schedule(shape: str, count: int, workers: int, steps: int) -> None:
    assert best_schedule(SHAPES[shape](count), workers) == steps


@pytest.mark.parametrize("in_readme", [True, False])
def test_the_tables_show_the_results(in_readme: bool) -> None:
    from run import show

    text = README if in_readme else (BENCHMARKS / "README.md").read_text()
    table = text.split("<!-- benchmarks -->\n")[1].split("\n\n")[0]
    assert table + "\n" == show(json.loads((BENCHMARKS / "results.json").read_text()), in_readme)
    assert in_readme is False or table.count("\n") == 7, "six rows"


@pytest.mark.slow
@pytest.mark.skipif(not (PREFECT_3 and KEDRO_1), reason="benchmarks are for the current lane")
def test_the_command_measures(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "run.py", "--out", out, "start"],
        env={**os.environ, "ROUNDS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert all(0 < row["from"] <= row["ratio"] <= row["to"] for row in rows)
    assert rows[0]["what"] in done.stdout
