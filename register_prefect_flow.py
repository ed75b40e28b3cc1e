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
import base64
import contextvars
import difflib
import functools
import hashlib
import heapq
import html
import importlib.metadata
import inspect
import io
import json
import logging.handlers
import os
import pickle
import platform
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass
from datetime import datetime, timezone
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple, cast

THIS_FILE = Path(__file__).absolute()
PROJECT_PATH = THIS_FILE.parent
if __name__ == "__main__":
    # Paths are relative to the project, as with `kedro run`. Kedro looks for conf/logging.yml when
    # it is imported.
    os.chdir(PROJECT_PATH)

import click
import kedro
import prefect

__version__ = "1.0.0"
Options = dict[str, Any]
ENTRYPOINT = "register_prefect_flow.py:my_flow"
FILTERS = (
    "tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "to_outputs", "namespaces",
)  # fmt: skip
NAMES_SHOWN = 50  # in an error that lists what there is
TEXT_SHOWN = 10_000  # characters of an exception that Prefect shows and stores
LOG_SHOWN = 100_000  # characters of a log line that Prefect shows and stores
LINES_SENT = 150  # log lines in one message to Prefect
PREVIEW_SHOWN = 1_000_000  # characters of a dataset's preview that Prefect shows and stores
NODES_DRAWN = 300  # in a picture of the pipeline
NAME_DRAWN = 22  # characters of a node's name
SERVER_TIMEOUT = 10  # seconds in which a Prefect server has to answer
REGISTER_TIMEOUT = 60  # seconds in which it has to register: its database may be busy


# ---- Compatibility: whatever differs between versions has one name and one signature here ----


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


_KEDRO, _PREFECT = _version(kedro.__version__), _version(prefect.__version__)
_KEDRO_1, _PREFECT_3 = _KEDRO >= (1,), _PREFECT >= (3,)

for _name, _found, _floor in (
    ("Python", sys.version.split()[0], "3.10"),
    ("Kedro", kedro.__version__, "0.18.10"),
    # 3.0 and 3.1 replace what users set in the UI, each time that something is registered.
    ("Prefect", prefect.__version__, "3.2" if _PREFECT_3 else "2.10.17"),
):
    if _version(_found) < _version(_floor):
        raise SystemExit(
            f"Error: register_prefect_flow.py needs {_name} {_floor} or newer, and this is {_name}"
            f" {_found}." + f" pip install '{_name.lower()}>={_floor}'" * (_name != "Python")
        )

from kedro import io as kedro_io
from kedro.config import AbstractConfigLoader, MissingConfigException
from kedro.framework.cli import utils as kedro_cli
from kedro.framework.project import pipelines, settings
from kedro.framework.session import KedroSession
from kedro.framework.startup import ProjectMetadata, _get_project_metadata, bootstrap_project
from kedro.logging import RichHandler
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from kedro.pipeline.pipeline import CircularDependencyError
from kedro.runner import SequentialRunner
from prefect import Task, flow, get_client, get_run_logger, runtime, task
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.logging.configuration import DEFAULT_LOGGING_SETTINGS_PATH, load_logging_config
from prefect.logging.formatters import PrefectFormatter
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings
from prefect.utilities.callables import parameter_schema
from prefect.utilities.templating import resolve_block_document_references

try:  # Kedro 0.19.10 put Task in the place of run_node, which 1.0 removed.
    from kedro.runner import Task as _KedroTask
except ImportError:
    from kedro.runner import run_node as _run_node  # type: ignore[attr-defined,unused-ignore]
else:

    def _run_node(node: Any, catalog: Any, hook_manager: Any, is_async: bool, run_id: Any) -> None:
        _KedroTask(node, catalog, is_async, hook_manager, run_id).execute()


def _pipeline_names(options: Options) -> list[str]:
    """Name the pipelines as `kedro run` does: none, if it is the default one."""
    names = list(dict.fromkeys(name.strip() for name in options["pipeline_name"].split(",")))
    return [] if names == ["__default__"] else names


def _filter_pipeline(pipeline: Pipeline, options: Options) -> Pipeline:
    filters = {name: options[name] for name in FILTERS}
    spaces = filters.pop("namespaces")  # Kedro 1.0 brought the plural
    own = {"node_namespaces": spaces} if _KEDRO_1 else {"node_namespace": next(iter(spaces), None)}
    return pipeline.filter(**filters, **own)


def _request_pipelines(names: list[str]) -> None:
    """Tell Kedro 1.5 and newer to load these pipelines only; none: all."""
    if hasattr(pipelines, "set_requested"):
        pipelines.set_requested(names or None)


def _create_session(env: str, conf_source: str, runtime_params: Options) -> Any:
    """Make a session as `kedro run` does."""
    # Since Kedro 1.3 the class is a setting, and those of another kind take the runtime
    # parameters later.
    session_class: Any = getattr(settings, "SESSION_CLASS", KedroSession)
    arguments: Options = {"conf_source": conf_source} if conf_source else {}
    if issubclass(session_class, KedroSession):
        arguments["runtime_params" if _KEDRO_1 else "extra_params"] = runtime_params
    return session_class.create(project_path=PROJECT_PATH, env=env, **arguments)


def _call_with_params(method: Any, options: Options) -> Any:
    """Call a method of a session, which may be of the kind that takes the parameters only now."""
    takes_them = "runtime_params" in inspect.signature(method).parameters
    return method(**{"runtime_params": options["runtime_params"]} if takes_them else {})


def _load_catalog(session: Any, context: Any, options: Options) -> Any:
    """Make the catalog as `kedro run` does."""
    if names := _pipeline_names(options):  # whose parameters Kedro 1.7 checks
        context._pipelines_to_validate = names
    arguments = {"catalog_class": settings.DATA_CATALOG_CLASS} if _KEDRO_1 else {}
    arguments |= {"save_version": session.session_id, "load_versions": options["load_versions"]}
    return context._get_catalog(**arguments)


def _copy_catalog(catalog: Any) -> Any:
    """Copy a catalog: asking the copy for a dataset makes none in the catalog itself."""
    copied = copy(catalog)
    dicts = {name: copy(each) for name, each in vars(catalog).items() if isinstance(each, dict)}
    vars(copied).update(dicts)
    return copied


def _run_session(session: Any, runner: SequentialRunner, options: Options) -> None:
    """Pass on what `kedro run` passes on, for hooks get to see it."""
    accepted = inspect.signature(session.run).parameters
    names = _pipeline_names(options)
    arguments = options | {
        "tags": tuple(options["tags"]),
        "node_names": tuple(options["node_names"]),
        "namespace": next(iter(options["namespaces"]), None),
        "pipeline_names": names,  # Kedro 1.2
        "pipeline_name": None if "pipeline_names" in accepted else next(iter(names), None),
    }
    session.run(runner=runner, **{name: arguments[name] for name in accepted & arguments.keys()})


def _get_dataset(catalog: Any, name: str) -> Any | None:
    """Return the dataset of a catalog entry or pattern; None: the runner keeps it in memory."""
    if _KEDRO_1:  # catalog.get returns None for what the catalog does not have
        return catalog.get(name)
    # Kedro 0.18.12 brought patterns, and `in` to ask for them.
    known = catalog if hasattr(catalog, "__contains__") else catalog._data_sets
    return catalog._get_dataset(name) if name in known else None


def _set_dataset(catalog: Any, name: str, dataset: Any) -> None:
    catalog._datasets.pop(name, None)  # or Kedro warns
    (catalog.__setitem__ if _KEDRO_1 else catalog.add)(name, dataset)


def _is_in_memory(dataset: Any | None) -> bool:
    old = type(dataset).__name__ in ("MemoryDataSet", "MemoryDataset")  # 0.18 had no mark for it
    return dataset is None or bool(getattr(dataset, "_EPHEMERAL", old))


# Kedro 0.18.12 renamed them.
_Dataset: Any = vars(kedro_io).get("AbstractDataset", vars(kedro_io).get("AbstractDataSet"))
_CachedDataset: Any = vars(kedro_io).get("CachedDataset", vars(kedro_io).get("CachedDataSet"))
_actions: Any = importlib.import_module("prefect.client.schemas.actions")
_make_schedule: Any = getattr(_actions, "DeploymentScheduleCreate", SimpleNamespace)
_SEVERAL_SCHEDULES = _make_schedule is not SimpleNamespace  # since Prefect 2.16
# Prefect 2.19 renamed them.
_NEW_JOB_VARIABLES = (
    "job_variables" in inspect.signature(PrefectClient.create_deployment).parameters
)


def _schedules(deployment: Any) -> list[Any]:
    """Return the schedules of a deployment on the server, where there is one."""
    if not _SEVERAL_SCHEDULES and getattr(deployment, "schedule", None):
        return [SimpleNamespace(schedule=deployment.schedule, active=deployment.is_schedule_active)]
    names = ("schedule", "active", "parameters", "slug")  # Prefect 3 brought the last two
    return [
        _make_schedule(**{name: getattr(found, name) for name in names if hasattr(found, name)})
        for found in getattr(deployment, "schedules", ())
    ]


if _PREFECT_3:
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.client.schemas.objects import TaskRunResult
    from prefect.futures import PrefectConcurrentFuture
    from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS
    from prefect.task_engine import run_task
    from prefect.task_runners import ThreadPoolTaskRunner

    _AGENT_POOL_TYPE, _SUGGESTED_POOL_TYPE = "", "process"
    _ONLY_PREFECT_3: tuple[str, ...] = ()

    _CALLED_IN_THREADS = False  # a task that is called runs in the thread that calls it

    @contextmanager
    def _task_runner(max_workers: int) -> Iterator[Callable[[Any, list[Any]], Any]]:
        """Yield a function that starts a task, given futures or runs, ended, of what it needs.

        One worker is this thread: the function returns when the task has ended.
        """
        runner: ThreadPoolTaskRunner[None] = ThreadPoolTaskRunner(max_workers=max_workers)

        def submit(task: Any, needed: list[Any]) -> Any:
            if not needed:
                return start(task, parameters={})
            # For each future to wait for, Prefect fetches a result through another thread, in a
            # millisecond. One that failed is enough, and edges can be drawn without.
            failed: list[Any] = [future for future in needed if not future.state.is_completed()]
            ids = (getattr(other, "task_run_id", None) or other.id for other in needed)
            edges: set[Any] = {TaskRunResult(id=other) for other in ids}
            behind: Any = {"wait_for": edges}
            return start(task, parameters={}, wait_for=failed[:1] or [None], dependencies=behind)

        def call(task: Any, **arguments: Any) -> Any:
            state: Any = run_task(task, return_type="state", **arguments)
            done: Future[Any] = Future()
            done.set_result(state)
            return PrefectConcurrentFuture(state.state_details.task_run_id, done)

        start: Any = runner.submit if max_workers > 1 else call
        with runner if max_workers > 1 else nullcontext():
            yield submit

    def _call_when_done(future: Any, callback: Callable[[], None]) -> None:
        future.add_done_callback(lambda _: callback())

    def _final_state(future: Any) -> Any:
        future.wait()
        return future.state

    @contextmanager
    def _embedded_server() -> Iterator[Any]:
        """Start the server that Prefect needs where none is set, and yield its process."""
        from prefect.server.api.server import SubprocessASGIServer

        server = SubprocessASGIServer()
        block = getattr(signal, "pthread_sigmask", lambda *_: None)  # Windows has none
        # It makes its database at its first start: 12 s on a fast machine. Prefect waits 20 s.
        patience = {PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 60}
        with temporary_settings(set_defaults=patience):
            # Ctrl-C reaches all processes of a terminal; this one has to record how the run ends.
            block(getattr(signal, "SIG_BLOCK", 0), {signal.SIGINT})  # which a child inherits
            try:
                server.start()
            finally:
                block(getattr(signal, "SIG_UNBLOCK", 0), {signal.SIGINT})
            yield server.server_process

    async def _save_deployment(flow: Any, wanted: Any, existing: Any, for_agent: bool) -> Any:
        """Create or update a deployment; what is not set stays as it is on the server."""
        del for_agent  # Prefect 3 has none
        schema = parameter_schema(flow).model_dump(exclude_unset=True)
        fields = wanted.fields() | {"parameter_openapi_schema": schema}
        triggers = fields.pop("triggers")
        async with get_client() as client:
            if existing:
                if wanted.schedules:
                    fields["schedules"] = [s.model_dump(mode="json") for s in wanted.schedules]
                deployment_id = existing.id
                await client.update_deployment(deployment_id, DeploymentUpdate(**fields))
            else:
                flow_id = await client.create_flow_from_name(flow.name)
                deployment_id = await client.create_deployment(flow_id, wanted.name, **fields)
            await client.delete_resource_owned_automations(f"prefect.deployment.{deployment_id}")
            for trigger in triggers:
                trigger.set_deployment_id(deployment_id)
                await client.create_automation(trigger.as_automation())
        return deployment_id

else:
    from prefect.client.schemas.objects import TaskRun

    # Agents gave way to workers in Prefect 2.16.4.
    _AGENT_POOL_TYPE = "prefect-agent"
    _SUGGESTED_POOL_TYPE = "process" if _PREFECT >= (2, 16, 4) else _AGENT_POOL_TYPE
    _ONLY_PREFECT_3 = ("concurrency_limit", "triggers", "schedules.parameters", "schedules.slug")
    _embedded_server = nullcontext  # type: ignore[assignment]  # it is no process of its own

    _CALLED_IN_THREADS = True  # as submitted ones do

    @contextmanager
    def _task_runner(max_workers: int) -> Iterator[Callable[[Any, list[Any]], Any]]:
        del max_workers  # nobody but PrefectRunner limits how many tasks are submitted
        yield lambda task, needed: task.submit(
            wait_for=[other.state if isinstance(other, TaskRun) else other for other in needed]
        )

    def _call_when_done(future: Any, callback: Callable[[], None]) -> None:
        # Futures have no callbacks before Prefect 3: a thread waits for each of the few in flight.
        def wait_and_call() -> None:
            future.wait()
            callback()

        threading.Thread(target=wait_and_call, daemon=True).start()

    def _final_state(future: Any) -> Any:
        return future.wait()

    async def _save_deployment(flow: Any, wanted: Any, existing: Any, for_agent: bool) -> Any:
        """Create or replace a deployment; what is not set is sent as it is on the server."""
        kept = ("version", "tags", "description", "paused", "enforce_parameter_schema")
        fields = {name: getattr(existing, name) for name in kept if hasattr(existing, name)}
        fields |= wanted.fields() | {"parameter_openapi_schema": parameter_schema(flow).dict()}
        del fields["triggers"]
        fields["schedules"] = wanted.schedules or _schedules(existing)
        if for_agent:  # for which job variables hold in infrastructure blocks only
            from prefect.infrastructure import Process

            fields["infrastructure_document_id"] = await Process()._save(is_anonymous=True)
        if not _NEW_JOB_VARIABLES:
            fields["infra_overrides"] = fields.pop("job_variables")
        if not _SEVERAL_SCHEDULES:
            one = next(iter(fields.pop("schedules")), SimpleNamespace(schedule=None, active=True))
            fields["schedule"] = one.schedule
            fields["is_schedule_active"] = not fields.pop("paused", not one.active)
        async with get_client() as client:
            flow_id = await client.create_flow_from_name(flow.name)
            return await client.create_deployment(flow_id, wanted.name, **fields)


def _job_variables(deployment: Any) -> Options:
    """Return the job variables of a deployment on the server."""
    return getattr(deployment, "job_variables", getattr(deployment, "infra_overrides", None)) or {}


def _threads_that_prefect_is_set_to() -> int | None:
    # Prefect 2 lacks this setting.
    setting = getattr(prefect.settings, "PREFECT_TASKS_RUNNER_THREAD_POOL_MAX_WORKERS", None)
    return cast("int | None", setting.value()) if setting is not None else None


# ---- Errors: what a user can mend is one message without a traceback ----


def _need(package: Any, version: str, what: str) -> None:
    """Refuse what came with a later version of Kedro or Prefect than this."""
    if _version(package.__version__) < _version(version):
        name = package.__name__.capitalize()
        raise click.ClickException(
            f"{what} needs {name} {version} or newer, and this is {name} {package.__version__}:"
            f" leave it out, or pip install '{package.__name__}>={version}'"
        )


def _need_both(what: str) -> None:
    """Refuse engines and checkpoints where they have not been tried."""
    _need(kedro, "0.19", what)
    _need(prefect, "3.2", what)


def _close_matches(name: str, names: Iterable[str], kind: str) -> str:
    """Name those that are spelled like the one asked for, and those there are."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{hint} The {kind} are: {', '.join(names[:NAMES_SHOWN]) or 'none'}{more}."


def _import(name: str, package: str, what: str) -> Any:
    """Import what is needed by those only who use it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        problem = f"prefect.yml: {what} needs {package}, which is not installed where the flow runs"
        raise click.ClickException(f'{problem}: pip install "{package}"') from error


@contextmanager
def _project_errors(doing: str) -> Iterator[None]:
    """Say in one line what the project's own code or configuration raised, and where."""
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:
        frames = [(Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        where = [
            f"\n  at {path}, line {line}"
            for path, line in frames
            if path.is_relative_to(PROJECT_PATH)
            and not path.is_relative_to(sys.prefix)  # which may lie in the project
            and path != THIS_FILE
        ]
        message = f"{doing} failed.\n  {type(error).__name__}: {error}{''.join(where[-1:])}"
        raise click.ClickException(message) from error


@contextmanager
def _server_errors(problem: str, remedy: str = "") -> Iterator[None]:
    """Say in one line why the Prefect server did not do what it was asked for."""
    import httpx  # by which Prefect's client speaks

    try:
        yield
    except httpx.HTTPStatusError as error:
        reason = f"the server answered {error.response.status_code} {error.response.reason_phrase}"
        if error.response.status_code in (401, 403):
            remedy = " Set PREFECT_API_AUTH_STRING (or PREFECT_API_KEY) to what it expects."
        text = f"{problem}: {reason}. {error.response.text[:1000]}{remedy}"
        raise click.ClickException(text) from error
    except (httpx.HTTPError, OSError, asyncio.TimeoutError) as error:
        reason = str(error) or f"no answer within {SERVER_TIMEOUT} s"
        raise click.ClickException(f"{problem}: {reason}. {remedy}") from error


def _without_credentials(text: str) -> str:
    """Hide what stands before the @ of a URL: it may be a token."""
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", text)


@functools.cache
def _trusted(certificates: str) -> Any:
    import ssl

    return ssl.create_default_context(cafile=certificates)


def _client() -> Any:
    """Return a client of Prefect's API; each of its own would read all certificates, in 50 ms."""
    setting = getattr(prefect.settings, "PREFECT_API_SSL_CERT_FILE", None)  # not in 2.10
    if setting is None or prefect.settings.PREFECT_API_TLS_INSECURE_SKIP_VERIFY.value():
        return get_client()
    import certifi  # which Prefect takes as well

    return get_client(httpx_settings={"verify": _trusted(setting.value() or certifi.where())})


def _call_api(coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
    """Run a call of Prefect's client, whether or not the caller has an event loop."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        call = asyncio.wait_for(coroutine, timeout)
        return thread.submit(contextvars.copy_context().run, asyncio.run, call).result()


def _start_beside(function: Callable[[], None]) -> threading.Thread:
    """Start a thread that belongs to the flow run and the task run of this one."""
    thread = threading.Thread(target=contextvars.copy_context().run, args=(function,))
    thread.start()
    return thread


# ---- Project: environment, pipeline, catalog ----


def _print_plain_lines() -> None:
    """Print log lines as Prefect does, where Kedro's Rich handler would draw them into a file.

    Drawing takes a millisecond a line: in a worker, longer than all that Prefect does for a task.
    """
    logger = logging.getLogger()
    for index, handler in enumerate(logger.handlers):
        if isinstance(handler, RichHandler) and not handler.console.is_terminal:
            if hasattr(handler.console.file, "reconfigure"):  # so that any text can be written
                handler.console.file.reconfigure(errors="backslashreplace")
            plain = logging.StreamHandler(handler.console.file)
            plain.setLevel(handler.level)
            formats = load_logging_config(DEFAULT_LOGGING_SETTINGS_PATH)["formatters"]["standard"]
            plain.setFormatter(PrefectFormatter(**{k: v for k, v in formats.items() if k != "()"}))
            logger.handlers[index] = plain


@functools.cache  # a second time would load all pipelines again
def _bootstrap(project_path: Path) -> ProjectMetadata:
    metadata = bootstrap_project(project_path)
    _print_plain_lines()
    return metadata


def _flow_name() -> str:
    """Name the flow after the project's package: on one server, projects must not share a flow."""
    try:
        return _get_project_metadata(PROJECT_PATH).package_name
    except (RuntimeError, ValueError):  # not in a Kedro project: prefect_deploy says so
        return "my_flow"


def _check_telemetry() -> None:
    """Refuse a run that would stop to ask for consent where nobody can answer."""
    name = "kedro-telemetry"
    decided = (PROJECT_PATH / ".telemetry").exists() or name in settings.DISABLE_HOOKS_FOR_PLUGINS
    opted_out = os.environ.get("DO_NOT_TRACK") or os.environ.get("KEDRO_DISABLE_TELEMETRY")
    remedy = "decide in a file: cp .telemetry.example .telemetry (or: echo 'consent: false')"
    with suppress(importlib.metadata.PackageNotFoundError):
        # Older ones ask, and know no variable to opt out.
        if _version(importlib.metadata.version(name)) < (0, 6) and not decided:
            problem = f"{name} would stop every flow run to ask for consent"
            raise click.ClickException(f"{problem}: {remedy}")
        if not (decided or opted_out):
            click.echo(f"Warning: {name} will send usage data from flow runs; {remedy}")


def _locate_conf(options: Options) -> str:
    """Return the folder, archive or URL of the configuration; a path is relative to the project."""
    conf: str = options["conf_source"] or settings.CONF_SOURCE
    return conf if "://" in conf else str(PROJECT_PATH / conf)


def _environment(options: Options) -> str:
    """Return the environment; `base` is the project's base environment, whatever its name is."""
    env: str = options["env"]
    if env == "base" and not Path(_locate_conf(options), env).is_dir():
        return str(settings.CONFIG_LOADER_ARGS.get("base_env", env))
    return env


def _list_environments(conf: Path) -> list[str]:
    found = conf.iterdir() if conf.is_dir() else ()
    return sorted(path.name for path in found if path.is_dir() and path.name[0] != ".")


def _check_environment(options: Options) -> None:
    conf, env = Path(_locate_conf(options)), _environment(options)
    if options["conf_source"] and "://" not in str(options["conf_source"]) and not conf.exists():
        raise click.ClickException(f"There is no configuration at {conf}: give another conf_source")
    # A project's own config loader may keep environments elsewhere than in folders.
    keeps_folders = settings.CONFIG_LOADER_CLASS.__base__ is not AbstractConfigLoader or (
        settings.CONFIG_LOADER_CLASS.__module__.startswith("kedro.")
    )
    if keeps_folders and conf.is_dir() and not (conf / env).is_dir():
        raise click.ClickException(
            f"Environment '{env}' has no folder {conf / env}."
            + _close_matches(env, _list_environments(conf), "environments")
        )


def _open_session(options: Options) -> Any:
    """Make the Kedro session of a run; it loads nothing yet."""
    conf_source = options["conf_source"] and _locate_conf(options)
    with _project_errors("Making a Kedro session"):
        return _create_session(_environment(options), conf_source, options["runtime_params"])


def _adopt_session_id(session: Any, session_id: str) -> None:
    session.session_id = session_id
    if hasattr(session, "_store"):
        session._store["session_id"] = session_id


def _read_credentials(session: Any, options: Options, name: str) -> Options:
    """Return an entry of credentials.yml."""
    if not name:
        return {}
    try:
        found = _call_with_params(session._get_config_loader, options)["credentials"]
    except MissingConfigException:
        found = {}
    if name not in found:
        problem = f"There are no credentials '{name}' in environment '{options['env']}'."
        raise click.ClickException(problem + _close_matches(name, found, "credentials"))
    return cast("Options", found[name])


class _Opened(NamedTuple):
    """A project that is opened for a run, up to the catalog."""

    session: Any
    context: Any
    pipeline: Pipeline


_opened: list[_Opened] = []  # by --run, for the flow: Prefect hands on no objects


def _open(options: Options, names: Iterable[str] = ()) -> _Opened:
    """Make session, context and pipelines, in Kedro's order; of the pipelines those with names.

    What a hook reads from the context may shape the pipelines: those of a run before do not do.
    """
    package = _bootstrap(PROJECT_PATH).package_name
    _check_environment(options)
    pipelines.configure(f"{package}.pipeline_registry")
    _request_pipelines(list(names))
    session = _open_session(options)
    with _project_errors(f"Loading environment '{options['env']}'"):
        context = _call_with_params(session.load_context, options)
    return _Opened(session, context, _load_pipeline(options))


def _load_whole_pipeline(options: Options) -> Pipeline:
    """Return all nodes of the pipelines that a run names."""
    names = _pipeline_names(options) or ["__default__"]
    with _project_errors("Loading the pipelines (pipeline_registry.py)"):
        found: Any = {name: pipelines.get(name) for name in names}
        if None in found.values():
            _request_pipelines([])
            registered = list(pipelines)
    for name, pipeline in found.items():
        if pipeline is None:
            raise click.ClickException(
                f"There is no pipeline '{name}'." + _close_matches(name, registered, "pipelines")
            )
        if not pipeline.nodes:
            raise click.ClickException(f"Pipeline '{name}' is empty: it has no node to run.")
    return sum(found.values(), Pipeline([]))


class _Group(Node):
    """Nodes that one task runs, one after the other, as a node that Kedro's pipelines take."""

    def __init__(self, name: str, members: list[Node]) -> None:
        part = Pipeline(members)
        inputs, outputs = sorted(part.inputs()), sorted(part.all_outputs())
        tags = set(chain.from_iterable(node.tags for node in members))
        super().__init__(lambda *_: None, inputs, outputs, name=name, tags=tags)
        self.members = members


def _members(node: Node) -> list[Node]:
    return node.members if isinstance(node, _Group) else [node]


def _group(pipeline: Pipeline, group_by: str | None) -> Pipeline:
    """Put all nodes of a top-level namespace into one."""
    if group_by is None:
        return pipeline
    nodes = {node.name: node for node in pipeline.nodes}
    groups = [
        _Group(found.name, [nodes[name] for name in found.nodes])
        if found.type == "namespace"
        else nodes[found.name]
        for found in pipeline.group_nodes_by(group_by)
    ]
    try:
        return Pipeline(groups)
    except CircularDependencyError as error:
        cycle = cast("CycleError", error.__cause__).args[1]
        names = " -> ".join(node.name for node in cycle)
        raise click.ClickException(
            f"prefect.yml: task_runner.group_by {group_by}: the groups need each other, {names}."
            " Leave it out, or put these nodes into one namespace."
        ) from error


def _is_parameter(name: str) -> bool:
    return name == "parameters" or name.startswith("params:")


def _plain_name(dataset: str) -> str:
    """Return a dataset's name without the transcoding."""
    return dataset.partition("@")[0]


def _namespaces(node: Node) -> set[str]:
    """Return the namespaces that a node is in: for a.b, that is a and a.b."""
    parts = (node.namespace or "").split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)} - {""}


def _explain_filters(pipeline: Pipeline, options: Options) -> Iterator[str]:
    """Find the values of filters that are not in the pipeline, and what they may have meant."""
    names = {node.name for node in pipeline.nodes}
    datasets = pipeline.all_inputs() | pipeline.all_outputs()
    tags = set(chain.from_iterable(node.tags for node in pipeline.nodes))
    namespaces = set(chain.from_iterable(map(_namespaces, pipeline.nodes)))
    known = [tags, names, names, names, datasets, datasets, namespaces]
    for kind, there in zip(FILTERS, known, strict=True):
        for value in sorted(set(options[kind]) - there):
            yield f"\n  {kind}: '{value}'." + _close_matches(value, there, kind)


def _check_supported(options: Options) -> None:
    if options["checkpoints"]:
        _need_both("checkpoints")
    if options["only_missing_outputs"]:
        _need(kedro, "1.0", "only_missing_outputs")
    if len(options["namespaces"]) > 1:
        _need(kedro, "1.0", "More than one of namespaces")
    if len(_pipeline_names(options)) > 1:
        _need(kedro, "1.2", "More than one pipeline at once")


def _load_pipeline(options: Options) -> Pipeline:
    """Return the nodes that a run asks for; refuse options that cannot be right."""
    _check_supported(options)
    pipeline = _load_whole_pipeline(options)
    try:
        return _filter_pipeline(pipeline, options)
    except ValueError as error:
        raise click.ClickException(
            f"Filtering pipeline '{options['pipeline_name']}': {error}"
            + "".join(_explain_filters(pipeline, options))
        ) from error


def _read_entries(env: str, options: Options) -> set[str]:
    """Name the datasets and credentials that an environment has; what cannot be read has none."""
    names: set[str] = set()
    with suppress(Exception):
        session = _open_session(options | {"env": env})
        loader = _call_with_params(session._get_config_loader, options)
        for section in ("catalog", "credentials"):
            with suppress(Exception):
                names |= set(loader[section])
    return names


def _remedies(message: str, options: Options) -> Iterator[str]:
    """Find what a message says is missing: behind a filter, or in what only `kedro run` reads."""
    words = {word.strip(".:") for word in re.findall(r"[^\s'\"{},()]+", message)}
    whole = _load_whole_pipeline(options)
    unfiltered: Options = {kind: [] for kind in FILTERS}
    inputs = words & _filter_pipeline(whole, options).inputs()
    if "pipeline input" not in message.lower():  # as Kedro says of what is missing, and we do
        inputs = set()
    if inputs:
        conf = f"{options['conf_source'] or settings.CONF_SOURCE}/"
        yield f" Add it to {conf}base or {conf}{_environment(options)}, or run what makes it."
    for node in whole.nodes:
        if made := ", ".join(sorted(inputs.intersection(node.outputs))):
            alone = {kind: {**options, **unfiltered, kind: options[kind]} for kind in FILTERS}
            by = [k for k in FILTERS if node not in _filter_pipeline(whole, alone[k]).nodes]
            yield f" Node '{node.name}' makes {made}, and {' and '.join(by)} leaves it out."
    env, local = options["env"], settings.CONFIG_LOADER_ARGS.get("default_run_env", "local")
    if found := words & _read_entries(local, options) - _read_entries(env, options):
        has = f"Environment {local}, which `kedro run` reads, has {', '.join(sorted(found))}"
        yield f" {has}: use --env {local}."


def _inner(dataset: Any) -> Any:
    """Return what a cache is of."""
    return dataset._dataset if isinstance(dataset, _CachedDataset) else dataset


def _pin_versions(catalog: Any, pipeline: Pipeline, session_id: str) -> None:
    """Load what nodes save in a session, even if another run has saved since."""
    made = set(map(_plain_name, pipeline.all_outputs()))
    for name in pipeline.all_inputs() | pipeline.all_outputs():
        dataset: Any = _inner(_get_dataset(catalog, name)) if _plain_name(name) in made else None
        if version := getattr(dataset, "_version", None):
            dataset._version = type(version)(version.load or session_id, session_id)


def _load_datasets(opened: _Opened, options: Options) -> dict[str, Any | None]:
    """Make every dataset of the pipeline, as a run would; None stands for memory."""
    session, context, pipeline = opened
    with _project_errors(f"Loading catalog and parameters of environment '{options['env']}'"):
        catalog = _load_catalog(session, context, options)
        names = sorted(pipeline.all_inputs() | pipeline.all_outputs())
        datasets = {name: _get_dataset(catalog, name) for name in names}
        missing = [name for name in pipeline.inputs() if datasets[name] is None]
        if missing := sorted(name for name in missing if not _is_parameter(name)):
            problem = "No catalog entry, pattern or parameter provides pipeline input"
            raise click.ClickException(f"{problem} {', '.join(missing)}.")
    return datasets


def _open_with_datasets(
    options: Options, needed: tuple[str, ...] = ()
) -> tuple[_Opened, dict[str, Any | None], list[str]]:
    """Open the project and make its datasets; name the parameters that each run has to bring.

    Those of runtime_params have a stand-in here, so that all else is checked.
    """
    params = dict(options["runtime_params"])
    for name in needed:
        *above, last = name.split(".")
        inner = functools.reduce(lambda found, part: found.setdefault(part, {}), above, params)
        inner[last] = name
    opened = None
    try:
        opened = _open(options | {"runtime_params": params})
        datasets = _load_datasets(opened, options)
    except click.ClickException as error:
        found = re.search(r"Runtime parameter '([^']+)' not found", error.message)
        if found and found[1] not in needed:
            return _open_with_datasets(options, (*needed, found[1]))
        remedies = _remedies(error.message, options) if opened else ()
        raise click.ClickException(error.message + "".join(remedies)) from error
    missing = [name for name in opened.pipeline.inputs() if datasets[name] is None]
    return opened, datasets, [*needed, *(name.removeprefix("params:") for name in missing)]


# ---- conf/<env>/prefect.yml ----

_TASK_RUNNERS = ("threads", "processes", "dask", "ray")
_NUMBER, _POSITIVE = (int, float), range(1, sys.maxsize)
_PARAMETERS: Options = {
    "pipeline_name": str, "env": str, "runtime_params": dict, **dict.fromkeys(FILTERS, list),
    "load_versions": dict, "only_missing_outputs": bool, "conf_source": str, "checkpoints": str,
}  # fmt: skip
_DEPLOYMENT: Options = {  # the keys of Prefect's prefect.yaml; `path` and `source` are ours
    "name": str, "version": (str, *_NUMBER), "tags": list, "description": str, "paused": bool,
    "parameters": _PARAMETERS, "enforce_parameter_schema": bool, "triggers": [dict],
    "schedules": [{
        "cron": str, "interval": _NUMBER, "rrule": str, "timezone": str, "anchor_date": object,
        "day_or": bool, "active": bool, "parameters": _PARAMETERS, "slug": str,
    }],
    "concurrency_limit": (_POSITIVE, {
        "limit": _POSITIVE, "collision_strategy": str, "grace_period_seconds": int,
    }),
    "work_pool": {
        "name": str, "work_queue_name": str, "job_variables": {"env": dict, str: object},
    },
    "path": str, "source": (str, dict),
}  # fmt: skip
_SHAPE: Options = {
    "deployment": _DEPLOYMENT, "deployments": [_DEPLOYMENT],
    "flow": {"retries": int, "retry_delay_seconds": _NUMBER},
    "task_runner": {
        "type": str, "max_workers": _POSITIVE, "is_async": bool, "resume": bool, "group_by": str,
    },
    "checkpoints": (str, {"url": str, "credentials": str}), "artifacts": bool,
    "tasks": {str: {
        "retries": int, "retry_delay_seconds": (*_NUMBER, list), "retry_jitter_factor": _NUMBER,
        "timeout_seconds": _NUMBER, "tags": list, "log_prints": bool, "description": str,
        "version": str, "resources": dict,
    }},
}  # fmt: skip


class _Deployment(NamedTuple):
    """What is registered; what is None stays as it is on the server."""

    name: str
    parameters: Options
    pull_steps: list[Options]
    job_variables: Options
    schedules: list[Any] | None
    triggers: list[Any]
    work_pool_name: str | None
    work_queue_name: str | None
    version: str | None = None
    tags: list[str] | None = None
    description: str | None = None
    paused: bool | None = None
    concurrency_limit: int | None = None
    concurrency_options: Options | None = None
    enforce_parameter_schema: bool | None = None
    entrypoint: str = ENTRYPOINT

    def fields(self) -> Options:
        """Return what is set, without the name."""
        return {k: v for k, v in self._asdict().items() if v is not None and k != "name"}


class _Config(NamedTuple):
    """What prefect.yml says; its deployments are checked when one is registered."""

    deployment: Any  # of all deployments
    deployments: Any  # each with a name
    flow: Options
    task_runner: Options
    tasks: dict[str, Options]
    checkpoints: Any = None  # URL, or URL and credentials
    artifacts: bool = True


def _check(where: str, found: Any, shape: Any) -> None:
    """Refuse keys of prefect.yml that are not there, and other values than there may be."""
    shapes = shape if isinstance(shape, tuple) else (shape,)
    types = [each if isinstance(each, type) else type(each) for each in shapes]
    if re.sub(r"^deployments?(\[\d+\])?\.|\[\d+\]", "", where) in _ONLY_PREFECT_3:
        _need(prefect, "3.2", f"prefect.yml: {where}")
    if range in types and type(found) is int and found not in shapes[0]:
        raise click.ClickException(f"prefect.yml: {where} is {found}, and has to be 1 or more.")
    kinds: list[Any] = [int if kind is range else kind for kind in types]
    other_bool = isinstance(found, bool) and not {bool, object} & {*kinds}
    if other_bool or not isinstance(found, tuple(kinds)):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise click.ClickException(
            f"prefect.yml: {where} is {found!r}, and has to be of type {names}."
        )
    inside = cast("Any", found)  # whose type is known now to be one of the shape's
    inner: Any = next((each for each in shapes if isinstance(each, type(found))), None)
    if isinstance(inner, list):
        for number, item in enumerate(inside):
            _check(f"{where}[{number}]", item, inner[0])
    if isinstance(inner, dict):
        for key, item in inside.items():
            path = f"{where}.{key}".lstrip(".")
            if key not in inner and str not in inner:
                taken = key in ("entrypoint", "build", "push", "pull")
                hint = " This file sets it." * taken + _close_matches(key, inner, "keys")
                raise click.ClickException(f"prefect.yml has no {path}.{hint}")
            _check(path, item, inner.get(key, inner.get(str)))


def _merge(*layers: Options) -> Options:
    """Lay mappings over each other, at all depths; later ones win."""
    merged: Options = {}
    for name, value in chain.from_iterable(layer.items() for layer in layers):
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _read(where: str, make: Callable[..., Any], fields: Options) -> Any:
    """Let Prefect read a part of prefect.yml, and say which part it is that it refuses."""
    with _project_errors(f"Reading {where} in prefect.yml"):
        return make(**fields)


def _read_config(session: Any, options: Options) -> _Config:
    """Read prefect.yml with the project's own config loader, and check what a run needs of it."""
    with _project_errors("Loading prefect.yml"):
        loader = _call_with_params(session._get_config_loader, options)
        if hasattr(loader, "config_patterns"):
            loader.config_patterns.setdefault("prefect", ["prefect.*"])
        try:
            found = {name: value for name, value in loader["prefect"].items() if value is not None}
        except (MissingConfigException, KeyError):
            found = {}
    shape = _SHAPE | {"deployment": object, "deployments": object}
    section = found.get("task_runner")
    kind = section.get("type", "threads") if isinstance(section, dict) else "threads"
    if kind in ("dask", "ray"):  # which check what else there is
        shape["task_runner"] = _SHAPE["task_runner"] | {str: object}
    _check("", found, shape)
    empty: Options = {name: {} for name in _Config._fields}
    empty |= {"deployments": [], **_Config._field_defaults}
    config = _Config(**empty | found)
    if kind not in _TASK_RUNNERS:
        problem = f"prefect.yml: task_runner.type is '{kind}'."
        raise click.ClickException(problem + _close_matches(kind, _TASK_RUNNERS, "types"))
    if group_by := config.task_runner.get("group_by"):
        _need(kedro, "1.0", "prefect.yml: task_runner.group_by")
        if group_by != "namespace":
            problem = f"prefect.yml: task_runner.group_by is '{group_by}'"
            raise click.ClickException(f"{problem}, and there is no other than namespace.")
    if kind != "threads" or config.checkpoints:
        what = f"prefect.yml: {'checkpoints' if config.checkpoints else f'task_runner.type {kind}'}"
        _need_both(what)
    for name, task_options in config.tasks.items():
        if "resources" in task_options and kind not in ("dask", "ray"):
            problem = f"prefect.yml: tasks.{name}.resources are for Dask and Ray"
            raise click.ClickException(f"{problem}, and task_runner.type is '{kind}'.")
        of_task = {key: value for key, value in task_options.items() if key != "resources"}
        _read(f"tasks.{name}", Task, {"fn": lambda: None, **of_task})
    return config


def _check_name(name: Any) -> None:
    if not name or re.search(r"[/%&<>]", name):
        raise click.ClickException(
            f"Deployment name '{name}' is refused by Prefect: it must not be empty, and must not"
            " contain / % & < or >. Choose another --deployment_name."
        )


def _deployment_sections(config: _Config) -> dict[str, Options]:
    """Return what prefect.yml says of each deployment that it names."""
    _check("deployment", config.deployment, _DEPLOYMENT)
    _check("deployments", config.deployments, [_DEPLOYMENT])
    sections: dict[str, Options] = {}
    for number, section in enumerate(config.deployments):
        name = section.get("name")
        _check_name(name)
        if name in sections:
            raise click.ClickException(f"prefect.yml: deployments[{number}] is a second '{name}'.")
        sections[name] = _merge(config.deployment, section)
    return sections


def _read_schedule(number: int, section: Options) -> tuple[Any, set[str], Options]:
    """Make a schedule; return it with the names of what is set of it, and what stands beside it."""
    where = f"deployment.schedules[{number}]"
    classes = {"cron": CronSchedule, "interval": IntervalSchedule, "rrule": RRuleSchedule}
    kinds = [kind for kind in classes if kind in section]
    if len(kinds) != 1:
        raise click.ClickException(
            f"prefect.yml: {where} has {' and '.join(kinds) or 'none'}, and not one of cron,"
            " interval and rrule."
        )
    timing = {kinds[0], "timezone", "anchor_date", "day_or"} & section.keys()
    schedule = _read(where, classes[kinds[0]], {name: section[name] for name in timing})
    others = {name: section[name] for name in section.keys() - timing}
    return schedule, timing | {"timezone"}, others


def _read_trigger(name: str, number: int, section: Options) -> Any:
    from prefect.events import DeploymentTriggerTypes
    from pydantic import TypeAdapter

    def read(**fields: Any) -> Any:
        return TypeAdapter[Any](DeploymentTriggerTypes).validate_python(fields)

    fields = {"name": f"{name}__automation_{number + 1}", **section}
    return _read(f"deployment.triggers[{number}]", read, fields)


def _read_place(section: Options) -> Options:
    """Return the pull step that takes a run to the project: into a folder, or a git clone."""
    source: Any = section.get("source")
    if source is None:
        directory = section.get("path", str(PROJECT_PATH))
        return {"prefect.deployments.steps.set_working_directory": {"directory": directory}}
    from prefect.deployments.steps.pull import git_clone

    text, problem = _without_credentials(str(source)), ""
    if isinstance(source, str):  # as pip writes it
        found = re.fullmatch(r"git\+(?P<repository>\w+://[^/]*/[^@]+)(?:@(?P<branch>.+))?", source)
        source = {k: v for k, v in found.groupdict().items() if v} if found else {}
    _check(
        "deployment.source", source, dict.fromkeys(inspect.signature(git_clone).parameters, object)
    )
    if "path" in section:
        problem = "stands beside path, and the project lies in one place only"
    elif "repository" not in source:
        problem = (
            f"is '{text}', and not git+URL@ref (a branch or tag, as in"
            " git+https://example.org/forecast.git@v1.4), or the arguments of Prefect's git_clone"
        )
    elif any("{{" not in str(source.get(name, "{{")) for name in ("access_token", "credentials")):
        problem = (
            "has a token that would lie on the server: put it into a block, and say access_token:"
            " '{{ prefect.blocks.secret.<its name> }}'"
        )
    if problem:
        raise click.ClickException(f"prefect.yml: deployment.source {problem}.")
    return {"prefect.deployments.steps.git_clone": source}


def _read_deployment(name: str, section: Options, given: Options, options: Options) -> _Deployment:
    """Lay the command line over a section of prefect.yml, and that over the defaults of options."""
    pool, limit = section.get("work_pool", {}), section.get("concurrency_limit", {})
    limit = dict(limit) if isinstance(limit, dict) else {"limit": limit}
    if limit:
        from prefect.client.schemas.objects import ConcurrencyLimitConfig

        _read("deployment.concurrency_limit", ConcurrencyLimitConfig, limit)
    schedules, triggers = section.get("schedules", []), section.get("triggers", [])
    if len(schedules) > 1 and not _SEVERAL_SCHEDULES:
        _need(prefect, "2.16", "prefect.yml: more than one of schedules")
    given_options = {option: options[option] for option in options if option in given}
    as_they_are: Any = ("tags", "description", "paused", "enforce_parameter_schema")
    return _Deployment(
        name=name,
        parameters=_merge(options, section.get("parameters", {}), given_options),
        pull_steps=[_read_place(section)],
        job_variables=pool.get("job_variables", {}),
        schedules=[_read_schedule(number, schedule) for number, schedule in enumerate(schedules)],
        triggers=[_read_trigger(name, number, trigger) for number, trigger in enumerate(triggers)],
        work_pool_name=given.get("work_pool_name", pool.get("name")),
        work_queue_name=given.get("work_queue_name", pool.get("work_queue_name")),
        version=given.get("version", section.get("version") and str(section["version"])),
        concurrency_limit=limit.pop("limit", None),
        concurrency_options=limit or None,
        **{field: cast("Any", section.get(field)) for field in as_they_are},
    )


def _task_names(node: Node) -> set[str]:
    """Return the names by which the tasks section may speak of a node."""
    tags = {f"tag:{tag}" for tag in node.tags}
    namespaces = chain.from_iterable(map(_namespaces, _members(node)))
    return {"default", node.name, *tags, *(f"namespace:{name}" for name in namespaces)}


def _task_options(node: Node, tasks: dict[str, Options]) -> Options:
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


# ---- Pictures and artifacts: what Prefect's UI shows of a pipeline ----

_COLOURS = {  # of boxes, by how it went; the first one of several shows
    "failed": "#b91c1c", "not run": "#6b7280", "resumed": "#1d4ed8", "completed": "#15803d",
    "": "#334155",
}  # fmt: skip


def _plain(text: str) -> str:
    """Write a text in Markdown so that nothing in it is markup, and it stays in its table cell."""
    # Backslashes, because the older UI decodes few entities.
    return re.sub(
        r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False)
    )


def _shorten(text: str) -> str:
    return f"{text[: NAME_DRAWN - 3]}..." if len(text) > NAME_DRAWN else text


def _state_of(node: Node, states: dict[str, str]) -> str:
    """Return how it went with a node; of a group, what most needs to be seen."""
    found = {states.get(name, "") for name in (node.name, *(m.name for m in _members(node)))}
    return next((state for state in _COLOURS if state in found), "failed")


def _draw(pipeline: Pipeline, states: dict[str, str]) -> str:
    """Draw a pipeline as SVG: layers from left to right, and what needs what."""
    layers, needed = pipeline.grouped_nodes, pipeline.node_dependencies
    height, left = 36 * max(map(len, layers), default=0), 4
    place: dict[Node, tuple[int, float]] = {}  # right and middle of its box
    boxes, lines = [], []
    for layer in layers:
        width = 7 * max(len(_shorten(node.name)) for node in layer) + 16
        heights = {node: [place[other][1] for other in needed[node]] for node in layer}
        # At the height of what they need: few lines cross.
        ordered = sorted(layer, key=lambda n: sum(heights[n]) / max(len(heights[n]), 1))
        for row, node in enumerate(ordered):
            y = 36 * row + 18 + (height - 36 * len(layer)) / 2
            place[node] = left + width, y
            boxes.append(
                f'<g><title>{html.escape(node.name)}</title><rect x="{left}" y="{y - 14:g}"'
                f' width="{width}" height="28" rx="5" fill="{_COLOURS[_state_of(node, states)]}"/>'
                f'<text x="{left + width / 2:g}" y="{y + 4.5:g}">'
                f"{html.escape(_shorten(node.name))}</text></g>"
            )
            for x, middle in (place[other] for other in needed[node]):
                lines.append(
                    f"M {x} {middle:g} C {x + 14} {middle:g} {left - 14} {y:g} {left} {y:g}"
                )
        left += width + 24
    size = f'width="{left - 20}" height="{height}" viewBox="0 0 {left - 20} {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13"'
        f' text-anchor="middle"><path d="{" ".join(lines)}" fill="none" stroke="#94a3b8"'
        f' stroke-width="1.5"/><g fill="#fff">{"".join(boxes)}</g></svg>'
    )


def _picture(pipeline: Pipeline, states: dict[str, str]) -> str:
    """Return the drawing in Markdown; of a large pipeline, that of its namespaces."""
    if len(pipeline.nodes) > NODES_DRAWN and any(node.namespace for node in pipeline.nodes):
        with suppress(AttributeError, click.ClickException):  # Kedro before 1.0; a cycle
            pipeline = _group(pipeline, "namespace")
    if len(pipeline.nodes) > NODES_DRAWN:
        return f"{len(pipeline.nodes)} nodes, which are too many to draw."
    drawn = base64.b64encode(_draw(pipeline, states).encode()).decode()
    return f"![the pipeline](data:image/svg+xml;base64,{drawn})"


def _artifact_key(name: str) -> str:
    """Return the key of an artifact of this project: it may hold a-z, 0-9 and hyphens only."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if slug != name or "-" in name or name in ("run", "progress"):  # so that no two are the same
        slug = f"{slug[:50]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".strip("-")
    return f"{_package_key()}-{slug}"


def _package_key() -> str:
    return re.sub(r"[^a-z0-9]+", "-", _flow_name().lower()).strip("-")


async def _create_artifact(kind: str, key: str, data: Any) -> Any:
    """Add an artifact to the flow run and the task run that go on here."""
    flow_run_id, task_run_id = runtime.flow_run.id, runtime.task_run.id
    ids = {"flow_run_id": flow_run_id, "task_run_id": task_run_id}
    async with _client() as client:
        return await client.create_artifact(
            _actions.ArtifactCreate(type=kind, key=key, data=data, **ids)
        )


async def _update_artifact(artifact_id: Any, data: Any) -> None:
    async with _client() as client:
        await client.update_artifact(artifact_id, _actions.ArtifactUpdate(data=data))


def _code(text: str, language: str = "") -> str:
    """Write a text as a block of code; none of it ends the block."""
    fence = "`" * (3 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _render(dataset: Any, arguments: Options) -> str:
    """Return a dataset's own preview as Markdown."""
    preview = getattr(dataset, "preview", None) or dataset._preview  # as kedro-datasets 1 calls it
    kind = str(getattr(inspect.signature(preview).return_annotation, "__name__", ""))
    kind = kind or str(inspect.signature(preview).return_annotation)
    found: Any = preview(**arguments)
    if kind == "PlotlyPreview":
        with suppress(Exception):  # without kaleido there is no picture
            figure = importlib.import_module("plotly.io").from_json(json.dumps(found))
            found, kind = base64.b64encode(figure.to_image("png")).decode(), "ImagePreview"
    if kind == "ImagePreview":
        return f"![preview](data:image/png;base64,{found})"
    if isinstance(found, dict) and {"columns", "data"} <= found.keys():
        rows = [found["columns"], ["---"] * len(found["columns"]), *found["data"]]
        cells = [[cell if cell == "---" else _plain(str(cell)) for cell in row] for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)
    with suppress(ValueError):
        found = json.loads(found) if isinstance(found, str) else found
    is_text = isinstance(found, str)
    return _code(
        found if is_text else json.dumps(found, indent=2, default=str), "" if is_text else "json"
    )


def _show_previews(node: Node, catalog: Any) -> None:
    """Show those of a node's outputs whose catalog entry asks for it; the server keeps them."""
    for name in node.outputs:
        dataset = _inner(_get_dataset(catalog, name))
        about = getattr(dataset, "metadata", None)
        about = about.get("prefect") if isinstance(about, dict) else None
        if isinstance(about, dict) and about.get("preview"):
            try:
                shown = _render(dataset, about.get("preview_args") or {})
                if len(shown) > PREVIEW_SHOWN:
                    raise ValueError(f"it has {len(shown)} characters, more than {PREVIEW_SHOWN}")
                text = f"### {_plain(name)}\n\n{shown}\n"
                _call_api(_create_artifact("markdown", _artifact_key(name), text), SERVER_TIMEOUT)
            except Exception as error:
                logging.getLogger("kedro").warning("No preview of '%s' in Prefect: %r", name, error)


# ---- The plan: what was checked, and is now going to be shown, run or registered ----


class _Plan(NamedTuple):
    """What was checked, and is now going to be shown, run or registered."""

    metadata: ProjectMetadata
    opened: _Opened
    datasets: dict[str, Any | None]
    config: _Config
    section: Options  # of prefect.yml, as it was written
    deployment: _Deployment
    existing: Any = None  # the deployment of this name on the server
    pool: Any = None  # its work pool; None: it runs from this process

    @property
    def pipeline(self) -> Pipeline:
        """The nodes that it runs."""
        return self.opened.pipeline

    @property
    def full_name(self) -> str:
        """The name of the deployment, behind that of the flow."""
        return f"{self.metadata.package_name}/{self.deployment.name}"

    @property
    def options(self) -> Options:
        """The options of a run that are not left at their default."""
        options = self.deployment.parameters
        return {k: v for k, v in options.items() if v or k in ("pipeline_name", "env")}


def _load_project(options: Options) -> tuple[ProjectMetadata, _Config]:
    """Bootstrap the project, and read prefect.yml."""
    with _project_errors(f"Loading {PROJECT_PATH}, where this file lies, as a Kedro project"):
        metadata = _bootstrap(PROJECT_PATH)
    _check_telemetry()
    _check_environment(options)
    return metadata, _read_config(_open_session(options), options)


def _where(name: str, dataset: Any | None) -> str:
    """Say where a dataset lives."""
    if _is_parameter(name):
        return "parameters"
    if dataset is None:
        return "memory, released after its last reader"
    about = dataset._describe() or {}
    filepath, protocol = about.get("filepath", ""), about.get("protocol", "file")
    prefix = "" if protocol == "file" else f"{protocol}://"
    return f"{type(dataset).__name__} {prefix}{filepath}".rstrip()


def _print_plan(plan: _Plan) -> None:
    """Print the execution layers, where each dataset lives, and what prefect.yml sets."""
    options, layers = dict(plan.options), plan.pipeline.grouped_nodes
    click.echo(
        f"Pipeline '{options.pop('pipeline_name')}' of {plan.metadata.package_name}, environment"
        f" '{options.pop('env')}': {len(plan.pipeline.nodes)} nodes in {len(layers)} layers"
    )
    lines = [f"  {name}: {value}" for name, value in options.items()]
    for number, layer in enumerate(layers, start=1):
        lines.append(f"Layer {number}")
        for node in layer:
            task_options = _task_options(node, plan.config.tasks) or ""
            inputs, outputs = (
                ", ".join(names) or "nothing" for names in (node.inputs, node.outputs)
            )
            lines.append(f"  {node.name}: {inputs} -> {outputs}  {task_options}".rstrip())
    lines.append("Datasets")
    lines += [f"  {name}: {_where(name, dataset)}" for name, dataset in plan.datasets.items()]
    for title, section in (("deployment", plan.section), ("task_runner", plan.config.task_runner)):
        lines += [f"{title}.{name}: {value}" for name, value in section.items()]
    click.echo(_without_credentials("\n".join(lines)))


def _describe(plan: _Plan) -> str:
    """Account for the pipeline in Markdown, without values that may be secret."""
    shown = plan.options | {"runtime_params": list(plan.options.get("runtime_params", ()))}
    return "\n".join(
        [
            f"Kedro project **{_plain(plan.metadata.project_name)}**, registered with\n",
            *(f"- {name}: {_plain(str(shown[name]))}" for name in plan.options),
            f"\n{_picture(plan.pipeline, {})}",
            "\n| layer | node | inputs | outputs |\n|---|---|---|---|",
            *(
                f"| {number} | {_plain(node.name)} | {'<br>'.join(map(_plain, node.inputs))}"
                f" | {'<br>'.join(map(_plain, node.outputs))} |"
                for number, layer in enumerate(plan.pipeline.grouped_nodes, start=1)
                for node in layer
            ),
        ]
    )


def _sign(text: str) -> str:
    """Add a line that nobody sees: it tells a description of ours from one that was edited."""
    digest = hashlib.sha256(text.strip().encode()).hexdigest()[:16]
    return f"{text}\n\n[register_prefect_flow.py]: # ({digest})"


def _make_plan(
    project: tuple[ProjectMetadata, _Config],
    deployment: _Deployment,
    section: Options,
    with_catalog: bool,
) -> _Plan:
    """Check what a deployment runs; loading the catalog calls hooks."""
    metadata, config = project
    options = deployment.parameters
    found = _open_with_datasets(options) if with_catalog else (_open(options), {}, [])
    opened, datasets, needed = found
    _group(opened.pipeline, config.task_runner.get("group_by"))  # which may fail
    _check_task_names(config.tasks)
    if needed:
        click.echo(f"Note: each run has to bring these runtime_params: {', '.join(needed)}")
    return _Plan(metadata, opened, datasets, config, section, deployment)


# ---- Checkpoints: what nodes hand on to others, in files of a flow run ----


class _Checkpoints(NamedTuple):
    """Where those of a flow run lie."""

    folder: str
    credentials: Options

    def path(self, dataset: str) -> str:
        """Return the path of a dataset: any name makes a file name, and no two make the same."""
        digest = hashlib.sha256(dataset.encode()).hexdigest()[:16]
        return f"{self.folder}/{re.sub(r'[^A-Za-z0-9.-]', '_', dataset)[:50]}-{digest}.pickle"

    def file_system(self) -> tuple[Any, str]:
        """Return fsspec's file system, and the folder in its terms."""
        fsspec: Any = importlib.import_module("fsspec.core")
        file_system, path = fsspec.url_to_fs(self.folder, **self.credentials)
        return file_system, str(path)


class _Checkpoint(_Dataset):  # type: ignore[misc]  # a class of any version of Kedro
    """What a node hands on to others, pickled into a file: all of it, or nothing."""

    def __init__(self, name: str, node: str, filepath: str, credentials: Options) -> None:
        dataset: Any = importlib.import_module("kedro_datasets.pickle").PickleDataset
        self._make = functools.partial(dataset, backend="cloudpickle", credentials=credentials)
        self._what = f"Dataset '{name}', which node '{node}' makes,"
        self._filepath, self._file = filepath, self._make(filepath=filepath)
        # On object stores a file is there when all of it has been written.
        is_local = self._file._protocol == "file"
        self._part = Path(f"{filepath}.part") if is_local else None

    def load(self) -> Any:
        return self._file.load()

    def save(self, data: Any) -> None:
        try:
            if self._part:
                self._part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make(filepath=str(self._part or self._filepath)).save(data)
            if self._part:
                self._part.replace(self._filepath)
        except Exception as error:
            raise kedro_io.DatasetError(
                f"{self._what} cannot be pickled to {self._filepath}: {error} Nodes hand it on in"
                " that file, unless an entry in the catalog says how to save it."
            ) from error

    def _exists(self) -> bool:
        return bool(self._file.exists())

    def _describe(self) -> Options:
        return {"filepath": self._filepath}


def _place_checkpoints(config: _Config, options: Options) -> Options:
    """Return where checkpoints lie, and the name of credentials; nothing: there are none."""
    place = options["checkpoints"] or config.checkpoints
    place = dict(place) if isinstance(place, dict) else {"url": place}
    kind = config.task_runner.get("type", "threads")
    if not place.get("url") and kind != "threads":
        address = str(config.task_runner.get("address", "local"))
        if not re.search(r"^(local|auto)$|localhost|127\.0\.0\.1|\[::1\]", address):
            raise click.ClickException(
                f"prefect.yml: nodes on {address} hand data on in files: say where, with"
                " checkpoints: <a URL or folder that all machines reach>"
            )
        place["url"] = str(
            prefect.settings.PREFECT_LOCAL_STORAGE_PATH.value() / "kedro-checkpoints"
        )
    if not place.get("url"):
        return {}
    _import("kedro_datasets.pickle", "kedro-datasets[pickle]", "checkpoints")
    if "://" not in place["url"]:
        place["url"] = str(PROJECT_PATH / place["url"])
    return place


def _add_checkpoints(
    catalog: Any, pipeline: Pipeline, checkpoints: _Checkpoints, kept: Iterable[str], cache: bool
) -> None:
    """Let what nodes write be in files as well, or instead of, in memory, but for what is kept."""
    for node in pipeline.nodes:
        for name in set(node.outputs).difference(kept):
            dataset = _get_dataset(catalog, name)
            if _is_in_memory(_inner(dataset)):
                path = checkpoints.path(name)
                made: Any = _Checkpoint(name, node.name, path, checkpoints.credentials)
                mode = getattr(dataset, "_copy_mode", None)
                made = kedro_io.CachedDataset(made, copy_mode=mode) if cache else made
                _set_dataset(catalog, name, made)


def _take_back(catalog: Any, pipeline: Pipeline, checkpoints: _Checkpoints) -> None:
    """Put what a run returns in memory, as `kedro run` does."""
    for name in pipeline.outputs():
        dataset: Any = _get_dataset(catalog, name)
        if _is_in_memory(_inner(dataset)):
            path = checkpoints.path(name)
            dataset.save(_Checkpoint(name, "", path, checkpoints.credentials).load())


def _end_checkpoints(checkpoints: _Checkpoints | None, completed: bool) -> None:
    """Remove those of a flow run that has completed; say where those of a failed one are."""
    if checkpoints is None:
        return
    log = get_run_logger()
    try:
        files, folder = checkpoints.file_system()
        if files.exists(folder) and completed:
            files.rm(folder, recursive=True)
        elif files.exists(folder):
            size = files.du(folder) / 1e6
            log.info("Checkpoints for a retry: %s, %.1f MB", checkpoints.folder, size)
    except Exception as error:
        log.warning("Checkpoints in %s: %s", checkpoints.folder, error)


async def _find_finished(flow_run_ids: list[str]) -> list[str]:
    """Return those flow runs that have completed, or that the server does not have."""
    finished = []
    async with _client() as client:
        for flow_run_id in flow_run_ids:
            try:
                state = (await client.read_flow_run(uuid.UUID(flow_run_id))).state
            except ObjectNotFound:
                state = None
            if state is None or state.is_completed():
                finished.append(flow_run_id)
    return finished


def _clean_checkpoints(config: _Config, options: Options) -> None:
    """Remove the folders of flow runs that nobody will retry."""
    place = _place_checkpoints(config, options)
    if not place:
        raise click.ClickException("prefect.yml has no checkpoints: name them with --checkpoints.")
    credentials = _read_credentials(_open_session(options), options, place.get("credentials", ""))
    files, folder = _Checkpoints(place["url"], credentials).file_system()
    paths = files.ls(folder, detail=False) if files.exists(folder) else []
    names = [path.rstrip("/").rpartition("/")[2] for path in paths]
    runs = [
        name for name in names if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name)
    ]
    with _server_errors("No checkpoint is removed"):
        finished = _call_api(_find_finished(runs), REGISTER_TIMEOUT)
    for flow_run_id in finished:
        files.rm(f"{folder}/{flow_run_id}", recursive=True)
    click.echo(f"Removed the checkpoints of {len(finished)} of {len(runs)} flow runs in {folder}")


# ---- Nodes as tasks, here or in other processes ----


@dataclass
class _Record:
    """How it went with the task of a node."""

    state: str = "not run"
    start: datetime | None = None
    seconds: float = 0
    attempts: int = 0
    error: BaseException | None = None  # as it was raised


class _Run(NamedTuple):
    """What the tasks of one run find by its key."""

    nodes: dict[str, Node]
    catalog: Any
    hook_manager: Any
    is_async: bool
    run_id: str | None
    fingerprint: str  # of the whole pipeline, and the options of the flow run
    records: defaultdict[str, _Record]  # by node name
    kept: set[str]  # datasets that are not released
    elsewhere: Callable[[Node], None] | None = None  # has a node run in another process or thread
    has_previews: bool = False


_runs: dict[str, _Run] = {}  # those that go on in this process
_latest: list[dict[str, _Record]] = [{}]  # how it went in the run that was started last
_started: Counter[str | None] = Counter()  # task runs, by flow run
_senders: list[threading.Thread] = []  # to Prefect; some go on when a run has ended


def _spell(value: Any) -> str:
    """Write a value so that equal ones read the same in each process, whatever they hold."""
    if isinstance(value, dict):
        items = (f"{_spell(key)}: {_spell(item)}" for key, item in value.items())
        return f"{{{', '.join(sorted(items))}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_spell, value)))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_spell, value))}]"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # an object's place in memory


def _digest(*parts: Any) -> str:
    text = _spell(parts).encode(errors="backslashreplace")
    return hashlib.sha256(text).hexdigest()[:16]


def _task_key(node: Node, run: _Run) -> str:
    """Identify what a node does in a run: it tells a retried flow run what need not run again.

    Prefect 2 also finds the task runs of a retried flow run by this key.
    """
    parameters = list(filter(_is_parameter, node.inputs))
    found: Any = {name: _get_dataset(run.catalog, name) for name in (*parameters, *node.outputs)}
    values = {name: found[name].load() for name in parameters if found[name]}
    lasting = [name for name in node.outputs if not _is_in_memory(found[name])]
    digest = _digest(values, {name: _where(name, found[name]) for name in lasting})
    return f"node/{run.fingerprint}/{run.run_id}/{digest}/{node.name}"


def _came_through(error: BaseException, *functions: Any) -> bool:
    """Tell whether an exception was raised in one of these functions, or in what they called."""
    codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    return not codes.isdisjoint(function.__code__ for function in functions)


def _text_of(error: BaseException) -> tuple[str, bool]:
    """Return what an exception says, as text that can be written, and whether Prefect bears it."""
    try:
        text = str(error)
    except Exception as broken:
        return f"no text, for making it raises {type(broken).__name__}", False
    writable = text.encode(errors="backslashreplace").decode()
    return writable, writable == text and len(text) <= TEXT_SHOWN


@contextmanager
def _bearable_errors(*logged_by: Any) -> Iterator[None]:
    """Put a stand-in with less text in the place of an exception whose text Prefect cannot bear.

    Prefect prints and stores the text several times, and fails where it is no Unicode. All of it is
    logged here, once: not if one of the given functions did so, of which Node.run logs no causes.
    """
    try:
        yield
    except Exception as error:
        part: BaseException | None = error  # of the chain that a traceback shows
        while part and _text_of(part)[1]:
            part = part.__cause__ or (None if part.__suppress_context__ else part.__context__)
        if part is None:
            raise
        if not _came_through(error, *logged_by) or (part is not error and Node.run in logged_by):
            whole = "".join(traceback.format_exception(error))
            whole = whole.encode(errors="backslashreplace").decode()
            logging.getLogger("kedro").error("%s", whole)  # noqa: TRY400
        text, _ = _text_of(error)
        if len(text) > TEXT_SHOWN:
            text = f"{text[:TEXT_SHOWN]}... (cut; the log has all {len(text)} characters)"
        kind = type(type(error).__name__, (Exception,), {"__module__": type(error).__module__})
        raise kind(text).with_traceback(error.__traceback__) from None


def _remove_versions(node: Node, catalog: Any) -> None:
    """Let a node save again what an earlier attempt has saved, whole or half, in this version."""
    for name in node.outputs:
        dataset = _inner(_get_dataset(catalog, name))
        if getattr(dataset, "_version", None) and hasattr(dataset, "_fs"):
            path = str(dataset._get_versioned_path(dataset.resolve_save_version()))
            if dataset._exists_function(path):
                dataset._fs.rm(path, recursive=True)
                dataset.release()  # it remembers versions


def _run_here(run: _Run, node: Node) -> None:
    for member in _members(node):
        _run_node(member, run.catalog, run.hook_manager, run.is_async, run.run_id)


def kedro_task(node_name: str, run_key: str) -> None:
    """Run one node of a run as Kedro does: load, run, save, with its hooks."""
    run = _runs[run_key]
    node, record = run.nodes[node_name], run.records[node_name]
    record.attempts += 1
    record.start = datetime.now(timezone.utc)
    try:
        if record.attempts > 1:
            _remove_versions(node, run.catalog)
        (run.elsewhere or functools.partial(_run_here, run))(node)
    except SystemExit as ended:  # a failure of this node, and no end of anything else
        code, _ = _text_of(ended)
        record.error = RuntimeError(f"Node '{node_name}' called sys.exit({code})")
        raise record.error from ended
    except (Exception, KeyboardInterrupt) as error:
        record.error = error
        raise
    finally:
        record.seconds = (datetime.now(timezone.utc) - record.start).total_seconds()
    if run.has_previews:
        _show_previews(node, run.catalog)


def instantiate_task(node: Node, run_key: str, like: Task[[], None]) -> Task[[], None]:
    """Make the Prefect task that runs a node, under the node's name, with another's options."""

    def run_node_task() -> None:
        with _bearable_errors(Node.run):  # which logs what a node's function raises
            kedro_task(node.name, run_key)

    # Prefect reads and parses this file for each task that it makes: a copy takes 1/50 of the time.
    node_task = copy(like)
    node_task.fn = run_node_task
    node_task.name = node.name
    node_task.task_run_name = lambda: node.name
    return node_task


def init_kedro_tasks_by_execution_layer(
    pipeline: Pipeline,
    run_key: str,
    task_options: dict[str, Options] | None = None,
    limited_tags: Iterable[str] = (),
) -> list[dict[Node, Task[[], None]]]:
    """Make a task for each node, in layers of nodes that need only nodes of earlier layers."""
    made: dict[str, Task[[], None]] = {}  # one for each set of options

    def make(node: Node) -> Task[[], None]:
        options = _task_options(node, task_options or {})
        options.pop("resources", None)  # which are for Dask and Ray
        options["tags"] = sorted({*options.get("tags", ()), *(node.tags & set(limited_tags))})
        key = repr(sorted(options.items()))
        if key not in made:  # without result there is nothing to hash, keep or look up
            made[key] = Task(fn=lambda: None, persist_result=False, **options)
        return instantiate_task(node, run_key, made[key])

    return [{node: make(node) for node in layer} for layer in pipeline.grouped_nodes]


# ---- Engines: other processes, here and on other machines ----
#
# Whatever the engine, a node runs in a child: a process that has opened the project for one flow
# run, and so has the project's code as it is now. Names of nodes go there, and what happens comes
# back. Dask and Ray say which machine has room for a child.

_Messages = Iterator[list[tuple[str, bytes]]]  # those that have come meanwhile
_LAST = ("ended", "failed", "died")  # kinds of messages after which there is no other


def _same_everywhere(metadata: ProjectMetadata) -> dict[str, str]:
    """Return what has to be the same wherever nodes of a run are run."""
    files = [THIS_FILE, *sorted(Path(metadata.source_dir).rglob("*.py"))]
    code = _digest([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"Kedro": kedro.__version__, "Python": python, "the code": code}


class _Printed(io.RawIOBase):
    """What nodes print in a child, sent line by line."""

    def __init__(self, say: Callable[[str, bytes], None]) -> None:
        self._say = say

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._say("print", bytes(data))
        return len(data)


def _send_logs(say: Callable[[str, bytes], None]) -> None:
    """Send all log records, at the levels that the project sets; handlers are the flow's."""
    put = SimpleNamespace(put_nowait=lambda record: say("log", pickle.dumps(record)))
    handler = logging.handlers.QueueHandler(cast("Any", put))
    for name in (None, *logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name is None or not logger.propagate else []


@functools.cache  # a child has one flow run
def _open_run(say: Callable[[str, bytes], None], told: str) -> _Run:
    """Open the project in a child: configuration, catalog and hooks as in the flow."""
    job = json.loads(told)
    metadata = bootstrap_project(PROJECT_PATH)
    _send_logs(say)
    for what, here in _same_everywhere(metadata).items():
        if here != job["same"][what]:
            values = "" if what == "the code" else f": {here} instead of {job['same'][what]}"
            raise RuntimeError(
                f"{what} of {PROJECT_PATH} on {platform.node()} is not that of the flow{values}."
                " Update it there; if it has just been changed, start the run again."
            )
    options = job["options"]
    session, context, pipeline = _open(options, _pipeline_names(options))
    _adopt_session_id(session, job["session_id"])
    catalog = _load_catalog(session, context, options)
    credentials = _read_credentials(session, options, job["credentials"])
    checkpoints, grouped = (
        _Checkpoints(job["folder"], credentials),
        _group(pipeline, job["group_by"]),
    )
    kept = grouped.outputs() - pipeline.outputs()
    for name in kept:  # handed on within a group
        if _get_dataset(catalog, name) is None:
            _set_dataset(catalog, name, kedro_io.MemoryDataset())
    _add_checkpoints(catalog, grouped, checkpoints, kept, cache=False)
    _pin_versions(catalog, pipeline, job["session_id"])
    nodes, hooks = {node.name: node for node in grouped.nodes}, session._hook_manager
    records: defaultdict[str, _Record] = defaultdict(_Record)
    run_id, kept = job["session_id"], grouped.inputs()
    return _Run(nodes, catalog, hooks, job["is_async"], run_id, "", records, kept)


def _pack_error(error: BaseException, with_object: bool) -> bytes:
    """Write an exception down: as itself, if that can be, and as text."""
    text = "".join(traceback.format_exception(error))
    parts: Options = {"traceback": text.encode(errors="backslashreplace").decode()}
    parts["text"] = f"{type(error).__name__}: {_text_of(error)[0]}"
    with suppress(Exception):  # there is much that cannot be pickled
        parts["error"] = pickle.dumps(error) if with_object else None
    return pickle.dumps(parts)


def _unpack_error(payload: bytes) -> BaseException:
    parts = pickle.loads(payload)
    remote = RuntimeError(f"in another process\n{parts['traceback']}")
    error: Any = None
    with suppress(Exception):  # of what it takes to make it again
        error = pickle.loads(parts["error"])
    if not isinstance(error, BaseException):
        error = RuntimeError(parts["text"])
    error.__cause__ = remote
    return cast("BaseException", error)


def _be_child(jobs_in: int, messages_out: int) -> None:
    """Run nodes of a flow run, and say what happens, until whoever started this process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the flow that Ctrl-C stops
    os.environ["KEDRO_DISABLE_TELEMETRY"] = "1"  # which the flow sends
    jobs: queue.SimpleQueue[Options] = queue.SimpleQueue()
    messages, lock = os.fdopen(messages_out, "wb"), threading.Lock()

    def say(kind: str, payload: bytes) -> None:
        with lock:
            pickle.dump((kind, payload), messages)
            messages.flush()

    def listen() -> None:
        with suppress(EOFError, OSError), os.fdopen(jobs_in, "rb") as file:
            while True:
                jobs.put(pickle.load(file))
        os._exit(1)  # at once, whatever a node is doing

    threading.Thread(target=listen, daemon=True).start()
    while True:
        job = jobs.get()
        raw = io.BufferedWriter(_Printed(say))  # the last node may have closed its own
        sys.stdout = io.TextIOWrapper(raw, line_buffering=True, errors="backslashreplace")
        is_open, end = False, ("ended", b"")
        try:
            _runs[job["run"]] = run = _open_run(say, job["told"])
            is_open = True
            run.records[job["node"]].attempts = job["attempts"]
            with _bearable_errors(Node.run):
                kedro_task(job["node"], job["run"])
        except BaseException as error:  # what opening raises may refer to credentials
            end = ("failed", _pack_error(error, with_object=is_open))
        if is_open:
            node = run.nodes[job["node"]]
            for name in {*node.inputs, *node.outputs} - run.kept:
                run.catalog.release(name)
        with suppress(ValueError):  # it has been closed
            sys.stdout.flush()
        say(*end)


# What a child does first. Nothing but messages may come out of its stdout. Importing Prefect takes
# longer than all else that it needs: while it imports this file, it has a dummy in its place.
_CHILD = """
import os, sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from unittest.mock import MagicMock

def find_spec(name, *_):
    return ModuleSpec(name, dummy) if name.partition(".")[0] == "prefect" else None

def create_module(_):
    return MagicMock(__version__="3.2", __path__=[])

dummy = SimpleNamespace(find_spec=find_spec, create_module=create_module, exec_module=id)
jobs, out, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
os.dup2(null, 0)
os.dup2(null, 1)
sys.path.insert(0, os.getcwd())
sys.meta_path.insert(0, dummy)
import register_prefect_flow as script
sys.meta_path.remove(dummy)
for name in [name for name in sys.modules if find_spec(name)]:
    del sys.modules[name]
os.dup2(2, 1)
script._be_child(jobs, out)
"""


class _Child:
    """The process of a child, as whoever started it sees it. Sent to Dask and Ray by value."""

    def __init__(self, script: str) -> None:
        self.process: Any = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            cwd=Path(script).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.messages: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self.timer: Any = None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(Exception):  # its end may come in the middle of a message
            while True:
                self.messages.put(pickle.load(self.process.stdout))
        code = self.process.wait()
        killed = -getattr(signal, "SIGKILL", sys.maxsize)  # Windows has no such thing
        why = " (killed, perhaps for lack of memory)" if code == killed else ""
        self.messages.put(("died", f"with exit code {code}{why}".encode()))

    def gather(self) -> list[tuple[str, bytes]]:
        """Return what it says within 50 ms of a first word: engines take long for each message."""
        said: list[tuple[str, bytes]] = []
        with suppress(queue.Empty):
            said.append(self.messages.get(timeout=0.2))
            until = time.monotonic() + 0.05
            while said[-1][0] not in _LAST and (left := until - time.monotonic()) > 0:
                said.append(self.messages.get(timeout=left))
        return said

    def end(self) -> None:
        """End it, and what it is doing."""
        self.process.kill()
        self.process.wait()

    def wait_for_job(self, idle: list[Any]) -> None:
        """Stand by for another node, but not for long."""

        def leave() -> None:
            with suppress(ValueError):  # it has just been taken
                idle.remove(self)
                self.end()

        self.timer = threading.Timer(60, leave)  # seconds
        self.timer.daemon = True
        idle.append(self)
        self.timer.start()


def _children() -> dict[str, list[Any]]:
    """Return the children that stand by, by flow run.

    They are kept beside the functions of this file, which Dask and Ray make anew for each call.
    """
    return vars(sys.modules.setdefault("_kedro_children", ModuleType("_kedro_children")))


def _run_in_child(job: Options, is_wanted: Callable[[], bool] | None = None) -> _Messages:
    """Run a node in a child, and yield what it says."""
    runs = _children()
    idle: list[Any] = runs.setdefault(job["run"], [])
    if not Path(job["script"]).exists():
        raise FileNotFoundError(
            f"{platform.node()} has no {job['script']}: the project has to lie there as it does"
            " where the flow runs, with this file."
        )
    try:
        child = idle.pop()
        child.timer.cancel()
    except IndexError:
        child = _Child(job["script"])
    kind = ""
    try:
        with suppress(OSError):  # it has died, and says so
            pickle.dump(job, child.process.stdin)
            child.process.stdin.flush()
        while kind not in _LAST:
            if said := child.gather():
                kind, _ = said[-1]
                yield said
            elif runs.get(job["run"]) is not idle or (is_wanted and not is_wanted()):
                raise RuntimeError("the run has been stopped")
    finally:
        if kind not in ("ended", "failed") or runs.get(job["run"]) is not idle:
            child.end()
        else:
            child.wait_for_job(idle)


def _end_children(run: str) -> None:
    """End the children of a flow run."""
    for child in _children().pop(run, []):
        child.end()


class _Engine(NamedTuple):
    """What runs nodes."""

    size: int  # how many at once
    # Takes a job and the resources that it needs; None: nodes run in the flow's own process.
    send: Callable[[Options, Options], _Messages] | None
    stop: Callable[[], Any]


def _by_value(function: Any) -> bytes:
    """Pickle a function so that it can be used where this file cannot be imported."""
    cloudpickle: Any = importlib.import_module("cloudpickle")
    if __name__ != "__main__":
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return cast("bytes", cloudpickle.dumps(function))


@contextmanager
def _start_threads(_: str, __: Options) -> Iterator[_Engine]:
    yield _Engine(_threads_that_prefect_is_set_to() or 1, None, lambda: None)


@contextmanager
def _start_processes(run: str, _: Options) -> Iterator[_Engine]:
    stop = functools.partial(_end_children, run)
    try:
        yield _Engine(os.cpu_count() or 1, lambda job, _: _run_in_child(job), stop)
    finally:
        stop()


def _listen(messages: Any) -> _Messages:
    """Yield what comes in a queue, up to no message."""
    said = None
    while said != []:
        with suppress(queue.Empty):  # in steps, so that a timeout can interrupt it
            said = messages.get(timeout=0.2)
            yield said


@contextmanager
def _cluster_errors(kind: str, options: Options, start: str) -> Iterator[None]:
    """Say in one line that there is no cluster, and how to start one."""
    try:
        yield
    except (OSError, asyncio.TimeoutError, TypeError, ValueError, RuntimeError) as error:
        where = options.get("address", "this machine")
        raise click.ClickException(
            f"prefect.yml: there is no {kind} cluster with workers at {where}: {error}. Start"
            f" {start}, and give task_runner.address."
        ) from error


def _connect(distributed: Any, options: Options, stack: ExitStack) -> Any:
    """Return a client of the Dask cluster that section task_runner names, or describes."""
    with _cluster_errors("Dask", options, "`dask scheduler` and `dask worker`"):
        if name := options.pop("cluster_class", None):
            module, _, class_name = name.rpartition(".")
            make = getattr(_import(module, module.partition(".")[0], name), class_name)
            options["address"] = stack.enter_context(make(**options.pop("cluster_kwargs", {})))
        # One here needs no processes of its own: its workers do nothing but start those of nodes.
        local: Options = {"processes": False, "memory_limit": 0}
        local |= dict.fromkeys(("dashboard_address", "worker_dashboard_address"), "127.0.0.1:0")
        local = {} if {"address", "host"} & options.keys() else local
        client = distributed.Client(**{"timeout": 20} | local | options)
        stack.enter_context(client)
        client.wait_for_workers(1, timeout=20)
    return client


def _run_on_dask_worker(topic: str, job: Options) -> None:
    """Run a node in a child of a Dask worker, and pass on what it says."""
    worker = importlib.import_module("distributed").get_worker()
    ask = functools.partial(importlib.import_module("distributed.utils").sync, worker.loop)
    tasks, key = worker.state.tasks, worker.get_current_task()
    mark: Options = {"keys": [topic, key]}
    if ask(worker.scheduler.get_metadata, default=False, **mark):
        return  # Dask runs it again, because the worker that ran it is lost
    ask(worker.scheduler.set_metadata, value=True, **mark)

    def is_wanted() -> bool:  # not if the flow has cancelled it, or is gone
        return key in tasks and tasks[key].state != "cancelled"

    for said in _run_in_child(job, is_wanted):
        worker.log_event(topic, (key, said))  # which the scheduler hands on


@contextmanager
def _start_dask(run: str, options: Options) -> Iterator[_Engine]:
    distributed = _import("distributed", "distributed", "task_runner.type dask")
    apply = importlib.import_module("dask.utils").apply
    logging.getLogger("distributed").setLevel(logging.WARNING)
    topic, said = f"kedro-{run}", cast("Any", defaultdict(queue.SimpleQueue))
    run_node, end_children = _by_value(_run_on_dask_worker), _by_value(_end_children)

    def send(job: Options, resources: Options) -> _Messages:
        key = f"{job['node']}-{uuid.uuid4().hex}"
        future = client.submit(
            apply, work, [topic, job], key=key, pure=False, resources=resources or None
        )
        future.add_done_callback(lambda _: said[key].put([]))
        try:
            yield from _listen(said[key])
            if future.status != "finished":  # or Dask would fetch the result, which is none
                future.result()  # raises what kept the node from being run
        finally:
            future.cancel()

    def hear(event: Any) -> None:
        _, (key, messages) = event
        said[key].put(messages)

    def hear_of_cluster(event: Any) -> None:  # which runs a lost worker's tasks again
        _, about = event
        if isinstance(about, dict) and about.get("action") == "remove-worker":
            for key in said.keys() & {*about["processing-tasks"]}:
                said[key].put([("died", b"with its Dask worker")])

    def forget(dask_scheduler: Any) -> None:
        dask_scheduler._broker._topics.pop(topic)
        dask_scheduler.task_metadata.pop(topic, None)

    with ExitStack() as stack:
        client = _connect(distributed, options, stack)
        client.subscribe_topic(topic, hear)
        client.subscribe_topic("all", hear_of_cluster)
        work = client.submit(pickle.loads, run_node, pure=False)  # once on each worker, for all

        def stop() -> None:
            with suppress(Exception):  # there may be no cluster any more
                client.run(lambda: pickle.loads(end_children)(run))
                client.run_on_scheduler(forget)

        stack.callback(stop)
        yield _Engine(sum(client.nthreads().values()), send, stop)


@contextmanager
def _start_ray(_: str, options: Options) -> Iterator[_Engine]:
    os.environ.setdefault("RAY_TQDM_PATCH_PRINT", "0")  # or Prefect's log_prints is undone
    ray = _import("ray", "ray", "task_runner.type ray")
    run_in_child = _by_value(_run_in_child)

    def work(job: Options) -> _Messages:  # a function in a function is sent by value
        yield from pickle.loads(run_in_child)(job)

    def send(job: Options, resources: Options) -> _Messages:
        stream, kind = remote.options(**resources, max_retries=0).remote(job), ""
        try:
            while kind not in _LAST:
                if ray.wait([stream], timeout=0.2)[0]:  # in steps, so that a timeout can interrupt
                    said = ray.get(next(stream))
                    kind, _ = said[-1]
                    yield said
        except StopIteration:
            return
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        finally:
            if kind not in _LAST:  # or the process is hit while it runs another node
                ray.cancel(stream, force=True)

    # If no address is given, not in the cluster that was started last on this machine.
    options = {"address": "local", "include_dashboard": False} | options
    with _cluster_errors("Ray", options, "`ray start --head`"):
        ray.init(**options)
    remote = ray.remote(work)
    try:
        yield _Engine(int(ray.cluster_resources().get("CPU", 1)), send, ray.shutdown)
    finally:
        ray.shutdown()


_ENGINES: Options = dict(
    zip(_TASK_RUNNERS, (_start_threads, _start_processes, _start_dask, _start_ray), strict=True)
)


def _hand_over(
    engine: Any,
    job: Options,
    tasks: dict[str, Options],
    records: dict[str, _Record],
    node: Node,
) -> None:
    """Run a node on an engine; what it prints and logs there, it prints and logs here."""
    resources = _task_options(node, tasks).get("resources", {})
    kind, attempts = "", records[node.name].attempts - 1  # before this one
    job = {**job, "node": node.name, "attempts": attempts}
    with closing(engine.send(job, resources)) as messages:
        for kind, payload in chain.from_iterable(messages):
            if kind == "print":
                print(payload.decode(), end="")
            elif kind == "log":
                record = pickle.loads(payload)
                logging.getLogger(record.name).handle(record)
            elif kind == "failed":
                raise _unpack_error(payload)
            elif kind == "died":
                raise RuntimeError(
                    f"The process that ran node '{node.name}' died {payload.decode()}"
                )
    if kind != "ended":
        raise RuntimeError(f"What node '{node.name}' said last was lost on its way")


# ---- PrefectRunner ----


async def _read_limited_tags() -> set[str]:
    """Ask the server which tags limit how many task runs may go on at once."""
    limits: list[Any] = []
    async with _client() as client:
        while page := await client.read_concurrency_limits(limit=200, offset=len(limits)):
            limits += page
    return {limit.tag for limit in limits}


@contextmanager
def _show_progress(run: _Run, is_wanted: bool) -> Iterator[None]:
    """Show in Prefect how many of a run's nodes have completed, if it takes more than 5 s."""
    ended, nodes = threading.Event(), len(run.nodes)

    def count() -> float:
        states = [record.state for record in list(run.records.values())]
        return 100 * states.count("completed") / nodes

    def show() -> None:
        if ended.wait(5):
            return
        try:
            made = _create_artifact("progress", f"{_package_key()}-progress", count())
            artifact = _call_api(made, SERVER_TIMEOUT)
            is_last = False
            while not is_last:
                is_last = ended.wait(2)
                _call_api(_update_artifact(artifact.id, count()), SERVER_TIMEOUT)
        except Exception as error:
            logging.getLogger("kedro").warning("No progress of this run in Prefect: %r", error)

    if is_wanted and _PREFECT_3:  # Prefect 2 has no such artifacts
        _senders.append(_start_beside(show))
    try:
        yield
    finally:
        ended.set()  # a busy server takes seconds for the last figure: nobody waits for it here


def _longest_path_first(pipeline: Pipeline) -> list[Node]:
    """Order nodes by how many have to run after them, one after the other; else as Kedro does."""
    behind = dict.fromkeys(pipeline.nodes, 0)
    for node in reversed(pipeline.nodes):
        for needed in pipeline.node_dependencies[node]:
            behind[needed] = max(behind[needed], behind[node] + 1)
    return sorted(behind, key=behind.__getitem__, reverse=True)


class _Scheduler:
    """Submits each task when the nodes it needs have ended, and yields what has ended.

    A task behind a failed one is submitted as well: Prefect shows it as NotReady, and does not run
    it.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        tasks: dict[Node, Any],
        submit: Any,
        max_workers: int,
        earlier: dict[str, Any],
    ) -> None:
        self._tasks, self._submit, self._free = tasks, submit, max_workers
        self._earlier = earlier
        self._needed = pipeline.node_dependencies
        self._nodes = pipeline.nodes if max_workers == 1 else _longest_path_first(pipeline)
        self._position = {node: index for index, node in enumerate(self._nodes)}
        self._sorter = TopologicalSorter(self._needed)
        self._sorter.prepare()
        self._ready: list[int] = []  # a heap of positions
        self._futures: dict[Node, Any] = {}
        # Nodes that have ended, and what this thread is asked to call.
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.is_sequential = max_workers == 1

    def submit_ready(self) -> None:
        """Submit what is ready, as far as there are free workers."""
        for node in self._sorter.get_ready():
            heapq.heappush(self._ready, self._position[node])
        while self._ready and self._free:
            node = self._nodes[heapq.heappop(self._ready)]
            ended = sorted(self._needed[node], key=self._position.__getitem__)
            needed = [self._futures[other] for other in ended]
            names = self._earlier.keys() & map(_plain_name, node.inputs)
            needed += {self._earlier[name].id: self._earlier[name] for name in names}.values()
            self._free -= 1
            _started[runtime.flow_run.id] += 1
            future = self._submit(self._tasks[node], needed)
            self._futures[node] = future
            _call_when_done(future, functools.partial(self._ended.put, node))

    def have_called(self, function: Callable[[Node], None], node: Node) -> None:
        """Have the thread that follows the run do what this one would do."""
        if self._tasks[node].timeout_seconds:  # Prefect 2 can stop it in its task's own thread only
            function(node)
            return
        done, context = cast("Future[None]", Future()), contextvars.copy_context()

        def call() -> None:
            try:
                done.set_result(context.run(function, node))
            except BaseException as error:
                done.set_exception(error)

        self._ended.put(call)
        done.result()

    def __iter__(self) -> Iterator[tuple[Node, Any]]:
        """Yield nodes and their futures as they end, until all have."""
        for _ in self._nodes:
            self.submit_ready()
            while not isinstance(node := self._ended.get(), Node):
                node()
            self._free += 1
            self._sorter.done(node)
            yield node, self._futures[node]


def _release(node: Node, run: _Run, load_counts: Counter[str]) -> None:
    """Release what no other node reads, as Kedro's own runners do."""
    load_counts.subtract(node.inputs)
    for name in {*node.inputs, *node.outputs} - run.kept:
        if load_counts[name] < 1:
            run.catalog.release(name)


class PrefectRunner(SequentialRunner):
    """A Kedro runner that runs each node as a Prefect task, as soon as its inputs are there.

    Use it inside a Prefect flow: `KedroSession.run(runner=PrefectRunner())`, or
    `PrefectRunner().run(pipeline, catalog, hook_manager)`. Nodes hand data on through the catalog;
    datasets are released after their last reader.

    Args:
        is_async: Load and save the inputs and outputs of a node at the same time, in threads, as
            Kedro's runners do. Default: False.
        max_workers: How many nodes may run at once, side by side in threads. Default: Prefect's
            setting `PREFECT_TASKS_RUNNER_THREAD_POOL_MAX_WORKERS` where it is set, else 1: nodes
            run one at a time, in Kedro's order, in the thread that calls `run`.
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
        task_options: dict[str, Options] | None = None,
    ) -> None:
        super().__init__(is_async=is_async)
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers is {max_workers}, and has to be 1 or more")
        self._max_workers = max_workers
        self._task_options = task_options
        self._outputs: dict[str, str] = {}  # where each lives, after a run
        self._engine = "threads"
        self._engine_options: Options = {}
        self._job: Options = {}  # what an engine is told of the run
        self._checkpoints: _Checkpoints | None = None
        self._group_by: str | None = None
        self._has_artifacts = False
        self._account: tuple[Pipeline, Any, dict[str, _Record]] | None = None  # after a run
        self._suggestion = ""  # of Kedro, how to go on after a failure
        self._resume = True
        self._fingerprint = ""  # of pipeline and options, in a flow run that can be retried
        self._resumed: dict[Node, Any] = {}  # what need not run: the task run that completed
        self._keys: dict[str, str] = {}  # of nodes, before hooks have changed the catalog

    @property
    def _logger(self) -> logging.Logger:
        # Kedro's logging configuration shows what its own loggers say, not those of this module.
        return logging.getLogger("kedro.runner.prefect_runner")

    def _run(
        self, pipeline: Pipeline, catalog: Any, hook_manager: Any = None, run_id: str | None = None
    ) -> None:
        """Run the nodes, and raise the exception of the first one that failed."""
        # Every tag of a task run costs a call to the server: use only those that do something.
        used_tags = set(chain.from_iterable(node.tags for node in pipeline.nodes))
        tags = used_tags & _call_api(_read_limited_tags()) if used_tags else used_tags
        grouped, key = _group(pipeline, self._group_by), uuid.uuid4().hex
        self._share(catalog, grouped)
        if run_id:
            _pin_versions(catalog, pipeline, run_id)
        with _ENGINES[self._engine](key, self._engine_options) as engine:
            told = json.dumps({**self._job, "session_id": run_id, "is_async": self._is_async})
            job = {"run": key, "script": str(THIS_FILE), "told": told}
            records: defaultdict[str, _Record] = defaultdict(_Record)
            tasks = self._task_options or {}
            elsewhere = functools.partial(_hand_over, engine, job, tasks, records)
            nodes = {node.name: node for node in grouped.nodes}
            run = _Run(
                nodes, catalog, hook_manager, self._is_async, run_id, self._fingerprint,
                records=records, kept=pipeline.inputs() | pipeline.outputs(),
                elsewhere=elsewhere if engine.send else None, has_previews=self._has_artifacts,
            )  # fmt: skip
            for node, done in self._resumed.items():
                seconds = done.total_run_time.total_seconds()
                run.records[node.name] = _Record(
                    "resumed", done.start_time, seconds, done.run_count
                )
            _latest[0] = run.records
            self._account = Pipeline([*self._resumed, *grouped.nodes]), catalog, run.records
            with (
                self._task_scheduler(grouped, run, key, engine, tags) as scheduler,
                _show_progress(run, self._has_artifacts),
            ):
                self._follow(scheduler, run, pipeline)
            if engine.send and self._checkpoints:
                _take_back(catalog, pipeline, self._checkpoints)
        outputs = sorted(pipeline.outputs())
        self._outputs = {name: _where(name, _get_dataset(catalog, name)) for name in outputs}

    def _share(self, catalog: Any, pipeline: Pipeline) -> None:
        """Let what nodes hand on be in checkpoints."""
        if self._checkpoints:
            cache = self._engine == "threads"
            _add_checkpoints(catalog, pipeline, self._checkpoints, pipeline.outputs(), cache)

    @contextmanager
    def _task_scheduler(
        self, pipeline: Pipeline, run: _Run, key: str, engine: _Engine, tags: set[str]
    ) -> Iterator[_Scheduler]:
        layers = init_kedro_tasks_by_execution_layer(pipeline, key, self._task_options, tags)
        tasks = {node: node_task for layer in layers for node, node_task in layer.items()}
        for node, node_task in tasks.items():
            node_task.task_key = self._keys.get(node.name) or _task_key(node, run)
        max_workers = self._max_workers or engine.size
        widest = max(map(len, layers), default=0)
        if widest > 1 == max_workers != self._max_workers:
            self._logger.info(
                "%d nodes run one at a time. Up to %d could run side by side: see task_runner in"
                " conf/base/prefect.yml, or max_workers of PrefectRunner",
                len(tasks),
                widest,
            )
        done = self._resumed.items()
        earlier = {_plain_name(name): found for node, found in done for name in node.outputs}
        _runs[key] = run
        try:
            with _task_runner(max_workers) as submit:
                scheduler = _Scheduler(pipeline, tasks, submit, max_workers, earlier)
                if scheduler.is_sequential and _CALLED_IN_THREADS:
                    here = functools.partial(_run_here, run)
                    _runs[key] = run._replace(
                        elsewhere=functools.partial(scheduler.have_called, here)
                    )
                try:
                    yield scheduler
                except BaseException:
                    engine.stop()  # or those that run would be waited for
                    raise
        finally:
            del _runs[key]

    def _suggest(self, pipeline: Pipeline, done_nodes: list[Node], catalog: Any) -> None:
        """Log how `kedro run` would go on, and keep it."""

        def keep(record: logging.LogRecord) -> bool:
            self._suggestion = record.getMessage()
            return True

        self._logger.addFilter(keep)
        try:
            self._suggest_resume_scenario(pipeline, done_nodes, catalog)
        finally:
            self._logger.removeFilter(keep)

    def _follow(self, scheduler: _Scheduler, run: _Run, pipeline: Pipeline) -> None:
        """Do all that follows from a node's end, until all have ended."""
        load_counts = Counter(chain.from_iterable(node.inputs for node in run.nodes.values()))
        done_nodes: list[Node] = []
        failed: list[tuple[Node, Any]] = []
        for node, future in scheduler:
            record, state = run.records[node.name], _final_state(future)
            if isinstance(record.error, KeyboardInterrupt):
                raise record.error
            record.state = "not run" if state.name == "NotReady" else state.name.lower()
            if completed := state.is_completed():
                _release(node, run, load_counts)
            if not scheduler.is_sequential:
                scheduler.submit_ready()  # before anybody logs something
            if not completed:
                failed.append((node, future))
                continue
            for member in _members(node):
                done_nodes.append(member)
                self._logger.info("Completed node: %s", member.name)
                self._logger.info(
                    "Completed %d out of %d tasks", len(done_nodes), len(pipeline.nodes)
                )
        if failed:
            self._suggest(pipeline, done_nodes, run.catalog)
            node, future = failed[0]  # it ended first, so it is no node that waited for another
            if error := run.records[node.name].error:
                raise error
            future.result()  # raises
            raise RuntimeError(f"A task run ended as {_final_state(future).name}")


# ---- Resuming: a flow run that is retried goes on where it failed ----


async def _read_task_runs(flow_run_id: Any, expected: int, patience: float) -> list[Any]:
    """Return the task runs of a flow run, as soon as so many of them have ended.

    Prefect 3 records task runs later than they end. Gives up when nothing has changed for
    `patience` seconds.
    """
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    this_run = FlowRunFilter(id=FlowRunFilterId(any_=[uuid.UUID(str(flow_run_id))]))
    loop = asyncio.get_running_loop()
    recorded, changed = -1, loop.time()
    async with _client() as client:
        while True:
            runs: dict[Any, Any] = {}  # by id: pages overlap while task runs are added
            offset = 0
            while page := await client.read_task_runs(flow_run_filter=this_run, offset=offset):
                runs.update({run.id: run for run in page if run.state})
                offset += len(page)
            states = [run.state for run in runs.values()]
            ended = sum(state.is_final() or state.name == "NotReady" for state in states)
            if ended >= expected or loop.time() - changed > patience:
                return list(runs.values())
            if ended != recorded:
                recorded, changed = ended, loop.time()
            await asyncio.sleep(0.2)


def _is_lost(dataset: Any) -> bool:
    """Tell whether what a dataset had is gone; those that cannot tell count as there."""
    can_tell = not _is_in_memory(dataset) and type(dataset)._exists is not _Dataset._exists
    return can_tell and not dataset.exists()


def _why_again(node: Node, run: _Run, task_run: Any, datasets: dict[str, Any]) -> str:
    """Say why the earlier run of a node does not do; nothing: it does."""
    if task_run is None or not task_run.state.is_completed():
        return str(task_run.state.name) if task_run else "not run"
    if task_run.task_key != _task_key(node, run):
        return "parameters or catalog have changed"
    lost = ", ".join(name for name in node.outputs if _is_lost(datasets[name]))
    return f"{lost} is gone" if lost else ""


def _find_what_runs_again(
    pipeline: Pipeline, run: _Run, earlier: dict[str, Any]
) -> dict[Node, str]:
    """Return the nodes to run, each with the reason: Kedro's resume suggestion, node by node."""
    outputs = {name: _get_dataset(run.catalog, name) for name in pipeline.all_outputs()}
    datasets = {name: _inner(dataset) for name, dataset in outputs.items()}
    _pin_versions(run.catalog, pipeline, str(run.run_id))
    needs, again = pipeline.node_dependencies, cast("dict[Node, str]", {})
    for node in pipeline.nodes:  # those before others come first
        reason = _why_again(node, run, earlier.get(node.name), datasets)
        if reason or needs[node] & again.keys():
            again[node] = reason or "what it needs is made again"
    for node in (todo := list(again)):  # which grows
        inputs = set(map(_plain_name, node.inputs))
        for maker in needs[node] - again.keys():
            used = [name for name in maker.outputs if _plain_name(name) in inputs]
            if kept := ", ".join(name for name in used if _is_in_memory(datasets[name])):
                again[maker] = f"{kept} was only in memory"
                todo.append(maker)
    for node in again:
        _remove_versions(node, run.catalog)
    return again


def _find_earlier(runner: PrefectRunner) -> tuple[str, dict[str, Any]]:
    """Return the session id of earlier attempts, and the last task run of each node.

    Nothing where this is the first attempt, or it is not known for sure what the others did.
    """
    log, flow_run = get_run_logger(), cast("Any", FlowRunContext.get()).flow_run
    if flow_run.run_count <= 1 or not runner._resume:
        return "", {}
    try:  # of this process, all but kedro_init
        read = _read_task_runs(flow_run.id, expected=_started[str(flow_run.id)] - 1, patience=10)
        runs = [run for run in _call_api(read) if run.task_key.startswith("node/")]
    except Exception as error:
        log.warning("All nodes run again: the server does not say what has completed: %s", error)
        return "", {}
    # By attempt first: clocks can be set back.
    runs.sort(key=lambda run: (run.flow_run_run_count, run.expected_start_time or run.created))
    _, fingerprint, session_id, *_ = runs[-1].task_key.split("/") if runs else [""] * 3
    if fingerprint != runner._fingerprint:
        changed = "parameters or nodes are others than before" if runs else "none has been run"
        log.warning("All nodes run again: %s", changed)
        return "", {}
    ours = [run for run in runs if f"/{session_id}/" in run.task_key]
    return session_id, {run.task_key.split("/", 4)[4]: run for run in ours}


def _resume(opened: _Opened, runner: PrefectRunner, options: Options) -> Options | None:
    """Leave out what earlier attempts of this flow run have completed; None: that is all."""
    log, (session_id, last) = get_run_logger(), _find_earlier(runner)
    session, context, whole = opened
    if session_id:
        _adopt_session_id(session, session_id)
    made = _load_catalog(session, context, options)
    session.load_context = lambda *_, **__: context  # session.run calls no hook a second time
    context._get_catalog = lambda **_: made
    # Hooks that session.run calls get the catalog as it is, and what they change is in no key.
    pipeline = _group(whole, runner._group_by)
    catalog = made if last else _copy_catalog(made)
    records: defaultdict[str, _Record] = defaultdict(_Record)
    run = _Run(
        {}, catalog, None, False, session.session_id, runner._fingerprint, records, kept=set()
    )
    if not last:
        with suppress(Exception):  # in session.run Kedro says what is wrong, and calls its hook
            runner._share(catalog, pipeline)
            runner._keys = {node.name: _task_key(node, run) for node in pipeline.nodes}
        return options
    runner._share(catalog, pipeline)
    runner._keys = {node.name: _task_key(node, run) for node in pipeline.nodes}
    again = _find_what_runs_again(pipeline, run, last)
    runner._resumed = {node: last[node.name] for node in pipeline.nodes if node not in again}
    completed = sum(run.state.is_completed() for run in last.values())
    counts = f"{completed} of {len(pipeline.nodes)}"
    log.info("Resuming session %s: %s nodes had completed", session_id, counts)
    for node in list(again)[:NAMES_SHOWN]:
        log.info("Runs again: %s (%s)", node.name, again[node])
    ordered = [node for node in pipeline.nodes if node in again]
    names = [member.name for node in ordered for member in _members(node)]
    return options | {"node_names": names, "run_id": session_id} if names else None


async def _set_retries(flow_run: Any, retries: int = 0, retry_delay_seconds: int = 0) -> None:
    """Set what section flow of prefect.yml says; the server decides at the end of the flow run."""
    policy = flow_run.empirical_policy
    policy.retries, policy.retry_delay = retries, retry_delay_seconds
    async with _client() as client:
        await client.update_flow_run(flow_run.id, empirical_policy=policy)


# ---- Logs, and the account of a run: what the pages of flow run and task runs show ----


class _RunLogs(logging.Handler):
    """Sends the log lines of a flow run to Prefect, many at once.

    Prefect's own handlers check and measure each line, and hand it on between three threads: that
    takes ten times as long, and without a server the lines are lost.
    """

    def __init__(self, flow_run_id: str) -> None:
        super().__init__()
        self._flow_run_id = flow_run_id
        longest = prefect.settings.PREFECT_LOGGING_TO_API_MAX_LOG_SIZE.value()
        self._longest = min(LOG_SHOWN, max(0, longest - 500))  # for what is sent with the text
        self._lines: list[Options] = []
        self._lost = 0
        self._problem: Exception | None = None
        self._ended = threading.Event()
        _senders.append(_start_beside(self._send_lines))

    def emit(self, record: logging.LogRecord) -> None:
        flow_run_id, task_run_id = (getattr(record, f"{k}_run_id", None) for k in ("flow", "task"))
        if flow_run_id is None:
            flow_run_id = self._flow_run_id  # in a thread that a node has started
            if context := cast("Any", TaskRunContext.get()):
                flow_run_id, task_run_id = context.task_run.flow_run_id, str(context.task_run.id)
            elif context := cast("Any", FlowRunContext.get()):
                flow_run_id = context.flow_run.id
        if str(flow_run_id) != self._flow_run_id or not getattr(record, "send_to_api", True):
            return
        record.send_to_api = False  # by Prefect's handlers, or by this one behind another logger
        try:
            text = self.format(record)[: self._longest].encode(errors="backslashreplace").decode()
            moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat()
            self._lines.append({
                "flow_run_id": self._flow_run_id, "task_run_id": task_run_id, "message": text,
                "name": record.name, "level": record.levelno, "timestamp": moment,
            })  # fmt: skip
        except Exception:
            self.handleError(record)

    async def _create_logs(self) -> None:
        async with _client() as client:
            # What there is now: sending may be logged as well.
            for _ in range(0, len(self._lines), LINES_SENT):
                lines = self._lines[:LINES_SENT]
                try:
                    await client.create_logs(lines)
                except PrefectHTTPStatusError as error:  # they would be refused again
                    self._lost, self._problem = self._lost + len(lines), error
                del self._lines[: len(lines)]

    def _send_lines(self) -> None:
        """Send what there is, time and again; without a server it stays for the next time."""
        interval, has_ended = prefect.settings.PREFECT_LOGGING_TO_API_BATCH_INTERVAL.value(), False
        while not has_ended:
            has_ended = self._ended.wait(interval)
            try:
                _call_api(self._create_logs())
            except Exception as error:
                self._problem = error
        if lost := self._lost + len(self._lines):
            log = logging.getLogger("kedro")
            log.warning("%d log lines are not in Prefect: %r", lost, self._problem)

    def close(self) -> None:
        """Have what is left sent while Prefect records how the flow ends."""
        self._ended.set()
        super().close()


@contextmanager
def _logs_to_prefect() -> Iterator[None]:
    """Send what Prefect, Kedro, the project and PREFECT_LOGGING_EXTRA_LOGGERS log, once."""
    if not prefect.settings.PREFECT_LOGGING_TO_API_ENABLED.value():
        yield
        return
    extra = prefect.settings.PREFECT_LOGGING_EXTRA_LOGGERS.value() or ()
    wanted = {"kedro", _flow_name(), *extra}
    handler, added = _RunLogs(str(runtime.flow_run.id)), []
    for logger in map(logging.getLogger, {*wanted, *logging.root.manager.loggerDict}):
        others = [other for other in logger.handlers if isinstance(other, APILogHandler)]
        if others or logger.name in wanted:
            ours = copy(handler)  # which keeps its lines in the same list
            for name in ("level", "filters", "formatter") if others else ():
                setattr(ours, name, getattr(others[0], name))
            logger.handlers.insert(0, ours)  # before Prefect's, which leave out what it has taken
            added.append((logger, ours))
    try:
        yield
    finally:
        for logger, ours in added:
            logger.removeHandler(ours)
        handler.close()


def _describe_run(runner: PrefectRunner, error: BaseException | None) -> str:
    """Account for a run in Markdown."""
    lines = [f"## {_plain(runtime.flow_run.name)} has {'failed' if error else 'completed'}\n"]
    if error:
        text, _ = _text_of(error)
        lines += [_code(f"{type(error).__name__}: {text[:TEXT_SHOWN]}"), ""]
    if runner._suggestion:
        lines += [f"As Kedro says:\n\n{_code(runner._suggestion)}\n"]
    if runner._account is None:
        return "\n".join([*lines, "No node was run."])
    pipeline, catalog, records = runner._account
    states = {node.name: records[node.name].state for node in pipeline.nodes}
    counts = ", ".join(f"{count} {state}" for state, count in Counter(states.values()).items())
    seconds = sum(record.seconds for record in records.values() if record.state != "resumed")
    lines += [f"{len(states)} nodes: {counts}; {seconds:.1f} s of work\n"]
    lines += [_picture(pipeline, states)]
    lines += ["\n| node | state | start | seconds | attempts | reads \u2192 writes |"]
    lines += ["|---|---|---|---|---|---|"]
    for node in pipeline.nodes:
        record = records[node.name]
        start = f"{record.start:%H:%M:%S}" if record.start else ""
        data = "<br>".join(
            [*map(_plain, node.inputs), *(f"\u2192 {_plain(n)}" for n in node.outputs)]
        )
        about = (
            _plain(node.name),
            record.state,
            start,
            f"{record.seconds:.1f}",
            record.attempts,
            data,
        )
        lines.append(f"| {' | '.join(map(str, about))} |")
    lines += ["\nTimes are UTC.\n\n| dataset | where it lives |\n|---|---|"]
    for name in sorted(pipeline.all_inputs() | pipeline.all_outputs()):
        dataset = _get_dataset(catalog, name)
        if not (_is_parameter(name) or _is_in_memory(_inner(dataset))):
            where = _where(name, dataset).replace(f"{PROJECT_PATH}/", "")
            lines.append(f"| {_plain(name)} | {_plain(where)} |")
    return "\n".join(lines)


def _give_account(runner: PrefectRunner, error: BaseException | None) -> None:
    """Show how it went with each node; what goes wrong with that is a warning.

    It is sent while Prefect records how the flow ends: a server that is busy takes its time.
    """

    def send() -> None:
        try:
            text = _describe_run(runner, error)
            _call_api(_create_artifact("markdown", f"{_package_key()}-run", text), SERVER_TIMEOUT)
        except Exception as problem:
            logging.getLogger("kedro").warning("No account of this run in Prefect: %r", problem)

    if runner._has_artifacts:
        _senders.append(_start_beside(send))


# ---- Flow ----


@task(persist_result=False)
def kedro_init(options: Options) -> Any:
    """Bootstrap the project, and make the Kedro session and the runner of this flow run."""
    _started[runtime.flow_run.id] += 1
    logger = get_run_logger()
    logger.info("Bootstrapping project")
    with _bearable_errors():
        metadata = _bootstrap(PROJECT_PATH)
        opened = _opened.pop() if _opened else _open(options, _pipeline_names(options))
        session, nodes = opened.session, opened.pipeline.nodes
        # Kedro names versions by the millisecond, in which another flow run may start as well.
        digits = f"{uuid.UUID(str(runtime.flow_run.id)).int % 1000:03}Z"
        _adopt_session_id(session, re.sub(r"(?<=\.\d{3})Z$", digits, session.session_id))
        config = _read_config(session, options)
    logger.info("Project %s: session created with ID %s", metadata.project_name, session.session_id)
    if config.flow:
        _call_api(_set_retries(cast("Any", FlowRunContext.get()).flow_run, **config.flow))
    place = _place_checkpoints(config, options)
    section = config.task_runner
    own = {name: section.pop(name) for name in ("is_async", "max_workers") if name in section}
    group_by = section.pop("group_by", None)
    if section.get("type") == "threads":  # which asks for nodes side by side
        several = _threads_that_prefect_is_set_to() or min(32, (os.cpu_count() or 1) + 4)
        own.setdefault("max_workers", several)
    runner = PrefectRunner(**own, task_options=config.tasks)
    runner._resume, runner._engine = section.pop("resume", True), section.pop("type", "threads")
    runner._engine_options, runner._group_by = section, group_by
    runner._has_artifacts = config.artifacts
    shape = [[node.name, node.inputs, node.outputs] for node in nodes]
    runner._fingerprint = _digest(options, shape)
    if place:
        folder = f"{place['url'].rstrip('/')}/{runtime.flow_run.id}"
        name = place.get("credentials", "")
        runner._checkpoints = _Checkpoints(folder, _read_credentials(session, options, name))
        runner._job = {
            "options": options, "folder": folder, "credentials": name, "group_by": group_by,
        }  # fmt: skip
        if runner._engine != "threads":
            runner._job["same"] = _same_everywhere(metadata)
    return opened, runner


def _run_pipeline(options: Options) -> dict[str, str]:
    """Do what `kedro run` does, and return where each output lives."""
    get_run_logger().info("Initializing Kedro...")
    with _bearable_errors(kedro_task, kedro_init.fn):
        if _CALLED_IN_THREADS and not _opened:  # nodes use what their modules have made: a database
            with suppress(click.ClickException):  # connection belongs to the thread that made it
                _opened.append(_open(options, _pipeline_names(options)))
        initialized: Any = kedro_init(options)
        opened, runner = initialized
        try:
            with _logs_to_prefect(), opened.session:
                if left := _resume(opened, runner, options):
                    _run_session(opened.session, runner, left)
            _end_checkpoints(runner._checkpoints, completed=True)
            _give_account(runner, None)
        except Exception as error:
            _end_checkpoints(runner._checkpoints, completed=False)
            _give_account(runner, error)
            remedies = () if _came_through(error, kedro_task) else _remedies(str(error), options)
            if text := "".join(remedies):
                raise click.ClickException(f"{error}{text}") from error
            raise
    outputs: dict[str, str] = runner._outputs
    return outputs


# Prefect stores the exception that ends a flow: as JSON that is its class and message, and not all
# that it refers to.
@flow(name=_flow_name(), persist_result=False, result_serializer="json")
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
    checkpoints: str = "",
) -> dict[str, str]:
    """Run a Kedro pipeline, each of its nodes as a Prefect task.

    Args:
        pipeline_name (str): Pipeline to run, or several: a,b (Kedro 1.2). Default: `__default__`.
        env (str): The Kedro configuration environment, a folder of `conf`. Default: `base`.
        runtime_params (dict): Values that win over parameters, nested as these are. Default: none.
        tags (list): Run only nodes with at least one of these Kedro tags. Default: all.
        node_names (list): Run only these nodes. Default: all.
        from_nodes (list): Run only these nodes and those behind them. Default: all.
        to_nodes (list): Run only these nodes and those before them. Default: all.
        from_inputs (list): Run only what needs these datasets. Default: all.
        to_outputs (list): Run only what these datasets need. Default: all.
        namespaces (list): Run only nodes in these namespaces; before Kedro 1.0 one. Default: all.
        load_versions (dict): From versioned dataset to the version to load. Default: the newest.
        only_missing_outputs (bool): Skip nodes whose outputs are there (Kedro 1.0). Default: false.
        conf_source (str): Folder, archive or URL of the configuration. Default: the project's own.
        checkpoints (str): URL for what nodes hand on (Kedro 0.19, Prefect 3). Default: prefect.yml.
    """
    return _run_pipeline(locals())


# ---- Deployment ----


async def _ask_server() -> None:
    async with _client() as client:
        if error := await client.api_healthcheck():
            raise error
        try:
            await client.read_flows(limit=1)  # anybody may ask for its health, but not for this
        except ValueError as error:
            raise OSError("what answers is not Prefect's API, whose URL ends in /api") from error


def _reach_server() -> None:
    """Refuse to register on a server that does not answer, or on none."""
    remedy = (
        "Start one with `prefect server start`, and name it with"
        " `prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`."
    )
    url = PREFECT_API_URL.value()
    if not url:
        raise click.ClickException(f"No Prefect server: PREFECT_API_URL is not set. {remedy}")
    with _server_errors(f"No Prefect server at {_without_credentials(url)}", remedy):
        _call_api(_ask_server(), SERVER_TIMEOUT)


async def _read_work_pool(client: Any, name: str, queue_name: str) -> Any:
    """Return a work pool that has the queue: Prefect would make one that nobody serves."""
    quoted, quoted_queue = shlex.quote(name), shlex.quote(queue_name)
    try:
        pool = await client.read_work_pool(name)
    except ObjectNotFound:
        pools = [pool.name for pool in await client.read_work_pools()]
        raise click.ClickException(
            f"There is no work pool '{name}'." + _close_matches(name, pools, "work pools")
            + f" Create it: prefect work-pool create --type {_SUGGESTED_POOL_TYPE} {quoted}"
        ) from None  # fmt: skip
    if pool.type == "prefect-agent" != _AGENT_POOL_TYPE:
        raise click.ClickException(
            f"Work pool '{name}' is for agents, which Prefect 3 does not have. Create one for"
            " workers: prefect work-pool create --type process <another name>"
        )
    queues = [queue.name for queue in await client.read_work_queues(work_pool_name=name)]
    if queue_name not in queues:
        raise click.ClickException(
            f"Work pool '{name}' has no queue '{queue_name}'."
            + _close_matches(queue_name, queues, "queues")
            + f" Create it: prefect work-queue create --pool {quoted} {quoted_queue}"
        )
    if pool.is_paused:
        resume = f"prefect work-pool resume {quoted}"
        click.echo(f"Warning: work pool '{name}' is paused. No run starts before: {resume}")
    return pool


def _timing(schedule: Any, names: Iterable[str]) -> list[str]:
    """Return what can be compared of a schedule from prefect.yml and one on the server."""
    values = [str(getattr(schedule, name, None) or "UTC") for name in sorted(names)]
    # The server adds the start that a rule without one has.
    return [value.removeprefix("DTSTART:20200101T000000\n") for value in values]


def _merge_schedules(wanted: list[Any], existing: Any) -> list[Any] | None:
    """Make the schedules; None where the deployment has just these: they keep starts and pauses."""
    found, made = _schedules(existing), []
    changed = len(found) != len(wanted)
    for schedule, names, others in wanted:
        timing = _timing(schedule, names)
        same = next((one for one in found if _timing(one.schedule, names) == timing), None)
        kept = {n: getattr(same, n, None) for n in ("active", "parameters", "slug")}
        kept = {name: value for name, value in kept.items() if value is not None}
        changed |= not same or kept != kept | others
        fields = {"schedule": same.schedule if same else schedule, "active": True}
        made.append(_make_schedule(**fields | kept | others))
    return made if changed else None


def _complete(plan: _Plan, level: str | None) -> _Deployment:
    """Add what depends on the deployment that is there; what nobody sets stays as it is."""
    wanted, existing = plan.deployment, plan.existing
    described = wanted.description
    old = getattr(existing, "description", None) or ""
    if described is None and (not old or _sign(old.rpartition("\n\n")[0]) == old):
        described = _sign(_describe(plan))
    default = {"env": {"PREFECT_LOGGING_LEVEL": "DEBUG"}}
    on_line = {"env": {"PREFECT_LOGGING_LEVEL": level}} if level else {}
    return wanted._replace(
        description=described,
        parameters=plan.options,
        version=wanted.version or (None if existing else "1.0"),
        schedules=_merge_schedules(wanted.schedules, existing) if wanted.schedules else None,
        job_variables=_merge(default, _job_variables(existing), wanted.job_variables, on_line),
    )


async def _look_up(plan: _Plan, level: str | None, serve: bool) -> _Plan:
    """Complete a deployment by what is on the server; check that pool and blocks are there."""
    deployment = plan.deployment
    async with _client() as client:
        with suppress(ObjectNotFound):
            existing = await client.read_deployment_by_name(plan.full_name)
            plan = plan._replace(existing=existing)
        complete = _complete(plan, level)
        if serve:
            if unused := ", ".join(sorted({"path", "source", "work_pool"} & plan.section.keys())):
                click.echo(f"Note: --serve runs in this process and folder, without {unused}.")
            return plan._replace(deployment=complete)
        used = getattr(plan.existing, "work_pool_name", None)
        name = deployment.work_pool_name or used or "default"
        used_queue = plan.existing.work_queue_name if used == name else None
        queue_name = deployment.work_queue_name or used_queue or "default"
        pool = await _read_work_pool(client, name, queue_name)
        try:  # as a run will
            await resolve_block_document_references(deployment.pull_steps, client=client)
        except (ObjectNotFound, ValueError) as error:
            source = _without_credentials(str(plan.section["source"]))
            raise click.ClickException(
                f"prefect.yml: deployment.source needs a block that is not there: {source} {error}"
            ) from error
    complete = complete._replace(work_pool_name=name, work_queue_name=queue_name)
    return plan._replace(deployment=complete, pool=pool)


def _offer(choices: dict[str, list[str]]) -> None:
    """Let Prefect 3's form offer what there is now, and take any other name: there may be new."""
    if _PREFECT_3:
        from pydantic import Field

        for name, names in choices.items():
            known: Any = Annotated[Literal[tuple(names)], Field(title="one of these")]
            my_flow.fn.__annotations__[name] = known | Annotated[str, Field(title="any other")]


def _place(pull_steps: list[Options] | None) -> str:
    """Say where the runs of a deployment find the project."""
    arguments: dict[str, str] = next(chain.from_iterable(s.values() for s in pull_steps or ()), {})
    return _without_credentials(arguments.get("directory") or arguments.get("repository") or "")


def _print_next_steps(plan: _Plan, deployment_id: Any) -> None:
    kind = "agent" if plan.pool.type == _AGENT_POOL_TYPE else "worker"
    queue_name = shlex.quote(plan.deployment.work_queue_name or "")
    where = f"--pool {shlex.quote(plan.pool.name)} --work-queue {queue_name}"
    ui = (PREFECT_UI_URL.value() or "").rstrip("/")
    click.echo(f"  see it:         {ui}/deployments/deployment/{deployment_id}")
    click.echo(f"  start {kind + ':':<9} prefect {kind} start {where}")
    click.echo(f"  start a run:    prefect deployment run {shlex.quote(plan.full_name)}")


def _register(plans: list[_Plan]) -> None:
    """Create or update deployments, a line of outcome for each."""
    for number, plan in enumerate(plans, start=1):
        deployment, existing = plan.deployment, plan.existing
        rest = "".join(f" Not registered either: {later.full_name}." for later in plans[number:])
        with _server_errors(f"Deployment '{plan.full_name}' is not registered", rest):
            for_agent = plan.pool.type == _AGENT_POOL_TYPE
            save = _save_deployment(my_flow, deployment, existing, for_agent)
            deployment_id = _call_api(save, REGISTER_TIMEOUT)
        click.echo(f"Registered deployment '{plan.full_name}' with id {deployment_id}")
        before, now = _place(existing and existing.pull_steps), _place(deployment.pull_steps)
        if before not in ("", now):
            click.echo(f"  until now it ran in {before}, from now on in {now}")
        if len(plans) == 1:
            _print_next_steps(plan, deployment_id)


def _serve(plan: _Plan) -> None:
    """Register a deployment, and run what is asked of it in processes of this one's."""
    from prefect.deployments.runner import DeploymentApplyError
    from prefect.flows import serve

    served: Any = my_flow.to_deployment(plan.deployment.name)
    fields = plan.deployment._replace(work_pool_name=None, work_queue_name=None).fields()
    del fields["pull_steps"], fields["job_variables"]
    for name, value in fields.items():
        setattr(served, name, value)
    # What is not set stays as it is on the server.
    served.model_fields_set.intersection_update({"name", "flow_name", *fields})
    try:
        serve(served)
    except DeploymentApplyError as error:
        raise click.ClickException(f"'{plan.full_name}' is not registered: {error}") from error


# ---- Command line ----


@contextmanager
def _interruptible(server: Any) -> Iterator[None]:
    """Let the first Ctrl-C end a run in order, and a second one this process at once."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, end)
        # Not printed: it may have come in a print.
        os.write(2, b"Stopping: no other node starts. Ctrl-C again ends at once.\n")
        raise KeyboardInterrupt

    def end(*_: Any) -> None:
        if server:
            server.kill()
        os._exit(130)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _terminal_progress(nodes: int) -> Iterator[None]:
    """Show on a terminal, below the log lines, how many nodes have completed and which run."""
    import rich.live

    console = rich.get_console()  # that of Kedro's log handler
    if not console.is_terminal:
        yield
        return

    def line() -> str:
        records = list(_latest[0].items())
        done = sum(record.state == "completed" for _, record in records)
        names = [name for name, r in records if r.start and not r.seconds and not r.error]
        running = f"; running: {', '.join(names[:NAMES_SHOWN])}" if names else ""
        return f"{done} of {nodes} nodes completed{running}"

    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    handlers: set[Any] = {h for logger in loggers for h in logger.handlers if hasattr(h, "console")}
    before = {handler: handler.console for handler in handlers}
    for handler in handlers:  # Prefect's: what they write has to move the line as well
        handler.console = console
    try:
        with rich.live.Live(get_renderable=line, console=console, transient=True):
            yield
    finally:
        for handler, own in before.items():
            handler.console = own


def _print_seconds() -> None:
    """Print how long each node took, the slowest first."""
    records = sorted(_latest[0].items(), key=lambda item: item[1].seconds, reverse=True)
    for name, record in records[:NAMES_SHOWN]:
        click.echo(f"  {record.seconds:8.1f} s  {name}  {record.state}")
    if len(records) > NAMES_SHOWN:
        click.echo(f"  and {len(records) - NAMES_SHOWN} more, which took no longer")


def _run_now(plan: _Plan) -> None:
    """Run the flow in this process; exit code 1 if it fails, 130 if Ctrl-C ends it."""
    has_server = bool(PREFECT_API_URL.value())  # without, Prefect starts its embedded one
    if has_server:
        _reach_server()
    state: Any = None
    with (
        nullcontext() if has_server else _embedded_server() as server,
        _interruptible(server),
        _terminal_progress(len(plan.pipeline.nodes)),
    ):
        _opened.append(plan.opened)
        with suppress(KeyboardInterrupt):
            state = my_flow(**plan.deployment.parameters, return_state=True)
        for sender in _senders:  # before the server stops
            sender.join(SERVER_TIMEOUT)
        if server and _started:
            # It stops with this process, and loses what it has not recorded.
            flow_run_id, expected = next(reversed(_started.items()))
            _call_api(_read_task_runs(flow_run_id, expected, patience=10 if state else 2))
    _print_seconds()
    if state is None:
        click.echo("Stopped by Ctrl-C.", err=True)
        sys.exit(130)
    if not state.is_completed():
        raise click.ClickException(f"The flow run ended as {state.name}. {state.message or ''}")
    click.echo("The flow run has completed. Its outputs:")
    # A slow server may have been told twice; its answer to that is a state without data.
    for name, where in (state.result() if state.data else {}).items():
        click.echo(f"  {name}: {where}")


def _check_usage(given: Options, deployment_name: str) -> None:
    """Refuse what Prefect would refuse, and options that would do nothing."""
    _check_name(deployment_name)
    ways = ("run", "serve", "all_deployments", "clean_checkpoints")
    how = [name for name in ways if name in given]
    if len(how) > 1 or ("all_deployments" in given and "deployment_name" in given):
        names = " and ".join(f"--{name}" for name in [*how, "deployment_name"][:2])
        raise click.UsageError(f"{names} exclude each other.")
    if "serve" in given:
        _need(prefect, "3.2", "--serve")
    for option in ("work_pool_name", "work_queue_name", "logging_level"):
        if option in given and given.keys() & {"run", "serve"}:
            raise click.UsageError(
                f"--{option} is for work pools: leave it out with --{how[0]}."
                + (" Set PREFECT_LOGGING_LEVEL instead." if option == "logging_level" else "")
            )


def _choose_sections(config: _Config, given: Options, name: str) -> Options:
    """Return what prefect.yml says of the deployments that are asked for, by name."""
    if "run" in given and "deployment_name" not in given:
        return {name: {}}
    sections = _deployment_sections(config)
    if "all_deployments" in given:
        if not sections:
            raise click.ClickException("--all_deployments: prefect.yml has none under deployments.")
        return sections
    if sections and name not in sections:
        note = f"Note: prefect.yml has no deployment '{name}': only its section deployment holds."
        click.echo(note + _close_matches(name, sections, "deployments"))
    return {name: sections.get(name, config.deployment)}


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
    ("checkpoints", "--checkpoints", None, "URL", "For what nodes hand on; see README."),
)  # fmt: skip


def _parse_as_kedro(parse: Any, context: click.Context, option: Any, value: Any) -> Any:
    try:
        return parse(context, option, value) if parse else value
    except click.UsageError:
        raise
    except Exception as error:  # Kedro's prints itself without its message
        raise click.BadParameter(getattr(error, "message", str(error))) from None


def _kedro_run_options(command: Any) -> Any:
    """Add the options of `kedro run` that become flow parameters."""
    for name, spelling, parse, form, about in reversed(_KEDRO_RUN_OPTIONS):
        callback = functools.partial(_parse_as_kedro, parse)
        options: Options = {"callback": callback, "metavar": form, "help": about}
        names = (name, *spelling.split())
        command = click.option(*names, default="", show_default=False, **options)(command)
    return command


# Kedro's recipe spells its options with underscores, most other commands with hyphens: both do.
@click.command(
    epilog=f"register_prefect_flow.py {__version__}",
    context_settings={
        "show_default": True,
        "token_normalize_func": lambda name: name.replace("-", "_"),
    },
)
@click.option(
    "-p", "--pipeline", "--pipelines", "pipeline_name", default="__default__",
    help="Registered pipeline to run, or several: a,b (Kedro 1.2).",
)  # fmt: skip
@click.option(
    "-e", "--env", default="base", envvar="KEDRO_ENV", help="Kedro environment; or set KEDRO_ENV."
)
@_kedro_run_options
@click.option("--only-missing-outputs", is_flag=True, help="Only nodes whose outputs are missing.")
@click.option("--deployment_name", default="example", help="Deployment to create or update.")
@click.option("--all_deployments", is_flag=True, help="Each deployment that prefect.yml describes.")
@click.option("--work_pool_name", default="default", help="Work pool that runs are sent to.")
@click.option("--work_queue_name", default="default", help="Queue in the work pool.")
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
@click.option("--clean_checkpoints", is_flag=True, help="Remove those nobody needs; nothing else.")
@click.pass_context
def prefect_deploy(
    context: click.Context, /, deployment_name: str, run: bool, serve: bool, dry_run: bool, **_: Any
) -> None:
    """Register a Kedro pipeline as a Prefect deployment, or run it as a flow."""
    default = (click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)
    given = {
        k: v for k, v in context.params.items() if context.get_parameter_source(k) not in default
    }
    _check_usage(given, deployment_name)
    options = {name: context.params[name] for name in _PARAMETERS}
    project = _load_project(options)
    if "clean_checkpoints" in given:
        _reach_server()
        return _clean_checkpoints(project[1], options)
    sections = _choose_sections(project[1], given, deployment_name)
    with_catalog = dry_run or not run  # a run loads it itself, and calls the hooks once
    plans = [
        _make_plan(project, _read_deployment(name, section, given, options), section, with_catalog)
        for name, section in sections.items()
    ]
    for plan in plans if dry_run else ():
        _print_plan(plan)
    if run:
        return None if dry_run else _run_now(plans[0])
    _reach_server()
    with _server_errors("Nothing is registered"):
        level = given.get("logging_level")
        plans = [_call_api(_look_up(plan, level, serve), SERVER_TIMEOUT) for plan in plans]
    if dry_run:
        return None
    environments = _list_environments(Path(_locate_conf(options))) or [options["env"]]
    _offer({"pipeline_name": list(pipelines), "env": environments})
    return _serve(plans[0]) if serve else _register(plans)


if __name__ == "__main__":
    prefect_deploy()
