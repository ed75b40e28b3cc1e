"""Register this Kedro project's pipeline as a Prefect deployment: each node becomes a task.

Copy this file into the root of a Kedro project, next to pyproject.toml. Then

    python register_prefect_flow.py --run                # run the pipeline now, in this process
    python register_prefect_flow.py --dry_run --run      # check everything, show what would run
    python register_prefect_flow.py --work_pool_name X   # register it, for agents and workers

Everything is checked before anything is registered. In a flow run a failing node stops only those
that need its output. Everything else is what `kedro run` does, because Kedro does it.

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
import textwrap
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from copy import copy, deepcopy
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import chain, filterfalse
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

THIS_FILE = Path(__file__).absolute()
PROJECT_PATH = THIS_FILE.parent
if __name__ == "__main__":
    # As with `kedro run`: and Kedro looks for conf/logging.yml when it is imported.
    os.chdir(PROJECT_PATH)

import click
import kedro
import prefect
from click import ClickException

__version__ = "1.0.0"
Options = dict[str, Any]
FILTERS = (
    "tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "to_outputs", "namespaces",
)  # fmt: skip
NAMES_SHOWN = 50  # in an error that lists what there is
TEXT_SHOWN, LOG_SHOWN = 10_000, 100_000  # characters of an exception, of a log line, in Prefect
PREVIEW_SHOWN = 1_000_000  # characters of a dataset's preview that Prefect shows and stores
NODES_DRAWN, NAME_DRAWN = 300, 22  # nodes in a picture of a pipeline, characters of a name
SERVER_TIMEOUT = 10  # seconds in which a Prefect server has to answer


# ---- Compatibility: whatever differs between versions has one name and one signature here ----


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


_KEDRO_1, _PREFECT_3 = _version(kedro.__version__) >= (1,), _version(prefect.__version__) >= (3,)

for _name, _found, _floor in (
    ("Python", sys.version.split()[0], "3.10"),
    ("Kedro", kedro.__version__, "0.18.10"),
    # 3.0 and 3.1 replace what users set in the UI, each time that something is registered.
    ("Prefect", prefect.__version__, "3.2" if _PREFECT_3 else "2.10.17"),
):
    if _version(_found) < _version(_floor):
        _problem = f"needs {_name} {_floor} or newer, and this is {_name} {_found}."
        _remedy = f" pip install '{_name.lower()}>={_floor}'" * (_name != "Python")
        raise SystemExit(f"Error: register_prefect_flow.py {_problem}{_remedy}")

from kedro import io as kedro_io
from kedro.config import AbstractConfigLoader, MissingConfigException
from kedro.framework.cli import utils as cli
from kedro.framework.project import pipelines, settings
from kedro.framework.session import KedroSession
from kedro.framework.startup import ProjectMetadata, _get_project_metadata, bootstrap_project
from kedro.logging import RichHandler
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from kedro.runner import SequentialRunner
from prefect import Task, flow, get_client, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import PrefectClient
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings
from prefect.utilities.callables import parameter_schema

try:  # Kedro 0.19.10 put Task in the place of run_node, which 1.0 removed.
    from kedro.runner import Task as _KedroTask
except ImportError:
    from kedro.runner import run_node as _run_node  # type: ignore[attr-defined,unused-ignore]
else:

    def _run_node(node: Any, catalog: Any, hook_manager: Any, is_async: bool, run_id: Any) -> None:
        _KedroTask(node, catalog, is_async, hook_manager, run_id).execute()


# Kedro 0.18.12 renamed them.
_Dataset: Any = vars(kedro_io).get("AbstractDataset", vars(kedro_io).get("AbstractDataSet"))
_CachedDataset: Any = vars(kedro_io).get("CachedDataset", vars(kedro_io).get("CachedDataSet"))


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


# Prefect 2 lacks this setting.
_THREADS: Any = getattr(prefect.settings, "PREFECT_TASKS_RUNNER_THREAD_POOL_MAX_WORKERS", None)

if _PREFECT_3:
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.client.schemas.objects import TaskRunResult
    from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS
    from prefect.task_engine import run_task
    from prefect.task_runners import ThreadPoolTaskRunner

    _AGENT_POOL_TYPE, _SUGGESTED_POOL_TYPE = "", "process"
    _CALLED_IN_THREADS = False  # a task that is called runs in the thread that calls it

    @contextmanager
    def _task_runner(max_workers: int) -> Iterator[Callable[..., None]]:
        """Yield what runs a task, behind states of others: if one worker does, in this thread."""
        runner: ThreadPoolTaskRunner[None] = ThreadPoolTaskRunner(max_workers=max_workers)

        def start(task: Any, needed: list[Any], hand_on: Callable[[Any], None]) -> None:
            # Prefect loads the result behind each state, which earlier runs have not kept: one that
            # failed is enough to wait for, and edges can be drawn without.
            failed: list[Any] = [state for state in needed if not state.is_completed()]
            ids = {state.state_details.task_run_id for state in needed}
            about: Any = {"parameters": {}, "wait_for": failed[:1] or [None]}
            about["dependencies"] = {"wait_for": {TaskRunResult(id=each) for each in ids}}
            if max_workers == 1:
                hand_on(run_task(task, return_type="state", **about))
                return

            def done(future: Any) -> None:
                with suppress(KeyboardInterrupt):  # of a node, whose record has it
                    future.wait()
                hand_on(future._final_state)

            runner.submit(task, **about).add_done_callback(done)

        with runner if max_workers > 1 else nullcontext():
            yield start

    @contextmanager
    def _embedded_server() -> Iterator[bool]:
        """Start the server that Prefect needs where none is set."""
        from prefect.server.api.server import SubprocessASGIServer

        # It makes its database at its first start: 12 s on a fast machine. Prefect waits 20 s.
        patience = {PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 60}
        with temporary_settings(set_defaults=patience):
            # Ctrl-C reaches all processes of a terminal, and this one has to record how the run
            # ends. What is blocked stays so in a child. Windows blocks nothing.
            block = getattr(signal, "pthread_sigmask", lambda *_: None)
            block(getattr(signal, "SIG_BLOCK", 0), {signal.SIGINT})
            try:
                SubprocessASGIServer().start()
            finally:
                block(getattr(signal, "SIG_UNBLOCK", 0), {signal.SIGINT})
            yield True

    async def _save_deployment(
        flow: Any, name: str, fields: Options, existing: Any, for_agent: bool
    ) -> Any:
        """Create or update a deployment; what is not set stays as it is on the server."""
        del for_agent  # Prefect 3 has none
        fields["parameter_openapi_schema"] = parameter_schema(flow).model_dump(exclude_unset=True)
        async with get_client() as client:
            if existing:
                await client.update_deployment(existing.id, DeploymentUpdate(**fields))
                return existing.id
            flow_id = await client.create_flow_from_name(flow.name)
            return await client.create_deployment(flow_id, name, **fields)

else:
    _AGENT_POOL_TYPE = "prefect-agent"  # Agents gave way to workers in Prefect 2.16.4.
    _OLD = _version(prefect.__version__) < (2, 16, 4)
    _SUGGESTED_POOL_TYPE = _AGENT_POOL_TYPE if _OLD else "process"
    _embedded_server = nullcontext  # type: ignore[assignment]  # it is no process of its own
    _CALLED_IN_THREADS = True  # as submitted ones do

    @contextmanager
    def _task_runner(max_workers: int) -> Iterator[Callable[..., None]]:
        del max_workers  # nobody but PrefectRunner limits how many tasks are submitted

        def start(task: Any, needed: list[Any], hand_on: Callable[[Any], None]) -> None:
            future = task.submit(wait_for=needed)
            # Futures have no callbacks before Prefect 3: a thread waits for each of the few.
            threading.Thread(target=lambda: hand_on(future.wait()), daemon=True).start()

        yield start

    async def _save_deployment(
        flow: Any, name: str, fields: Options, existing: Any, for_agent: bool
    ) -> Any:
        """Create or replace a deployment; what is not set is sent as it is on the server."""
        accepted = inspect.signature(PrefectClient.create_deployment).parameters
        kept = {"version", "tags", "description", "paused", "enforce_parameter_schema"}
        kept |= {"schedules"} if "schedules" in accepted else {"schedule", "is_schedule_active"}
        there: Options = {each: getattr(existing, each) for each in kept if hasattr(existing, each)}
        if "schedules" in there:  # Prefect 2.16 brought several
            from prefect.client.schemas.actions import DeploymentScheduleCreate as Schedule

            of_server = there["schedules"]
            there["schedules"] = [Schedule(schedule=s.schedule, active=s.active) for s in of_server]
        fields = there | fields | {"parameter_openapi_schema": parameter_schema(flow).dict()}
        if for_agent:  # for which job variables hold in infrastructure blocks only
            from prefect.infrastructure import Process

            fields["infrastructure_document_id"] = await Process()._save(is_anonymous=True)
        if "job_variables" not in accepted:  # Prefect 2.19 renamed them
            fields["infra_overrides"] = fields.pop("job_variables")
        async with get_client() as client:
            flow_id = await client.create_flow_from_name(flow.name)
            return await client.create_deployment(flow_id, name, **fields)


# ---- Errors: what a user can mend is one message without a traceback ----

_ENGINES_NEED = {"kedro": "0.19", "prefect": "3.2"}  # and checkpoints: not tried with older ones


def _need(what: str, **versions: str) -> None:
    """Refuse what came with a later version of Kedro or Prefect than this."""
    for package in (kedro, prefect):
        name, found = package.__name__, package.__version__
        if _version(found) < _version(floor := versions.get(name, "0")):
            problem = f"{what} needs {name.title()} {floor} or newer, and this is {name.title()}"
            remedy = f"leave it out, or pip install '{name}>={floor}'"
            raise ClickException(f"{problem} {found}: {remedy}")


def _unknown(problem: str, name: str, names: Iterable[str], kind: str, remedy: str = "") -> Any:
    """Return an error with names that are spelled like the one asked for, and those there are."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    there = f" The {kind} are: {', '.join(names[:NAMES_SHOWN]) or 'none'}{more}."
    return ClickException(problem + hint + there + remedy)


def _import(name: str, package: str, what: str) -> Any:
    """Import what is needed by those only who use it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        problem = f"prefect.yml: {what} needs {package}, which is not installed where the flow runs"
        raise ClickException(f'{problem}: pip install "{package}"') from error


@contextmanager
def _project_errors(doing: str) -> Iterator[None]:
    """Say in one line what the project's own code or configuration raised, and where."""
    try:
        yield
    except ClickException:
        raise
    except Exception as error:
        where = ""
        for frame in traceback.extract_tb(error.__traceback__):
            path = Path(frame.filename)
            is_ours = path == THIS_FILE or path.is_relative_to(sys.prefix)  # may be in the project
            if path.is_relative_to(PROJECT_PATH) and not is_ours:
                where = f"\n  at {path}, line {frame.lineno}"
        message = f"{doing} failed.\n  {type(error).__name__}: {error}{where}"
        raise ClickException(message) from error


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
        remedy = error.response.text[:1000] + remedy
        raise ClickException(f"{problem}: {reason}. {remedy}") from error
    except (httpx.HTTPError, OSError, asyncio.TimeoutError) as error:
        reason = str(error) or f"no answer within {SERVER_TIMEOUT} s"
        raise ClickException(f"{problem}: {reason}. {remedy}") from error


def _call_api(coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
    """Run a call of Prefect's client, whether or not the caller has an event loop."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        call = asyncio.wait_for(coroutine, timeout)
        return thread.submit(contextvars.copy_context().run, asyncio.run, call).result()


# ---- Project: environment, pipeline, catalog ----


@functools.cache  # a second time would load all pipelines again
def _bootstrap(project_path: Path) -> ProjectMetadata:
    metadata, handlers = bootstrap_project(project_path), logging.getLogger().handlers
    for index, handler in enumerate(handlers):
        # Into a file, Kedro's Rich handler would draw each line in a millisecond.
        if isinstance(handler, RichHandler) and not handler.console.is_terminal:
            with suppress(AttributeError):  # and a worker stops reading at what is no UTF-8
                cast("Any", handler.console.file).reconfigure(errors="backslashreplace")
            handlers[index] = plain = logging.StreamHandler(handler.console.file)
            plain.setLevel(handler.level)
            layout = "%(asctime)s | %(levelname)-7s | %(name)s - %(message)s"
            plain.setFormatter(logging.Formatter(layout))
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
    with suppress(importlib.metadata.PackageNotFoundError):
        if _version(importlib.metadata.version(name)) < (0, 6) and not decided:
            problem = f"{name} would stop every flow run to ask for consent: decide in a file"
            raise ClickException(f"{problem}: cp .telemetry.example .telemetry")


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


def _check_environment(options: Options) -> None:
    conf, env = Path(_locate_conf(options)), _environment(options)
    if options["conf_source"] and "://" not in options["conf_source"] and not conf.exists():
        raise ClickException(f"There is no configuration at {conf}: give another conf_source")
    # A project's own config loader may keep environments elsewhere than in folders.
    loader = settings.CONFIG_LOADER_CLASS
    is_own = loader.__base__ is AbstractConfigLoader and not loader.__module__.startswith("kedro.")
    if conf.is_dir() and not (conf / env).is_dir() and not is_own:
        there = [path.name for path in conf.iterdir() if path.is_dir() and path.name[0] != "."]
        problem = f"Environment '{env}' has no folder {conf / env}."
        raise _unknown(problem, env, there, "environments")


def _open_session(options: Options) -> Any:
    """Make the Kedro session of a run; it loads nothing yet."""
    conf_source = options["conf_source"] and _locate_conf(options)
    with _project_errors("Making a Kedro session"):
        return _create_session(_environment(options), conf_source, options["runtime_params"])


def _adopt_session_id(session: Any, session_id: str) -> None:
    session.session_id = session_id
    if hasattr(session, "_store"):
        session._store["session_id"] = session_id


def _load_conf(session: Any, options: Options, kind: str) -> Any:
    """Load the catalog or credentials with the project's own config loader; none: nothing."""
    with suppress(MissingConfigException):
        return _call_with_params(session._get_config_loader, options)[kind]
    return {}


def _read_credentials(session: Any, options: Options, name: str) -> Options:
    """Return an entry of credentials.yml; without a name, nothing."""
    if not name:
        return {}
    found = _load_conf(session, options, "credentials")
    if name not in found:
        problem = f"There are no credentials '{name}' in environment '{options['env']}'."
        raise _unknown(problem, name, found, "credentials")
    return cast("Options", found[name])


def _pipeline_names(options: Options) -> list[str]:
    """Name the pipelines as `kedro run` does: none, if it is the default one."""
    names = list(dict.fromkeys(name.strip() for name in options["pipeline_name"].split(",")))
    return [] if names == ["__default__"] else names


def _is_parameter(name: str) -> bool:
    return name == "parameters" or name.startswith("params:")


def _plain_name(dataset: str) -> str:
    """Return a dataset's name without the transcoding."""
    return dataset.partition("@")[0]


def _namespaces(node: Node) -> set[str]:
    """Return the namespaces that a node is in: for a.b, that is a and a.b."""
    parts = (node.namespace or "").split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)} - {""}


def _explain_filters(problem: str, pipeline: Pipeline, options: Options) -> Any:
    """Return an error that names a value of a filter that is not in the pipeline."""
    nodes = {node.name for node in pipeline.nodes}
    datasets = pipeline.all_inputs() | pipeline.all_outputs()
    tags = set(chain.from_iterable(node.tags for node in pipeline.nodes))
    spaces = set(chain.from_iterable(map(_namespaces, pipeline.nodes)))
    known = [tags, nodes, nodes, nodes, datasets, datasets, spaces]
    for kind, there in zip(FILTERS, known, strict=True):
        for value in set(options[kind]) - there:
            return _unknown(f"{problem}\n  {kind}: '{value}'.", value, there, kind)
    return ClickException(problem)


_Opened = tuple[Any, Any, Pipeline]  # session, context and nodes of a project opened for a run
_opened: list[_Opened] = []  # by --run, for the flow: Prefect hands on no objects
_opening = threading.Lock()  # a process has one list of pipelines, and may have several runs


def _load_pipeline(options: Options) -> Pipeline:
    """Return the nodes that a run asks for; refuse what cannot be right, or not with this Kedro."""
    names = _pipeline_names(options) or ["__default__"]
    for what, is_asked_for, floors in (
        ("checkpoints", options["checkpoints"], _ENGINES_NEED),
        ("only_missing_outputs", options["only_missing_outputs"], {"kedro": "1.0"}),
        ("More than one of namespaces", options["namespaces"][1:], {"kedro": "1.0"}),
        ("More than one pipeline at once", names[1:], {"kedro": "1.2"}),
    ):
        _need(what, **floors if is_asked_for else {})
    with _project_errors("Loading the pipelines (pipeline_registry.py)"):
        found: Any = {name: pipelines.get(name) for name in names}
        if None in found.values():
            _request_pipelines([])
            registered = list(pipelines)
    for name, pipeline in found.items():
        if pipeline is None:
            raise _unknown(f"There is no pipeline '{name}'.", name, registered, "pipelines")
        if not pipeline.nodes:
            raise ClickException(f"Pipeline '{name}' is empty: it has no node to run.")
    whole = sum(found.values(), Pipeline([]))
    try:
        return _filter_pipeline(whole, options)
    except ValueError as error:
        problem = f"Filtering pipeline '{options['pipeline_name']}': {error}"
        raise _explain_filters(problem, whole, options) from error


def _open(options: Options, names: Iterable[str] = ()) -> _Opened:
    """Make session, context and pipelines, in Kedro's order; of the pipelines those with names."""
    package = _bootstrap(PROJECT_PATH).package_name
    _check_environment(options)
    # What a hook reads from the context may shape the pipelines: those of the last run do not do.
    pipelines.configure(f"{package}.pipeline_registry")
    _request_pipelines(list(names))
    session = _open_session(options)
    with _project_errors(f"Loading environment '{options['env']}'"):
        context = _call_with_params(session.load_context, options)
    return session, context, _load_pipeline(options)


def _remedies(message: str, options: Options) -> str:
    """Say where an input may come from that a message calls missing, or credentials."""
    conf, env = Path(_locate_conf(options)), _environment(options)
    is_input = "pipeline input" in message.lower()  # as Kedro says, and we do
    place = "parameters" if "params:" in message else "catalog"
    stop = "" if message.endswith(".") else "."
    text = f"{stop} Add it to the {place} in {conf.name}, or run what makes it." * is_input
    local = settings.CONFIG_LOADER_ARGS.get("default_run_env", "local")
    has_files = any((conf / local).glob("**/*.y*ml"))
    if env != local and (is_input or "redential" in message) and has_files:
        text += f" `kedro run` reads environment {local}, too: try --env {local}."
    return text


def _copy_catalog(catalog: Any) -> Any:
    """Copy a catalog: asking the copy for a dataset makes none in the catalog itself."""
    copied = copy(catalog)
    dicts = {name: copy(each) for name, each in vars(catalog).items() if isinstance(each, dict)}
    vars(copied).update(dicts)
    return copied


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


def _load_datasets(opened: _Opened, options: Options) -> tuple[dict[str, Any | None], list[str]]:
    """Make every dataset of the pipeline, None for memory, and name missing parameters."""
    session, context, pipeline = opened
    with _project_errors(f"Loading catalog and parameters of environment '{options['env']}'"):
        catalog = _load_catalog(session, context, options)
        names = sorted(pipeline.all_inputs() | pipeline.all_outputs())
        datasets = {name: _get_dataset(catalog, name) for name in names}
    missing = sorted(name for name in pipeline.inputs() if datasets[name] is None)
    if inputs := [name for name in missing if not _is_parameter(name)]:
        problem = "No catalog entry, pattern or parameter provides pipeline input"
        entries = [name for name in _load_conf(session, options, "catalog") if name[0] != "_"]
        raise _unknown(f"{problem} {', '.join(inputs)}.", inputs[0], entries, "entries")
    return datasets, [name.removeprefix("params:") for name in missing]


def _open_with_datasets(options: Options) -> tuple[_Opened, dict[str, Any | None], list[str]]:
    """Open the project, make its datasets, and name the parameters that each run has to bring."""
    needed: list[str] = []
    params, opened = deepcopy(options["runtime_params"]), None
    while True:
        try:
            opened = _open(options | {"runtime_params": params})
            datasets, missing = _load_datasets(opened, options)
            return opened, datasets, needed + missing
        except ClickException as error:
            found = re.search(r"Runtime parameter '([^']+)' not found", error.message)
            if not found or found[1] in needed:
                remedies = _remedies(error.message, options) if opened else ""
                raise ClickException(error.message + remedies) from error
        needed.append(found[1])  # and a value is made up, so that all else is checked
        *above, last = found[1].split(".")
        functools.reduce(lambda inner, part: inner.setdefault(part, {}), above, params)[last] = last


# ---- conf/<env>/prefect.yml ----

_NUMBER = (int, float)
_SHAPE: Options = {
    "flow": {"retries": int, "retry_delay_seconds": _NUMBER},
    "task_runner": {"type": str, "max_workers": int, "is_async": bool, "resume": bool},
    "checkpoints": (str, {"url": str, "credentials": str}), "artifacts": bool,
    "tasks": {str: {
        "retries": int, "retry_delay_seconds": (*_NUMBER, list), "retry_jitter_factor": _NUMBER,
        "timeout_seconds": _NUMBER, "tags": list, "log_prints": bool, "description": str,
        "version": str, "resources": dict,
    }},
}  # fmt: skip


class _Config(NamedTuple):
    """What prefect.yml says of how nodes are run."""

    flow: Options
    task_runner: Options
    tasks: dict[str, Options]
    checkpoints: Any = None  # URL, or URL and credentials
    artifacts: bool = True


def _check(where: str, found: Any, shape: Any) -> None:
    """Refuse keys of prefect.yml that are not there, and values of another type."""
    shapes = shape if isinstance(shape, tuple) else (shape,)
    types = tuple(each if isinstance(each, type) else type(each) for each in shapes)
    if (isinstance(found, bool) and bool not in types) or not isinstance(found, types):
        names = " or ".join(each.__name__ for each in types)
        raise ClickException(f"prefect.yml: {where} is {found!r}, and has to be of type {names}.")
    inner: Any = next((each for each in shapes if isinstance(each, dict)), None)
    if isinstance(found, dict) and inner is not None:
        for key, item in found.items():
            path = f"{where}.{key}".lstrip(".")
            if key not in inner and str not in inner:
                raise _unknown(f"prefect.yml has no {path}.", str(key), inner, "keys")
            _check(path, item, inner.get(key, inner.get(str)))


def _read_config(session: Any, options: Options) -> _Config:
    """Read prefect.yml with the project's own config loader, and check it."""
    with _project_errors("Loading prefect.yml"):
        loader = _call_with_params(session._get_config_loader, options)
        if hasattr(loader, "config_patterns"):
            loader.config_patterns.setdefault("prefect", ["prefect.*"])
        try:
            found = {name: value for name, value in loader["prefect"].items() if value is not None}
        except (MissingConfigException, KeyError):
            found = {}
    if found.keys() & {"deployment", "deployments"}:
        problem = "prefect.yml says how nodes are run. Deployments belong into Prefect's own file"
        remedy = "in the project's root, and are registered with `prefect deploy --all`"
        raise ClickException(f"{problem} prefect.yaml, {remedy}.")
    shape, section = dict(_SHAPE), found.get("task_runner", {})
    kind = section.get("type", "threads") if isinstance(section, dict) else "threads"
    if kind == "dask":  # which checks what else there is
        shape["task_runner"] = _SHAPE["task_runner"] | {str: object}
    _check("", found, shape)
    config = _Config(**{"flow": {}, "task_runner": {}, "tasks": {}, **found})
    if kind not in (kinds := ("threads", "processes", "dask")):
        raise _unknown(f"prefect.yml: task_runner.type is '{kind}'.", kind, kinds, "types")
    with _project_errors("Reading task_runner in prefect.yml"):
        PrefectRunner(max_workers=section.get("max_workers"))
    if kind != "threads" or config.checkpoints:
        what = "checkpoints" if config.checkpoints else f"task_runner.type {kind}"
        _need(f"prefect.yml: {what}", **_ENGINES_NEED)
    for name, task_options in config.tasks.items():
        if "resources" in task_options and kind != "dask":
            problem = f"prefect.yml: tasks.{name}.resources are for Dask"
            raise ClickException(f"{problem}, and task_runner.type is '{kind}'.")
        of_task = {key: value for key, value in task_options.items() if key != "resources"}
        with _project_errors(f"Reading tasks.{name} in prefect.yml"):
            Task(fn=lambda: None, **of_task)
    return config


def _task_names(node: Node) -> set[str]:
    """Return the names by which the tasks section may speak of a node."""
    tags, spaces = (f"tag:{tag}" for tag in node.tags), _namespaces(node)
    return {"default", node.name, *tags, *(f"namespace:{name}" for name in spaces)}


def _task_options(node: Node, tasks: dict[str, Options]) -> Options:
    """Return what the tasks section says of a node; its later lines win over earlier ones."""
    names = _task_names(node)
    return dict(chain.from_iterable(tasks[name].items() for name in tasks if name in names))


def _check_task_names(tasks: Iterable[str]) -> None:
    nodes = chain.from_iterable(pipeline.nodes for pipeline in pipelines.values())
    known = set(chain({"default"}, *map(_task_names, nodes)))
    for name in set(tasks) - known:
        problem = f"prefect.yml: tasks has '{name}', which is no node of any pipeline."
        raise _unknown(problem, name, known, "names")


# ---- Pictures and artifacts: what Prefect's UI shows of a pipeline and of a run ----

_COLOURS = {  # of boxes, by how it went
    "failed": "#b91c1c", "not run": "#6b7280", "resumed": "#1d4ed8", "completed": "#15803d",
    "": "#334155",
}  # fmt: skip


def _plain(text: str) -> str:
    """Write a text in Markdown so that nothing in it is markup, and it stays in its table cell."""
    text = html.escape(" ".join(text.split()), quote=False)
    # Backslashes, because the older UI decodes few entities.
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", text)


def _draw(pipeline: Pipeline, states: dict[str, str]) -> str:
    """Draw a pipeline as SVG: layers from left to right, and what needs what."""
    layers, needed = pipeline.grouped_nodes, pipeline.node_dependencies
    height, left = 36 * max(map(len, layers), default=0), 4
    place: dict[Node, tuple[int, float]] = {}  # right and middle of its box
    boxes, lines = [], []
    shown = {n: n.name[:NAME_DRAWN] + "..." * (len(n.name) > NAME_DRAWN) for n in needed}
    for layer in layers:
        width = 7 * max(len(shown[node]) for node in layer) + 16
        heights = {node: [place[other][1] for other in needed[node]] for node in layer}
        # At the height of what they need: few lines cross.
        ordered = sorted(layer, key=lambda n: sum(heights[n]) / max(len(heights[n]), 1))
        for row, node in enumerate(ordered):
            y = 36 * row + 18 + (height - 36 * len(layer)) / 2
            place[node] = left + width, y
            colour = _COLOURS.get(states.get(node.name, ""), _COLOURS["failed"])
            boxes.append(
                f'<g><title>{html.escape(node.name)}</title><rect x="{left}" y="{y - 14:g}"'
                f' width="{width}" height="28" rx="5" fill="{colour}"/>'
                f'<text x="{left + width / 2:g}" y="{y + 4.5:g}">'
                f"{html.escape(shown[node])}</text></g>"
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
    """Return the drawing in Markdown."""
    if len(pipeline.nodes) > NODES_DRAWN:
        return f"{len(pipeline.nodes)} nodes, which are too many to draw."
    drawn = base64.b64encode(_draw(pipeline, states).encode()).decode()
    return f"![the pipeline](data:image/svg+xml;base64,{drawn})"


def _table(head: Iterable[str], *rows: Iterable[str]) -> str:
    """Write a table in Markdown."""
    lines = [head, ["---" for _ in head], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _reads_and_writes(node: Node) -> str:
    return "<br>".join([*map(_plain, node.inputs), *(f"\u2192 {_plain(n)}" for n in node.outputs)])


def _describe(pipeline: Pipeline, options: Options) -> str:
    """Account for a pipeline in Markdown, without values that may be secret."""
    shown = options | {"runtime_params": ", ".join(options.get("runtime_params", ()))}
    rows = [
        (str(number), _plain(node.name), _reads_and_writes(node))
        for number, layer in enumerate(pipeline.grouped_nodes, start=1)
        for node in layer
    ]
    table = _table(("layer", "node", "reads \u2192 writes"), *rows)
    parts = [f"- {name}: {_plain(str(shown[name]))}" for name in options]
    return _sign("\n".join([*parts, f"\n{_picture(pipeline, {})}\n", table]))


def _sign(text: str) -> str:
    """Add a line that nobody sees: it tells a description of ours from one that was edited."""
    digest = hashlib.sha256(text.strip().encode()).hexdigest()[:16]
    return f"{text}\n\n[register_prefect_flow.py]: # ({digest})"


def _package_key() -> str:
    return re.sub(r"[^a-z0-9]+", "-", _flow_name().lower()).strip("-")


def _artifact_key(name: str) -> str:
    """Return the key of an artifact of this project: it may hold a-z, 0-9 and hyphens only."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if slug != name or "-" in name or name == "run":  # so that no two are the same
        slug = f"{slug[:50]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".strip("-")
    return f"{_package_key()}-{slug}"


def _show(what: str, key: str, make: Callable[[], str]) -> None:
    """Add Markdown to the flow run or task run that goes on here; what goes wrong is a warning."""

    async def create(text: str) -> None:
        created: Any = create_markdown_artifact(text, key=key)
        if inspect.isawaitable(created):  # in Prefect 2 it is done by now
            await created

    try:
        _call_api(create(make()), SERVER_TIMEOUT)
    except Exception as error:
        logging.getLogger("kedro").warning("No %s in Prefect: %r", what, error)


def _render(name: str, dataset: Any, arguments: Options) -> str:
    """Return a dataset's own preview as Markdown, under its name."""
    preview = getattr(dataset, "preview", None) or dataset._preview  # as kedro-datasets 1 calls it
    kind = str(inspect.signature(preview).return_annotation)
    found: Any = preview(**arguments)
    if "ImagePreview" in kind:
        shown = f"![preview](data:image/png;base64,{found})"
    elif isinstance(found, dict) and {"columns", "data"} <= found.keys():
        rows = (found["columns"], *found["data"])
        shown = _table(*([_plain(str(cell)) for cell in row] for row in rows))
    else:
        with suppress(ValueError):
            found = json.loads(found) if isinstance(found, str) else found
        text = found if isinstance(found, str) else json.dumps(found, indent=2, default=str)
        shown = textwrap.indent(text, " " * 4)
    if len(shown) > PREVIEW_SHOWN:
        raise ValueError(f"it has {len(shown)} characters, more than {PREVIEW_SHOWN}")
    return f"### {_plain(name)}\n\n{shown}\n"


def _show_previews(node: Node, catalog: Any) -> None:
    """Show those of a node's outputs whose catalog entry asks for it; the server keeps them."""
    for name in node.outputs:
        dataset = _inner(_get_dataset(catalog, name))
        about = getattr(dataset, "metadata", None)
        about = about.get("prefect") if isinstance(about, dict) else None
        if isinstance(about, dict) and about.get("preview"):
            make = functools.partial(_render, name, dataset, about.get("preview_args") or {})
            _show(f"preview of '{name}'", _artifact_key(name), make)


def _describe_run(nodes: Pipeline, records: Any, error: BaseException | None, advice: str) -> str:
    """Account for a run in Markdown."""
    parts = [f"## {_plain(runtime.flow_run.name)} has {'failed' if error else 'completed'}\n"]
    if error:
        text = f"{type(error).__name__}: {_text_of(error)[:TEXT_SHOWN]}\n"
        parts.append(textwrap.indent(text, " " * 4))
    if advice:
        parts.append(f"How to go on:\n\n{textwrap.indent(advice, ' ' * 4)}\n")
    states = {node.name: records[node.name].state for node in nodes.nodes}
    counts = ", ".join(f"{count} {state}" for state, count in Counter(states.values()).items())
    drawn = _picture(nodes, states) if states else ""
    parts += [f"{len(states)} nodes: {counts or 'none was run'}\n", f"{drawn}\n"]
    rows = [("node", "state", "seconds", "reads \u2192 writes")]
    for node in nodes.nodes:
        seconds = f"{records[node.name].seconds:.1f}"
        rows.append((_plain(node.name), states[node.name], seconds, _reads_and_writes(node)))
    return "\n".join([*parts, _table(*rows)])


# ---- Checkpoints: what nodes hand on to others, in files of a flow run ----


class _Checkpoint(_Dataset):  # type: ignore[misc]  # a class of any version of Kedro
    """What a node hands on to others, pickled into a file: all of it, or nothing."""

    def __init__(self, folder: str, credentials: Options, name: str, node: str = "") -> None:
        # Any name makes a file name, and no two make the same.
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        path = f"{folder}/{re.sub(r'[^A-Za-z0-9.-]', '_', name)[:50]}-{digest}.pickle"
        dataset: Any = importlib.import_module("kedro_datasets.pickle").PickleDataset
        self._make = functools.partial(dataset, backend="cloudpickle", credentials=credentials)
        self._what = f"Dataset '{name}'" + f", which node '{node}' makes," * bool(node)
        self._filepath, self._file = path, self._make(filepath=path)

    def load(self) -> Any:
        return self._file.load()

    def save(self, data: Any) -> None:
        part = Path(f"{self._filepath}.part")
        try:
            if self._file._protocol == "file":
                part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._make(filepath=str(part)).save(data)
                part.replace(self._filepath)
            else:  # on object stores a file is there when all of it has been written
                self._file.save(data)
        except Exception as error:
            problem = f"{self._what} cannot be pickled to {self._filepath}: {error}"
            remedy = "Nodes hand it on in that file, unless the catalog says how to save it."
            raise kedro_io.DatasetError(f"{problem} {remedy}") from error

    def _exists(self) -> bool:
        return bool(self._file.exists())

    def _describe(self) -> Options:
        return {"filepath": self._filepath}


def _place_checkpoints(config: _Config, options: Options) -> Options:
    """Return where checkpoints lie, and the name of credentials; nothing: there are none."""
    place = options["checkpoints"] or config.checkpoints or {}
    place = dict(place) if isinstance(place, dict) else {"url": place}
    address = str(config.task_runner.get("address", "local"))
    if not place.get("url") and config.task_runner.get("type", "threads") != "threads":
        if not re.search(r"^local$|localhost|127\.0\.0\.1|\[::1\]", address):
            problem = f"prefect.yml: nodes on {address} hand data on in files: say where, with"
            raise ClickException(f"{problem} checkpoints: <a URL or folder that all reach>")
        storage = prefect.settings.PREFECT_LOCAL_STORAGE_PATH.value()
        place["url"] = str(storage / "kedro-checkpoints")
    if place.get("url"):
        _import("kedro_datasets.pickle", "kedro-datasets[pickle]", "checkpoints")
        if "://" not in place["url"]:
            place["url"] = str(PROJECT_PATH / place["url"])
    return place


def _add_checkpoints(
    catalog: Any, pipeline: Pipeline, checkpoint: Any, kept: Iterable[str], cache: bool
) -> None:
    """Let what nodes write be in files as well, or instead of, in memory, but for what is kept."""
    for node in pipeline.nodes:
        for name in set(node.outputs).difference(kept):
            dataset = _get_dataset(catalog, name)
            if _is_in_memory(_inner(dataset)):
                made = checkpoint(name, node.name)
                mode = getattr(dataset, "_copy_mode", None)
                made = kedro_io.CachedDataset(made, copy_mode=mode) if cache else made
                _set_dataset(catalog, name, made)


def _end_checkpoints(completed: bool, folder: str, credentials: Options) -> None:
    """Remove those of a flow run that has completed; say where those of a failed one are."""
    log, fsspec = get_run_logger(), importlib.import_module("fsspec.core")
    try:
        files, path = fsspec.url_to_fs(folder, **credentials)
        if completed and files.exists(path):
            files.rm(path, recursive=True)
        elif files.exists(path):
            log.info("Checkpoints for a retry: %s", folder)
    except Exception as error:
        log.warning("Checkpoints in %s: %s", folder, error)


# ---- Nodes as tasks ----


@dataclass
class _Record:
    """How it went with the task of a node."""

    state: str = "not run"
    seconds: float = 0
    attempts: int = 0
    error: BaseException | None = None


class _Run(NamedTuple):
    """What the tasks of one run find by its key."""

    nodes: dict[str, Node]
    catalog: Any
    records: dict[str, _Record]  # by node name
    run_node: Callable[[Node], None]  # here, in the flow's thread, or in a child
    has_previews: bool = False


# Those that go on in this process, by the key that tasks are given: Prefect walks what it is given.
_runs: dict[str, _Run] = {}


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


def _task_key(node: Node, catalog: Any, run: str) -> str:
    """Identify what a node does in a run: it tells a retried flow run what need not run again."""
    parameters = list(filter(_is_parameter, node.inputs))
    found: Any = {name: _get_dataset(catalog, name) for name in (*parameters, *node.outputs)}
    values = {name: found[name].load() for name in parameters if found[name]}
    lasting = [name for name in node.outputs if not _is_in_memory(found[name])]
    digest = _digest(values, {name: _where(name, found[name]) for name in lasting})
    return f"node/{run}/{digest}/{node.name}"


def _writable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _text_of(error: BaseException) -> str:
    try:
        return _writable(str(error))
    except Exception as broken:
        return f"no text, for making it raises {type(broken).__name__}"


def _stand_in(module: str, name: str, text: str) -> Exception:
    """Make an exception that looks like one that cannot be passed on."""
    return cast("Exception", type(name, (Exception,), {"__module__": module})(text))


def _bearable(error: Exception) -> Exception:
    """Return what Prefect can print and store of an exception: it does so several times.

    It fails where a text is no Unicode, and a long one is too much.
    """
    whole, text = "".join(traceback.format_exception(error)), _text_of(error)
    if len(text) <= TEXT_SHOWN and len(whole) <= LOG_SHOWN and whole == _writable(whole):
        return error
    shown = text[:TEXT_SHOWN] + f"... (cut: {len(text)} characters)" * (len(text) > TEXT_SHOWN)
    made = _stand_in(type(error).__module__, type(error).__name__, shown)
    return made.with_traceback(error.__traceback__)


def _remove_versions(node: Node, catalog: Any) -> None:
    """Let a node save again what an earlier attempt has saved, whole or half, in this version."""
    for name in node.outputs:
        dataset = _inner(_get_dataset(catalog, name))
        if getattr(dataset, "_version", None) and hasattr(dataset, "_fs"):
            path = str(dataset._get_versioned_path(dataset.resolve_save_version()))
            if dataset._exists_function(path):
                dataset._fs.rm(path, recursive=True)
                dataset.release()  # it remembers versions


def kedro_task(node_name: str, run_key: str) -> None:
    """Run one node of a run as Kedro does: load, run, save, with its hooks."""
    run = _runs[run_key]
    node, record = run.nodes[node_name], run.records[node_name]
    record.attempts += 1
    start = time.monotonic()
    try:
        if record.attempts > 1:
            _remove_versions(node, run.catalog)
        run.run_node(node)
    except SystemExit as ended:  # a failure of this node, and no end of anything else
        record.error = RuntimeError(f"Node '{node_name}' called sys.exit({_text_of(ended)})")
        raise record.error from ended
    except KeyboardInterrupt as error:
        record.error = error
        raise
    except Exception as error:
        record.error = _bearable(error)
        if record.error is error:
            raise
        raise record.error from None
    finally:
        record.seconds = time.monotonic() - start
    if run.has_previews:
        _show_previews(node, run.catalog)


def instantiate_task(node: Node, run_key: str, task_options: Options) -> Task[[], None]:
    """Make the Prefect task that runs a node, under the node's name."""
    options = {name: value for name, value in task_options.items() if name != "resources"}
    # Of a function instead of a partial, Prefect would read and parse this file for each task.
    fn: Any = functools.partial(kedro_task, node.name, run_key)
    name: Any = {"name": node.name, "task_run_name": lambda: node.name}
    return Task(fn=fn, persist_result=False, **name, **options)


def init_kedro_tasks_by_execution_layer(
    pipeline: Pipeline, run_key: str, task_options: dict[str, Options] | None = None
) -> list[dict[Node, Task[[], None]]]:
    """Make a task for each node, in layers of nodes that need only nodes of earlier layers."""
    options = {node: _task_options(node, task_options or {}) for node in pipeline.nodes}
    layers = pipeline.grouped_nodes
    return [{node: instantiate_task(node, run_key, options[node]) for node in n} for n in layers]


# ---- Engines: nodes in children, here and under Dask workers ----
#
# A child is a process that has opened the project for one flow run, with its code as it is now.
# Names of nodes go there; log records come back, and how each node ended. A child and all that it
# has started end together. Dask says which machine has room for one.

_TOPIC = "kedro"  # under which Dask's workers send them
# Nothing but messages may come out of a child's stdout, and nothing but jobs into its stdin.
_CHILD = """
import os
jobs, out = os.dup(0), os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
import register_prefect_flow
register_prefect_flow._be_child(jobs, out)
"""


def _same_everywhere(metadata: ProjectMetadata) -> str:
    """Digest what has to be the same wherever nodes of a run are run."""
    package = Path(metadata.source_dir) / metadata.package_name
    files = [THIS_FILE, *sorted(path for path in package.rglob("*.py") if path.is_file())]
    code = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return _digest(kedro.__version__, sys.version_info[:2], code)


def _open_run(job: Options, say: Callable[..., None]) -> _Run:
    """Open the project in a child: configuration, catalog and hooks as in the flow."""
    metadata = _bootstrap(PROJECT_PATH)
    # All log records, at the levels that the project sets; handlers are the flow's.
    put = SimpleNamespace(put_nowait=lambda record: say("log", pickle.dumps(record)))
    handler = logging.handlers.QueueHandler(cast("Any", put))
    for name in (None, *logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name is None or not logger.propagate else []
    if _same_everywhere(metadata) != job["same"]:
        here = f"{platform.node()}, Kedro {kedro.__version__} or Python {platform.python_version()}"
        remedy = "Update them there; if the code has just been changed, start the run again."
        problem = f"The code of {PROJECT_PATH} on {here} are not those of the flow"
        raise RuntimeError(f"{problem}. {remedy}")
    options, session_id = job["options"], job["session_id"]
    session, context, pipeline = _open(options, _pipeline_names(options))
    _adopt_session_id(session, session_id)
    catalog = _load_catalog(session, context, options)
    credentials = _read_credentials(session, options, job["credentials"])
    checkpoint = functools.partial(_Checkpoint, job["folder"], credentials)
    _add_checkpoints(catalog, pipeline, checkpoint, kept=(), cache=False)
    for name in job["handed_on"]:
        _set_dataset(catalog, name, checkpoint(name))
    _pin_versions(catalog, pipeline, session_id)

    def run_node(node: Node) -> None:
        _run_node(node, catalog, session._hook_manager, job["is_async"], session_id)

    nodes = {node.name: node for node in pipeline.nodes}
    return _Run(nodes, catalog, {name: _Record() for name in nodes}, run_node)


def _pack_error(error: BaseException, with_object: bool) -> bytes:
    """Write an exception down: as itself, if that can be, and as text."""
    about = (type(error).__module__, type(error).__name__, _text_of(error))
    text, packed = _writable("".join(traceback.format_exception(error))), b""
    with suppress(Exception):  # there is much that cannot be pickled
        packed = pickle.dumps(error) if with_object else b""
    return pickle.dumps((packed, about, text))


def _unpack_error(payload: bytes) -> BaseException:
    packed, about, text = pickle.loads(payload)
    error: Any = None
    with suppress(Exception):  # of what it takes to make it again
        error = pickle.loads(packed)
    error = error if isinstance(error, BaseException) else _stand_in(*about)
    error.__cause__ = RuntimeError(f"in another process\n{text}")
    return cast("BaseException", error)


def _be_child(jobs_in: int, messages_out: int) -> None:
    """Run nodes of a flow run, and say what happens, until whoever started this process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the flow that Ctrl-C stops
    os.environ["KEDRO_DISABLE_TELEMETRY"] = "1"  # which the flow sends
    jobs: queue.SimpleQueue[Options] = queue.SimpleQueue()
    messages, lock = os.fdopen(messages_out, "wb"), threading.Lock()

    def say(kind: str, payload: bytes = b"") -> None:
        with lock:
            pickle.dump((kind, payload), messages)
            messages.flush()

    def listen() -> None:
        with suppress(EOFError, OSError), os.fdopen(jobs_in, "rb") as file:
            while True:
                jobs.put(pickle.load(file))
        _end_group(os.getpid())  # at once, whatever a node is doing

    threading.Thread(target=listen, daemon=True).start()
    run = None
    while True:
        job = jobs.get()
        try:
            run = _runs[""] = run or _open_run(job, say)
            run.records[job["node"]].attempts = job["attempts"]
            kedro_task(job["node"], "")
            end = ("ended", b"")
        except BaseException as error:  # what opening raises may refer to credentials
            end = ("failed", _pack_error(error, with_object=run is not None))
        if run:
            node = run.nodes[job["node"]]
            for name in filterfalse(_is_parameter, {*node.inputs, *node.outputs}):
                run.catalog.release(name)
        say(*end)


def _end_group(leader: int) -> None:
    """End a child and all that it has started. On Windows, the child only."""
    with suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(leader, signal.SIGKILL)
        else:
            os.kill(leader, signal.SIGTERM)  # which ends it at once there


# Ends what a process has started when that is gone: what has its mark or, as a fork, its pipe.
_GUARD = """
import os, signal, sys, time
parent, mark, pipe = int(sys.argv[1]), sys.argv[2].encode(), os.readlink("/proc/self/fd/0")
while os.getppid() == parent:
    time.sleep(0.5)
for pid in {*filter(str.isdigit, os.listdir("/proc"))} - {str(os.getpid())}:
    try:
        with open(f"/proc/{pid}/environ", "rb") as environ:
            marked = mark in environ.read().split(b"\\0")
        files = f"/proc/{pid}/fd"
        if marked or pipe in [os.readlink(f"{files}/{file}") for file in os.listdir(files)]:
            os.kill(int(pid), signal.SIGKILL)
    except OSError:  # it belongs to somebody else, or has ended
        pass
"""


@functools.cache  # once in a process
def _guard_what_nodes_start() -> Any:
    """Have what nodes start end with this process, however that ends; on Linux only."""
    if sys.platform != "linux":
        return None
    os.environ["KEDRO_FLOW_PROCESS"] = uuid.uuid4().hex
    mark = f"KEDRO_FLOW_PROCESS={os.environ['KEDRO_FLOW_PROCESS']}"
    command, null = [sys.executable, "-ISc", _GUARD, str(os.getpid()), mark], subprocess.DEVNULL
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": null, "stderr": null}
    return subprocess.Popen(command, cwd="/", start_new_session=True, **pipes)


class _Child:
    """A child, as whoever started it sees it."""

    def __init__(self, script: str) -> None:
        command, pipes = [sys.executable, "-uc", _CHILD], ("stdin", "stdout")
        how: Any = {"cwd": Path(script).parent, **dict.fromkeys(pipes, subprocess.PIPE)}
        self.process: Any = subprocess.Popen(command, start_new_session=True, **how)
        self.messages: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(Exception):  # its end may come in the middle of a message
            while True:
                self.messages.put(pickle.load(self.process.stdout))
        code = self.process.wait()
        _end_group(self.process.pid)
        why = " (killed, perhaps for lack of memory)" * (str(code) == "-9")  # by SIGKILL
        self.messages.put(("died", f"with exit code {code}{why}".encode()))


class _Children:
    """The children of a flow run on one machine. Sent to Dask's workers by value."""

    def __init__(self, script: str) -> None:
        self.size = os.cpu_count() or 1
        self._script = script
        self._all: list[Any] = []
        self._idle: list[Any] = []
        self._has_ended = False

    def run(
        self, job: Options, _: Options, is_wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[str, bytes]]:
        """Run a node in a child, and yield what it says."""
        if not Path(self._script).exists():
            problem = "the project has to lie there as where the flow runs, with this file"
            raise FileNotFoundError(f"{platform.node()} has no {self._script}: {problem}.")
        try:
            child = self._idle.pop()
        except IndexError:
            child = _Child(self._script)
            self._all.append(child)
        kind = ""
        try:
            with suppress(OSError):  # it has died, and says so
                pickle.dump(job, child.process.stdin)
                child.process.stdin.flush()
            while kind not in ("ended", "failed", "died"):
                try:
                    kind, payload = child.messages.get(timeout=0.2)
                    yield kind, payload
                except queue.Empty:
                    if self._has_ended or not is_wanted():
                        raise RuntimeError("the run has been stopped") from None
        finally:
            if kind in ("ended", "failed") and not self._has_ended:
                self._idle.append(child)
            else:
                self._end(child)

    def _end(self, child: Any) -> None:
        with suppress(ValueError):  # it has been ended
            self._all.remove(child)
            _end_group(child.process.pid)
            child.process.wait()

    def close(self) -> None:
        """End all, and what they are doing."""
        self._has_ended = True
        for child in list(self._all):
            self._end(child)


def _make_plugin(flow_run: str, script: str) -> Any:
    """Make what keeps the children of a flow run on each Dask worker; it is sent by value."""
    distributed: Any = importlib.import_module("distributed")
    if __name__ != "__main__":
        importlib.import_module("cloudpickle").register_pickle_by_value(sys.modules[__name__])

    class FlowRun(distributed.WorkerPlugin):  # type: ignore[misc]
        name = flow_run

        def setup(self, worker: Any) -> None:
            self._worker, self._children = worker, _Children(script)

        def teardown(self, worker: Any) -> None:
            del worker
            self._children.close()

        def run(self, job: Options) -> None:
            """Run a node in a child, and pass on what it says."""
            worker, key = self._worker, self._worker.get_current_task()
            ask = functools.partial(importlib.import_module("distributed.utils").sync, worker.loop)
            mark: Options = {"keys": [flow_run, key]}
            if ask(worker.scheduler.get_metadata, default=False, **mark):
                return  # Dask runs it again, because the worker that ran it is lost
            ask(worker.scheduler.set_metadata, value=True, **mark)

            def is_wanted() -> bool:  # not if the flow has cancelled it, or is gone
                found = worker.state.tasks.get(key)
                return found is not None and found.state != "cancelled"

            for message in self._children.run(job, {}, is_wanted):
                worker.log_event(_TOPIC, (key, message))  # which the scheduler hands on

    return FlowRun()


class _Dask:
    """A Dask cluster, whose workers run nodes of a flow run in children."""

    def __init__(self, script: str, options: Options) -> None:
        distributed = _import("distributed", "distributed", "task_runner.type dask")
        logging.getLogger("distributed").setLevel(logging.WARNING)
        self._name, self._stack = f"kedro-{uuid.uuid4().hex}", ExitStack()
        self._said: dict[str, queue.SimpleQueue[Any]] = {}  # by Dask's key of a node
        try:
            options = dict(options)
            if name := options.pop("cluster_class", None):
                module, _, class_name = name.rpartition(".")
                make = getattr(_import(module, module.partition(".")[0], name), class_name)
                cluster = make(**options.pop("cluster_kwargs", {}))
                options["address"] = self._stack.enter_context(cluster)
            elif not {"address", "host"} & options.keys():
                # One here needs no processes: its workers do nothing but start those of nodes.
                options = {"processes": False, "memory_limit": 0} | options
                boards = ("dashboard_address", "worker_dashboard_address")
                options = dict.fromkeys(boards, "127.0.0.1:0") | options
            client = distributed.Client(**{"timeout": 20} | options)
            self._client = self._stack.enter_context(client)
            client.wait_for_workers(1, timeout=20)
            client.subscribe_topic(_TOPIC, self._hear)
            client.register_plugin(_make_plugin(self._name, script))
        except (OSError, asyncio.TimeoutError, TypeError, ValueError, RuntimeError) as error:
            self._stack.close()
            where = options.get("address", "this machine")
            problem = f"prefect.yml: there is no Dask cluster with workers at {where}: {error}"
            remedy = "Start `dask scheduler` and `dask worker`, and give task_runner.address."
            raise ClickException(f"{problem}. {remedy}") from error
        self.size = sum(client.nthreads().values())

    def _hear(self, event: Any) -> None:
        _, (key, message) = event
        if key in self._said:
            self._said[key].put(message)

    def run(self, job: Options, resources: Options) -> Iterator[tuple[str, bytes]]:
        """Run a node in a child of the worker that has room, and yield what it says."""
        key, name = f"{job['node']}-{uuid.uuid4().hex}", self._name
        said = self._said[key] = queue.SimpleQueue()

        def work(job: Options) -> None:
            importlib.import_module("distributed").get_worker().plugins[name].run(job)

        future = self._client.submit(work, job, key=key, pure=False, resources=resources or None)
        future.add_done_callback(lambda _: said.put(None))
        message = ("", b"")
        try:
            while message:
                with suppress(queue.Empty):  # in steps, so that a timeout can interrupt it
                    if message := said.get(timeout=0.2):
                        yield message
            if future.status != "finished":  # or Dask would fetch the result, which is none
                future.result()  # raises what kept the node from being run
        finally:
            del self._said[key]
            future.cancel()

    def close(self) -> None:
        """End all children, and what they are doing."""
        with suppress(Exception):  # there may be no cluster any more
            self._client.unregister_worker_plugin(name := self._name)
            self._client.run_on_scheduler(
                lambda dask_scheduler: dask_scheduler.task_metadata.pop(name, None)
            )
        self._stack.close()


def _run_in_child(engine: Any, job: Options, resources: Options) -> None:
    """Run a node on an engine; what it logs there, it logs here."""
    with closing(engine.run(job, resources)) as messages:
        for kind, payload in messages:
            if kind == "log":
                record = pickle.loads(payload)
                logging.getLogger(record.name).handle(record)
            elif kind == "failed":
                raise _unpack_error(payload)
            elif kind == "died":
                problem = f"The process that ran node '{job['node']}' died {payload.decode()}"
                raise RuntimeError(problem)
            elif kind == "ended":
                return
    raise RuntimeError(f"The worker that ran node '{job['node']}' is lost")


# ---- PrefectRunner ----


# Task runs that were started, by flow run: Prefect 3 records them late, and who asks must know.
_started: Counter[str] = Counter()


@contextmanager
def _terminal_progress(nodes: int) -> Iterator[Callable[[], None]]:
    """Show on a terminal, below the log lines, how many nodes have completed; yield a counter."""
    from rich import get_console, progress

    console = get_console()  # that of Kedro's log handler; Prefect's have to move the line as well
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    handlers: set[Any] = {h for logger in loggers for h in logger.handlers if hasattr(h, "console")}
    before = {handler: handler.console for handler in handlers if console.is_terminal}
    for handler in before:
        handler.console = console
    columns = (progress.BarColumn(), "{task.completed} of {task.total} nodes completed")
    is_off = not console.is_terminal
    try:
        with progress.Progress(*columns, console=console, transient=True, disable=is_off) as shown:
            bar = shown.add_task("", total=nodes)
            yield lambda: shown.advance(bar)
    finally:
        for handler, own in before.items():
            handler.console = own


def _longest_path_first(pipeline: Pipeline) -> list[Node]:
    """Order nodes by how many have to run after them, one after the other; else as Kedro does."""
    behind = dict.fromkeys(pipeline.nodes, 0)
    for node in reversed(pipeline.nodes):
        for needed in pipeline.node_dependencies[node]:
            behind[needed] = max(behind[needed], behind[node] + 1)
    return sorted(behind, key=behind.__getitem__, reverse=True)


def _schedule(
    pipeline: Pipeline, start: Callable[..., None], max_workers: int, ended: queue.SimpleQueue[Any]
) -> Iterator[tuple[Node, Any]]:
    """Start each node when those it needs have ended, and yield it with its state at its end."""
    # One behind a failed one is started as well: Prefect shows it as NotReady, and does not run it.
    # The queue takes nodes with their states, and what this thread is to call.
    nodes = pipeline.nodes if max_workers == 1 else _longest_path_first(pipeline)
    position = {node: index for index, node in enumerate(nodes)}
    sorter = TopologicalSorter(needed := pipeline.node_dependencies)
    sorter.prepare()
    ready: list[int] = []  # a heap of positions
    states, running = cast("dict[Node, Any]", {}), 0
    while sorter.is_active():
        for node in sorter.get_ready():
            heapq.heappush(ready, position[node])
        while ready and running < max_workers:
            node, running = nodes[heapq.heappop(ready)], running + 1
            start(node, [states[other] for other in needed[node]])
        while callable(event := ended.get()):
            event()
        node, states[node] = event
        running -= 1
        sorter.done(node)
        yield node, states[node]


def _call_in_another_thread(
    calls: queue.SimpleQueue[Any], function: Any, tasks: dict[Node, Any], node: Node
) -> None:
    """Have the thread that reads the queue do what this one would do, and wait for it."""
    if tasks[node].timeout_seconds:  # Prefect 2 can stop a node in its task's own thread only
        function(node)
        return
    done, context = cast("Future[None]", Future()), contextvars.copy_context()

    def call() -> None:
        try:
            done.set_result(context.run(function, node))
        except BaseException as error:
            done.set_exception(error)

    calls.put(call)
    done.result()


class PrefectRunner(SequentialRunner):
    """A Kedro runner that runs each node as a Prefect task, as soon as its inputs are there.

    Use it inside a Prefect flow: `KedroSession.run(runner=PrefectRunner())`, or
    `PrefectRunner().run(pipeline, catalog, hook_manager)`.

    Args:
        is_async: Load and save the inputs and outputs of a node at the same time, in threads, as
            Kedro's runners do. Default: False.
        max_workers: How many nodes may run at once, side by side in threads. Default: Prefect's
            setting `PREFECT_TASKS_RUNNER_THREAD_POOL_MAX_WORKERS` where it is set, else 1: nodes
            run one at a time, in Kedro's order, in the thread that calls `run`.
        task_options: Options of the nodes' tasks: from node name, `tag:<tag>`, `namespace:<name>`
            or `default` to options of Prefect's Task. Default: none.

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
        self._task_options = task_options or {}
        # What a flow run adds, and what is known after a run.
        self._make_engine: Callable[[], Any] | None = None
        self._job: Options = {}  # what children are told of the run
        self._checkpoint: Any = None  # makes one
        self._has_artifacts = False
        self._resume = True
        self._fingerprint = ""  # of pipeline and options
        self._resumed: dict[Node, Any] = {}  # what need not run: the task run that completed
        self._keys: dict[str, str] = {}  # of nodes, before hooks have changed the catalog
        self._before: dict[str, str] = {}  # digests of parameters, likewise
        self._outputs: dict[str, str] = {}  # where each lives
        self._nodes, self._records = Pipeline([]), cast("dict[str, _Record]", {})
        self._suggestion = ""  # of Kedro, how to go on after a failure

    @property
    def _logger(self) -> logging.Logger:
        # Kedro's logging configuration shows what its own loggers say, not those of this module.
        return logging.getLogger("kedro.runner.prefect_runner")

    def _run(
        self, pipeline: Pipeline, catalog: Any, hook_manager: Any = None, run_id: str | None = None
    ) -> None:
        """Run the nodes, and raise the exception of the first one that failed."""
        if run_id:
            _pin_versions(catalog, pipeline, run_id)
        self._prepare(catalog, pipeline, run_id)
        done, self._records = self._resumed, {node.name: _Record() for node in pipeline.nodes}
        for node, task_run in done.items():
            self._records[node.name] = _Record("resumed", task_run.total_run_time.total_seconds())
        self._nodes = Pipeline([*done, *pipeline.nodes])

        def here(node: Node) -> None:
            _run_node(node, catalog, hook_manager, self._is_async, run_id)

        if self._make_engine and self._checkpoint:
            handed_on = self._hand_on(catalog, pipeline)
            about = {"session_id": run_id, "is_async": self._is_async, "handed_on": handed_on}
            with closing(self._make_engine()) as engine:

                def there(node: Node) -> None:
                    attempts = self._records[node.name].attempts - 1  # before this one
                    resources = _task_options(node, self._task_options).get("resources", {})
                    job = {**self._job, **about, "node": node.name, "attempts": attempts}
                    _run_in_child(engine, job, resources)

                self._run_tasks(pipeline, catalog, there, engine)
            for name in pipeline.outputs():
                dataset: Any = _get_dataset(catalog, name)
                if _is_in_memory(_inner(dataset)):  # what a run returns, as `kedro run` does
                    dataset.save(self._checkpoint(name).load())
        else:
            self._run_tasks(pipeline, catalog, here, None)
        outputs = sorted(self._nodes.outputs())
        self._outputs = {name: _where(name, _get_dataset(catalog, name)) for name in outputs}

    def _prepare(self, catalog: Any, pipeline: Pipeline, session_id: str | None) -> None:
        """Let what nodes hand on be in checkpoints; identify what they do, as long as unchanged."""
        if self._checkpoint:
            # To Kedro, a cache is in memory: `kedro run`, as it advises, would not find the file.
            _add_checkpoints(catalog, pipeline, self._checkpoint, pipeline.outputs(), cache=True)
        if not self._keys:
            run = f"{self._fingerprint}/{session_id}"
            self._keys = {node.name: _task_key(node, catalog, run) for node in pipeline.nodes}
            for name in filter(_is_parameter, pipeline.inputs()):
                if (dataset := _get_dataset(catalog, name)) is not None:
                    self._before[name] = _digest(dataset.load())

    def _hand_on(self, catalog: Any, pipeline: Pipeline) -> list[str]:
        """Put what hooks have put in memory, or changed there, into checkpoints."""
        names = []
        for name in sorted(pipeline.inputs()):
            dataset: Any = _get_dataset(catalog, name)
            if _is_in_memory(_inner(dataset)) and dataset.exists():
                value = dataset.load()
                if self._before.get(name) != _digest(value):
                    self._checkpoint(name).save(value)
                    names.append(name)
        return names

    def _run_tasks(self, pipeline: Pipeline, catalog: Any, run_node: Any, engine: Any) -> None:
        """Make the tasks, and run them in the order of their needs."""
        key = uuid.uuid4().hex
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        layers = init_kedro_tasks_by_execution_layer(pipeline, key, self._task_options)
        tasks = {node: node_task for layer in layers for node, node_task in layer.items()}
        for node, node_task in tasks.items():
            node_task.task_key = self._keys[node.name]
        by_default = engine.size if engine else _THREADS and _THREADS.value()
        max_workers = self._max_workers or by_default or 1
        widest = max(map(len, layers), default=0)
        if widest > 1 == max_workers != self._max_workers:
            where = "see task_runner in conf/base/prefect.yml, or max_workers of PrefectRunner"
            advice = "%d nodes run one at a time. Up to %d could run side by side: %s"
            self._logger.info(advice, len(tasks), widest, where)
        if max_workers == 1 and _CALLED_IN_THREADS and not engine:
            run_node = functools.partial(_call_in_another_thread, ended, run_node, tasks)
        nodes = {node.name: node for node in pipeline.nodes}
        _runs[key] = _Run(nodes, catalog, self._records, run_node, self._has_artifacts)
        earlier = {_plain_name(n): run for node, run in self._resumed.items() for n in node.outputs}
        try:
            with _task_runner(max_workers) as submit, _terminal_progress(len(tasks)) as count:

                def start(node: Node, needed: list[Any]) -> None:
                    names = earlier.keys() & map(_plain_name, node.inputs)
                    resumed = {earlier[name].id: earlier[name].state for name in names}
                    _started[str(runtime.flow_run.id)] += 1
                    needed += resumed.values()
                    submit(tasks[node], needed, lambda state: ended.put((node, state)))

                try:
                    schedule = _schedule(pipeline, start, max_workers, ended)
                    self._follow(schedule, pipeline, catalog, count)
                except BaseException:
                    if engine:
                        engine.close()  # or nodes that run would be waited for
                    raise
        finally:
            del _runs[key]

    def _follow(self, schedule: Any, pipeline: Pipeline, catalog: Any, count: Any) -> None:
        """Do all that follows from a node's end, until all have ended."""
        load_counts = Counter(chain.from_iterable(node.inputs for node in pipeline.nodes))
        kept = pipeline.inputs() | pipeline.outputs()
        done_nodes: list[Node] = []
        failed: list[tuple[Node, Any]] = []
        for node, state in schedule:
            record = self._records[node.name]
            if isinstance(record.error, KeyboardInterrupt):
                raise record.error
            record.state = "not run" if state.name == "NotReady" else state.name.lower()
            if not state.is_completed():
                failed.append((node, state))
                continue
            load_counts.subtract(node.inputs)
            for name in {*node.inputs, *node.outputs} - kept:  # as Kedro's own runners do
                if load_counts[name] < 1:
                    catalog.release(name)
            done_nodes.append(node)
            count()
            self._logger.info("Completed node: %s", node.name)
            self._logger.info("Completed %d out of %d tasks", len(done_nodes), len(pipeline.nodes))
        if failed:
            self._suggest(pipeline, done_nodes, catalog)
            node, state = failed[0]  # it ended first, so it is no node that waited for another
            problem = f"The task run of node '{node.name}' ended as {state.name}: {state.message}"
            raise self._records[node.name].error or RuntimeError(problem)

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


# ---- Resuming: a flow run that is retried goes on where it failed ----


async def _read_task_runs(flow_run_id: Any, expected: int, patience: float) -> list[Any]:
    """Return the task runs of a flow run when so many have ended, or nothing changes for a time."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    this_run = FlowRunFilter(id=FlowRunFilterId(any_=[uuid.UUID(str(flow_run_id))]))
    loop = asyncio.get_running_loop()
    recorded, changed = -1, loop.time()
    async with get_client() as client:
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


def _find_what_runs_again(
    pipeline: Pipeline, catalog: Any, keys: dict[str, str], earlier: dict[str, Any]
) -> dict[Node, str]:
    """Return the nodes to run, each with the reason: Kedro's resume suggestion, node by node."""
    datasets = {name: _inner(_get_dataset(catalog, name)) for name in pipeline.all_outputs()}
    needs, again = pipeline.node_dependencies, cast("dict[Node, str]", {})
    for node in pipeline.nodes:  # those before others come first
        run, reason = earlier.get(node.name), ""
        if run is None or not run.state.is_completed():
            reason = str(run.state.name) if run else "not run"
        elif run.task_key != keys[node.name]:
            reason = "parameters or catalog have changed"
        elif lost := ", ".join(name for name in node.outputs if _is_lost(datasets[name])):
            reason = f"{lost} is gone"
        if reason or needs[node] & again.keys():
            again[node] = reason or "what it needs is made again"
    todo = list(again)
    while todo:
        node = todo.pop()
        inputs = set(map(_plain_name, node.inputs))
        for maker in needs[node] - again.keys():
            used = [name for name in maker.outputs if _plain_name(name) in inputs]
            if kept := ", ".join(name for name in used if _is_in_memory(datasets[name])):
                again[maker] = f"{kept} was only in memory"
                todo.append(maker)
    return again


def _find_earlier(runner: PrefectRunner) -> tuple[str, dict[str, Any]]:
    """Return the session id of earlier attempts, if any, and the last task run of each node."""
    log, flow_run = get_run_logger(), cast("Any", FlowRunContext.get()).flow_run
    if flow_run.run_count <= 1 or not runner._resume:
        return "", {}
    # Of those that this process has started, kedro_init still runs.
    read = _read_task_runs(flow_run.id, expected=_started[str(flow_run.id)] - 1, patience=10)
    runs = [run for run in _call_api(read) if run.task_key.startswith("node/")]
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
    session, context, pipeline = opened
    if session_id:
        _adopt_session_id(session, session_id)
    made = _load_catalog(session, context, options)
    session.load_context = lambda *_, **__: context  # session.run calls no hook a second time
    context._get_catalog = lambda **_: made
    # Hooks that session.run calls get the catalog as it is, and what they change is in no key.
    if not last:
        with suppress(Exception):  # in session.run Kedro says what is wrong, and calls its hook
            runner._prepare(_copy_catalog(made), pipeline, session.session_id)
        return options
    runner._prepare(made, pipeline, session_id)
    _pin_versions(made, pipeline, session_id)
    again = _find_what_runs_again(pipeline, made, runner._keys, last)
    for node in again:
        _remove_versions(node, made)
    runner._resumed = {node: last[node.name] for node in pipeline.nodes if node not in again}
    completed = sum(run.state.is_completed() for run in last.values())
    counts = f"{completed} of {len(pipeline.nodes)}"
    log.info("Resuming session %s: %s nodes had completed", session_id, counts)
    for node in list(again)[:NAMES_SHOWN]:
        log.info("Runs again: %s (%s)", node.name, again[node])
    names = [node.name for node in pipeline.nodes if node in again]
    return options | {"node_names": names, "run_id": session_id} if names else None


# ---- Logs ----


class _RunLogs(APILogHandler):
    """Sends to Prefect what is logged in a flow run, also by threads that its nodes start."""

    def __init__(self, flow_run_id: str) -> None:
        super().__init__()
        self._flow_run_id = flow_run_id

    def filter(self, record: Any) -> Any:
        """Take a line of this run: several runs may go on in one process."""
        if not getattr(record, "flow_run_id", None):
            found = runtime.flow_run.id or self._flow_run_id
            record.flow_run_id = str(uuid.UUID(str(found)))  # an agent of Prefect 2 has no hyphens
            record.task_run_id = runtime.task_run.id
        return str(record.flow_run_id) == self._flow_run_id and super().filter(record)

    def format(self, record: logging.LogRecord) -> str:
        """Write a line so that Prefect takes it."""
        return _writable(super().format(record))[:LOG_SHOWN]


@contextmanager
def _logs_to_prefect() -> Iterator[None]:
    """Send what Kedro, the project and PREFECT_LOGGING_EXTRA_LOGGERS log, once."""
    extra = prefect.settings.PREFECT_LOGGING_EXTRA_LOGGERS.value() or ()
    handler = _RunLogs(str(runtime.flow_run.id))
    loggers = [*map(logging.getLogger, sorted({"kedro", _flow_name(), *extra}))]
    for logger in loggers:
        above: Any = logger
        while above and APILogHandler not in map(type, above.handlers):
            above = above.parent if above.propagate else None
        if not above:  # else what it logs is sent already
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


# ---- Flow ----


async def _set_retries(retries: int = 0, retry_delay_seconds: int = 0) -> None:
    """Set what section flow of prefect.yml says; the server decides at the end of the flow run."""
    policy = (flow_run := cast("Any", FlowRunContext.get()).flow_run).empirical_policy
    policy.retries, policy.retry_delay = retries, retry_delay_seconds
    async with get_client() as client:
        await client.update_flow_run(flow_run.id, empirical_policy=policy)


def _make_runner(
    config: _Config, session: Any, nodes: Pipeline, options: Options, metadata: ProjectMetadata
) -> PrefectRunner:
    """Make the runner that prefect.yml describes."""
    section = dict(config.task_runner)
    kind, resume = section.pop("type", ""), section.pop("resume", True)
    own = {name: section.pop(name) for name in ("is_async", "max_workers") if name in section}
    if kind == "threads":  # which asks for nodes side by side
        by_default = min(32, (os.cpu_count() or 1) + 4)
        own.setdefault("max_workers", (_THREADS and _THREADS.value()) or by_default)
    runner = PrefectRunner(**own, task_options=config.tasks)
    runner._resume, runner._has_artifacts = resume, config.artifacts
    shape = [[node.name, node.inputs, node.outputs] for node in nodes.nodes]
    runner._fingerprint = _digest(options, shape)
    if (place := _place_checkpoints(config, options)).get("url"):
        folder = f"{place['url'].rstrip('/')}/{runtime.flow_run.id}"
        name = place.get("credentials", "")
        credentials = _read_credentials(session, options, name)
        runner._checkpoint = functools.partial(_Checkpoint, folder, credentials)
        runner._job = {"options": options, "folder": folder, "credentials": name}
    if kind in ("processes", "dask"):
        runner._job["same"] = _same_everywhere(metadata)
        on_dask = functools.partial(_Dask, str(THIS_FILE), section)
        here = functools.partial(_Children, str(THIS_FILE))
        runner._make_engine = on_dask if kind == "dask" else here
    return runner


@task(persist_result=False)
def kedro_init(options: Options) -> Any:
    """Bootstrap the project, and make the Kedro session and the runner of this flow run."""
    _started[str(runtime.flow_run.id)] += 1
    (logger := get_run_logger()).info("Bootstrapping project")
    with _opening:
        metadata = _bootstrap(PROJECT_PATH)
        opened = _opened.pop() if _opened else _open(options, _pipeline_names(options))
    session, _, nodes = opened
    # Kedro names versions by the millisecond, in which another flow run may start as well.
    digits = f"{uuid.UUID(str(runtime.flow_run.id)).int % 1000:03}Z"
    _adopt_session_id(session, re.sub(r"(?<=\.\d{3})Z$", digits, session.session_id))
    config = _read_config(session, options)
    logger.info("Project %s: session created with ID %s", metadata.project_name, session.session_id)
    if config.flow:
        _call_api(_set_retries(**config.flow))
    return opened, _make_runner(config, session, nodes, options, metadata)


def _end_run(runner: PrefectRunner, error: BaseException | None) -> None:
    if runner._checkpoint:
        _end_checkpoints(error is None, *runner._checkpoint.args)
    advice = runner._suggestion
    if error and runner._resume:
        again = "Retry this flow run, and it goes on where it failed."
        get_run_logger().info(again)
        advice += f"\n{again}"
    if runner._has_artifacts:
        about = (runner._nodes, runner._records, error, advice)
        _show("account of this run", f"{_package_key()}-run", lambda: _describe_run(*about))


def _run_pipeline(options: Options) -> dict[str, str]:
    """Do what `kedro run` does, and return where each output lives."""
    get_run_logger().info("Initializing Kedro...")
    _guard_what_nodes_start()
    if _CALLED_IN_THREADS and not _opened:  # nodes use what their modules have made: a database
        with suppress(ClickException):  # connection belongs to the thread that made it
            _opened.append(_open(options, _pipeline_names(options)))
    opened, runner = cast("Any", kedro_init(options))
    try:
        with _logs_to_prefect(), opened[0]:  # the session
            if left := _resume(opened, runner, options):
                _run_session(opened[0], runner, left)
    except Exception as error:
        _end_run(runner, error)
        of_node = any(record.error is error for record in runner._records.values())
        if not of_node and (remedies := _remedies(str(error), options)):
            raise ClickException(f"{error}{remedies}") from error
        raise
    _end_run(runner, None)
    return cast("dict[str, str]", runner._outputs)


# Of the exception that ends a flow, Prefect stores class and message only where it writes JSON.
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


# ---- Registering: checks, plan, deployment ----


def _reach_server() -> None:
    """Refuse to register on a server that does not answer, or on none."""

    async def ask() -> None:
        async with get_client() as client:
            if error := await client.api_healthcheck():
                raise error
            try:
                await client.read_flows(limit=1)  # anybody may ask for its health, but not for this
            except ValueError as error:
                raise OSError("what answers is no Prefect API, whose URL ends in /api") from error

    name_it = "prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api"
    remedy = f"Start one with `prefect server start`, and name it with `{name_it}`."
    url = PREFECT_API_URL.value()
    if not url:
        raise ClickException(f"No Prefect server: PREFECT_API_URL is not set. {remedy}")
    with _server_errors(f"No Prefect server at {url}", remedy):
        _call_api(ask(), SERVER_TIMEOUT)


async def _read_work_pool(client: Any, name: str, queue_name: str) -> Any:
    """Return a work pool that has the queue: Prefect would make one that nobody serves."""
    quoted, quoted_queue = shlex.quote(name), shlex.quote(queue_name)
    try:
        pool = await client.read_work_pool(name)
    except ObjectNotFound:
        pools = [pool.name for pool in await client.read_work_pools()]
        problem = f"There is no work pool '{name}'."
        create = f" Create it: prefect work-pool create --type {_SUGGESTED_POOL_TYPE} {quoted}"
        raise _unknown(problem, name, pools, "work pools", create) from None
    if pool.type == "prefect-agent" != _AGENT_POOL_TYPE:
        problem = f"Work pool '{name}' is for agents, which Prefect 3 does not have. Create one for"
        raise ClickException(f"{problem} workers: prefect work-pool create --type process <name>")
    queues = [queue.name for queue in await client.read_work_queues(work_pool_name=name)]
    if queue_name not in queues:
        problem = f"Work pool '{name}' has no queue '{queue_name}'."
        create = f" Create it: prefect work-queue create --pool {quoted} {quoted_queue}"
        raise _unknown(problem, queue_name, queues, "queues", create)
    if pool.is_paused:
        resume = f"prefect work-pool resume {quoted}"
        click.echo(f"Warning: work pool '{name}' is paused. No run starts before: {resume}")
    return pool


def _set_options(options: Options) -> Options:
    """Return the options of a run that are not left at their default."""
    return {k: v for k, v in options.items() if v or k in ("pipeline_name", "env")}


async def _look_up(full_name: str, given: Options) -> tuple[Any, Any, Options]:
    """Return what is there of a deployment, its work pool, and the fields that name this."""
    existing: Any = None
    async with get_client() as client:
        with suppress(ObjectNotFound):
            existing = await client.read_deployment_by_name(full_name)
        used = getattr(existing, "work_pool_name", None)
        name = given.get("work_pool_name", used or "default")
        used_queue = existing.work_queue_name if used == name else None
        queue_name = given.get("work_queue_name", used_queue or "default")
        pool = await _read_work_pool(client, name, queue_name)
    return existing, pool, {"work_pool_name": name, "work_queue_name": queue_name}


def _fields(pipeline: Pipeline, options: Options, given: Options, existing: Any) -> Options:
    """Return what the command line says of a deployment; what nobody sets stays as it is."""
    old = getattr(existing, "job_variables", getattr(existing, "infra_overrides", None)) or {}
    level = {"PREFECT_LOGGING_LEVEL": given.get("logging_level", "DEBUG")}
    env = level | old.get("env", {}) | (level if "logging_level" in given else {})
    directory = {"directory": str(PROJECT_PATH)}
    fields: Options = {
        "parameters": _set_options(options),
        "entrypoint": "register_prefect_flow.py:my_flow",
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": directory}],
        "job_variables": old | {"env": env},
    }
    if "version" in given or not existing:
        fields["version"] = given.get("version", "1.0")
    described = getattr(existing, "description", None) or ""
    if not described or _sign(described.rpartition("\n\n")[0]) == described:
        described = _describe(pipeline, _set_options(options))
    return fields | {"description": described}


def _print_plan(pipeline: Pipeline, datasets: Options, config: _Config, options: Options) -> None:
    """Print the execution layers, where each dataset lives, and what prefect.yml sets."""
    layers, shown = pipeline.grouped_nodes, _set_options(options)
    what = f"Pipeline '{shown.pop('pipeline_name')}' of {my_flow.name}"
    where = f"environment '{shown.pop('env')}'"
    click.echo(f"{what}, {where}: {len(pipeline.nodes)} nodes in {len(layers)} layers")
    lines = [f"  {name}: {value}" for name, value in shown.items()]
    for number, layer in enumerate(layers, start=1):
        lines.append(f"Layer {number}")
        for node in layer:
            about = _task_options(node, config.tasks) or ""
            reads, writes = (", ".join(names) or "nothing" for names in (node.inputs, node.outputs))
            lines.append(f"  {node.name}: {reads} -> {writes}  {about}".rstrip())
    lines += ["Datasets", *(f"  {name}: {_where(name, found)}" for name, found in datasets.items())]
    lines += [f"task_runner.{name}: {value}" for name, value in config.task_runner.items()]
    click.echo("\n".join(lines))


def _register(name: str, pipeline: Pipeline, options: Options, given: Options, dry: bool) -> None:
    """Create a deployment, or update what the command line says of it; print what comes next."""
    full_name = f"{my_flow.name}/{name}"
    _reach_server()
    with _server_errors(f"Deployment '{full_name}' is not registered"):
        existing, pool, place = _call_api(_look_up(full_name, given), SERVER_TIMEOUT)
        if dry:
            return
        fields = _fields(pipeline, options, given, existing) | place
        for_agent = pool.type == _AGENT_POOL_TYPE
        save = _save_deployment(my_flow, name, fields, existing, for_agent)
        deployment_id = _call_api(save, 6 * SERVER_TIMEOUT)  # its database may be busy
    kind, ui = "agent" if for_agent else "worker", (PREFECT_UI_URL.value() or "").rstrip("/")
    pool_name, queue_name = (shlex.quote(value) for value in place.values())
    start = f"prefect {kind} start --pool {pool_name} --work-queue {queue_name}"
    click.echo(f"Registered deployment '{full_name}' with id {deployment_id}")
    click.echo(f"  see it:         {ui}/deployments/deployment/{deployment_id}")
    click.echo(f"  start {kind + ':':<9} {start}")
    click.echo(f"  start a run:    prefect deployment run {shlex.quote(full_name)}")


# ---- Command line ----


def _run_now(opened: _Opened, options: Options) -> None:
    """Run the flow in this process; exit code 1 if it fails, 130 if Ctrl-C ends it."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        os.write(2, b"Stopping: no other node starts. Ctrl-C again ends at once.\n")
        raise KeyboardInterrupt

    has_server = bool(PREFECT_API_URL.value())  # without, Prefect starts its embedded one
    if has_server:
        _reach_server()
    _guard_what_nodes_start()  # and the embedded server
    _opened.append(opened)
    state: Any = None
    with nullcontext() if has_server else _embedded_server() as is_embedded:
        signal.signal(signal.SIGINT, stop)
        with suppress(KeyboardInterrupt):
            state = my_flow(**options, return_state=True)
        if is_embedded and _started:
            # It stops with this process, and loses what it has not recorded.
            flow_run_id, expected = next(reversed(_started.items()))
            _call_api(_read_task_runs(flow_run_id, expected, patience=10 if state else 2))
    if state is None:
        click.echo("Stopped by Ctrl-C.", err=True)
        sys.exit(130)
    if not state.is_completed():
        raise ClickException(f"The flow run ended as {state.name}. {state.message or ''}")
    click.echo("The flow run has completed. Its outputs:")
    for name, where in (state.result() if state.data else {}).items():  # a slow server sends none
        click.echo(f"  {name}: {where}")


_KEDRO_RUN_OPTIONS = (  # flow parameter; spelling and parser of `kedro run`; form; meaning
    ("runtime_params", "--params", cli._split_params, "K=V,...", "Override parameters."),
    ("tags", "-t --tags", cli.split_string, "TAG,...", "Only nodes with one of these tags."),
    ("node_names", "-n --nodes", cli.split_node_names, "NODE,...", "Only these nodes."),
    ("from_nodes", "--from-nodes", cli.split_node_names, "NODE,...", "Only from these on."),
    ("to_nodes", "--to-nodes", cli.split_node_names, "NODE,...", "Only up to these."),
    ("from_inputs", "--from-inputs", cli.split_string, "DATA,...", "Only what needs these."),
    ("to_outputs", "--to-outputs", cli.split_string, "DATA,...", "Only what these need."),
    ("namespaces", "-ns --namespaces --namespace", cli.split_node_names, "NAME,...", "Only these."),
    ("load_versions", "-lv --load-versions", cli._split_load_versions, "DATA:VERSION", "Versions."),
    ("conf_source", "--conf-source", None, "PATH", "Configuration in another place than conf."),
    ("checkpoints", "--checkpoints", None, "URL", "Where nodes hand on data."),
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


def _check_usage(given: Options, deployment_name: str) -> None:
    """Refuse what Prefect would refuse, and options that would do nothing."""
    if not deployment_name or re.search(r"[/%&<>]", deployment_name):
        problem = f"Prefect refuses deployment name '{deployment_name}': it is empty, or has one of"
        raise ClickException(f"{problem} / % & < >. Choose another --deployment_name.")
    unused = given.keys() & {"work_pool_name", "work_queue_name", "logging_level"}
    for option in unused if "run" in given else ():
        hint = " Set PREFECT_LOGGING_LEVEL instead." * (option == "logging_level")
        raise click.UsageError(f"--{option} is for work pools: leave it out with --run.{hint}")


# Kedro's recipe spells its options with underscores, most other commands with hyphens: both do.
@click.command(
    epilog=f"register_prefect_flow.py {__version__}",
    context_settings={
        "show_default": True, "token_normalize_func": lambda name: name.replace("-", "_"),
    },
)  # fmt: skip
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
@click.option("--work_pool_name", default="default", help="Work pool that runs are sent to.")
@click.option("--work_queue_name", default="default", help="Queue in the work pool.")
@click.option("--version", default="1.0", help="Version of the deployment.")
@click.option(
    "--logging_level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]),
    default="DEBUG", help="PREFECT_LOGGING_LEVEL of the runs.",
)  # fmt: skip
@click.option("--run", is_flag=True, help="Run the flow now, in this process; needs no work pool.")
@click.option("--dry_run", is_flag=True, help="Check everything, show the plan, change nothing.")
@click.pass_context
def prefect_deploy(
    context: click.Context, /, deployment_name: str, run: bool, dry_run: bool, **_: Any
) -> None:
    """Register a Kedro pipeline as a Prefect deployment, or run it as a flow."""
    default, source = click.core.ParameterSource.DEFAULT, context.get_parameter_source
    given = {name: value for name, value in context.params.items() if source(name) != default}
    _check_usage(given, deployment_name)
    options = {name: context.params[name] for name in inspect.signature(my_flow.fn).parameters}
    with _project_errors(f"Loading {PROJECT_PATH}, where this file lies, as a Kedro project"):
        _bootstrap(PROJECT_PATH)
    _check_telemetry()
    _check_environment(options)
    config = _read_config(_open_session(options), options)
    if run and not dry_run:  # a run loads the catalog itself, and calls the hooks once
        opened = _open(options)
        _check_task_names(config.tasks)
        return _run_now(opened, options)
    (_, _, nodes), datasets, needed = _open_with_datasets(options)
    _check_task_names(config.tasks)
    if needed:
        click.echo(f"Note: each run has to bring these runtime_params: {', '.join(needed)}")
    if dry_run:
        _print_plan(nodes, datasets, config, options)
    return None if run else _register(deployment_name, nodes, options, given, dry_run)


if __name__ == "__main__":
    prefect_deploy()
