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


RESULTS = BENCHMARKS / "results.json"


def table_of(text: str) -> str:
    return text.split("<!-- benchmarks -->\n")[1].split("\n\n", maxsplit=1)[0] + "\n"


@pytest.mark.parametrize("in_readme", [True, False])
def test_the_tables_show_the_results(in_readme: bool) -> None:
    from run import show

    text = README if in_readme else (BENCHMARKS / "README.md").read_text()
    assert table_of(text) == show(json.loads(RESULTS.read_text()), in_readme=in_readme)


def test_what_the_readme_shows_can_be_measured_alone() -> None:
    from run import IN_README

    rows = json.loads(RESULTS.read_text())["rows"]
    assert {row["name"] for row in rows if row["in_readme"]} <= IN_README.keys()
    assert table_of(README).count("\n") <= 16, "at most 14 rows"


def test_a_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    from run import write_table

    path = tmp_path / "README.md"
    path.write_text("before\n\n<!-- benchmarks -->\n| old |\n| older |\n\nbehind\n\nend\n")
    write_table(path, "| new |\n")
    assert path.read_text() == "before\n\n<!-- benchmarks -->\n| new |\n\nbehind\n\nend\n"


@pytest.mark.slow
@pytest.mark.skipif(not (PREFECT_3 and KEDRO_1), reason="benchmarks are for the current lane")
def test_the_command_measures(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    names = ["default-100", "start", "register"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "run.py", "--out", out, *names],
        env={**os.environ, "ROUNDS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert list(dict.fromkeys(row["name"] for row in rows)) == names
    assert all(0 < row["from"] <= row["ratio"] <= row["to"] for row in rows)
    assert all(row["what"] in done.stdout for row in rows)
