"""Versions: the floor is checked first, and each adapter gives the same in every lane."""

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import kedro
import prefect
import pytest
from conftest import KEDRO_1, PREFECT_3, SCRIPT, MemoryDataset, run
from kedro.framework.hooks.manager import _create_hook_manager
from kedro.io import DataCatalog
from kedro.pipeline import node

import register_prefect_flow


@pytest.mark.one_lane
@pytest.mark.parametrize(
    ("package", "version", "floor"),
    [
        ("kedro", "0.18.9", "0.18.10"),
        pytest.param("kedro", "0.17.7", "0.18.10", marks=pytest.mark.slow),
        ("prefect", "2.10.16", "2.10.17"),
        pytest.param("prefect", "1.4.1", "2.10.17", marks=pytest.mark.slow),
        pytest.param("prefect", "3.0.0", "3.2", marks=pytest.mark.slow),
        ("prefect", "3.1.15", "3.2"),
    ],
)
def test_versions_below_the_floor_are_refused_by_name(
    tmp_path: Path, package: str, version: str, floor: str
) -> None:
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / package).mkdir()  # found before the installed one, and has nothing else
    (tmp_path / package / "__init__.py").write_text(f"__version__ = '{version}'\n")
    done = run(sys.executable, "register_prefect_flow.py", "--run", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"Error: register_prefect_flow.py needs {package.capitalize()} {floor} or newer, and this "
        f"is {package.capitalize()} {version}. pip install '{package}>={floor}'"
    )


@pytest.mark.one_lane
def test_importing_it_with_too_old_a_version_exits_nothing(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "kedro").mkdir()
    (tmp_path / "kedro/__init__.py").write_text("__version__ = '0.18.9'\n")
    code = "try:\n    import register_prefect_flow\nexcept ImportError as error:\n    print(error)"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "register_prefect_flow.py needs Kedro 0.18.10 or newer, and this is" in done.stdout


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1.7.0", (1, 7, 0)),
        ("2.10.17", (2, 10, 17)),
        ("3.0.0rc2+4.g12", (3, 0, 0)),
        ("3.10", (3, 10)),
    ],
)
def test_versions_are_read_as_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert register_prefect_flow._version(text) == numbers


def test_generations_are_told_apart() -> None:
    assert register_prefect_flow._PREFECT_3 is prefect.__version__.startswith("3.") is PREFECT_3
    assert register_prefect_flow._KEDRO_1 is kedro.__version__.startswith("1.") is KEDRO_1


def test_a_node_is_run_with_load_and_save() -> None:
    catalog = DataCatalog({"a": MemoryDataset(2), "b": MemoryDataset()})
    double = node(lambda a: 2 * a, "a", "b", name="double")
    register_prefect_flow._run_node(double, catalog, _create_hook_manager(), False, "run id")
    assert catalog.load("b") == 4


def catalog_of(config: dict[str, Any]) -> DataCatalog:
    return DataCatalog.from_config(config)


def test_entries_are_found_in_the_catalog_and_other_names_are_not() -> None:
    catalog = catalog_of({"there": {"type": "json.JSONDataset", "filepath": "there.json"}})
    found = register_prefect_flow._get_dataset(catalog, "there")
    assert found._describe()["filepath"].name == "there.json"
    assert register_prefect_flow._get_dataset(catalog, "absent") is None


@pytest.mark.skipif(kedro.__version__ == "0.18.10", reason="patterns came with Kedro 0.18.12")
def test_patterns_are_found_in_the_catalog() -> None:
    catalog = catalog_of({"{name}_json": {"type": "json.JSONDataset", "filepath": "{name}.json"}})
    found = register_prefect_flow._get_dataset(catalog, "any_json")
    assert found._describe()["filepath"].name == "any.json"
    assert register_prefect_flow._get_dataset(catalog, "any_csv") is None


class AnySession:
    """Takes what the installed Kedro's session takes."""

    if KEDRO_1:

        def run(self, pipeline_name=None, pipeline_names=None, runner=None, load_versions=None):
            assert pipeline_name is None, "deprecated"
            self.name = pipeline_names

    else:

        def run(self, pipeline_name=None, runner=None, load_versions=None):
            self.name = pipeline_name


@pytest.mark.parametrize(
    ("name", "passed_on"),
    [("__default__", [] if KEDRO_1 else None), ("a", ["a"] if KEDRO_1 else "a")],
)
def test_the_session_gets_the_pipeline_name_as_from_kedro_run(
    monkeypatch: pytest.MonkeyPatch, name: str, passed_on: Any
) -> None:
    monkeypatch.setattr(register_prefect_flow, "_session_class", lambda: AnySession)
    options = {filters: [] for filters in register_prefect_flow.FILTERS}
    options |= {"pipeline_name": name, "load_versions": {}, "only_missing_outputs": False}
    options |= {"runtime_params": {}}
    session = AnySession()
    session.run(**register_prefect_flow._run_arguments(options))
    assert session.name == passed_on


@pytest.mark.one_lane
@pytest.mark.slow
def test_nodes_run_one_at_a_time_unless_prefects_setting_says_more() -> None:
    name = "PREFECT_TASKS_RUNNER_THREAD_POOL_MAX_WORKERS"
    code = "import register_prefect_flow as r; print(r._default_workers())"
    printed = run(sys.executable, "-c", code, cwd=SCRIPT.parent).stdout
    assert printed.split()[-1] == "1"
    printed = run(sys.executable, "-c", code, cwd=SCRIPT.parent, env={name: "7"}).stdout
    has_setting = getattr(prefect.settings, name, None) is not None
    assert printed.split()[-1] == ("7" if has_setting else "1")


def test_calls_of_the_client_work_inside_an_event_loop() -> None:
    async def call() -> int:
        return 3

    async def caller() -> int:
        return register_prefect_flow._call_api(call())

    assert asyncio.run(caller()) == register_prefect_flow._call_api(call()) == 3
