"""What ordinary data science code does in nodes: a flow run writes what `kedro run` writes."""

from typing import Any

import pytest
from conftest import KEDRO_1, PREFECT_3, Server, copy_in
from habits_project import HABITS, write_habits_project
from test_features import compare

MODES = [
    "default",
    pytest.param(
        "processes",
        marks=pytest.mark.skipif(not (PREFECT_3 and KEDRO_1), reason="not in this lane"),
    ),
]


@pytest.fixture(scope="module", params=MODES)
def runs(request: Any, server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All habits, run in one process: starting one takes longer than its runs."""
    if not server.request("POST", "/variables/filter", {}):
        server.post("/variables/", {"name": "habit", "value": "coffee"})
    mode = request.param
    project = copy_in(write_habits_project(tmp_path_factory.mktemp("habits") / "project"))
    options = HABITS.values()
    if mode != "default":
        options = [["--env", mode, *each] for each in options]
    return dict(zip(HABITS, compare(project, server, [*options]), strict=True))


@pytest.mark.parametrize("habit", HABITS)
def test_a_flow_run_writes_what_kedro_run_writes(runs: dict[str, Any], habit: str) -> None:
    kedro, prefect = runs[habit]["kedro"], runs[habit]["prefect"]
    assert kedro["error"] is None, "else this test shows nothing"
    assert prefect["error"] is None
    assert prefect["files"].keys() == kedro["files"].keys()
    assert [name for name, data in kedro["files"].items() if prefect["files"][name] != data] == []
