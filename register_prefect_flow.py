"""Register this Kedro project's pipeline as a Prefect deployment: each node becomes a task.

Copy this file into the root of a Kedro project, next to pyproject.toml. Then

    python register_prefect_flow.py --run                # run the pipeline now, in this process
    python register_prefect_flow.py --dry_run --run      # check everything, show what would run
    python register_prefect_flow.py --work_pool_name X   # register it, for agents and workers

Everything is checked before anything is registered; an error names what is wrong and what mends
it. In a flow run a failing node stops only the nodes that need its output, and the run fails with
that node's own exception. Everything else is what `kedro run` does, because Kedro does it.

It takes over from https://docs.kedro.org/en/0.18.10/deployment/prefect.html.
"""

import asyncio
import contextvars
import difflib
import heapq
import html
import importlib.metadata
import inspect
import logging
import os
import queue
import re
import shlex
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from functools import lru_cache
from graphlib import TopologicalSorter
from itertools import chain, groupby
from logging.config import DictConfigurator
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import kedro
import prefect

PROJECT_PATH = Path(__file__).absolute().parent
ENTRYPOINT = "register_prefect_flow.py:my_flow"
NAMES_SHOWN = 50  # in an error that lists what there is
MERMAID_EDGES = 500  # more than that, mermaid draws nothing
SERVER_TIMEOUT = 10  # seconds in which a Prefect server has to answer before anything is registered


# ---- Compatibility: whatever differs between versions has one name and one signature here ----


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


for _name, _found, _floor in (
    ("Python", sys.version, "3.10"),
    ("Kedro", kedro.__version__, "0.18.10"),
    ("Prefect", prefect.__version__, "2.10.17"),
):
    if _version(_found) < _version(_floor):
        raise SystemExit(
            f"Error: register_prefect_flow.py needs {_name} {_floor} or newer, and this is "
            f"{_name} {_found.split()[0]}."
            + ("" if _name == "Python" else f" pip install '{_name.lower()}>={_floor}'")
        )

from kedro.config import MissingConfigException
from kedro.framework.cli import utils as kedro_cli
from kedro.framework.project import pipelines, settings
from kedro.framework.session import KedroSession
from kedro.framework.startup import ProjectMetadata, _get_project_metadata, bootstrap_project
from kedro.logging import RichHandler
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from kedro.runner import SequentialRunner
from prefect import Task, flow, get_client, get_run_logger, task
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.exceptions import ObjectNotFound
from prefect.logging.configuration import DEFAULT_LOGGING_SETTINGS_PATH, load_logging_config
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

_KEDRO_1 = _version(kedro.__version__) >= (1,)
_PREFECT_3 = _version(prefect.__version__) >= (3,)

try:  # Kedro 0.19.10 put Task in the place of run_node, which 1.0 removed.
    from kedro.runner import Task as _KedroTask
except ImportError:
    from kedro.runner import run_node  # type: ignore[attr-defined,unused-ignore]

    def _run_node(node: Any, catalog: Any, hook_manager: Any, is_async: bool, run_id: Any) -> None:
        run_node(node, catalog, hook_manager, is_async, run_id)
else:

    def _run_node(node: Any, catalog: Any, hook_manager: Any, is_async: bool, run_id: Any) -> None:
        _KedroTask(node, catalog, is_async, hook_manager, run_id).execute()


_FILTERS = ("tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "to_outputs")


def _check_supported(parameters: dict[str, Any]) -> None:
    if not _KEDRO_1 and (parameters["only_missing_outputs"] or len(parameters["namespaces"]) > 1):
        raise click.ClickException(
            "only_missing_outputs and more than one of namespaces need Kedro 1.0 or newer, and this"
            f" is Kedro {kedro.__version__}. pip install 'kedro>=1.0', or leave them out"
        )


def _filter_pipeline(pipeline: Pipeline, parameters: dict[str, Any]) -> Pipeline:
    filters = {name: parameters[name] for name in _FILTERS}
    namespaces = parameters["namespaces"]
    if _KEDRO_1:
        filters["node_namespaces"] = namespaces
    else:
        filters["node_namespace"] = next(iter(namespaces), None)
    return pipeline.filter(**filters)


def _pipeline_names(parameters: dict[str, Any]) -> list[str]:
    """Name the pipeline as `kedro run` does: not at all, if it is the default one."""
    name = parameters["pipeline_name"]
    return [] if name == "__default__" else [name]


def _request_pipelines(names: list[str]) -> None:
    """Tell Kedro 1.5 and newer to load these pipelines only; none: all."""
    if hasattr(pipelines, "set_requested"):
        pipelines.set_requested(names or None)


def _create_session(parameters: dict[str, Any]) -> Any:
    """Make a session as `kedro run` does."""
    # Since Kedro 1.3 the class is a setting, and those of another kind take the runtime
    # parameters later.
    session_class: Any = getattr(settings, "SESSION_CLASS", KedroSession)
    options = {"env": parameters["env"]}
    if parameters["conf_source"]:
        options["conf_source"] = _locate_conf(parameters["conf_source"])
    if issubclass(session_class, KedroSession):
        name = "runtime_params" if _KEDRO_1 else "extra_params"
        options[name] = parameters["runtime_params"]
    return session_class.create(project_path=PROJECT_PATH, **options)


def _call_with_params(method: Any, parameters: dict[str, Any]) -> Any:
    """Call a method of a session, which may be of the kind that takes the parameters only now."""
    takes_them = "runtime_params" in inspect.signature(method).parameters
    return method(**{"runtime_params": parameters["runtime_params"]} if takes_them else {})


def _load_catalog(session: Any, parameters: dict[str, Any]) -> Any:
    context = _call_with_params(session.load_context, parameters)
    if names := _pipeline_names(parameters):  # whose parameters Kedro 1.7 checks
        context._pipelines_to_validate = names
    options = {"catalog_class": settings.DATA_CATALOG_CLASS} if _KEDRO_1 else {}
    return context._get_catalog(load_versions=parameters["load_versions"], **options)


def _run_session(session: Any, runner: SequentialRunner, parameters: dict[str, Any]) -> None:
    """Pass on what `kedro run` passes on, for hooks get to see it."""
    accepted = inspect.signature(session.run).parameters
    names = _pipeline_names(parameters)
    given = parameters | {
        "tags": tuple(parameters["tags"]),
        "node_names": tuple(parameters["node_names"]),
        "namespace": next(iter(parameters["namespaces"]), None),  # Kedro 1.0 brought the plural
        "pipeline_names": names,  # Kedro 1.2
    }
    given["pipeline_name"] = None if "pipeline_names" in accepted else next(iter(names), None)
    session.run(runner=runner, **{name: given[name] for name in accepted if name in given})


def _get_dataset(catalog: Any, name: str) -> Any | None:
    """Return the dataset of a catalog entry or pattern; None: the runner keeps it in memory."""
    if _KEDRO_1:  # catalog.get returns None for what the catalog does not have
        return catalog.get(name)
    # Kedro 0.18.12 brought patterns, and `in` to ask for them.
    known = catalog if hasattr(catalog, "__contains__") else catalog.list()
    return catalog._get_dataset(name) if name in known else None


def _call_api(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a call of Prefect's client, whether or not the caller has an event loop."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(contextvars.copy_context().run, asyncio.run, coroutine).result()


def _schedules(deployment: Any) -> list[Any]:
    """Return the schedules of a deployment on the server, which was one before Prefect 2.16."""
    return deployment.schedules if hasattr(deployment, "schedules") else [deployment]


if _PREFECT_3:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import TaskRunResult
    from prefect.flows import serve
    from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS
    from prefect.task_runners import ThreadPoolTaskRunner

    _SUGGESTED_POOL_TYPE = "process"
    _AGENT_POOL_TYPES: tuple[str, ...] = ()
    _CAN_SERVE = True
    _CAN_LIMIT_RUNS = True
    # The embedded server makes its database at its first start: 12 s on a fast machine. Prefect
    # waits 20 s (3.0: 10 s).
    _RUN_SETTINGS: dict[Any, Any] = {PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 60}

    @contextmanager
    def _task_runner(max_workers: int) -> Iterator[Callable[[Any, list[Any]], Any]]:
        """Yield a function that submits a task, given the ended futures of what it needs."""
        runner: ThreadPoolTaskRunner[None] = ThreadPoolTaskRunner(max_workers=max_workers)

        def submit(task: Any, needed: list[Any]) -> Any:
            if not needed:
                return runner.submit(task, parameters={})
            # For each future to wait for, Prefect fetches a result through another thread, in a
            # millisecond. One that failed is enough, and edges can be drawn without.
            failed: list[Any] = [future for future in needed if not future.state.is_completed()]
            edges: set[Any] = {TaskRunResult(id=future.task_run_id) for future in needed}
            return runner.submit(
                task, {}, wait_for=failed[:1] or [None], dependencies={"wait_for": edges}
            )

        with runner:
            yield submit

    def _call_when_done(future: Any, callback: Callable[[], None]) -> None:
        future.add_done_callback(lambda _: callback())

    def _final_state(future: Any) -> Any:
        future.wait()
        return future.state

    def _make_deployment(
        flow: Any, choices: dict[str, list[str]], schedule: Any = None, **options: Any
    ) -> Any:
        # The form offers what there is now, and takes any other name, for there may be new ones.
        for name, names in choices.items():
            flow.fn.__annotations__[name] = Literal[tuple(names)] | str
        if schedule:
            options["schedules"] = [schedule]
        deployment = flow.to_deployment(**options)
        deployment.entrypoint = ENTRYPOINT
        return deployment

    def _register(existing: Any, path: str, source: Any, options: dict[str, Any]) -> Any:
        from prefect.runner.storage import GitRepository, LocalStorage

        deployment = _make_deployment(**options)
        deployment.storage = LocalStorage(path=path)
        if source:
            deployment.storage = GitRepository(url=source[0], branch=source[1])
        # What is not set stays as it is on the server, where users may have changed it.
        kept = {"paused", "tags"} - options.keys()
        kept |= set() if "schedule" in options else {"schedules"}
        if existing and _version(prefect.__version__) < (3, 2):  # these replace, and do not update
            for name in kept:
                setattr(deployment, name, getattr(existing, name))
            if "schedules" in kept:
                deployment.schedules = [
                    DeploymentScheduleCreate(schedule=found.schedule, active=found.active)
                    for found in existing.schedules
                ]
        deployment.model_fields_set.difference_update(kept)
        return deployment.apply()

    def _serve(options: dict[str, Any]) -> None:
        with suppress(KeyboardInterrupt):  # which Prefect itself does since 3.0.11
            serve(_make_deployment(**options))

else:
    from prefect.deployments import Deployment
    from prefect.filesystems import GitHub

    # Agents gave way to workers in Prefect 2.16.4.
    _is_agent_time = _version(prefect.__version__) < (2, 16, 4)
    _SUGGESTED_POOL_TYPE = "prefect-agent" if _is_agent_time else "process"
    _AGENT_POOL_TYPES = ("prefect-agent",)
    _CAN_SERVE = False
    _CAN_LIMIT_RUNS = False
    _RUN_SETTINGS = {}

    @contextmanager
    def _task_runner(max_workers: int) -> Iterator[Callable[[Any, list[Any]], Any]]:
        """Yield a function that submits a task, given the ended futures of what it needs."""
        del max_workers  # nobody but PrefectRunner limits how many tasks are submitted
        yield lambda task, wait_for: task.submit(wait_for=wait_for)

    def _call_when_done(future: Any, callback: Callable[[], None]) -> None:
        # Futures have no callbacks before Prefect 3: a thread waits for each of the few in flight.
        def wait_and_call() -> None:
            future.wait()
            callback()

        threading.Thread(target=wait_and_call, daemon=True).start()

    def _final_state(future: Any) -> Any:
        return future.wait()

    def _register(existing: Any, path: str, source: Any, options: dict[str, Any]) -> Any:
        del options["choices"]  # the form of Prefect 2 has none
        if "paused" in options:
            options["is_schedule_active"] = not options.pop("paused")
        if existing:  # what is not set stays as it is on the server: users may have changed it
            kept = {name: getattr(existing, name) for name in ("tags", "is_schedule_active")}
            if "schedule" not in options and hasattr(existing, "schedules"):  # 2.16
                kept["schedules"] = [
                    {"schedule": found.schedule, "active": found.active}
                    for found in existing.schedules
                ]
            elif "schedule" not in options:
                kept["schedule"] = existing.schedule
            options = kept | options
        if source and not _is_agent_time:  # workers take no storage block, and agents nothing else
            from prefect.runner.storage import GitRepository

            deployment: Any = options.pop("flow").to_deployment(**options)
            deployment.entrypoint = ENTRYPOINT
            deployment.storage = GitRepository(url=source[0], branch=source[1])
            return deployment.apply()
        variables = options.pop("job_variables")
        if source:
            options["storage"] = GitHub(repository=source[0], reference=source[1])
            _call_api(options["storage"]._save(is_anonymous=True))
        else:
            # Without a working directory the run gets a temporary copy of the project, and its
            # output files are gone with it.
            options["path"] = variables["working_dir"] = path
        with warnings.catch_warnings():  # deprecated since 2.16.4, and all that knows agents
            warnings.simplefilter("ignore", DeprecationWarning)
            deployment = Deployment.build_from_flow(  # type: ignore[attr-defined]
                entrypoint=ENTRYPOINT,
                infra_overrides=variables,
                ignore_file=os.devnull,  # or else it leaves an empty .prefectignore behind
                load_existing=False,
                **options,
            )
        return deployment.apply()


def _default_max_workers() -> int:
    # Prefect 2 and 3.0.0 lack this setting; unset, the thread pool would have no limit.
    setting = getattr(prefect.settings, "PREFECT_TASKS_RUNNER_THREAD_POOL_MAX_WORKERS", None)
    return (setting and setting.value()) or min(32, (os.cpu_count() or 1) + 4)


# ---- Kedro: the project, and what has to be right before it can run ----


@lru_cache  # a second time would load all pipelines again
def _bootstrap(project_path: Path) -> ProjectMetadata:
    return bootstrap_project(project_path)


def _print_plain_lines() -> None:
    """Print log lines as Prefect does, where Kedro's Rich handler would draw them into a file.

    Drawing takes a millisecond a line: in a worker, longer than all that Prefect does for a task.
    """
    logger = logging.getLogger()
    for index, handler in enumerate(logger.handlers):
        if isinstance(handler, RichHandler) and not handler.console.is_terminal:
            config = DictConfigurator(load_logging_config(DEFAULT_LOGGING_SETTINGS_PATH))
            plain = logging.StreamHandler(handler.console.file)
            plain.setLevel(handler.level)
            plain.setFormatter(config.configure_formatter(config.config["formatters"]["standard"]))
            logger.handlers[index] = plain


@contextmanager
def _project_errors(doing: str) -> Iterator[None]:
    """Say in one line what the project's own code or configuration raised, and where."""
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if _is_project_code(Path(frame.filename))]
        where = f"\n  at {own[-1].filename}, line {own[-1].lineno}" if own else ""
        message = f"{doing} failed.\n  {type(error).__name__}: {error}{where}"
        raise click.ClickException(message) from error


def _is_project_code(path: Path) -> bool:
    in_environment = path.is_relative_to(sys.prefix)  # which may lie in the project's folder
    this_file = Path(__file__).absolute()
    return path.is_relative_to(PROJECT_PATH) and path != this_file and not in_environment


def _close_matches(name: str, names: Iterable[str], kind: str) -> str:
    """Name those that are spelled like the one asked for, and those there are."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{hint} The {kind} are: {', '.join(names[:NAMES_SHOWN]) or 'none'}{more}."


def _check_telemetry() -> None:
    """Refuse a run that would stop to ask for consent where nobody can answer."""
    try:
        version = importlib.metadata.version("kedro-telemetry")
    except importlib.metadata.PackageNotFoundError:
        return
    if (PROJECT_PATH / ".telemetry").exists():
        return
    if "kedro-telemetry" in settings.DISABLE_HOOKS_FOR_PLUGINS:
        return
    remedy = "decide in a file: cp .telemetry.example .telemetry (or: echo 'consent: false')"
    if _version(version) < (0, 6):  # these ask, and know no opt-out variable
        raise click.ClickException(
            f"kedro-telemetry {version} would stop every flow run to ask for consent: {remedy}"
        )
    if not (os.environ.get("DO_NOT_TRACK") or os.environ.get("KEDRO_DISABLE_TELEMETRY")):
        click.echo(f"Warning: kedro-telemetry will send usage data from flow runs; {remedy}")


def _locate_conf(conf_source: str | None) -> str:
    """Return the folder, archive or URL of the configuration; a path is relative to the project."""
    conf = conf_source or settings.CONF_SOURCE
    return conf if "://" in conf else str(PROJECT_PATH / conf)


def _list_environments(conf_source: str | None) -> list[str]:
    conf = Path(_locate_conf(conf_source))
    found = conf.iterdir() if conf.is_dir() else ()
    return sorted(path.name for path in found if path.is_dir() and path.name[0] != ".")


def _check_environment(env: str, conf_source: str | None) -> None:
    conf = _locate_conf(conf_source)
    if conf_source and "://" not in conf and not Path(conf).exists():
        raise click.ClickException(f"There is no configuration at {conf}: give another conf_source")
    environments = _list_environments(conf_source)
    if Path(conf).is_dir() and env not in environments:
        raise click.ClickException(
            f"Environment '{env}' has no folder {conf}/{env}."
            + _close_matches(env, environments, "environments")
        )


def _load_pipeline(parameters: dict[str, Any]) -> Pipeline:
    """Return the nodes that are asked for."""
    name = parameters["pipeline_name"]
    with _project_errors("Loading the pipelines (pipeline_registry.py)"):
        pipeline = pipelines.get(name)
        if pipeline is None:
            _request_pipelines([])
            registered = list(pipelines)
    if pipeline is None:
        raise click.ClickException(
            f"There is no pipeline '{name}'." + _close_matches(name, registered, "pipelines")
        )
    if not pipeline.nodes:
        raise click.ClickException(f"Pipeline '{name}' is empty: it has no node to run.")
    try:
        return _filter_pipeline(pipeline, parameters)
    except ValueError as error:
        hints = "".join(_explain_filters(pipeline, parameters))
        raise click.ClickException(f"Filtering pipeline '{name}': {error}{hints}") from error


def _dataset_names(pipeline: Pipeline) -> set[str]:
    return set(chain.from_iterable([*node.inputs, *node.outputs] for node in pipeline.nodes))


def _explain_filters(pipeline: Pipeline, parameters: dict[str, Any]) -> Iterator[str]:
    """Find the values of filters that are not in the pipeline, and what they may have meant."""
    nodes = pipeline.nodes
    names = {node.name for node in nodes}
    datasets = _dataset_names(pipeline)
    tags = set(chain.from_iterable(node.tags for node in nodes))
    namespaces = set(chain.from_iterable(map(_namespaces, nodes)))
    known = [tags, names, names, names, datasets, datasets, namespaces]
    for kind, there in zip((*_FILTERS, "namespaces"), known, strict=True):
        for value in sorted(set(parameters[kind]) - there):
            yield f"\n  {kind}: '{value}'." + _close_matches(value, there, kind)


def _namespaces(node: Node) -> set[str]:
    """Return the namespaces that a node is in: for a.b, that is a and a.b."""
    parts = (node.namespace or "").split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)} - {""}


def _check_parameters(parameters: dict[str, Any]) -> Pipeline:
    """Refuse flow parameters that cannot be right, and return the nodes they ask for."""
    _check_supported(parameters)
    _check_environment(parameters["env"], parameters["conf_source"])
    return _load_pipeline(parameters)


def _load_datasets(
    pipeline: Pipeline, session: Any, parameters: dict[str, Any]
) -> dict[str, Any | None]:
    """Make every dataset of the pipeline, as a run would; None stands for memory."""
    env = parameters["env"]
    with _project_errors(f"Loading the catalog and parameters of environment '{env}'"):
        catalog = _load_catalog(session, parameters)
        datasets = {name: _get_dataset(catalog, name) for name in sorted(_dataset_names(pipeline))}
    missing = sorted(name for name in pipeline.inputs() if datasets[name] is None)
    if missing:
        raise click.ClickException(
            f"No catalog entry, pattern or parameter provides pipeline input {', '.join(missing)}."
            f" Add it to {settings.CONF_SOURCE}/base or {settings.CONF_SOURCE}/{env}."
        )
    return datasets


# ---- conf/<env>/prefect.yml ----

_NUMBER = (int, float)
_DEPLOYMENT_SETTINGS: dict[str, Any] = {
    "cron": str, "interval": _NUMBER, "rrule": str, "timezone": str, "paused": bool,
    "description": str, "tags": list, "concurrency_limit": int, "job_variables": dict,
    "path": str, "source": str,
}  # fmt: skip
_RUNNER_SETTINGS: dict[str, Any] = {"type": str, "max_workers": int, "is_async": bool}
_TASK_SETTINGS: dict[str, Any] = {
    "retries": int, "retry_delay_seconds": (*_NUMBER, list), "retry_jitter_factor": _NUMBER,
    "timeout_seconds": _NUMBER, "tags": list, "log_prints": bool, "description": str,
    "version": str,
}  # fmt: skip


def _read_schedule(settings: dict[str, Any]) -> Any | None:
    """Make the schedule that section deployment of prefect.yml describes."""
    classes = {"cron": CronSchedule, "interval": IntervalSchedule, "rrule": RRuleSchedule}
    given = [name for name in classes if name in settings]
    if len(given) > 1 or (not given and "timezone" in settings):
        raise click.ClickException(
            f"prefect.yml: deployment has {' and '.join(given) or 'only a timezone'}, and not one"
            " of cron, interval and rrule."
        )
    for name in given:
        with _project_errors(f"Reading deployment.{name} in prefect.yml"):
            return classes[name](**{name: settings[name], "timezone": settings.get("timezone")})
    return None


def _read_source(settings: dict[str, Any]) -> tuple[str, str | None] | None:
    """Split a source as pip does: git+URL, and the branch or tag behind an @."""
    if "source" not in settings:
        return None
    found = re.fullmatch(r"git\+(\w+://[^/]*/[^@]+)(?:@(.+))?", settings["source"])
    if not found:
        raise click.ClickException(
            f"prefect.yml: deployment.source is '{settings['source']}', and not git+URL@ref, as in"
            " git+https://example.org/forecast.git@v1.4 (a branch or tag)."
        )
    if "path" in settings:
        raise click.ClickException(
            "prefect.yml: deployment has path and source, and the project lies in one place only."
        )
    return found[1], found[2]


def _load_config(session: Any, parameters: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read prefect.yml with the project's own config loader, and check what is in it."""
    with _project_errors("Loading prefect.yml"):
        loader = _call_with_params(session._get_config_loader, parameters)
        loader.config_patterns.setdefault("prefect", ["prefect.*"])
        try:
            given = {section: settings or {} for section, settings in loader["prefect"].items()}
        except MissingConfigException:
            given = {}
    _check_settings("", given, dict.fromkeys(("deployment", "task_runner", "tasks"), dict))
    config = {"deployment": {}, "task_runner": {}, "tasks": {}, **given}
    _check_settings("deployment.", config["deployment"], _DEPLOYMENT_SETTINGS)
    _read_schedule(config["deployment"])
    _read_source(config["deployment"])
    if "concurrency_limit" in config["deployment"] and not _CAN_LIMIT_RUNS:
        raise click.ClickException(
            "prefect.yml: deployment.concurrency_limit needs Prefect 3, and this is Prefect"
            f" {prefect.__version__}: leave it out, or limit the work queue."
        )
    _check_settings("task_runner.", config["task_runner"], _RUNNER_SETTINGS)
    if (kind := config["task_runner"].pop("type", "threads")) != "threads":
        raise click.ClickException(f"prefect.yml: task_runner.type is '{kind}', not 'threads'.")
    _check_settings("tasks.", config["tasks"], dict.fromkeys(config["tasks"], dict))
    for name, options in config["tasks"].items():
        _check_settings(f"tasks.{name}.", options, _TASK_SETTINGS)
        with _project_errors(f"Reading tasks.{name} in prefect.yml"):
            Task(fn=lambda: None, **options)
    with _project_errors("Reading task_runner in prefect.yml"):
        PrefectRunner(**config["task_runner"])
    return config


def _check_settings(where: str, given: dict[str, Any], allowed: dict[str, Any]) -> None:
    """Refuse settings that are not there, or of another type."""
    for name, value in given.items():
        if name not in allowed:
            raise click.ClickException(
                f"prefect.yml has no {where}{name}." + _close_matches(name, allowed, "settings")
            )
        types = allowed[name] if isinstance(allowed[name], tuple) else (allowed[name],)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join(kind.__name__ for kind in types)
            raise click.ClickException(
                f"prefect.yml: {where}{name} is {value!r}, and has to be of type {names}."
            )


def _task_names(node: Node) -> set[str]:
    """Return the names by which the tasks section may speak of a node."""
    tags = {f"tag:{tag}" for tag in node.tags}
    return {"default", node.name, *tags, *(f"namespace:{name}" for name in _namespaces(node))}


def _task_options(node: Node, tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what the tasks section says of a node; its later lines win over earlier ones."""
    names = _task_names(node)
    return dict(chain.from_iterable(tasks[name].items() for name in tasks if name in names))


def _check_task_names(tasks: Iterable[str]) -> None:
    nodes = chain.from_iterable(pipeline.nodes for pipeline in pipelines.values())
    known = set(chain({"default"}, *map(_task_names, nodes)))
    for name in tasks:
        if name not in known:
            raise click.ClickException(
                f"prefect.yml: tasks has '{name}', which is no node of any pipeline."
                + _close_matches(name, known, "names")
            )


# ---- The plan: what was checked, and is now going to be shown, run or registered ----


class _Plan(NamedTuple):
    """What was checked, and is now going to be shown, run or registered."""

    metadata: ProjectMetadata
    parameters: dict[str, Any]
    pipeline: Pipeline
    datasets: dict[str, Any | None]
    config: dict[str, dict[str, Any]]
    choices: dict[str, list[str]]

    @property
    def given(self) -> dict[str, Any]:
        """The flow parameters that are not left at their default."""
        return {
            name: value
            for name, value in self.parameters.items()
            if value or name in ("pipeline_name", "env")
        }


def _check_project(parameters: dict[str, Any]) -> _Plan:
    with _project_errors(f"Loading {PROJECT_PATH}, where this file lies, as a Kedro project"):
        metadata = _bootstrap(PROJECT_PATH)
    _check_telemetry()
    pipeline = _check_parameters(parameters)
    with _project_errors("Making a Kedro session"):
        session = _create_session(parameters)
    config = _load_config(session, parameters)
    _check_task_names(config["tasks"])
    datasets = _load_datasets(pipeline, session, parameters)
    environments = _list_environments(parameters["conf_source"]) or [parameters["env"]]
    choices = {"pipeline_name": list(pipelines), "env": environments}
    return _Plan(metadata, parameters, pipeline, datasets, config, choices)


def _where(name: str, dataset: Any | None) -> str:
    """Say where a dataset lives."""
    if name == "parameters" or name.startswith("params:"):
        return "parameters"
    if dataset is None:
        return "memory, released after its last reader"
    about = dataset._describe()
    filepath, protocol = about.get("filepath", ""), about.get("protocol", "file")
    prefix = "" if protocol == "file" else f"{protocol}://"
    return f"{type(dataset).__name__} {prefix}{filepath}".rstrip()


def _layers(plan: _Plan) -> Iterator[tuple[int, Node, str, str]]:
    """Yield each node with the number of its layer, its inputs and its outputs."""
    for number, layer in enumerate(plan.pipeline.grouped_nodes, start=1):
        for node in layer:
            inputs, outputs = ", ".join(node.inputs), ", ".join(node.outputs)
            yield number, node, inputs or "nothing", outputs or "nothing"


def _print_plan(plan: _Plan) -> None:
    """Print the execution layers, where each dataset lives, and what prefect.yml sets."""
    rows = list(_layers(plan))
    given = dict(plan.given)
    click.echo(
        f"Pipeline '{given.pop('pipeline_name')}' of {plan.metadata.package_name}, "
        f"environment '{given.pop('env')}': {len(rows)} nodes in {rows[-1][0]} layers"
    )
    for name, value in given.items():
        click.echo(f"  {name}: {value}")
    for number, group in groupby(rows, key=itemgetter(0)):
        click.echo(f"Layer {number}")
        for _, node, inputs, outputs in group:
            options = _task_options(node, plan.config["tasks"]) or ""
            click.echo(f"  {node.name}: {inputs} -> {outputs}  {options}".rstrip())
    click.echo("Datasets")
    for name, dataset in plan.datasets.items():
        click.echo(f"  {name}: {_where(name, dataset)}")
    for section in ("deployment", "task_runner"):
        for name, value in plan.config[section].items():
            click.echo(f"{section}.{name}: {value}")


def _describe(plan: _Plan) -> str:
    """Account for the pipeline in Markdown, with a graph that Prefect's UI draws."""
    pipeline = plan.pipeline
    ids = {node: f"n{number}" for number, node in enumerate(pipeline.nodes)}
    edges = [
        f"{ids[needed]} --> {ids[node]}"
        for node, all_needed in pipeline.node_dependencies.items()
        for needed in sorted(all_needed)
    ]
    graph = [*(f'{ids[node]}["{html.escape(node.name)}"]' for node in ids), *edges]
    return "\n".join(
        [
            f"Kedro project **{plan.metadata.project_name}**, registered with\n",
            *(f"- {name}: `{value}`" for name, value in plan.given.items()),
            "\n| layer | node | inputs | outputs |\n|---|---|---|---|",
            *(f"| {n} | `{node.name}` | `{i}` | `{o}` |" for n, node, i, o in _layers(plan)),
            *(["\n```mermaid\ngraph TD", *graph, "```"] if len(edges) <= MERMAID_EDGES else ()),
        ]
    )


# ---- Nodes as tasks ----


def kedro_task(node: Node, execution_config: dict[str, Any]) -> None:
    """Run one node as Kedro does: load, run, save, with its hooks."""
    _run_node(node, **execution_config)


def instantiate_task(
    node: Node, execution_config: dict[str, Any], like: Task[[], None]
) -> Task[[], None]:
    """Make the Prefect task that runs a node, under the node's name, with another's options."""

    def run_node_task() -> None:
        kedro_task(node, execution_config)

    # Prefect reads and parses this file for each task that it makes: a copy takes 1/50 of the time.
    node_task = copy(like)
    node_task.fn = run_node_task
    node_task.name = node.name
    node_task.task_run_name = lambda: node.name
    # Prefect 2 finds the task runs of a retried flow run by this key, which has to be the node's.
    node_task.task_key = f"{__name__}.{node.name}"
    return node_task


def init_kedro_tasks_by_execution_layer(
    pipeline: Pipeline,
    execution_config: dict[str, Any],
    task_options: dict[str, dict[str, Any]] | None = None,
    limited_tags: Iterable[str] = (),
) -> list[dict[Node, Task[[], None]]]:
    """Make a task for each node, in layers of nodes that need only nodes of earlier layers."""
    made: dict[str, Task[[], None]] = {}  # one for each set of options

    def make(node: Node) -> Task[[], None]:
        options = _task_options(node, task_options or {})
        options["tags"] = sorted({*options.get("tags", ()), *(node.tags & set(limited_tags))})
        key = repr(sorted(options.items()))
        if key not in made:  # without result there is nothing to hash, keep or look up
            made[key] = Task(fn=lambda: None, persist_result=False, **options)
        return instantiate_task(node, execution_config, made[key])

    return [{node: make(node) for node in layer} for layer in pipeline.grouped_nodes]


def _longest_path_first(pipeline: Pipeline) -> list[Node]:
    """Order nodes by how many have to run after them, one after the other; else as Kedro does."""
    behind = dict.fromkeys(pipeline.nodes, 0)
    for node in reversed(pipeline.nodes):
        for needed in pipeline.node_dependencies[node]:
            behind[needed] = max(behind[needed], behind[node] + 1)
    return sorted(behind, key=behind.__getitem__, reverse=True)


async def _read_limited_tags() -> set[str]:
    """Ask the server which tags limit how many task runs may go on at once."""
    limits: list[Any] = []
    async with get_client() as client:
        while page := await client.read_concurrency_limits(limit=200, offset=len(limits)):
            limits += page
    return {limit.tag for limit in limits}


class PrefectRunner(SequentialRunner):
    """A Kedro runner that runs each node as a Prefect task, as soon as its inputs are there.

    Use it inside a Prefect flow: `KedroSession.run(runner=PrefectRunner())`, or
    `PrefectRunner().run(pipeline, catalog, hook_manager)`. Nodes run in threads of the flow's
    process and hand data on through the catalog; datasets are released after their last reader.

    Args:
        is_async: Load and save the inputs and outputs of a node at the same time, in threads, as
            Kedro's runners do. Default: False.
        max_workers: How many nodes may run at once. Default: Prefect's setting
            `PREFECT_TASKS_RUNNER_THREAD_POOL_MAX_WORKERS` where it is set, else the number of CPUs
            plus 4, at most 32. With 1, nodes run in Kedro's sequential order.
        task_options: Options of the nodes' tasks, as in section `tasks` of prefect.yml: from node
            name, `tag:<tag>`, `namespace:<namespace>` or `default` to options of Prefect's Task.
            Default: none.

    Raises:
        ValueError: If max_workers is less than 1.
    """

    def __init__(
        self,
        is_async: bool = False,
        max_workers: int | None = None,
        task_options: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(is_async=is_async)
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers is {max_workers}, and has to be 1 or more")
        self._max_workers = max_workers or _default_max_workers()
        self._task_options = task_options

    @property
    def _logger(self) -> logging.Logger:
        # Kedro's logging configuration shows what its own loggers say, not those of this module.
        return logging.getLogger("kedro.runner.prefect_runner")

    def _run(
        self,
        pipeline: Pipeline,
        catalog: Any,
        hook_manager: Any = None,
        run_id: str | None = None,
    ) -> None:
        """Run the nodes, and raise the exception of the first one that failed."""
        config = {
            "catalog": catalog,
            "hook_manager": hook_manager,
            "is_async": self._is_async,
            "run_id": run_id,
        }
        # Every tag of a task run costs a call to the server: use only those that do something.
        used_tags = set(chain.from_iterable(node.tags for node in pipeline.nodes))
        tags = used_tags & _call_api(_read_limited_tags()) if used_tags else used_tags
        layers = init_kedro_tasks_by_execution_layer(pipeline, config, self._task_options, tags)
        tasks = {node: node_task for layer in layers for node, node_task in layer.items()}

        load_counts = Counter(chain.from_iterable(node.inputs for node in pipeline.nodes))
        kept = pipeline.inputs() | pipeline.outputs()

        def release(node: Node) -> None:
            """Release what this node was the last to need, as Kedro's own runners do."""
            load_counts.subtract(node.inputs)
            for name in {*node.inputs, *node.outputs} - kept:
                if load_counts[name] < 1:
                    catalog.release(name)

        done_nodes: list[Node] = []
        failed: list[Any] = []
        for node, future in self._run_tasks(pipeline, tasks, release):
            if not _final_state(future).is_completed():
                failed.append(future)
                continue
            done_nodes.append(node)
            self._logger.info("Completed node: %s", node.name)
            self._logger.info("Completed %d out of %d tasks", len(done_nodes), len(tasks))
        if failed:
            self._suggest_resume_scenario(pipeline, done_nodes, catalog)
            failed[0].result()  # raises: it ended first, so it is no node that waited for another
            raise RuntimeError(f"A task run ended as {_final_state(failed[0]).name}")

    def _run_tasks(
        self,
        pipeline: Pipeline,
        tasks: dict[Node, Task[[], None]],
        release: Callable[[Node], None],
    ) -> Iterator[tuple[Node, Any]]:
        """Submit each task when the nodes it needs have ended; yield nodes and futures as they end.

        A task behind a failed one is submitted as well: Prefect does not run it, and shows it as
        NotReady.
        """
        needed = pipeline.node_dependencies
        nodes = pipeline.nodes if self._max_workers == 1 else _longest_path_first(pipeline)
        position = {node: index for index, node in enumerate(nodes)}
        sorter = TopologicalSorter(needed)
        sorter.prepare()
        ready: list[int] = []  # a heap of positions
        futures: dict[Node, Any] = {}
        ended: queue.SimpleQueue[Node] = queue.SimpleQueue()

        def submit_ready(running: int) -> None:
            for node in sorter.get_ready():
                heapq.heappush(ready, position[node])
            for _ in range(min(len(ready), self._max_workers - running)):
                node = nodes[heapq.heappop(ready)]
                wait_for = [futures[n] for n in sorted(needed[node], key=position.__getitem__)]
                futures[node] = submit(tasks[node], wait_for)
                _call_when_done(futures[node], lambda node=node: ended.put(node))  # type: ignore[misc]

        with _task_runner(self._max_workers) as submit:
            submit_ready(running=0)
            for count in range(1, len(nodes) + 1):
                node = ended.get()
                if _final_state(futures[node]).is_completed():
                    release(node)
                sorter.done(node)
                submit_ready(running=len(futures) - count)  # before anybody logs something
                yield node, futures[node]


# ---- The flow ----


@task(persist_result=False)
def kedro_init(parameters: dict[str, Any]) -> Any:
    """Bootstrap the project, and make the Kedro session and the runner of this flow run."""
    logger = get_run_logger()
    logger.info("Bootstrapping project")
    metadata = _bootstrap(PROJECT_PATH)
    _print_plain_lines()
    _request_pipelines(_pipeline_names(parameters))
    _check_parameters(parameters)
    session = _create_session(parameters)
    config = _load_config(session, parameters)
    logger.info("Project %s: session created with ID %s", metadata.project_name, session.session_id)
    return session, PrefectRunner(**config["task_runner"], task_options=config["tasks"])


def _flow_name() -> str:
    """Name the flow after the project's package: on one server, projects must not share a flow."""
    try:
        return _get_project_metadata(PROJECT_PATH).package_name
    except (RuntimeError, ValueError):  # not in a Kedro project: prefect_deploy says so
        return "my_flow"


@flow(name=_flow_name())
def my_flow(
    pipeline_name: str = "__default__",
    env: str = "base",
    runtime_params: dict[str, Any] = {},
    tags: list[str] = [],
    node_names: list[str] = [],
    from_nodes: list[str] = [],
    to_nodes: list[str] = [],
    from_inputs: list[str] = [],
    to_outputs: list[str] = [],
    namespaces: list[str] = [],
    load_versions: dict[str, str] = {},
    only_missing_outputs: bool = False,
    conf_source: str = "",
) -> None:
    """Run a Kedro pipeline, each of its nodes as a Prefect task.

    Args:
        pipeline_name (str): The registered pipeline to run. Default: `__default__`.
        env (str): The Kedro configuration environment, a folder of `conf`. Default: `base`.
        runtime_params (dict): Values that win over the project's parameters, nested as these are.
            Default: none.
        tags (list): Run only nodes with at least one of these Kedro tags. Default: all.
        node_names (list): Run only these nodes. Default: all.
        from_nodes (list): Run only these nodes and those behind them. Default: all.
        to_nodes (list): Run only these nodes and those before them. Default: all.
        from_inputs (list): Run only what needs these datasets. Default: all.
        to_outputs (list): Run only what these datasets need. Default: all.
        namespaces (list): Run only nodes in these namespaces; before Kedro 1.0 one. Default: all.
        load_versions (dict): From versioned dataset to the version to load. Default: the newest.
        only_missing_outputs (bool): Skip nodes whose outputs are there; needs Kedro 1.0. Default:
            false.
        conf_source (str): Folder, archive or URL of the configuration; a path is relative to the
            project. Default: the project's own.
    """
    parameters = locals()
    get_run_logger().info("Initializing Kedro...")
    initialized: Any = kedro_init(parameters)
    session, runner = initialized
    with session:
        _run_session(session, runner, parameters)


# ---- Deployment ----


def _reach_server() -> None:
    """Refuse to register on a server that does not answer, or on none."""
    url = PREFECT_API_URL.value()
    remedy = (
        "Start one with `prefect server start`, and name it with"
        " `prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`."
    )
    if not url:
        raise click.ClickException(f"No Prefect server: PREFECT_API_URL is not set. {remedy}")
    try:
        _call_api(asyncio.wait_for(_check_health(), SERVER_TIMEOUT))
    except Exception as error:
        reason = str(error) or f"no answer within {SERVER_TIMEOUT} s"
        raise click.ClickException(f"No Prefect server at {url}: {reason}. {remedy}") from error


async def _check_health() -> None:
    async with get_client() as client:
        if error := await client.api_healthcheck():
            raise error


async def _look_up(full_name: str, pool: tuple[Any, ...] | None) -> tuple[Any | None, Any | None]:
    """Return the deployment, where there is one, and the work pool, where one is asked for."""
    async with get_client() as client:
        try:
            existing = await client.read_deployment_by_name(full_name)
        except ObjectNotFound:
            existing = None
        return existing, await _find_work_pool(client, *pool) if pool else None


async def _find_work_pool(
    client: Any, pool_name: str, queue_name: str, pool_type: str | None, dry: bool
) -> Any:
    """Return the work pool, after checking or making it and its queue."""
    try:
        pool = await client.read_work_pool(pool_name)
    except ObjectNotFound:
        pool = await _create_work_pool(client, pool_name, pool_type, dry)
        existing = ["default"]  # each pool is born with this queue
    else:
        queues = await client.read_work_queues(work_pool_name=pool_name)
        existing = [work_queue.name for work_queue in queues]
    _check_work_pool(pool, pool_type)
    if queue_name not in existing:
        await _create_work_queue(client, pool_name, queue_name, existing, pool_type, dry)
    return pool


async def _create_work_pool(client: Any, name: str, pool_type: str | None, dry: bool) -> Any:
    from prefect.workers.utilities import (
        get_available_work_pool_types,
        get_default_base_job_template_for_infrastructure_type,
    )

    if not pool_type:
        raise click.ClickException(
            f"There is no work pool '{name}' on {client.api_url}."
            + _close_matches(name, [p.name for p in await client.read_work_pools()], "work pools")
            + f" Create it: prefect work-pool create --type {_SUGGESTED_POOL_TYPE} "
            f"{shlex.quote(name)} (or add: --work_pool_type {_SUGGESTED_POOL_TYPE})"
        )
    template = await get_default_base_job_template_for_infrastructure_type(pool_type)
    if template is None and pool_type not in _AGENT_POOL_TYPES:
        known = {*await get_available_work_pool_types(), *_AGENT_POOL_TYPES}
        raise click.ClickException(
            f"There is no work pool type '{pool_type}'."
            + _close_matches(pool_type, known, "types known here")
        )
    pool = WorkPoolCreate(name=name, type=pool_type, base_job_template=template or {})
    click.echo(f"{'Would create' if dry else 'Creating'} work pool '{name}' ({pool_type}).")
    return pool if dry else await client.create_work_pool(pool)


def _check_work_pool(pool: Any, pool_type: str | None) -> None:
    if pool.type == "prefect-agent" and not _AGENT_POOL_TYPES:
        raise click.ClickException(
            f"Work pool '{pool.name}' is for agents, which Prefect 3 does not have. Create one for"
            " workers: prefect work-pool create --type process <another name>"
        )
    if pool_type and pool.type != pool_type:
        raise click.ClickException(
            f"Work pool '{pool.name}' exists, with type {pool.type}, not {pool_type}: leave out"
            " --work_pool_type, or choose another --work_pool_name."
        )
    if pool.is_paused:
        resume = f"prefect work-pool resume {shlex.quote(pool.name)}"
        click.echo(f"Warning: work pool '{pool.name}' is paused. No run starts before: {resume}")


async def _create_work_queue(
    client: Any, pool_name: str, name: str, existing: list[str], pool_type: str | None, dry: bool
) -> None:
    """Make a queue, if asked to: Prefect would, without a word, and no worker would serve it."""
    if not pool_type:
        raise click.ClickException(
            f"Work pool '{pool_name}' has no queue '{name}'."
            + _close_matches(name, existing, "queues")
            + f" Create it: prefect work-queue create --pool {shlex.quote(pool_name)} "
            f"{shlex.quote(name)} (or add: --work_pool_type {_SUGGESTED_POOL_TYPE})"
        )
    click.echo(f"{'Would create' if dry else 'Creating'} work queue '{name}'.")
    if not dry:
        await client.create_work_queue(name=name, work_pool_name=pool_name)


def _is_scheduled(schedule: Any, existing: Any) -> bool:
    """Tell whether a deployment has just this schedule: it then keeps its start and its pause."""

    def timing(schedule: Any) -> list[str]:
        times = [getattr(schedule, name, None) for name in ("cron", "interval", "rrule")]
        zone = getattr(schedule, "timezone", None) or "UTC"
        # The server adds the start that a rule without one has.
        return [str(time).removeprefix("DTSTART:20200101T000000\n") for time in (*times, zone)]

    return [timing(found.schedule) for found in _schedules(existing)] == [timing(schedule)]


def _deployment_options(plan: _Plan, existing: Any) -> dict[str, Any]:
    """Turn the plan and its prefect.yml into options of a deployment."""
    settings = plan.config["deployment"]
    options: dict[str, Any] = {"parameters": plan.given, "choices": plan.choices}
    names = settings.keys() & {"tags", "concurrency_limit", "paused"}
    options |= {name: settings[name] for name in names}
    options["description"] = settings.get("description") or _describe(plan)
    schedule = _read_schedule(settings)
    if schedule and not (existing and _is_scheduled(schedule, existing)):
        options["schedule"] = schedule
    return options


def _print_next_steps(deployment_id: Any, full_name: str, pool: Any, queue_name: str) -> None:
    kind = "agent" if pool.type in _AGENT_POOL_TYPES else "worker"
    target = f"--pool {shlex.quote(pool.name)} --work-queue {shlex.quote(queue_name)}"
    ui = (PREFECT_UI_URL.value() or "").rstrip("/")
    click.echo(f"Registered deployment '{full_name}' with id {deployment_id}")
    click.echo(f"  see it:         {ui}/deployments/deployment/{deployment_id}")
    click.echo(f"  start {kind + ':':<9} prefect {kind} start {target}")
    click.echo(f"  start a run:    prefect deployment run {shlex.quote(full_name)}")


# ---- Command line ----


def _run_now(plan: _Plan) -> None:
    """Run the flow in this process; exit code 1 if it fails."""
    if PREFECT_API_URL.value():  # without one, Prefect starts its embedded server
        _reach_server()
    with temporary_settings(set_defaults=_RUN_SETTINGS):
        state: Any = my_flow(**plan.parameters, return_state=True)
        task_runs = len(plan.pipeline.nodes) + 1  # and kedro_init
        _call_api(_await_recording(state.state_details.flow_run_id, task_runs))
    if not state.is_completed():
        raise click.ClickException(f"The flow run ended as {state.name}. {state.message or ''}")
    click.echo("The flow run has completed. Its outputs:")
    for name in sorted(plan.pipeline.outputs()):
        click.echo(f"  {name}: {_where(name, plan.datasets[name])}")


async def _await_recording(flow_run_id: Any, expected: int, patience: float = 10) -> None:
    """Wait for the server of Prefect 3, which records task runs later than they end.

    The embedded server stops with this process, and loses what it has not recorded. Gives up when
    nothing has changed for `patience` seconds.
    """
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    this_run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    loop = asyncio.get_running_loop()
    recorded, changed = -1, loop.time()
    async with get_client() as client:
        while recorded < expected and loop.time() - changed < patience:
            states: dict[Any, Any] = {}  # by id: pages overlap while task runs are added
            offset = 0
            while page := await client.read_task_runs(flow_run_filter=this_run, offset=offset):
                states.update({run.id: run.state for run in page if run.state})
                offset += len(page)
            ended = sum(s.is_final() or s.name == "NotReady" for s in states.values())
            if ended != recorded:
                recorded, changed = ended, loop.time()
            await asyncio.sleep(0.2)


def _is_given(context: click.Context, option: str) -> bool:
    return context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE


def _job_variables(
    context: click.Context, logging_level: str, variables: dict[str, Any]
) -> dict[str, Any]:
    """Add the logging level to the job variables; the command line wins over prefect.yml."""
    level, env = {"PREFECT_LOGGING_LEVEL": logging_level}, variables.get("env", {})
    return {**variables, "env": env | level if _is_given(context, "logging_level") else level | env}


def _check_usage(context: click.Context, deployment_name: str, run: bool, serve: bool) -> None:
    """Refuse what Prefect would refuse, and options that would do nothing."""
    if not deployment_name or re.search(r"[/%&<>]", deployment_name):
        raise click.ClickException(
            f"Deployment name '{deployment_name}' is refused by Prefect: it must not be empty, and"
            " must not contain / % & < or >. Choose another --deployment_name."
        )
    if run and serve:
        raise click.UsageError("--run and --serve exclude each other.")
    if serve and not _CAN_SERVE:
        raise click.UsageError(
            f"--serve needs Prefect 3, and this is Prefect {prefect.__version__}: register with"
            " --work_pool_name, and start a worker or an agent."
        )
    for option in ("work_pool_name", "work_queue_name", "work_pool_type", "logging_level"):
        if (run or serve) and _is_given(context, option):
            raise click.UsageError(
                f"--{option} is for work pools: leave it out with --{'run' if run else 'serve'}."
                + (" Set PREFECT_LOGGING_LEVEL instead." if option == "logging_level" else "")
            )


_KEDRO_RUN_OPTIONS = (  # flow parameter; spelling and parser of `kedro run`; form; meaning
    ("runtime_params", "--params", kedro_cli._split_params, "K=V,...", "Win over the parameters."),
    ("tags", "-t --tags", kedro_cli.split_string, "TAG,...", "Only nodes with one of these tags."),
    ("node_names", "-n --nodes", kedro_cli.split_node_names, "NODE,...", "Only these nodes."),
    ("from_nodes", "--from-nodes", kedro_cli.split_node_names, "NODE,...", "Only from these on."),
    ("to_nodes", "--to-nodes", kedro_cli.split_node_names, "NODE,...", "Only up to these."),
    ("from_inputs", "--from-inputs", kedro_cli.split_string, "DATA,...", "Only what needs these."),
    ("to_outputs", "--to-outputs", kedro_cli.split_string, "DATA,...", "Only what these need."),
    ("namespaces", "-ns --namespaces --namespace", kedro_cli.split_node_names,
     "NAME,...", "Only nodes in these namespaces."),
    ("load_versions", "-lv --load-versions", kedro_cli._split_load_versions,
     "DATA:VERSION,...", "Instead of the newest."),
    ("conf_source", "--conf-source", None, "PATH", "Configuration in another place than conf."),
)  # fmt: skip


def _kedro_run_options(command: Any) -> Any:
    """Add the options of `kedro run` that become flow parameters."""
    for name, spelling, parse, form, about in reversed(_KEDRO_RUN_OPTIONS):
        options: dict[str, Any] = {"callback": parse, "metavar": form, "help": about}
        names = (name, *spelling.split())
        command = click.option(*names, default="", show_default=False, **options)(command)
    return command


# Kedro's recipe spells its options with underscores, most other commands with hyphens: both do.
@click.command(
    context_settings={
        "show_default": True,
        "token_normalize_func": lambda name: name.replace("-", "_"),
    }
)
@click.option(
    "-p", "--pipeline", "pipeline_name", default="__default__", help="Registered pipeline to run."
)
@click.option(
    "-e", "--env", default="base", envvar="KEDRO_ENV", help="Kedro environment; or set KEDRO_ENV."
)
@_kedro_run_options
@click.option("--only-missing-outputs", is_flag=True, help="Only nodes whose outputs are missing.")
@click.option("--deployment_name", default="example", help="Deployment to create or update.")
@click.option("--work_pool_name", default="default", help="Work pool that runs are sent to.")
@click.option("--work_queue_name", default="default", help="Queue in the work pool.")
@click.option(
    "--work_pool_type", metavar="TYPE", help="Create a missing pool with this type, and its queue."
)
@click.option("--version", default="1.0", help="Version of the deployment.")
@click.option(
    "--logging_level",
    default="DEBUG",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]),
    help="PREFECT_LOGGING_LEVEL of the runs.",
)
@click.option("--run", is_flag=True, help="Run the flow now, in this process; needs no work pool.")
@click.option("--serve", is_flag=True, help="Register, and run from this process until Ctrl-C.")
@click.option("--dry_run", is_flag=True, help="Check everything, show the plan, change nothing.")
@click.pass_context
def prefect_deploy(
    context: click.Context,
    /,
    deployment_name: str,
    work_pool_name: str,
    work_queue_name: str,
    work_pool_type: str | None,
    version: str,
    logging_level: str,
    run: bool,
    serve: bool,
    dry_run: bool,
    **parameters: Any,
) -> None:
    """Register a Kedro pipeline as a Prefect deployment, or run it as a flow."""
    _check_usage(context, deployment_name, run, serve)
    plan = _check_project(parameters)
    settings = plan.config["deployment"]
    if dry_run:
        _print_plan(plan)
    if run:
        return None if dry_run else _run_now(plan)
    _reach_server()
    full_name = f"{plan.metadata.package_name}/{deployment_name}"
    pool_options = (work_pool_name, work_queue_name, work_pool_type, dry_run)
    existing, pool = _call_api(_look_up(full_name, None if serve else pool_options))
    options = {
        "flow": my_flow,
        "name": deployment_name,
        "version": version,
        **_deployment_options(plan, existing),
    }
    if serve:
        return None if dry_run else _serve(options)
    if dry_run:
        return None
    options |= {
        "work_pool_name": work_pool_name,
        "work_queue_name": work_queue_name,
        "job_variables": _job_variables(context, logging_level, settings.get("job_variables", {})),
    }
    path = settings.get("path", str(PROJECT_PATH))
    deployment_id = _register(existing, path, _read_source(settings), options)
    return _print_next_steps(deployment_id, full_name, pool, work_queue_name)


if __name__ == "__main__":
    os.chdir(PROJECT_PATH)  # as with `kedro run`, nodes may read and write relative to the project
    prefect_deploy()
