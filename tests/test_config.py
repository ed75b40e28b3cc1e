"""conf/<env>/prefect.yml: how it is loaded, what is refused, and what becomes of it."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import kedro
import pytest
from conftest import Server, eventually, register
from kedro.framework.project import settings
from kedro.pipeline import node, pipeline

import register_prefect_flow

OPTIONS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(register_prefect_flow.my_flow.fn).parameters.items()
}


def load(conf: Path, env: str = "base", loader: Any = None, **arguments: Any) -> Any:
    """Load prefect.yml with a config loader of Kedro's."""
    loader_class = loader or settings.CONFIG_LOADER_CLASS
    config_loader = loader_class(
        conf_source=str(conf), env=env, base_env="base", default_run_env="local", **arguments
    )
    session = SimpleNamespace(_get_config_loader=lambda: config_loader)
    return register_prefect_flow._read_config(session, OPTIONS)


def write(conf: Path, text: str, env: str = "base", name: str = "prefect.yml") -> Path:
    (conf / env).mkdir(parents=True, exist_ok=True)
    (conf / env / name).write_text(text)
    return conf


def test_all_of_it_is_optional(tmp_path: Path) -> None:
    nothing = register_prefect_flow._Config({}, {})
    assert load(write(tmp_path, "{}", name="catalog.yml")) == nothing
    assert load(write(tmp_path, "tasks:\nflow:\n")) == nothing


def test_an_environment_overrides_base(tmp_path: Path) -> None:
    write(tmp_path, "task_runner: {max_workers: 2}\ntasks: {default: {retries: 1}}\n")
    write(tmp_path, "tasks: {default: {retries: 5}}\n", env="prod")
    assert load(tmp_path).tasks == {"default": {"retries": 1}}
    config = load(tmp_path, env="prod")
    assert config.task_runner == {"max_workers": 2}
    assert config.tasks == {"default": {"retries": 5}}


@pytest.mark.skipif(kedro.__version__ == "0.18.10", reason="globals came with Kedro 0.18.13")
def test_globals_are_resolved(tmp_path: Path) -> None:
    from kedro.config import OmegaConfigLoader

    write(tmp_path, "tasks: {default: {retries: '${globals:patience}'}}\n")
    write(tmp_path, "patience: 4\n", name="globals.yml")
    assert load(tmp_path, loader=OmegaConfigLoader).tasks["default"] == {"retries": 4}


@pytest.mark.skipif(not kedro.__version__.startswith("0.18"), reason="Kedro 0.19 removed it")
def test_templates_are_filled_in(tmp_path: Path) -> None:
    from kedro.config import TemplatedConfigLoader

    write(tmp_path, "tasks: {default: {retries: '${patience}'}}\n")
    config = load(tmp_path, loader=TemplatedConfigLoader, globals_dict={"patience": 4})
    assert config.tasks["default"] == {"retries": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task_runer: {}", "prefect.yml has no task_runer. Did you mean task_runner"),
        ("deployment: {}", "Deployments belong in Prefect's own file prefect.yaml"),
        ("deployments: [{name: a}]", "(`prefect deploy --all`)"),
        ("flow: {retries: 1}", "retries of flow runs to PREFECT_FLOW_DEFAULT_RETRIES and"),
        ("task_runner: {type: tasks}", "task_runner.type is 'tasks'"),
        (
            "task_runner: {max_worker: 3}",
            "prefect.yml has no task_runner.max_worker. Did you mean max_w",
        ),
        ("task_runner: {max_workers: 0}", "max_workers is 0, and has to be 1 or more"),
        (
            "tasks: {default: {retry: 3}}",
            "prefect.yml has no tasks.default.retry. Did you mean retries?",
        ),
        ("tasks: {add: {retries: many}}", "tasks.add.retries is 'many', and has to be of type int"),
        ("tasks: {add: {retry_jitter_factor: -1}}", "Reading tasks.add in prefect.yml failed"),
        ("tasks: {add: }", "prefect.yml: tasks.add is None, and has to be of type dict"),
        ("task_runner: 3", "prefect.yml: task_runner is 3, and has to be of type dict"),
        ("task_runner: {max_workers: true}", "max_workers is True, and has to be of type int"),
        ("tasks: [", "Loading prefect.yml failed"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(click.ClickException) as refused:
        load(write(tmp_path, text + "\n"))
    assert message in refused.value.message


def test_later_lines_win_over_earlier_ones() -> None:
    tasks = {
        "default": {"retries": 1, "timeout_seconds": 60},
        "tag:api": {"retries": 2},
        "namespace:models": {"retries": 3},
        "models.trees.fit": {"retries": 4, "tags": ["gpu"]},
    }
    options = register_prefect_flow._task_options
    assert options(node(len, "a", "b", name="plain"), tasks)["retries"] == 1
    assert options(node(len, "a", "b", name="call", tags="api"), tasks)["retries"] == 2
    inner = node(len, "a", "b", name="predict", namespace="models.trees", tags="api")
    assert options(inner, tasks) == {"retries": 3, "timeout_seconds": 60}
    fit = node(len, "a", "b", name="fit", namespace="models.trees")
    assert options(fit, tasks) == {"retries": 4, "timeout_seconds": 60, "tags": ["gpu"]}
    assert options(fit, dict(reversed(tasks.items())))["retries"] == 1


def test_a_task_name_that_is_no_node_is_refused(project: Path) -> None:
    write(project / "conf", "tasks: {ad: {retries: 1}}\n")
    done = register(project, None, "--run", "--dry_run")
    assert done.returncode == 1
    assert "tasks has 'ad', which is no node of any pipeline. Did you mean add?" in done.stderr
    assert "Traceback" not in done.stderr


TASK_NODES = """

def pop(doubled):
    print("popping", doubled.pop())
    with open("attempts.txt", "a") as file:
        file.write("pop ")
    if len(Path("attempts.txt").read_text().split()) < 3:
        raise RuntimeError("not yet")
    return doubled


def spin(numbers):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        time.sleep(0.01)
"""

TASK_PIPELINES = """
    popping = pipeline([
        node(nodes.double, "numbers", "doubled", name="double", tags="light"),
        node(nodes.pop, "doubled", "total", name="pop"),
    ])
    spinning = pipeline([node(nodes.spin, "numbers", "nothing", name="spin")])
    return {"popping": popping, "spinning": spinning, """

TASKS = """
tasks:
  default: {retries: 3}
  pop: {retries: 2, retry_delay_seconds: [0, 1], log_prints: true, tags: [gpu]}
  "tag:light": {retries: 0}
  spin: {timeout_seconds: 1, retries: 0}
"""


@pytest.fixture
def tasks_project(project: Path) -> Path:
    with (project / "src/tiny/nodes.py").open("a") as nodes:
        nodes.write(TASK_NODES)
    registry = project / "src/tiny/pipeline_registry.py"
    registry.write_text(registry.read_text().replace("\n    return {", TASK_PIPELINES))
    write(project / "conf", TASKS)
    return project


def last_flow_run(server: Server) -> dict[str, Any]:
    runs = server.post("/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})
    return runs[0]


def test_a_retried_node_loads_its_inputs_again(tasks_project: Path, server: Server) -> None:
    done = register(tasks_project, server, "--run", "--pipeline", "popping")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tasks_project / "attempts.txt").read_text() == "pop pop pop "
    assert json.loads((tasks_project / "data/total.json").read_text()) == [2, 4]
    runs = server.task_runs(last_flow_run(server)["id"])
    assert runs["pop"]["tags"] == ["gpu"]
    assert runs["pop"]["empirical_policy"]["retries"] == 2
    assert runs["pop"]["empirical_policy"]["retry_delay"] == [0, 1]
    assert runs["double"]["empirical_policy"]["retries"] == 0
    logs = {"logs": {"task_run_id": {"any_": [runs["pop"]["id"]]}}}
    eventually(
        lambda: any(log["message"] == "popping 6" for log in server.post("/logs/filter", logs))
    )


def test_a_node_that_takes_too_long_fails(tasks_project: Path, server: Server) -> None:
    done = register(tasks_project, server, "--run", "--pipeline", "spinning")
    assert done.returncode == 1
    runs = server.task_runs(last_flow_run(server)["id"])
    assert runs["spin"]["state_name"] == "TimedOut"
    assert ("1" in done.stderr and "timed out" in done.stderr) or "exceeded" in done.stderr


def test_values_that_may_be_secret_are_not_in_the_description() -> None:
    options = {"runtime_params": {"token": "s3cret"}, "tags": ["shown"]}
    nodes = pipeline([node(len, "a", "b")])
    described = register_prefect_flow._describe_deployment(nodes, options).replace("\\", "")
    assert "- runtime_params: token" in described
    assert "- tags: ['shown']" in described
    assert "s3cret" not in described
