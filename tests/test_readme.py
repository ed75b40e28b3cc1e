"""What the README says is so."""

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import SCRIPT
from sample_projects import KEDRO
from test_config import load, write

import register_prefect_flow

ROOT = SCRIPT.parent
README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    """The fenced block that follows a marker."""
    found = re.search(rf"<!-- {name} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert found, name
    return found[1]


def help_text() -> str:
    return (
        CliRunner()
        .invoke(
            register_prefect_flow.prefect_deploy,
            ["--help"],
            prog_name="python register_prefect_flow.py",
            terminal_width=99,
        )
        .output
    )


@pytest.mark.skipif(
    not register_prefect_flow._PREFECT_3, reason="other versions of click word it differently"
)
def test_the_options_are_those_of_the_script() -> None:
    assert block("options") == help_text()


def test_every_option_is_explained() -> None:
    for option in register_prefect_flow.prefect_deploy.params:
        assert isinstance(option, click.Option)
        assert option.help, option.name


def test_ci_runs_the_commands_of_the_readme() -> None:
    assert "-m pytest tests" in block("test command")
    for name in ("run command", "test command"):
        assert f'readme "{name}"\n' in (ROOT / ".ci/run").read_text()


def test_the_table_in_ci_names_suites_that_are_there() -> None:
    table = (ROOT / ".ci/run").read_text().split("suites='\n")[1].split("\n'")[0]
    head, *rows = map(str.split, table.splitlines())
    there = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert {row[0] for row in rows} - there == {"others"}
    assert {len(row) for row in rows} == {len(head)}


@pytest.mark.parametrize("name", ["run command", "test command"])
def test_the_files_in_the_commands_are_there(name: str) -> None:
    made = {"tests/wine/data/08_reporting/metrics.json", "tests/wine/register_prefect_flow.py"}
    made.add("tests/wine/.telemetry")
    for path in set(re.findall(r"[\w./]*tests[\w./]*|\S*requirements\.txt", block(name))) - made:
        assert (ROOT / path).exists(), path


def test_the_lanes_are_those_that_are_tested() -> None:
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", README, re.MULTILINE)
    assert [row[0] for row in rows] == ["documented", "late2", "bridge", "current"]
    for lane, kedro, prefect, _ in rows:
        lines = (ROOT / f"tests/constraints/{lane}.txt").read_text().splitlines()
        pins = [line.partition(" ;")[0] for line in lines]  # without the Python they are for
        assert f"kedro=={kedro}" in pins
        assert f"prefect=={prefect}" in pins


def test_the_settings_shown_are_taken(tmp_path: Path) -> None:
    _, text = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)  # the first one is Prefect's
    if not register_prefect_flow._PREFECT_3 or KEDRO < (0, 19):
        text = re.sub(r"type: processes, |checkpoints: .*\n", "", text)
    config = load(write(tmp_path, text))
    assert config.task_runner["max_workers"] == 4
    assert config.tasks["train_model"] == {"tags": ["gpu"]}


def test_the_help_ends_with_the_version_of_the_copy() -> None:
    version = register_prefect_flow.__version__
    assert help_text().rstrip().splitlines()[-1].strip() == f"register_prefect_flow.py {version}"


def test_the_errors_under_troubleshooting_are_the_scripts() -> None:
    table = README[README.index("### Troubleshooting") : README.index("### Versions")]
    script = re.sub(r'"\s+f?"', "", SCRIPT.read_text())
    messages = re.findall(r"^- `([^`]+)`:", table, re.MULTILINE)
    assert messages
    for message in messages:
        assert re.sub(r"\d+", "", message) in script, message
