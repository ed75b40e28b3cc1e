"""Bad input: one clear message, the right exit code, no traceback, and nothing registered."""

import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import (
    KEDRO_1,
    POOL_TYPE,
    PREFECT_3,
    SCRIPT,
    Server,
    register,
    schedules_of,
)

from register_prefect_flow import prefect_deploy

CHECK = ("--dry_run", "--run")


def refused(
    project: Path, server: Server | None, *arguments: str, code: int = 1, **options: Any
) -> str:
    """Assert that the script refuses, in the way it should, and return what it says."""
    before = deployments(server)
    done = register(project, server, *arguments, **options)
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "Traceback" not in output
    message = done.stderr[done.stderr.index("Error: ") :]
    assert deployments(server) == before
    return message


def deployments(server: Server | None) -> list[str]:
    if server is None:
        return []
    return sorted(found["id"] for found in server.post("/deployments/filter", {"limit": 200}))


@pytest.fixture
def idle_pool(server: Server, tmp_path: Path) -> str:
    """A work pool without a worker."""
    name = f"idle-{tmp_path.name}"
    server.post("/work_pools/", {"name": name, "type": POOL_TYPE})
    return name


@pytest.mark.one_lane
def test_outside_a_kedro_project(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path)
    message = refused(tmp_path, None, "--run")
    assert str(tmp_path) in message
    assert "pyproject.toml" in message


@pytest.mark.one_lane
def test_pyproject_without_a_kedro_section(project: Path) -> None:
    (project / "pyproject.toml").write_text("[project]\nname = 'tiny'\n")
    assert "[tool.kedro]" in refused(project, None, "--run")


def test_unknown_pipeline(project: Path) -> None:
    message = refused(project, None, "--run", "--dry_run", "--pipeline", "broke")
    assert "There is no pipeline 'broke'. Did you mean broken?" in message
    assert "The pipelines are: __default__, broken, empty." in message


@pytest.mark.one_lane
def test_empty_pipeline(project: Path) -> None:
    assert "Pipeline 'empty' is empty" in refused(
        project, None, "--dry_run", "--run", "-p", "empty"
    )


def test_environment_without_a_folder(project: Path) -> None:
    message = refused(project, None, "--run", "--env", "lokal")
    assert "Environment 'lokal' has no folder" in message
    assert "Did you mean local? The environments are: base, local." in message


def test_environment_from_the_variable_of_kedro(project: Path) -> None:
    message = refused(project, None, "--run", env={"KEDRO_ENV": "lokal"})
    assert "Environment 'lokal' has no folder" in message


def test_filters_that_leave_no_node(project: Path) -> None:
    message = refused(project, None, *CHECK, "--tags", "heavi", "--nodes", "add")
    assert "Filtering pipeline '__default__' by tags heavi, node_names add: " in message


def test_unknown_node(project: Path) -> None:
    assert "by from_nodes ad: Pipeline does not contain nodes named ['ad']" in refused(
        project, None, *CHECK, "--from-nodes", "ad"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pipeline", "broke"], "ValueError: Failed to find the pipeline named 'broke'"),
        (["--nodes", "doubel"], "ValueError: Pipeline does not contain nodes named ['doubel']"),
    ],
)
def test_a_run_with_a_wrong_name_ends_in_one_message(
    project: Path, server: Server, arguments: list[str], says: str
) -> None:
    done = register(project, server, "--run", *arguments)
    assert done.returncode == 1
    [error] = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert says in error
    assert "Traceback" not in done.stderr[done.stderr.index(error) :]


def test_version_of_an_unknown_dataset(project: Path) -> None:
    message = refused(
        project, None, "--run", "--dry_run", "--load-versions", "rapport:2020-01-01T00.00.00.000Z"
    )
    assert "rapport" in message


@pytest.mark.one_lane
def test_missing_configuration(project: Path) -> None:
    message = refused(project, None, "--run", "--conf-source", "elsewhere")
    assert f"There is no configuration at {project}/elsewhere" in message


@pytest.mark.skipif(KEDRO_1, reason="Kedro 1.0 has both")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--namespaces", "a,b"], "does not take namespaces ['a', 'b']: leave it out"),
        (["--only-missing-outputs"], "does not take only_missing_outputs True: leave it out"),
        (
            ["--pipelines", "__default__,broken"],
            "not take pipeline_names ['__default__', 'broken']",
        ),
    ],
)
def test_what_came_with_kedro_1(project: Path, arguments: list[str], message: str) -> None:
    assert message in refused(project, None, *CHECK, *arguments)


@pytest.mark.parametrize("name", ["catalog", "parameters"])
def test_invalid_yaml(project: Path, name: str) -> None:
    (project / f"conf/base/{name}.yml").write_text("a: [1\nb: }\n")
    assert f"{name}.yml" in refused(project, None, "--run", "--dry_run")


def test_dataset_class_that_cannot_be_imported(project: Path) -> None:
    catalog = project / "conf/base/catalog.yml"
    catalog.write_text(catalog.read_text().replace("json.JSON", "nosuch.Thing", 1))
    message = refused(project, None, "--run", "--dry_run")
    assert "numbers" in message
    assert "nosuch.ThingDataset" in message


def test_dataset_whose_package_is_not_installed(project: Path) -> None:
    (project / "src/tiny/special.py").write_text("import nosuchpackage\n")
    catalog = project / "conf/base/catalog.yml"
    catalog.write_text(catalog.read_text().replace("json.JSON", "tiny.special.Special", 1))
    message = refused(project, None, "--run", "--dry_run")
    assert "numbers" in message
    assert "nosuchpackage" in message or "tiny.special.SpecialDataset" in message


def test_pipeline_input_that_nothing_provides(project: Path) -> None:
    catalog = project / "conf/base/catalog.yml"
    catalog.write_text(catalog.read_text().replace("numbers:", "digits:", 1))
    (project / "src/tiny/settings.py").write_text("")  # hooks might put it into the catalog
    message = refused(project, None, "--run", "--dry_run")
    assert "pipeline input numbers. The entries are: digits" in message
    assert "Add it to the catalog in conf, or run what makes it." in message


@pytest.mark.one_lane
def test_pipeline_registry_that_raises(project: Path) -> None:
    registry = project / "src/tiny/pipeline_registry.py"
    registry.write_text("def register_pipelines():\n    return 1 / 0\n")
    message = refused(project, None, *CHECK)
    assert "ZeroDivisionError: division by zero" in message
    assert f"{registry}, line 2" in message


@pytest.mark.one_lane
def test_settings_that_raise(project: Path) -> None:
    settings = project / "src/tiny/settings.py"
    settings.write_text("HOOKS = (nosuchname,)\n")
    message = refused(project, None, "--run")
    assert "NameError: name 'nosuchname' is not defined" in message
    assert f"{settings}, line 1" in message


def test_no_server_configured(project: Path) -> None:
    message = refused(project, None, "--work_pool_name", "any")
    assert "PREFECT_API_URL is not set" in message
    assert "prefect server start" in message
    assert "prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api" in message


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--run"]])
def test_server_that_is_not_there(project: Path, arguments: list[str]) -> None:
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/api"
        message = refused(project, None, *arguments, env={"PREFECT_API_URL": url})
    assert f"No Prefect server at {url}" in message
    assert "prefect server start" in message


@pytest.fixture
def mute_server() -> Iterator[str]:
    """A port that takes connections and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        accepted: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    accepted.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    for connection in accepted:
        connection.close()


@pytest.mark.slow
def test_server_that_does_not_answer(project: Path, mute_server: str) -> None:
    message = refused(project, None, env={"PREFECT_API_URL": mute_server})
    assert f"No Prefect server at {mute_server}: no answer within 10 s" in message


def test_missing_work_pool(project: Path, server: Server, idle_pool: str) -> None:
    message = refused(project, server, "--work_pool_name", f"{idle_pool}x")
    assert f"There is no work pool '{idle_pool}x'" in message
    assert f"Did you mean {idle_pool}" in message
    assert f"prefect work-pool create --type {POOL_TYPE} {idle_pool}x" in message


def test_missing_work_queue(project: Path, server: Server, idle_pool: str) -> None:
    arguments = ("--work-pool-name", idle_pool, "--work-queue-name", "nightly")
    message = refused(project, server, *arguments)
    assert f"Work pool '{idle_pool}' has no queue 'nightly'" in message
    assert "The queues are: default." in message
    assert f"prefect work-queue create --pool {idle_pool} nightly" in message


def test_paused_pool_is_a_warning(project: Path, server: Server, idle_pool: str) -> None:
    server.request("PATCH", f"/work_pools/{idle_pool}", {"is_paused": True})
    done = register(project, server, "--work_pool_name", idle_pool)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Warning: work pool '{idle_pool}' is paused" in done.stdout
    assert f"prefect work-pool resume {idle_pool}" in done.stdout


@pytest.mark.skipif(not PREFECT_3, reason="Prefect 2 has agents")
def test_pool_for_agents_on_prefect_3(project: Path, server: Server, tmp_path: Path) -> None:
    name = f"agents-{tmp_path.name}"
    server.post("/work_pools/", {"name": name, "type": "prefect-agent"})
    message = refused(project, server, "--work_pool_name", name)
    assert f"Work pool '{name}' is for agents, which Prefect 3 does not have" in message
    assert "prefect work-pool create --type process" in message


@pytest.mark.parametrize("name", ["a/b", "a%b", "a&b", "a<b", "a>b", ""])
def test_deployment_name_that_prefect_refuses(name: str) -> None:
    done = CliRunner().invoke(prefect_deploy, ["--deployment_name", name])
    assert done.exit_code == 1
    assert f"Prefect refuses deployment name '{name}'" in done.output


@pytest.mark.one_lane
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "--work_pool_name", "x"], "--work_pool_name is for work pools"),
        (["--run", "--logging_level", "INFO"], "Set PREFECT_LOGGING_LEVEL instead"),
        (["--logging_level", "LOUD"], "LOUD"),
        (["--nosuch"], "--nosuch"),
        (["--params", "factor"], "factor"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(prefect_deploy, arguments)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.skipif(
    int(version("kedro-telemetry").split(".")[1]) >= 6, reason="newer ones do not ask"
)
def test_telemetry_without_a_decision(project: Path) -> None:
    (project / ".telemetry").unlink()
    message = refused(project, None, "--run", "--dry_run")
    assert "would stop every flow run to ask for consent" in message
    assert "cp .telemetry.example .telemetry" in message


def test_dry_run_shows_layers_and_datasets_and_registers_nothing(
    project: Path, server: Server, idle_pool: str
) -> None:
    before = deployments(server)
    done = register(project, server, "--work_pool_name", idle_pool, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert deployments(server) == before
    plan = done.stdout[done.stdout.index("Pipeline '__default__'") :]
    assert plan.splitlines() == [
        "Pipeline '__default__' of tiny, environment 'base': 4 nodes in 3 layers",
        "Layer 1",
        "  double: numbers -> doubled",
        "  scale: numbers, params:factor, params:pause -> scaled",
        "Layer 2",
        "  add: doubled, scaled -> total",
        "Layer 3",
        "  report: total -> report",
        "Datasets",
        "  doubled: memory, released after its last reader",
        f"  numbers: JSONDataset {project}/data/numbers.json",
        "  params:factor: parameters",
        "  params:pause: parameters",
        f"  report: PickleDataset {project}/data/report.pickle",
        "  scaled: memory, released after its last reader",
        f"  total: JSONDataset {project}/data/total.json",
    ]


@pytest.mark.one_lane
def test_dry_run_shows_parameters_and_settings(project: Path) -> None:
    (project / "conf/base/prefect.yml").write_text(
        "tasks: {'tag:heavy': {retries: 2}}\ntask_runner: {max_workers: 2}\n"
    )
    arguments = ("--tags", "heavy", "--params", "factor=5,a.b=2", "--deployment-name", "a")
    done = register(project, None, "--run", "--dry-run", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = done.stdout[done.stdout.index("Pipeline '__default__'") :].splitlines()
    assert plan[:5] == [
        "Pipeline '__default__' of tiny, environment 'base': 1 nodes in 1 layers",
        "  runtime_params: factor, a",
        "  tags: ['heavy']",
        "Layer 1",
        "  scale: numbers, params:factor, params:pause -> scaled {'retries': 2}",
    ]
    assert plan[-1] == "task_runner.max_workers: 2"


def test_the_form_explains(project: Path, server: Server, idle_pool: str) -> None:
    done = register(project, server, "--work_pool_name", idle_pool)
    assert done.returncode == 0, done.stdout + done.stderr
    path = f"/deployments/{re.search(r'with id (.+)', done.stdout)[1]}"
    properties = server.request("GET", path)["parameter_openapi_schema"]["properties"]
    assert len(properties) == 14
    assert all(field["description"] for field in properties.values())
    assert properties["only_missing_outputs"]["type"] == "boolean"
    for name in ("tags", "node_names", "from_inputs", "namespaces"):
        assert (properties[name]["type"], properties[name]["items"]) == (
            "array",
            {"type": "string"},
        )
    for name in ("runtime_params", "load_versions"):
        assert properties[name]["type"] == "object"


def test_what_is_printed_after_registering_works(
    project: Path, server: Server, idle_pool: str
) -> None:
    arguments = ("--work_pool_name", idle_pool, "--deployment_name", "every day")
    done = register(project, server, *arguments, "--version", "2.1", "--logging-level", "INFO")
    assert done.returncode == 0, done.stdout + done.stderr
    deployment_id = re.search(r"Registered deployment 'tiny/every day' with id (\S+)", done.stdout)[
        1
    ]
    deployment = server.request("GET", f"/deployments/{deployment_id}")
    assert deployment["version"] == "2.1"
    assert deployment["entrypoint"] == "register_prefect_flow.py:my_flow"
    assert deployment["parameters"] == {"pipeline_name": "__default__"}
    overrides = deployment.get("job_variables") or deployment["infra_overrides"]
    assert overrides["env"] == {"PREFECT_LOGGING_LEVEL": "INFO"}
    ui = f"http://127.0.0.1:{server.port}/deployments/deployment/{deployment_id}"
    assert f"see it:         {ui}\n" in done.stdout
    command = re.search(r"start a run:\s+prefect (.+)", done.stdout)[1]
    assert command == "deployment run 'tiny/every day'"


def test_registering_again_updates_in_place_and_keeps_what_was_set_in_the_ui(
    project: Path, server: Server, idle_pool: str
) -> None:
    def registered(*arguments: str) -> dict[str, Any]:
        done = register(project, server, "--work_pool_name", idle_pool, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        deployment_id = re.search(r"with id (\S+)", done.stdout)[1]
        return server.request("GET", f"/deployments/{deployment_id}")

    first = registered()
    path = f"/deployments/{first['id']}"
    schedule = {"cron": "0 6 * * *", "timezone": "UTC"}
    if "schedules" in first:  # Prefect 2.16
        server.post(f"{path}/schedules", [{"schedule": schedule, "active": True}])
    else:
        server.request("PATCH", path, {"schedule": schedule})
    paused = "paused" if "paused" in first else "is_schedule_active"
    if PREFECT_3:
        server.post(f"{path}/pause_deployment", {})
    else:
        server.post(f"{path}/set_schedule_inactive", {})
    before = server.request("GET", path)

    again = registered("--version", "2.0", "--pipeline", "broken")
    assert again["id"] == first["id"]
    assert again["version"] == "2.0"
    assert again["parameters"]["pipeline_name"] == "broken"
    assert again[paused] == before[paused] == (paused == "paused")
    assert schedules_of(again) == schedules_of(before)
    assert len(schedules_of(again)) == 1
    assert schedules_of(again)[0][0]["cron"] == "0 6 * * *"
