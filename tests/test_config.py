"""conf/<env>/prefect.yml: how it is loaded, what is refused, and what becomes of it."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import kedro
import pytest
from conftest import PREFECT_3, QUEUE, Server, copy_in, eventually, register, schedules_of
from kedro.framework.project import settings
from kedro.pipeline import node, pipeline
from tiny_project import write_tiny_project

import register_prefect_flow

PARAMETERS: dict[str, Any] = {"runtime_params": {}}


def load(conf: Path, env: str = "base", loader: Any = None, **arguments: Any) -> dict[str, Any]:
    """Load prefect.yml with a config loader of Kedro's."""
    loader_class = loader or settings.CONFIG_LOADER_CLASS
    config_loader = loader_class(
        conf_source=str(conf), env=env, base_env="base", default_run_env="local", **arguments
    )
    session = SimpleNamespace(_get_config_loader=lambda: config_loader)
    return register_prefect_flow._load_config(session, PARAMETERS)


def write(conf: Path, text: str, env: str = "base", name: str = "prefect.yml") -> Path:
    (conf / env).mkdir(parents=True, exist_ok=True)
    (conf / env / name).write_text(text)
    return conf


def test_all_of_it_is_optional(tmp_path: Path) -> None:
    nothing = {"deployment": {}, "task_runner": {}, "tasks": {}}
    assert load(write(tmp_path, "{}", name="catalog.yml")) == nothing
    assert load(write(tmp_path, "tasks:\n")) == nothing


def test_an_environment_overrides_base(tmp_path: Path) -> None:
    write(tmp_path, "task_runner: {max_workers: 2}\ntasks: {default: {retries: 1}}\n")
    write(tmp_path, "tasks: {default: {retries: 5}}\n", env="prod")
    assert load(tmp_path)["tasks"] == {"default": {"retries": 1}}
    assert load(tmp_path, env="prod") == {
        "deployment": {},
        "task_runner": {"max_workers": 2},
        "tasks": {"default": {"retries": 5}},
    }


@pytest.mark.skipif(kedro.__version__ == "0.18.10", reason="globals came with Kedro 0.18.13")
def test_globals_are_resolved(tmp_path: Path) -> None:
    from kedro.config import OmegaConfigLoader

    write(tmp_path, "tasks: {default: {retries: '${globals:patience}'}}\n")
    write(tmp_path, "patience: 4\n", name="globals.yml")
    assert load(tmp_path, loader=OmegaConfigLoader)["tasks"]["default"] == {"retries": 4}


@pytest.mark.skipif(not kedro.__version__.startswith("0.18"), reason="Kedro 0.19 removed it")
def test_templates_are_filled_in(tmp_path: Path) -> None:
    from kedro.config import TemplatedConfigLoader

    write(tmp_path, "tasks: {default: {retries: '${patience}'}}\n")
    config = load(tmp_path, loader=TemplatedConfigLoader, globals_dict={"patience": 4})
    assert config["tasks"]["default"] == {"retries": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deploymint: {}", "prefect.yml has no deploymint. Did you mean deployment?"),
        ("deployment: 3", "prefect.yml: deployment is 3, and has to be of type dict"),
        (
            "deployment: {corn: '* * * * *'}",
            "prefect.yml has no deployment.corn. Did you mean cron?",
        ),
        (
            "deployment: {interval: soon}",
            "deployment.interval is 'soon', and has to be of type int or float",
        ),
        ("deployment: {paused: 1}", "deployment.paused is 1, and has to be of type bool"),
        ("deployment: {tags: nightly}", "deployment.tags is 'nightly', and has to be of type list"),
        (
            "deployment: {concurrency_limit: true}",
            "concurrency_limit is True, and has to be of type int",
        ),
        ("deployment: {cron: '* * * * *', interval: 60}", "has cron and interval, and not one of"),
        ("deployment: {timezone: UTC}", "deployment has only a timezone, and not one of"),
        ("deployment: {cron: every day}", "deployment.cron in prefect.yml failed"),
        ("deployment: {rrule: nonsense}", "deployment.rrule in prefect.yml failed"),
        ("deployment: {source: 'https://a.b/c'}", "'https://a.b/c', and not git+URL@ref"),
        ("deployment: {source: 'git+https://a.b/c', path: /d}", "has path and source"),
        ("task_runner: {type: dask}", "task_runner.type is 'dask', not 'threads'"),
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


DEPLOYMENT = """
deployment:
  cron: "0 6 * * *"
  timezone: Europe/Berlin
  tags: [forecasting]
  job_variables: {image: "registry/forecast:1.4", env: {MODE: fast, PREFECT_LOGGING_LEVEL: INFO}}
"""


@pytest.fixture(autouse=True)
def forget_the_deployment(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test finds what another registered."""
    yield
    if "registered" in request.fixturenames:
        server = request.getfixturevalue("server")
        found = server.request("GET", "/deployments/name/tiny/configured")
        server.request("DELETE", f"/deployments/{found['id']}")


@pytest.fixture
def registered(project: Path, server: Server, pool: str) -> Any:
    def registered(*arguments: str) -> dict[str, Any]:
        pools = ("--work_pool_name", pool, "--work_queue_name", QUEUE)
        done = register(project, server, *pools, "--deployment_name", "configured", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        deployment_id = re.search(r"with id (\S+)", done.stdout)[1]
        return server.request("GET", f"/deployments/{deployment_id}")

    return registered


def timings_of(deployment: dict[str, Any]) -> list[tuple[Any, bool]]:
    """What the schedules of a deployment say, and whether each is active."""
    names = ("cron", "interval", "rrule", "timezone")
    return [
        ({name: schedule[name] for name in names if schedule.get(name)}, active)
        for schedule, active in schedules_of(deployment)
    ]


def test_the_deployment_is_as_described(project: Path, server: Server, registered: Any) -> None:
    write(project / "conf", DEPLOYMENT)
    first = registered("--tags", "heavy")
    daily = {"cron": "0 6 * * *", "timezone": "Europe/Berlin"}
    assert timings_of(first) == [(daily, True)]
    assert first["tags"] == ["forecasting"]
    assert first["parameters"] == {"pipeline_name": "__default__", "env": "base", "tags": ["heavy"]}
    variables = first.get("job_variables") or first["infra_overrides"]
    assert variables["image"] == "registry/forecast:1.4"
    assert variables["env"] == {"MODE": "fast", "PREFECT_LOGGING_LEVEL": "INFO"}
    assert "project **Tiny project**" in first["description"]
    assert "| 1 | `scale` | `numbers, params:factor, params:pause` |" in first["description"]
    assert '```mermaid\ngraph TD\nn0["scale"]\n```' in first["description"]

    # What was set in the UI stays; the command line wins over the file.
    path = f"/deployments/{first['id']}"
    pause = "pause_deployment" if PREFECT_3 else "set_schedule_inactive"
    server.post(f"{path}/{pause}", {})
    if "schedules" in first:
        schedule = first["schedules"][0]["id"]
        server.request("PATCH", f"{path}/schedules/{schedule}", {"active": False})
    before = server.request("GET", path)
    again = registered("--logging_level", "WARNING")
    assert again["id"] == first["id"]
    assert timings_of(again) == [(daily, False)]
    paused = "paused" if PREFECT_3 else "is_schedule_active"
    assert (before[paused], again[paused]) == (PREFECT_3, PREFECT_3)
    variables = again.get("job_variables") or again["infra_overrides"]
    assert variables["env"] == {"MODE": "fast", "PREFECT_LOGGING_LEVEL": "WARNING"}
    assert 'n0["double"]' in again["description"]
    assert re.search(r"\bn0 --> n[23]\b", again["description"])

    # What the file says wins over what was set in the UI.
    write(project / "conf", "deployment: {interval: 3600, paused: false, description: Mine.}\n")
    changed = registered()
    [(schedule, active)] = timings_of(changed)
    assert schedule["interval"] == 3600
    assert active
    assert changed["description"] == "Mine."
    assert changed["tags"] == ["forecasting"], "kept, for the file says nothing of tags"
    assert changed[paused] is not PREFECT_3
    # An interval that counts from its registration must not start anew with each.
    assert schedules_of(registered()) == schedules_of(changed)


def plan_of(*nodes: Any) -> Any:
    parameters = {"pipeline_name": "__default__", "env": "base"}
    metadata = SimpleNamespace(project_name="Any")
    return register_prefect_flow._Plan(metadata, parameters, pipeline([*nodes]), {}, {}, {})


def test_names_are_no_markup_in_the_graph() -> None:
    described = register_prefect_flow._describe(plan_of(node(lambda a: a, "a", "b")))
    [label] = re.findall(r'^n0\["(.*)"\]$', described, re.MULTILINE)
    assert not set(label) & set('<>"')


def test_a_graph_too_large_to_be_drawn_is_left_out() -> None:
    chain = [node(len, f"d{i}", f"d{i + 1}", name=f"n{i}") for i in range(502)]
    assert "```mermaid" in register_prefect_flow._describe(plan_of(*chain[:501]))
    described = register_prefect_flow._describe(plan_of(*chain))
    assert "```mermaid" not in described
    assert "| 502 | `n501` | `d501` | `d502` |" in described


@pytest.mark.skipif(not PREFECT_3, reason="deployments of Prefect 2 have no limit")
def test_a_deployment_may_limit_its_runs(project: Path, registered: Any) -> None:
    write(project / "conf", "deployment: {concurrency_limit: 1, rrule: FREQ=DAILY}\n")
    deployment = registered()
    limit = deployment.get("global_concurrency_limit") or {"limit": deployment["concurrency_limit"]}
    assert limit["limit"] == 1
    assert timings_of(deployment)[0][0]["rrule"].endswith("FREQ=DAILY")
    assert schedules_of(registered()) == schedules_of(deployment)


@pytest.mark.skipif(PREFECT_3, reason="Prefect 3 has the limit")
def test_a_limit_is_refused_on_prefect_2(project: Path, server: Server, pool: str) -> None:
    write(project / "conf", "deployment: {concurrency_limit: 1}\n")
    done = register(project, server, "--work_pool_name", pool, "--work_queue_name", QUEUE)
    assert done.returncode == 1
    assert "deployment.concurrency_limit needs Prefect 3" in done.stderr


def test_the_project_may_come_from_git_or_lie_elsewhere_on_the_worker(
    tmp_path: Path, project: Path, server: Server, registered: Any
) -> None:
    outputs = tmp_path / "outputs"
    catalog = project / "conf/base/catalog.yml"
    catalog.write_text(catalog.read_text().replace("data/total.json", f"{outputs}/total.json"))

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=tiny", "-c", "user.email=tiny@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=project, check=True)

    git("init", "--quiet", "--initial-branch", "main")
    git("add", ".")
    git("commit", "--quiet", "--message", "as it is to run")
    git("tag", "v1")
    (project / "conf/base/parameters.yml").write_text("factor: 100\npause: 0\n")
    git("commit", "--quiet", "--all", "--message", "newer")
    write(project / "conf", f"deployment: {{source: 'git+file://{project}@v1'}}\n")
    registered()
    flow_run = server.finished(server.trigger("tiny/configured", cwd=project))
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]["message"]
    assert json.loads((outputs / "total.json").read_text()) == 30, "of the tag, not of the newest"

    image = copy_in(write_tiny_project(tmp_path / "image"))
    write(project / "conf", f"deployment: {{path: {image}}}\n")
    registered()
    flow_run = server.finished(server.trigger("tiny/configured", cwd=project))
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]["message"]
    assert json.loads((image / "data/total.json").read_text()) == 30
    assert not (project / "data/total.json").exists()
