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
import random
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from itertools import chain, combinations, filterfalse
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

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
        _text = f"{THIS_FILE.name} needs {_name} {_floor} or newer, and this is {_name} {_found}."
        if _name != "Python":
            _text += f" pip install '{_name.lower()}>={_floor}'"
        if __name__ == "__main__":
            sys.exit(f"Error: {_text}")
        raise ImportError(_text)

from kedro import io as kedro_io
from kedro.config import AbstractConfigLoader, MissingConfigException
from kedro.framework import project as kedro_project
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
_MemoryDataset: Any = vars(kedro_io).get("MemoryDataset", vars(kedro_io).get("MemoryDataSet"))


def _filter_pipeline(pipeline: Pipeline, options: Options) -> Pipeline:
    filters = {name: options[name] for name in FILTERS}
    spaces = filters.pop("namespaces")  # Kedro 1.0 brought the plural
    own = {"node_namespaces": spaces} if _KEDRO_1 else {"node_namespace": next(iter(spaces), None)}
    return pipeline.filter(**filters, **own)


def _request_pipelines(names: list[str]) -> None:
    """Tell Kedro 1.5 and newer to load these pipelines only; none: all."""
    if hasattr(pipelines, "set_requested"):
        pipelines.set_requested(names or None)


def _session_class() -> Any:
    """Return the class of the project's session, which is a setting since Kedro 1.3."""
    return getattr(settings, "SESSION_CLASS", KedroSession)


def _create_session(env: str, conf_source: str, runtime_params: Options) -> Any:
    """Make a session as `kedro run` does; those of another kind take runtime parameters later."""
    arguments: Options = {"conf_source": conf_source} if conf_source else {}
    if issubclass(_session_class(), KedroSession):
        arguments["runtime_params" if _KEDRO_1 else "extra_params"] = runtime_params
    return _session_class().create(project_path=PROJECT_PATH, env=env, **arguments)


def _adopt_run_id(session: Any, run_id: str) -> None:
    """Let it be the version of what a session saves; those of another kind take it later."""
    if isinstance(session, KedroSession):
        stored = session.store | {"session_id": run_id}
        session.session_id = run_id
        session._store = session._init_store()  # a store may be a file with this id in its name
        session._store.update(stored)


def _call_with_params(method: Any, options: Options) -> Any:
    """Call a method of a session, which may be of the kind that takes the parameters only now."""
    takes_them = "runtime_params" in inspect.signature(method).parameters
    return method(**{"runtime_params": options["runtime_params"]} if takes_them else {})


def _load_catalog(context: Any, options: Options, run_id: str) -> Any:
    """Make the catalog as `kedro run` does."""
    if names := _pipeline_names(options):  # whose parameters Kedro 1.7 checks
        context._pipelines_to_validate = names
    own = {"catalog_class": settings.DATA_CATALOG_CLASS} if _KEDRO_1 else {}
    versions = options["load_versions"]
    return context._get_catalog(save_version=run_id, load_versions=versions, **own)


def _run_session(session: Any, runner: SequentialRunner, options: Options, run_id: str) -> None:
    """Pass on what `kedro run` passes on, for hooks get to see it."""
    accepted, names = _accepted(session.run), _pipeline_names(options)
    arguments = options | {
        "run_id": run_id,
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


def _catalog_names(catalog: Any) -> list[str]:
    return [*(catalog.keys() if _KEDRO_1 else catalog.list())]


def _set_dataset(catalog: Any, name: str, dataset: Any) -> None:
    (vars(catalog).get("_datasets") or catalog._data_sets).pop(name, None)  # or Kedro warns
    (catalog.__setitem__ if _KEDRO_1 else catalog.add)(name, dataset)


def _is_in_memory(dataset: Any | None) -> bool:
    old = type(dataset).__name__ in ("MemoryDataSet", "MemoryDataset")  # 0.18 had no mark for it
    return dataset is None or bool(getattr(dataset, "_EPHEMERAL", old))


def _report_end(report: Callable[[Any], None], future: Any) -> None:
    """Wait for a task, and report its state, or what kept it from having one."""
    try:
        state = future.wait()  # in Prefect 3 it returns nothing
        report(future.state if state is None else state)
    except BaseException as error:
        report(error)


# Prefect 2 lacks this setting.
_THREADS: Any = getattr(prefect.settings, "PREFECT_TASKS_RUNNER_THREAD_POOL_MAX_WORKERS", None)

if _PREFECT_3:
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.client.schemas.objects import TaskRunResult
    from prefect.task_engine import run_task
    from prefect.task_runners import ThreadPoolTaskRunner

    _AGENT_POOL_TYPE, _SUGGESTED_POOL_TYPE = "", "process"

    @contextmanager
    def _task_runner(max_workers: int) -> Iterator[Callable[..., None]]:
        """Yield what runs a task, behind states of others: if one worker does, in this thread."""
        runner: ThreadPoolTaskRunner[None] = ThreadPoolTaskRunner(max_workers=max_workers)

        def start(task: Any, needed: list[Any], report: Callable[[Any], None]) -> None:
            # Prefect loads the result behind each state, which earlier runs have not kept: one that
            # failed is enough to wait for, and edges can be drawn without.
            failed: list[Any] = [state for state in needed if not state.is_completed()]
            ids = {state.state_details.task_run_id for state in needed}
            about: Any = {"parameters": {}, "wait_for": failed[:1] or [None]}
            about["dependencies"] = {"wait_for": {TaskRunResult(id=each) for each in ids}}
            if max_workers == 1:
                report(run_task(task, return_type="state", **about))
            else:
                future = runner.submit(task, **about)
                future.add_done_callback(functools.partial(_report_end, report))

        with runner if max_workers > 1 else nullcontext():
            yield start

    async def _save_deployment(flow: Any, name: str, fields: Options, old: Any, agent: bool) -> Any:
        """Create or update a deployment; what is not set stays as it is on the server."""
        del agent  # Prefect 3 has none
        fields["parameter_openapi_schema"] = parameter_schema(flow).model_dump(exclude_unset=True)
        async with get_client() as client:
            if old:
                await client.update_deployment(old.id, DeploymentUpdate(**fields))
                return old.id
            flow_id = await client.create_flow_from_name(flow.name)
            return await client.create_deployment(flow_id, name, **fields)

else:
    _AGENT_POOL_TYPE = "prefect-agent"  # Agents gave way to workers in Prefect 2.16.4.
    _IS_LATE = _version(prefect.__version__) >= (2, 16, 4)
    _SUGGESTED_POOL_TYPE = "process" if _IS_LATE else _AGENT_POOL_TYPE

    @contextmanager
    def _task_runner(max_workers: int) -> Iterator[Callable[..., None]]:
        del max_workers  # nobody but PrefectRunner limits how many tasks are submitted

        def start(task: Any, needed: list[Any], report: Callable[[Any], None]) -> None:
            future = task.submit(wait_for=needed)
            # Futures have no callbacks before Prefect 3: a thread waits for each of the few.
            threading.Thread(target=_report_end, args=(report, future), daemon=True).start()

        yield start

    async def _save_deployment(flow: Any, name: str, fields: Options, old: Any, agent: bool) -> Any:
        """Create or replace a deployment; what is not set is sent as it is on the server."""
        accepted = inspect.signature(PrefectClient.create_deployment).parameters
        kept = {"version", "tags", "description", "paused", "enforce_parameter_schema"}
        kept |= {"schedules"} if "schedules" in accepted else {"schedule", "is_schedule_active"}
        there: Options = {each: getattr(old, each) for each in kept if hasattr(old, each)}
        if "schedules" in there:  # Prefect 2.16 brought several
            from prefect.client.schemas.actions import DeploymentScheduleCreate as Schedule

            of_server = there["schedules"]
            there["schedules"] = [Schedule(schedule=s.schedule, active=s.active) for s in of_server]
        fields = there | fields | {"parameter_openapi_schema": parameter_schema(flow).dict()}
        if agent:  # for which job variables hold in infrastructure blocks only
            from prefect.infrastructure import Process

            fields["infrastructure_document_id"] = await Process()._save(is_anonymous=True)
        if "job_variables" not in accepted:  # Prefect 2.19 renamed them
            fields["infra_overrides"] = fields.pop("job_variables")
        async with get_client() as client:
            flow_id = await client.create_flow_from_name(flow.name)
            return await client.create_deployment(flow_id, name, **fields)


# ---- Errors: what a user can mend is one message without a traceback ----


def _need_engines(what: str) -> None:
    """Refuse what is not tried with older versions of Kedro and Prefect."""
    for package, floor in ((kedro, "0.19"), (prefect, "3.2")):
        name = package.__name__
        if _version(package.__version__) < _version(floor):
            problem = f"{what} needs {name.title()} {floor} or newer, and this is {name.title()}"
            remedy = f"leave it out, or pip install '{name}>={floor}'"
            raise ClickException(f"{problem} {package.__version__}: {remedy}")


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


# Held while Kedro loads a project: a process has one list of pipelines, and may have several runs.
_loading = threading.Lock()


def _bootstrap() -> ProjectMetadata:
    """Let this be the project that Kedro has open: a process may run flows of several."""
    metadata = _get_project_metadata(PROJECT_PATH)
    if metadata.package_name != kedro_project.PACKAGE_NAME:
        bootstrap_project(PROJECT_PATH)
        _log_plain_lines()
    return metadata


def _log_plain_lines() -> None:
    """Where the output is no terminal, let Kedro's handler write lines as they are."""
    handlers = logging.getLogger().handlers
    for index, handler in enumerate(handlers):
        # Into a file, Kedro's Rich handler would draw each line in a millisecond.
        if isinstance(handler, RichHandler) and not handler.console.is_terminal:
            with suppress(AttributeError):  # and a worker stops reading at what is no UTF-8
                cast("Any", handler.console.file).reconfigure(errors="backslashreplace")
            handlers[index] = plain = logging.StreamHandler(handler.console.file)
            plain.setLevel(handler.level)
            layout = "%(asctime)s | %(levelname)-7s | %(name)s - %(message)s"
            plain.setFormatter(logging.Formatter(layout))


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
    env: str = options["env"] or os.environ.get("KEDRO_ENV") or "base"
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


def _read_credentials(session: Any, options: Options, name: str) -> Options:
    """Return an entry of credentials.yml; without a name, nothing."""
    if not name:
        return {}
    found: Options = {}
    with suppress(MissingConfigException):
        found = _call_with_params(session._get_config_loader, options)["credentials"]
    if name not in found:
        problem = f"There are no credentials '{name}' in environment '{_environment(options)}'."
        raise _unknown(problem, name, found, "credentials")
    return cast("Options", found[name])


def _pipeline_names(options: Options) -> list[str]:
    """Name the pipelines as `kedro run` does: none, if it is the default one."""
    names = list(dict.fromkeys(name.strip() for name in options["pipeline_name"].split(",")))
    return [] if names == ["__default__"] else names


def _accepted(*methods: Any) -> set[str]:
    """Name the parameters of methods of a session; **kwargs stands for those of Kedro's own."""
    signatures = [*map(inspect.signature, methods)]
    found = list(chain.from_iterable(each.parameters.values() for each in signatures))
    if any(each.kind is each.VAR_KEYWORD for each in found):
        found += inspect.signature(KedroSession.run).parameters.values()
    return {each.name for each in found}


def _check_options(options: Options) -> None:
    """Refuse options that this Kedro, or the project's own session, does not take."""
    taken = _accepted(_session_class().create, _session_class().run) | {"env", "checkpoints"}
    names, namespaces = _pipeline_names(options), options["namespaces"]
    one_of = {  # what the session may call it; the singular takes one only
        "pipeline_name": {"pipeline_names", *([] if names[1:] else ["pipeline_name"])},
        "namespaces": {"namespaces", *([] if namespaces[1:] else ["namespace"])},
        "runtime_params": {"runtime_params", "extra_params"},
    }
    for name, value in (options | {"pipeline_name": names}).items():
        if value and not taken & one_of.get(name, {name}):
            what = f"{name} '{options[name]}'" if name in ("pipeline_name", "namespaces") else name
            kind = f"{_session_class().__name__} of Kedro {kedro.__version__}"
            raise ClickException(f"{kind} does not take {what}: leave it out, or change that.")


def _is_parameter(name: str) -> bool:
    return name == "parameters" or name.startswith("params:")


def _plain_name(dataset: str) -> str:
    """Return a dataset's name without the transcoding."""
    return dataset.partition("@")[0]


def _namespaces(node: Node) -> set[str]:
    """Return the namespaces that a node is in: for a.b, that is a and a.b."""
    parts = (node.namespace or "").split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)} - {""}


def _load_pipeline(options: Options) -> Pipeline:
    """Return the nodes that a run asks for; refuse what cannot be right."""
    names = _pipeline_names(options) or ["__default__"]
    with _project_errors("Loading the pipelines (pipeline_registry.py)"):
        found: list[Any] = [pipelines.get(name) for name in names]
        for name, pipeline in zip(names, found, strict=True):
            if pipeline is None:
                _request_pipelines([])
                raise _unknown(f"There is no pipeline '{name}'.", name, pipelines, "pipelines")
            if not pipeline.nodes:
                raise ClickException(f"Pipeline '{name}' is empty: it has no node to run.")
    try:
        return _filter_pipeline(sum(found, Pipeline([])), options)
    except ValueError as error:
        filters = ", ".join(
            f"{name} {','.join(options[name])}" for name in FILTERS if options[name]
        )
        problem = f"Filtering pipeline '{options['pipeline_name']}' by {filters}: {error}"
        raise ClickException(problem) from error


def _open_project(options: Options, names: Iterable[str] = ()) -> tuple[Any, Any, Pipeline]:
    """Make session, context and pipeline, in Kedro's order; load the pipelines with these names."""
    # What a hook reads from the context may shape the pipelines: those of the last run do not do.
    pipelines.configure(f"{_bootstrap().package_name}.pipeline_registry")
    _request_pipelines(list(names))
    session = _open_session(options)
    with _project_errors(f"Loading environment '{_environment(options)}'"):
        context = _call_with_params(session.load_context, options)
    return session, context, _load_pipeline(options)


def _other_environment(options: Options) -> str:
    """Say that a run leaves out an environment that `kedro run` reads, if it has anything."""
    local = settings.CONFIG_LOADER_ARGS.get("default_run_env", "local")
    has_files = any(Path(_locate_conf(options), local).glob("**/*.y*ml"))
    if local == _environment(options) or not has_files:
        return ""
    read = (
        f"Environment {_environment(options)} was read. `kedro run` reads environment {local}, too"
    )
    return f" {read}: try --env {local}."


def _inner(dataset: Any) -> Any:
    """Return what a cache is of."""
    return dataset._dataset if isinstance(dataset, _CachedDataset) else dataset


def _pin_versions(catalog: Any, names: Iterable[str], run_id: str) -> None:
    """Load what this run has saved elsewhere, even if another run has saved since."""
    for name in names:
        dataset: Any = _inner(_get_dataset(catalog, name))
        version = getattr(dataset, "_version", None)  # datasets of others may use this name
        if not isinstance(version, kedro_io.Version) or version.load:
            continue
        if dataset._exists_function(str(dataset._get_versioned_path(run_id))):
            dataset._version = kedro_io.Version(run_id, version.save)
            dataset.release()  # it remembers versions


class _Checked(NamedTuple):
    """What is known of a run before it starts."""

    pipeline: Pipeline
    datasets: dict[str, Any | None]  # None: the runner keeps it in memory
    notes: list[str]  # what has to come with the run


def _note_missing(pipeline: Pipeline, catalog: Any, datasets: Options) -> list[str]:
    """Name inputs that nothing provides, as notes if runs or hooks may bring them."""
    names, notes = _catalog_names(catalog), []
    missing = sorted(name for name in pipeline.inputs() if datasets[name] is None)
    if inputs := [name for name in missing if not _is_parameter(name)]:
        problem = f"No catalog entry, pattern or parameter provides pipeline input {inputs[0]}"
        problem = ", ".join([problem, *inputs[1:]]) + "."
        hooks = (getattr(hook, "before_pipeline_run", None) for hook in settings.HOOKS)
        if not any(hook and "catalog" in inspect.signature(hook).parameters for hook in hooks):
            remedy = f" Add it to the catalog in {settings.CONF_SOURCE}, or run what makes it."
            entries = [name for name in names if not _is_parameter(name)]
            raise _unknown(problem, inputs[0], entries, "entries", remedy)
        notes.append(f"{problem} A hook has to (before_pipeline_run), or each run fails.")
    for name in filter(_is_parameter, missing):
        close = difflib.get_close_matches(name, filter(_is_parameter, names), n=1)
        hint = f" Or did you mean {close[0]}?" if close else ""
        param = name.removeprefix("params:")
        notes.append(f"Each run has to bring '{param}' in runtime_params, or a hook.{hint}")
    return notes


def _check_project(options: Options) -> _Checked:
    """Open the project as a run would, and make its datasets, but run no hook of a pipeline."""
    _check_options(options)
    _, context, pipeline = _open_project(options)
    names = sorted(pipeline.all_inputs() | pipeline.all_outputs())
    doing = f"Loading catalog and parameters of environment '{_environment(options)}'"
    try:
        with _project_errors(doing):
            catalog = _load_catalog(context, options, kedro_io.core.generate_timestamp())
            datasets = {name: _get_dataset(catalog, name) for name in names}
        return _Checked(pipeline, datasets, _note_missing(pipeline, catalog, datasets))
    except ClickException as error:
        if "Runtime parameter" not in str(error.__cause__):  # Kedro has no class for that
            raise ClickException(error.message + _other_environment(options)) from error
        [reason, *_] = str(error.__cause__).splitlines()
        note = f"Each run has to bring runtime_params. {reason} Without them (--params) the catalog"
        return _Checked(pipeline, {}, [f"{note} is not checked."])


def _note_run_command(metadata: ProjectMetadata) -> list[str]:
    """Say that a project's own `kedro run` is not what a flow runs."""
    try:
        commands = importlib.import_module(f"{metadata.package_name}.cli").cli.commands
    except Exception:  # there is none, or `kedro` says what is wrong with it
        return []
    own = "cli.py has a command `run` of its own. A flow run does not call it."
    return [own] if "run" in commands else []


# ---- conf/<env>/prefect.yml ----

_NUMBER = (int, float)
_SHAPE: Options = {
    "task_runner": {"type": str, "max_workers": int, "is_async": bool, "resume": bool},
    "checkpoints": (str, {"url": str, "credentials": str}), "artifacts": bool,
    "tasks": {str: {
        "retries": int, "retry_delay_seconds": (*_NUMBER, list), "retry_jitter_factor": _NUMBER,
        "timeout_seconds": _NUMBER, "tags": list, "log_prints": bool, "description": str,
        "version": str, "resources": dict,
    }},
}  # fmt: skip


_MOVED = {"deployment", "deployments", "flow"}  # sections that an earlier copy of this file had


class _Config(NamedTuple):
    """What prefect.yml says of how nodes are run."""

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


def _load_config(session: Any, options: Options) -> Options:
    """Load prefect.yml with the project's own config loader; none: nothing."""
    loader = _call_with_params(session._get_config_loader, options)
    section: Any = {}
    with _project_errors("Loading prefect.yml"), suppress(MissingConfigException, KeyError):
        if hasattr(loader, "config_patterns"):
            loader.config_patterns.setdefault("prefect", ["prefect.*"])
        try:
            section = loader["prefect"] or {}
        except (AttributeError, OSError, TypeError):  # so may a loader of the project's own say it
            if any(Path(_locate_conf(options)).rglob("prefect*.y*ml")):
                raise
    return {name: value for name, value in section.items() if value is not None}


def _read_config(session: Any, options: Options) -> _Config:
    """Read prefect.yml, and check it."""
    found = _load_config(session, options)
    for name in sorted(found.keys() & _MOVED):
        problem = f"prefect.yml says how nodes are run, and has no section {name} any more"
        deployments = (
            "Deployments belong into Prefect's own file prefect.yaml (`prefect deploy --all`)"
        )
        retries = "PREFECT_FLOW_DEFAULT_RETRIES and PREFECT_FLOW_DEFAULT_RETRY_DELAY_SECONDS"
        raise ClickException(f"{problem}. {deployments}, retries of flow runs to {retries}.")
    shape, section = dict(_SHAPE), found.get("task_runner", {})
    kind = section.get("type", "threads") if isinstance(section, dict) else "threads"
    if kind == "dask":  # which checks what else there is
        shape["task_runner"] = _SHAPE["task_runner"] | {str: object}
    _check("", found, shape)
    config = _Config(**{"task_runner": {}, "tasks": {}, **found})
    if kind not in (kinds := ("threads", "processes", "dask")):
        raise _unknown(f"prefect.yml: task_runner.type is '{kind}'.", kind, kinds, "types")
    with _project_errors("Reading task_runner in prefect.yml"):
        PrefectRunner(max_workers=section.get("max_workers"))
    if kind != "threads" or config.checkpoints or options["checkpoints"]:
        what = "checkpoints" if kind == "threads" else f"task_runner.type {kind}"
        _need_engines(f"prefect.yml: {what}")
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


# ---- Pictures and artifacts: what Prefect's UI shows of a pipeline and of its datasets ----

# In a description of ours, and invisible there: one without this line is somebody's own.
_MARKER = "[register_prefect_flow.py]: # (to keep what you write here, remove this line)"


def _plain(text: str) -> str:
    """Write a text in Markdown so that nothing in it is markup, and it stays in its table cell."""
    text = html.escape(" ".join(text.split()), quote=False)
    # Backslashes, because the older UI decodes few entities.
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", text)


def _draw(pipeline: Pipeline) -> str:
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
            boxes.append(
                f'<g><title>{html.escape(node.name)}</title><rect x="{left}" y="{y - 14:g}"'
                f' width="{width}" height="28" rx="5" fill="#334155"/>'
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


def _picture(pipeline: Pipeline) -> str:
    """Return the drawing in Markdown."""
    if len(pipeline.nodes) > NODES_DRAWN:
        return f"{len(pipeline.nodes)} nodes, which are too many to draw."
    drawn = base64.b64encode(_draw(pipeline).encode()).decode()
    return f"![the pipeline](data:image/svg+xml;base64,{drawn})"


def _table(head: Iterable[str], *rows: Iterable[str]) -> str:
    """Write a table in Markdown."""
    lines = [head, ["---" for _ in head], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _without_secrets(options: Options) -> Options:
    """Return the options of a run as they may be shown: no runtime values, no passwords in URLs."""
    params = ", ".join(options.get("runtime_params", ()))
    shown = options | ({"runtime_params": params} if params else {})
    return {name: _without_password(str(value)) for name, value in shown.items()}


def _without_password(text: str) -> str:
    """Leave out who a URL says that asks."""
    return re.sub(r"(?<=://)[^/\s]+@", "***@", text)


def _describe(pipeline: Pipeline, options: Options) -> str:
    """Describe what a deployment runs in Markdown."""
    lines = [f"- {name}: {_plain(text)}" for name, text in _without_secrets(options).items()]
    return "\n".join([*lines, f"\n{_picture(pipeline)}", f"\n{_MARKER}"])


def _artifact_key(name: str) -> str:
    """Return the key of an artifact of this project: it may hold a-z, 0-9 and hyphens only."""
    package, slug = (re.sub(r"[^a-z0-9]+", "-", n.lower()).strip("-") for n in (_flow_name(), name))
    if slug != name or "-" in name:  # so that no two are the same
        slug = f"{slug[:50]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".strip("-")
    return f"{package}-{slug}"


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
        try:
            about = getattr(dataset, "metadata", None)
            about = about.get("prefect") if isinstance(about, dict) else None
            if isinstance(about, dict) and about.get("preview"):
                text = _render(name, dataset, about.get("preview_args") or {})
                _call_api(_create_artifact(text, _artifact_key(name)), SERVER_TIMEOUT)
        except Exception as error:
            logger = logging.getLogger("kedro")
            logger.warning("No preview of '%s' in Prefect: %r", name, error)


async def _create_artifact(text: str, key: str) -> None:
    """Add Markdown to the task run that goes on here."""
    created: Any = create_markdown_artifact(text, key=key)
    if inspect.isawaitable(created):  # in Prefect 2 it is done by now
        await created


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


def _key_of_other_machines(section: Options) -> str:
    """Return the key of task_runner that lets nodes run on other machines; none: nothing."""
    if urlsplit(str(section.get("address", ""))).hostname not in (
        None,
        "localhost",
        "127.0.0.1",
        "::1",
    ):
        return "address"
    if not str(section.get("cluster_class", "LocalCluster")).endswith("LocalCluster"):
        return "cluster_class"
    return next((key for key in ("scheduler_file", "host") if key in section), "")


def _place_checkpoints(config: _Config, options: Options) -> Options:
    """Return where checkpoints lie, and the name of credentials; nothing: there are none."""
    place = options["checkpoints"] or config.checkpoints or {}
    place = dict(place) if isinstance(place, dict) else {"url": place}
    if not place.get("url") and config.task_runner.get("type", "threads") != "threads":
        if key := _key_of_other_machines(config.task_runner):
            problem = f"prefect.yml: with task_runner.{key}, nodes hand data on between machines"
            raise ClickException(f"{problem}: checkpoints: <a URL or folder that all reach>")
        storage = prefect.settings.PREFECT_LOCAL_STORAGE_PATH.value()
        place["url"] = str(storage / "kedro-checkpoints")
    if place.get("url"):
        _import("kedro_datasets.pickle", "kedro-datasets[pickle]", "checkpoints")
        if "://" not in place["url"]:
            place["url"] = str(PROJECT_PATH / place["url"])
    return place


@dataclass
class _Checkpoints:
    """Those of one flow run, in a folder of its own."""

    folder: str  # or URL
    credentials: Options

    def make(self, name: str, node: str = "") -> _Checkpoint:
        """Return the one of a dataset, which the node makes."""
        return _Checkpoint(self.folder, self.credentials, name, node)

    def add_to(self, catalog: Any, pipeline: Pipeline, kept: Iterable[str], cache: bool) -> None:
        """Let what nodes write be in files as well as in memory, or instead; but what is kept."""
        for node in pipeline.nodes:
            for name in set(node.outputs).difference(kept):
                dataset = _get_dataset(catalog, name)
                if _is_in_memory(_inner(dataset)):
                    made: Any = self.make(name, node.name)
                    mode = getattr(dataset, "_copy_mode", None)
                    made = kedro_io.CachedDataset(made, copy_mode=mode) if cache else made
                    _set_dataset(catalog, name, made)

    def end(self, completed: bool) -> None:
        """Remove those of a flow run that has completed; say where those of a failed one are."""
        log, fsspec = get_run_logger(), importlib.import_module("fsspec.core")
        try:
            files, path = fsspec.url_to_fs(self.folder, **self.credentials)
            if completed and files.exists(path):
                files.rm(path, recursive=True)
            elif files.exists(path):
                log.info("Checkpoints for a retry: %s", self.folder)
        except Exception as error:
            log.warning("Checkpoints in %s: %s", self.folder, error)


# ---- Nodes as tasks ----


@dataclass
class _Record:
    """What is known of the task of a node."""

    attempts: int = 0
    error: BaseException | None = None  # of the last attempt


class _Run(NamedTuple):
    """What the tasks of one run find by its key."""

    nodes: dict[str, Node]
    catalog: Any
    records: dict[str, _Record]  # by node name
    executor: "_InProcess | _InChildren"
    keys: Options | None = None  # in a child, by node name
    has_previews: bool = False


# Those that go on in this process, by the key that tasks are given: Prefect walks what it is given.
_runs: dict[str, _Run] = {}


class _InProcess(NamedTuple):
    """Runs nodes in this process, each in the thread of its task."""

    catalog: Any
    hook_manager: Any
    is_async: bool
    run_id: str | None
    is_first: bool  # process and attempt of the run: else others have saved what nodes load

    def run(self, node: Node, record: _Record) -> None:
        """Run a node as Kedro does."""
        del record
        if self.run_id and not self.is_first:
            _pin_versions(self.catalog, node.inputs, self.run_id)
        _run_node(node, self.catalog, self.hook_manager, self.is_async, self.run_id)

    def stop(self) -> None:
        """Do nothing: what a thread does cannot be ended."""

    def close(self) -> None:
        """Do nothing: this process goes on."""


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
    about = dataset._describe()
    about = about if isinstance(about, dict) else {}  # some return a text
    filepath, protocol = about.get("filepath", ""), about.get("protocol", "file")
    prefix = "" if protocol == "file" else f"{protocol}://"
    return f"{type(dataset).__name__} {prefix}{filepath}".rstrip()


def _task_key(node: Node, catalog: Any, run: str) -> str:
    """Identify what a node does in a run: it tells a retried flow run what need not run again."""
    parameters = list(filter(_is_parameter, node.inputs))
    found: Any = {name: _get_dataset(catalog, name) for name in (*parameters, *node.outputs)}
    values = {name: found[name].load() for name in parameters if found[name] is not None}
    lasting = [name for name in node.outputs if not _is_in_memory(found[name])]
    places = {name: _where(name, found[name]) for name in lasting}
    return f"node/{run}/{_digest(node.inputs, node.outputs, values, places)}/{node.name}"


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


def _bearable(error: BaseException) -> Exception:
    """Return what Prefect can print and store of an exception, and end a task with.

    It fails where a text is no Unicode, and a long one is too much. What is no Exception would be
    the end of more than the task, and Prefect 2 waits for ever after a StopIteration.
    """
    whole, text = "".join(traceback.format_exception(error)), _text_of(error)
    is_short = len(text) <= TEXT_SHOWN and len(whole) <= LOG_SHOWN and whole == _writable(whole)
    is_odd = isinstance(error, (StopIteration, StopAsyncIteration))
    if isinstance(error, Exception) and is_short and not is_odd:
        return error
    shown = text[:TEXT_SHOWN] + f"... (cut: {len(text)} characters)" * (len(text) > TEXT_SHOWN)
    made = _stand_in(type(error).__module__, type(error).__name__, shown)
    return made.with_traceback(error.__traceback__)


def _remove_versions(node: Node, catalog: Any) -> None:
    """Let a node save again what an earlier attempt has saved, whole or half, in this version."""
    for name in node.outputs:
        dataset = _inner(_get_dataset(catalog, name))
        is_kedros = isinstance(getattr(dataset, "_version", None), kedro_io.Version)
        if is_kedros and hasattr(dataset, "_fs"):
            path = str(dataset._get_versioned_path(dataset.resolve_save_version()))
            if dataset._exists_function(path):
                dataset._fs.rm(path, recursive=True)
                dataset.release()  # it remembers versions


def _is_of_prefect(what: Any) -> bool:
    """Tell whether a class or function is Prefect's."""
    return str(getattr(what, "__module__", "")).partition(".")[0] == "prefect"


def kedro_task(node_name: str, run_key: str) -> None:
    """Run one node of a run as Kedro does: load, run, save, with its hooks."""
    run = _runs[run_key]
    node, record = run.nodes[node_name], run.records[node_name]
    record.attempts, record.error = record.attempts + 1, None
    try:
        if record.attempts > 1:
            _remove_versions(node, run.catalog)
        run.executor.run(node, record)
    except KeyboardInterrupt as error:
        record.error = error
        raise
    except SystemExit as ended:  # a failure of this node, and no end of anything else
        record.error = RuntimeError(f"Node '{node_name}' called sys.exit({_text_of(ended)})")
        raise record.error from ended
    except BaseException as error:
        if _is_of_prefect(type(error)):  # it stops a task: a timeout, a suspended flow run
            raise
        bearable = _bearable(error)
        # Kedro's hooks get what is no Exception as it is: they are not told of it.
        record.error = bearable if isinstance(error, Exception) else error
        if bearable is error:
            raise
        raise bearable from None
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
# Names of nodes go there; log records come back, and how each node ended. After a run it ends as a
# Python process does; with all that it has started it is killed when a node is stopped, or when who
# started it is gone. Dask says which machine has room for one.

_PARAMETERS = "params:"  # the checkpoint that hands their values on; no dataset has this name
# Nothing but messages may come out of a child's stdout, and nothing but jobs into its stdin.
_CHILD = """
import importlib.util, os, sys
jobs, out = os.dup(0), os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
spec = importlib.util.spec_from_file_location("register_prefect_flow", sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module._be_child(jobs, out)
"""


def _fingerprint(metadata: ProjectMetadata) -> dict[str, str]:
    """Return what has to be the same wherever nodes of a run are run: versions, and code."""
    package = Path(metadata.source_dir) / metadata.package_name
    files = [THIS_FILE, *(path for path in package.rglob("*.py") if path.is_file())]
    code = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Kedro": kedro.__version__, "Python": python, **code}


def _check_same(metadata: ProjectMetadata, theirs: dict[str, str]) -> None:
    """Refuse to run nodes with another version, or with code that is not that of the flow."""
    loaded = {str(getattr(module, "__file__", "")) for module in [*sys.modules.values()]}
    for what, found in _fingerprint(metadata).items():
        if what in ("Kedro", "Python") and found != theirs[what]:
            problem = f"{what} is {found} on {platform.node()}, and {theirs[what]} in the flow"
            raise RuntimeError(f"{problem}. Install the same there.")
        if what in loaded and found != theirs.get(what):  # others may be new, and are not run
            problem = f"{what} on {platform.node()} is not as it was when the flow run started"
            raise RuntimeError(f"{problem}. Start the run again; elsewhere, update it first.")


class _LogsToFlow(logging.handlers.QueueHandler):
    """Sends what is logged in a child to the flow; a fork has no way there, and prints it."""

    def __init__(self, say: Callable[..., None]) -> None:
        super().__init__(cast("Any", None))
        self._say, self._process = say, os.getpid()

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send a record, whose arguments are in its text by now."""
        if os.getpid() == self._process:
            self._say("log", pickle.dumps(record))
        else:
            print(record.getMessage(), file=sys.stderr)


def _open_run(job: Options, say: Callable[..., None]) -> _Run:
    """Open the project in a child: configuration, catalog and hooks as in the flow."""
    metadata = _bootstrap()
    # All log records, at the levels that the project sets; handlers are the flow's.
    handler = _LogsToFlow(say)
    for name in (None, *logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name is None or not logger.propagate else []
    options, run_id = job["options"], job["run_id"]
    session, context, pipeline = _open_project(options, _pipeline_names(options))
    _check_same(metadata, job["same"])
    catalog = _load_catalog(context, options, run_id)
    credentials = _read_credentials(session, options, job["credentials"])
    checkpoints = _Checkpoints(job["folder"], credentials)
    handed_on = {*job["handed_on"]}
    if _PARAMETERS in handed_on:
        for name, value in checkpoints.make(_PARAMETERS).load().items():
            _set_dataset(catalog, name, _MemoryDataset(value))
    keys = {node.name: _task_key(node, catalog, job["run"]) for node in pipeline.nodes}
    checkpoints.add_to(catalog, pipeline, kept=(), cache=False)
    for name in handed_on - {_PARAMETERS}:
        _set_dataset(catalog, name, checkpoints.make(name))
    nodes = {node.name: node for node in pipeline.nodes}
    executor = _InProcess(catalog, session._hook_manager, job["is_async"], run_id, is_first=False)
    return _Run(nodes, catalog, {name: _Record() for name in nodes}, executor, keys)


def _run_job(run: _Run, job: Options) -> None:
    """Run a node in a child, if it is the same node there as in the flow."""
    node = run.nodes[job["node"]]
    if cast("Options", run.keys)[node.name] != job["key"]:
        problem = f"Node '{node.name}' has other inputs, outputs or paths in its process than here"
        remedy = "Does a resolver give another value each time? Put the value into a parameter."
        raise RuntimeError(f"{problem}. {remedy}")
    run.records[node.name].attempts = job["attempts"]
    try:
        kedro_task(node.name, "")
    finally:
        for name in filterfalse(_is_parameter, {*node.inputs, *node.outputs}):
            run.catalog.release(name)


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
    """Run nodes of a flow run, and say what happens, until there is nothing more to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the flow that Ctrl-C stops
    os.environ["KEDRO_DISABLE_TELEMETRY"] = "1"  # which the flow sends
    jobs: queue.SimpleQueue[Options | None] = queue.SimpleQueue()
    lock, forked = threading.Lock(), getattr(os, "register_at_fork", lambda **_: None)
    # A fork holds no end of a pipe: the flow would take it for the child, or wait for it.
    forked(after_in_child=functools.partial(os.close, jobs_in))
    forked(after_in_child=functools.partial(os.close, messages_out))

    def say(kind: str, payload: bytes = b"") -> None:
        message = memoryview(pickle.dumps((kind, payload)))
        with lock:
            while message:
                message = message[os.write(messages_out, message) :]

    def listen() -> None:
        with suppress(EOFError, OSError), os.fdopen(jobs_in, "rb", closefd=False) as file:
            while True:
                jobs.put(pickle.load(file))
        _end_group(os.getpid())  # who started it is gone: at once, whatever a node is doing

    threading.Thread(target=listen, daemon=True).start()
    run = None
    while job := jobs.get():
        try:
            run = _runs[""] = run or _open_run(job, say)
            _run_job(run, job)
            end = ("ended", b"")
        except BaseException as error:  # what opening raises may refer to credentials
            end = ("failed", _pack_error(error, with_object=run is not None))
        say(*end)


def _end_group(leader: int) -> None:
    """End a child and all that it has started. On Windows, the child only."""
    with suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(leader, signal.SIGKILL)
        else:
            os.kill(leader, signal.SIGTERM)  # which ends it at once there


class _Child:
    """A child, as whoever started it sees it."""

    def __init__(self, script: str) -> None:
        command, pipes = [sys.executable, "-uc", _CHILD, script], ("stdin", "stdout")
        how: Any = {"cwd": Path(script).parent, **dict.fromkeys(pipes, subprocess.PIPE)}
        self.process: Any = subprocess.Popen(command, start_new_session=True, **how)
        self.messages: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self.node = ""  # that it runs, or has run last
        self._reaping = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        why = ""
        try:
            while True:
                self.messages.put(pickle.load(self.process.stdout))
        except EOFError:
            pass
        except Exception as error:
            why = f", for what it said cannot be read: {error!r}"
            self.kill()
        if hasattr(os, "waitid"):  # its number is its own until it is reaped
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        with self._reaping:
            code = self.process.wait()
        if str(code) == "-9" and not why:  # by SIGKILL
            why = " (killed, perhaps for lack of memory)"
        self.messages.put(("died", f"with exit code {code}{why}".encode()))

    def send(self, job: Options | None) -> None:
        """Give it a node to run; nothing: it ends when all that it does has ended."""
        with suppress(OSError):  # it has died, and says so
            pickle.dump(job, self.process.stdin)
            self.process.stdin.flush()

    def has_ended(self, timeout: float | None = 0) -> bool:
        """Wait for its end as long as that."""
        self._reader.join(timeout)
        return not self._reader.is_alive()

    def kill(self) -> None:
        """Kill it, and all that it has started."""
        with self._reaping:
            if self.process.returncode is None:  # else its number may be another's
                _end_group(self.process.pid)


class _Children:
    """The children of a flow run on one machine. Sent to Dask's workers by value."""

    def __init__(self, script: str) -> None:
        self._script = script
        self._busy: list[Any] = []
        self._idle: list[Any] = []
        self._is_stopped = False

    def capacity(self) -> int:
        """Return how many nodes this machine can run at once."""
        return os.cpu_count() or 1

    def run(
        self, job: Options, _: Options, is_wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[str, bytes]]:
        """Run a node in a child, and yield what it says."""
        if not Path(self._script).exists():
            problem = "the project has to lie there as where the flow runs, with this file"
            raise FileNotFoundError(f"{platform.node()} has no {self._script}: {problem}.")
        child, kind = self._take(), ""
        child.node = job["node"]
        try:
            child.send(job)
            while kind not in ("ended", "failed", "died"):
                try:
                    kind, payload = child.messages.get(timeout=0.2)
                    if kind == "died" and self._is_stopped:
                        raise RuntimeError("the run has been stopped")
                    yield kind, payload
                except queue.Empty:
                    if self._is_stopped or not is_wanted():
                        raise RuntimeError("the run has been stopped") from None
        finally:
            self._busy.remove(child)
            if kind in ("ended", "failed"):
                self._idle.append(child)
            else:
                child.kill()

    def _take(self) -> Any:
        """Return an idle child, or a new one."""
        child = None
        while child is None:
            try:
                child = self._idle.pop()
            except IndexError:
                child = _Child(self._script)
            if child.has_ended():  # it may have been killed, for lack of memory
                child = None
        self._busy.append(child)
        return child

    def stop(self) -> None:
        """Kill all, if any runs a node."""
        self._is_stopped = True
        for child in [*self._busy, *self._idle] if self._busy else []:
            child.kill()

    def close(self) -> None:
        """Let all end as Python processes do, and wait for them."""
        children, self._idle = self._idle, []
        try:
            for child in children:
                child.send(None)
            for child in children:
                if not child.has_ended(timeout=10):
                    problem = "The process that ran node '%s' goes on, and is waited for: a thread?"
                    logging.getLogger("kedro").warning(problem, child.node)
                    child.has_ended(timeout=None)
                while not child.messages.empty():
                    _log_here(*child.messages.get())
        except BaseException:
            for child in children:
                child.kill()
            raise


def _log_here(kind: str, payload: bytes) -> None:
    """Log what has been logged in a child."""
    if kind == "log":
        record = pickle.loads(payload)
        logging.getLogger(record.name).handle(record)


def _make_plugin(flow_run: str, client_id: str, script: str) -> Any:
    """Make what keeps the children of a flow run on each Dask worker; it is sent by value."""
    distributed: Any = importlib.import_module("distributed")
    if __name__ != "__main__":
        importlib.import_module("cloudpickle").register_pickle_by_value(sys.modules[__name__])

    class FlowRun(distributed.WorkerPlugin):  # type: ignore[misc]
        name = flow_run

        def setup(self, worker: Any) -> None:
            self._worker, self._children = worker, _Children(script)

        async def teardown(self, worker: Any) -> None:
            del worker
            self._children.stop()
            await asyncio.to_thread(self._children.close)

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
                # The scheduler hands it on to this client only, and forgets it with the client.
                worker.log_event(client_id, (key, message))

    return FlowRun()


class _Dask:
    """A Dask cluster, whose workers run nodes of a flow run in children."""

    def __init__(self, script: str, options: Options) -> None:
        distributed = _import("distributed", "distributed", "task_runner.type dask")
        self._name, self._stack = f"kedro-{uuid.uuid4().hex}", ExitStack()
        logger, log = logging.getLogger("distributed"), logging.getLogger("kedro")
        self._stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.WARNING)
        self._said: dict[str, queue.SimpleQueue[Any]] = {}  # by Dask's key of a node
        where: Any = "this machine"
        self._is_stopped, self._capacity, self._asked_at = False, 1, 0.0
        try:
            options = dict(options)
            if name := options.pop("cluster_class", None):
                module, _, class_name = name.rpartition(".")
                make = getattr(_import(module, module.partition(".")[0], name), class_name)
                cluster = make(**options.pop("cluster_kwargs", {}))
                options["address"] = self._stack.enter_context(cluster)
            elif not {"address", "host", "scheduler_file"} & options.keys():
                # One here needs no processes: its workers do nothing but start those of nodes.
                options = {"processes": False, "memory_limit": 0} | options
                boards = ("dashboard_address", "worker_dashboard_address")
                options = dict.fromkeys(boards, "127.0.0.1:0") | options
            options = {"timeout": 20} | options
            where = options.get("address", where)
            log.info("Waiting up to %s s for Dask workers at %s", options["timeout"], where)
            client = distributed.Client(**options)
            self._client = self._stack.enter_context(client)
            client.wait_for_workers(1, timeout=options["timeout"])
            client.subscribe_topic(client.id, self._hear)
            client.register_plugin(_make_plugin(self._name, client.id, script))
        except (OSError, asyncio.TimeoutError, TypeError, ValueError, RuntimeError) as error:
            self._stack.close()
            problem = f"prefect.yml: there is no Dask cluster with workers at {where}: {error}"
            remedy = "Start `dask scheduler` and `dask worker`, and give task_runner.address"
            raise ClickException(f"{problem}. {remedy}, or a longer timeout.") from error

    def capacity(self) -> int:
        """Return how many nodes the cluster can run at once; it is asked each second."""
        if time.monotonic() > self._asked_at + 1:
            self._asked_at = time.monotonic()
            with suppress(Exception):  # it is lost, as its nodes will say
                self._capacity = sum(self._client.nthreads().values()) or 1
        return self._capacity

    def _hear(self, event: Any) -> None:
        _, said = event
        if isinstance(said, tuple) and said[0] in self._said:  # Dask itself says other things
            self._said[said[0]].put(said[1])

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
                if self._is_stopped:
                    raise RuntimeError("the run has been stopped")
            if future.status != "finished":  # or Dask would fetch the result, which is none
                future.result()  # raises what kept the node from being run
        finally:
            del self._said[key]
            future.cancel()

    def stop(self) -> None:
        """Have those children killed that run nodes."""
        self._is_stopped = True

    def close(self) -> None:
        """Let all children end, and wait for them."""
        name, client_id = self._name, self._client.id

        def forget(dask_scheduler: Any) -> None:
            dask_scheduler.task_metadata.pop(name, None)
            if hasattr(dask_scheduler, "_broker"):  # it has log records of this run
                dask_scheduler._broker.truncate(client_id)
            else:  # as in 2024.2
                dask_scheduler.events.pop(client_id, None)

        with suppress(Exception):  # there may be no cluster any more
            self._client.unregister_worker_plugin(name)
            self._client.run_on_scheduler(forget)
        self._stack.close()


class _InChildren(NamedTuple):
    """Runs nodes in children."""

    engine: Any
    job: Options  # what is the same for all nodes
    keys: dict[Node, str]
    task_options: dict[str, Options]

    def run(self, node: Node, record: _Record) -> None:
        """Run a node where the engine has room for it."""
        resources = _task_options(node, self.task_options).get("resources", {})
        own = {"node": node.name, "key": self.keys[node], "attempts": record.attempts - 1}
        _run_in_child(self.engine, self.job | own, resources)

    def stop(self) -> None:
        """Stop nodes that run."""
        self.engine.stop()

    def close(self) -> None:
        """Let all children end, and wait for them."""
        self.engine.close()


def _run_in_child(engine: Any, job: Options, resources: Options) -> None:
    """Run a node on an engine; what it logs there, it logs here."""
    with closing(engine.run(job, resources)) as messages:
        for kind, payload in messages:
            _log_here(kind, payload)
            if kind == "failed":
                raise _unpack_error(payload)
            if kind == "died":
                problem = f"The process that ran node '{job['node']}' died {payload.decode()}"
                raise RuntimeError(problem)
            if kind == "ended":
                return
    raise RuntimeError(f"The worker that ran node '{job['node']}' is lost")


# ---- PrefectRunner ----


@dataclass
class _FlowRun:
    """What a flow run of this file gives its runner."""

    run_id: str = ""  # of Kedro: the version of what is saved, in all attempts
    options_key: str = ""  # of the options of the run: with others, all nodes run again
    earlier: dict[str, Any] = field(default_factory=dict)  # by node, its last task run before
    can_resume: bool = True
    has_previews: bool = False
    checkpoints: _Checkpoints | None = None
    make_engine: Callable[[], Any] | None = None
    job: Options = field(default_factory=dict)  # what children are told of the run
    loading: ExitStack = field(default_factory=ExitStack)  # held until Kedro has loaded the project


# Task runs that were started, by flow run: Prefect 3 records them late, and who asks must know.
_started: Counter[str] = Counter()


def _hand_on(catalog: Any, pipeline: Pipeline, checkpoints: _Checkpoints) -> list[str]:
    """Put parameters, and what hooks have put in memory, into checkpoints, and name these."""
    values, names = {}, []
    for name in sorted(pipeline.inputs()):
        dataset: Any = _get_dataset(catalog, name)
        if _is_in_memory(_inner(dataset)) and dataset.exists():
            if _is_parameter(name):
                values[name] = dataset.load()
            else:
                checkpoints.make(name).save(dataset.load())
                names.append(name)
    if values:
        checkpoints.make(_PARAMETERS).save(values)
        names.append(_PARAMETERS)
    return names


def _longest_path_first(pipeline: Pipeline) -> list[Node]:
    """Order nodes by how many have to run after them, one after the other; else as Kedro does."""
    behind = dict.fromkeys(pipeline.nodes, 0)
    for node in reversed(pipeline.nodes):
        for needed in pipeline.node_dependencies[node]:
            behind[needed] = max(behind[needed], behind[node] + 1)
    return sorted(behind, key=behind.__getitem__, reverse=True)


def _schedule(
    pipeline: Pipeline, start: Callable[..., None], limit: Callable[[], int]
) -> Iterator[tuple[Node, Any]]:
    """Start each node when those it needs have ended, and yield it with its state at its end."""
    # One behind a failed one is started as well: Prefect shows it as NotReady, and does not run it.
    nodes = pipeline.nodes if limit() == 1 else _longest_path_first(pipeline)
    position = {node: index for index, node in enumerate(nodes)}
    sorter = TopologicalSorter(needed := pipeline.node_dependencies)
    sorter.prepare()
    ready: list[int] = []  # a heap of positions
    ended: queue.SimpleQueue[tuple[Node, Any]] = queue.SimpleQueue()
    states, running = cast("dict[Node, Any]", {}), 0
    stopped: BaseException | None = None
    while sorter.is_active():
        for node in sorter.get_ready():
            heapq.heappush(ready, position[node])
        while ready and running < limit() and stopped is None:
            node, running = nodes[heapq.heappop(ready)], running + 1
            start(node, [states[n] for n in needed[node]], lambda end, n=node: ended.put((n, end)))
        if not running and stopped is not None:
            raise stopped
        try:  # in steps, so that Prefect can interrupt it, and a cluster grow
            node, end = ended.get(timeout=1)
        except queue.Empty:
            continue
        running -= 1
        if isinstance(end, KeyboardInterrupt):
            raise end
        if isinstance(end, BaseException):
            # Prefect has stopped the run: nodes that run are waited for, and no other starts.
            stopped = end if stopped is None else stopped
            continue
        states[node] = end
        sorter.done(node)
        yield node, end


def _check_for_children(pipeline: Pipeline, hook_manager: Any, log: logging.Logger) -> None:
    """Refuse what would be lost between processes, and warn of what each has for itself."""
    for node in pipeline.nodes:
        if lost := sorted(set(node.confirms) - set(node.inputs)):
            problem = f"Node '{node.name}' confirms {lost[0]}, which another node reads"
            remedy = "Each has a process of its own: let the node confirm it that reads it"
            raise ValueError(f"{problem}. {remedy}, or leave out task_runner.type.")
    for plugin in hook_manager.get_plugins():
        calls = {call.name for call in hook_manager.get_hookcallers(plugin) or ()}
        of_nodes = any("node" in name or "dataset" in name for name in calls)
        if of_nodes and calls & {"before_pipeline_run", "after_pipeline_run"}:
            name = type(plugin).__qualname__
            where = "for the pipeline in this process, and for nodes in theirs"
            effect = "what it sets, opens or collects in one is not there in others"
            log.warning("Hooks of %s are called %s: %s", name, where, effect)


def _warn_of_shared_files(pipeline: Pipeline, catalog: Any, log: logging.Logger) -> None:
    """Warn of files that several nodes write, if these may run at the same time."""
    writers: dict[str, list[Node]] = {}
    for node in pipeline.nodes:
        for place in {_where(name, _get_dataset(catalog, name)) for name in node.outputs}:
            writers.setdefault(place, []).append(node)
    for place, nodes in writers.items():
        behind = {node: {*pipeline.from_nodes(node.name).nodes} for node in nodes[:-1]}
        for one, other in combinations(nodes, 2):
            if "/" in place and other not in behind[one] and one not in behind.get(other, ()):
                names = f"{one.name} and {other.name}"
                log.warning("%s may write at the same time: nodes %s", place, names)


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
        _flow_run: _FlowRun | None = None,
    ) -> None:
        super().__init__(is_async=is_async)
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers is {max_workers}, and has to be 1 or more")
        self._max_workers = max_workers
        self._task_options = task_options or {}
        self._flow_run = _flow_run or _FlowRun()
        self.outputs: dict[str, str] = {}  # where each lives, after a run
        self.failure: BaseException | None = None  # of the node that failed first

    @property
    def _logger(self) -> logging.Logger:
        # Kedro's logging configuration shows what its own loggers say, not those of this module.
        return logging.getLogger("kedro.runner.prefect_runner")

    def _run(
        self, pipeline: Pipeline, catalog: Any, hook_manager: Any = None, run_id: str | None = None
    ) -> None:
        """Run the nodes, and raise the exception of the first one that failed."""
        self._flow_run.loading.close()
        checkpoints = self._flow_run.checkpoints
        if checkpoints:
            # To Kedro, a cache is in memory: `kedro run`, as it advises, would not find the file.
            checkpoints.add_to(catalog, pipeline, pipeline.outputs(), cache=True)
        run = f"{self._flow_run.options_key}/{run_id}"
        keys = {node: _task_key(node, catalog, run) for node in pipeline.nodes}
        resumed: dict[Node, Any] = {}
        if self._flow_run.earlier:
            get_run_logger().info("Resuming session %s", run_id)
            resumed = _resume(pipeline, catalog, keys, self._flow_run.earlier)
        left = Pipeline([node for node in pipeline.nodes if node not in resumed])
        executor: _InProcess | _InChildren
        if self._flow_run.make_engine:
            _check_for_children(pipeline, hook_manager, self._logger)
            job = self._flow_run.job | {"run_id": run_id, "is_async": self._is_async}
            job |= {"run": run, "handed_on": _hand_on(catalog, left, cast("Any", checkpoints))}
            executor = _InChildren(self._flow_run.make_engine(), job, keys, self._task_options)
        else:
            is_first = not self._flow_run.earlier
            executor = _InProcess(catalog, hook_manager, self._is_async, run_id, is_first)
        with closing(executor):
            self._run_tasks(left, catalog, executor, keys, resumed)
        for name in sorted(pipeline.outputs()):
            dataset = _get_dataset(catalog, name)
            self.outputs[name] = _where(name, dataset)
            # What a run returns, as `kedro run` does.
            if isinstance(executor, _InChildren) and _is_in_memory(_inner(dataset)):
                cast("Any", dataset).save(cast("Any", checkpoints).make(name).load())
            elif name not in left.all_outputs() and _is_in_memory(dataset):
                self._logger.warning("%s was only in memory: the run returns None for it", name)
                _set_dataset(catalog, name, _MemoryDataset(None))

    def _run_tasks(
        self,
        pipeline: Pipeline,
        catalog: Any,
        executor: "_InProcess | _InChildren",
        keys: dict[Node, str],
        resumed: dict[Node, Any],
    ) -> None:
        """Make the tasks, and run them in the order of their needs."""
        run_key = uuid.uuid4().hex
        layers = init_kedro_tasks_by_execution_layer(pipeline, run_key, self._task_options)
        tasks = {node: node_task for layer in layers for node, node_task in layer.items()}
        for node, node_task in tasks.items():
            node_task.task_key = keys[node]
        nodes = {node.name: node for node in pipeline.nodes}
        records = {name: _Record() for name in nodes}
        has_previews = self._flow_run.has_previews
        _runs[run_key] = _Run(nodes, catalog, records, executor, has_previews=has_previews)
        earlier = {_plain_name(n): run for node, run in resumed.items() for n in node.outputs}
        limit = self._limit(executor)
        if limit() > 1:
            _warn_of_shared_files(pipeline, catalog, self._logger)
        elif (widest := max(map(len, layers), default=0)) > 1 and not self._max_workers:
            where = "see task_runner in conf/base/prefect.yml, or max_workers of PrefectRunner"
            advice = "%d nodes run one at a time. Up to %d could run side by side: %s"
            self._logger.info(advice, len(nodes), widest, where)
        # A cluster may grow: there, all nodes get a thread, and the limit is asked for each.
        threads = limit() if self._max_workers or isinstance(executor, _InProcess) else len(nodes)
        try:
            with _task_runner(threads) as submit:

                def start(node: Node, needed: list[Any], report: Callable[[Any], None]) -> None:
                    names = earlier.keys() & map(_plain_name, node.inputs)
                    before = {earlier[name].id: earlier[name].state for name in names}
                    _started[str(runtime.flow_run.id)] += 1
                    submit(tasks[node], [*needed, *before.values()], report)

                try:
                    schedule = _schedule(pipeline, start, limit)
                    self._follow(schedule, pipeline, catalog, records)
                except BaseException:
                    executor.stop()  # or nodes that run would be waited for
                    raise
        finally:
            del _runs[run_key]

    def _limit(self, executor: "_InProcess | _InChildren") -> Callable[[], int]:
        """Return what tells how many nodes may run at once."""
        if isinstance(executor, _InChildren) and not self._max_workers:
            capacity: Callable[[], int] = executor.engine.capacity
            return capacity
        by_default = self._max_workers or (_THREADS and _THREADS.value()) or 1
        return lambda: by_default

    def _follow(
        self, schedule: Any, pipeline: Pipeline, catalog: Any, records: dict[str, _Record]
    ) -> None:
        """Do all that follows from a node's end, until all have ended."""
        load_counts = Counter(chain.from_iterable(node.inputs for node in pipeline.nodes))
        kept = pipeline.inputs() | pipeline.outputs()
        done_nodes: list[Node] = []
        failed: list[tuple[Node, Any]] = []
        for node, state in schedule:
            error = records[node.name].error
            if isinstance(error, KeyboardInterrupt):
                raise error
            if not state.is_completed():
                failed.append((node, state))
                continue
            load_counts.subtract(node.inputs)
            for name in dict.fromkeys([*node.inputs, *node.outputs]):  # as Kedro's own runners do
                if load_counts[name] < 1 and name not in kept:
                    catalog.release(name)
            done_nodes.append(node)
            self._logger.info("Completed node: %s", node.name)
            self._logger.info("Completed %d out of %d tasks", len(done_nodes), len(pipeline.nodes))
        if failed:
            self._suggest_resume_scenario(pipeline, done_nodes, catalog)
            node, state = failed[0]  # it ended first, so it is no node that waited for another
            self.failure = records[node.name].error
            if self.failure is None:
                problem = f"The task run of node '{node.name}' ended as {state.name}"
                self.failure = RuntimeError(f"{problem}: {state.message}")
            raise self.failure


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
    pipeline: Pipeline, catalog: Any, keys: dict[Node, str], earlier: dict[str, Any]
) -> dict[Node, str]:
    """Return the nodes to run, each with the reason: Kedro's resume suggestion, node by node."""
    datasets = {name: _inner(_get_dataset(catalog, name)) for name in pipeline.all_outputs()}
    needs, again = pipeline.node_dependencies, cast("dict[Node, str]", {})
    for node in pipeline.nodes:  # those before others come first
        run, reason = earlier.get(node.name), ""
        if run is None or not run.state.is_completed():
            reason = str(run.state.name) if run else "not run"
        elif run.task_key != keys[node]:
            reason = "its inputs, outputs, parameters or catalog entries have changed"
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


def _find_earlier(options_key: str) -> tuple[str, dict[str, Any]]:
    """Return the run id of earlier attempts, if any, and the last task run of each node."""
    log, flow_run = get_run_logger(), cast("Any", FlowRunContext.get()).flow_run
    if flow_run.start_time == flow_run.state.timestamp:
        return "", {}  # it runs for the first time: one that was suspended has been running, too
    # Of those that this process has started, kedro_init still runs.
    read = _read_task_runs(flow_run.id, expected=_started[str(flow_run.id)] - 1, patience=10)
    runs = [run for run in _call_api(read) if run.task_key.startswith("node/")]
    if not runs:
        log.warning("All nodes run again: none has been run")
        return "", {}
    # By attempt first: clocks can be set back.
    runs.sort(key=lambda run: (run.flow_run_run_count, run.expected_start_time or run.created))
    _, last_options_key, run_id, *_ = runs[-1].task_key.split("/")
    if last_options_key != options_key:
        log.warning("All nodes run again: the run has other parameters than before")
        return "", {}
    ours = [run for run in runs if f"/{run_id}/" in run.task_key]
    return run_id, {run.task_key.split("/", 4)[4]: run for run in ours}


def _resume(
    pipeline: Pipeline, catalog: Any, keys: dict[Node, str], earlier: dict[str, Any]
) -> dict[Node, Any]:
    """Return what earlier attempts of this flow run have completed, each with its task run."""
    log = get_run_logger()
    again = _find_what_runs_again(pipeline, catalog, keys, earlier)
    for node in again:
        _remove_versions(node, catalog)
    completed = sum(run.state.is_completed() for run in earlier.values())
    log.info("%d of %d nodes had completed", completed, len(pipeline.nodes))
    for node in list(again)[:NAMES_SHOWN]:
        log.info("Runs again: %s (%s)", node.name, again[node])
    return {node: earlier[node.name] for node in pipeline.nodes if node not in again}


# ---- Logs ----


class _RunLogs(APILogHandler):
    """Sends to Prefect what is logged in a flow run, also by threads that its nodes start."""

    def __init__(self, flow_run_id: str) -> None:
        super().__init__()
        self._flow_run_id, self._process = flow_run_id, os.getpid()

    def filter(self, record: Any) -> Any:
        """Take a line of this run: several runs may go on in one process."""
        if os.getpid() != self._process:  # in a fork, Prefect's threads and locks do not work
            return False
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


def _keep_generator() -> None:
    """Give Prefect's websockets client a generator of its own, as long as this process lives.

    For each ping, every 20 s, it draws from the module `random`, in another thread: a node that has
    seeded that would draw other numbers than with `kedro run`.
    """
    for name in ("client", "asyncio.connection", "sync.connection", "legacy.protocol"):
        with suppress(ImportError):  # which of them there are depends on the version
            module = importlib.import_module(f"websockets.{name}")
            if getattr(module, "random", None) is random:
                cast("Any", module).random = random.Random()  # noqa: S311  # as it was


@functools.cache  # once in a process, for whose life it holds
def _free_forks() -> None:
    """Let SIGTERM end what a node forks: Prefect's handler, which it inherits, would not.

    A `multiprocessing.Pool` ends its workers by this signal, and waits for them.
    """

    def restore() -> None:
        if _is_of_prefect(cast("Any", signal.getsignal(signal.SIGTERM))):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=restore)


def _add_engine(flow_run: _FlowRun, config: _Config, session: Any, options: Options) -> None:
    """Add the checkpoints and the engine that prefect.yml describes."""
    if (place := _place_checkpoints(config, options)).get("url"):
        folder = f"{place['url'].rstrip('/')}/{runtime.flow_run.id}"
        name = place.get("credentials", "")
        flow_run.checkpoints = _Checkpoints(folder, _read_credentials(session, options, name))
        flow_run.job = {"options": options, "folder": folder, "credentials": name}
    kind = config.task_runner.get("type", "threads")
    if kind != "threads":
        flow_run.job["same"] = _fingerprint(_bootstrap())
        of_dask = {k: v for k, v in config.task_runner.items() if k not in _SHAPE["task_runner"]}
        on_dask = functools.partial(_Dask, str(THIS_FILE), of_dask)
        here = functools.partial(_Children, str(THIS_FILE))
        flow_run.make_engine = on_dask if kind == "dask" else here


def _make_runner(config: _Config, flow_run: _FlowRun) -> PrefectRunner:
    """Make the runner that prefect.yml describes."""
    max_workers = config.task_runner.get("max_workers")
    if config.task_runner.get("type") == "threads" and not max_workers:
        # It asks for nodes side by side.
        max_workers = (_THREADS and _THREADS.value()) or min(32, (os.cpu_count() or 1) + 4)
    is_async = config.task_runner.get("is_async", False)
    return PrefectRunner(is_async, max_workers, config.tasks, flow_run)


@task(persist_result=False)
def kedro_init(options: Options, loading: ExitStack) -> Any:
    """Bootstrap the project, and make the Kedro session and the runner of this flow run."""
    flow_run_id = str(runtime.flow_run.id)
    _started[flow_run_id] += 1
    (logger := get_run_logger()).info("Bootstrapping project")
    metadata = _bootstrap()
    _check_options(options)
    # What a hook reads from the context may shape the pipelines: those of the last run do not do.
    pipelines.configure(f"{metadata.package_name}.pipeline_registry")
    session = _open_session(options)
    config = _read_config(session, options)
    flow_run = _FlowRun(loading=loading, has_previews=config.artifacts)
    flow_run.options_key = _digest(options | {"env": _environment(options)})
    flow_run.can_resume = config.task_runner.get("resume", True)
    if flow_run.can_resume:
        flow_run.run_id, flow_run.earlier = _find_earlier(flow_run.options_key)
    if not flow_run.run_id:
        # Kedro names versions by the millisecond, in which another flow run may start as well.
        digits = f"{uuid.UUID(flow_run_id).int % 1000:03}Z"
        flow_run.run_id = kedro_io.core.generate_timestamp().removesuffix("Z") + digits
    _adopt_run_id(session, flow_run.run_id)
    name = metadata.project_name
    logger.info("Project %s: session created with ID %s", name, flow_run.run_id)
    _add_engine(flow_run, config, session, options)
    return session, flow_run, _make_runner(config, flow_run)


def _run_session_in_flow(options: Options, loading: ExitStack) -> dict[str, str]:
    """Run the session; if it fails, say how to go on."""
    log = get_run_logger()
    session, flow_run, runner = cast("Any", kedro_init(options, loading))
    is_completed = False
    try:
        with _logs_to_prefect(), session:
            _run_session(session, runner, options, flow_run.run_id)
        is_completed = True
    except BaseException as error:
        is_of_node = error is runner.failure
        if is_of_node and flow_run.can_resume:
            log.info("Retry this flow run, and it goes on where it failed.")
        elif isinstance(error, Exception) and (hint := _other_environment(options)):
            log.info(hint.strip())
        if is_of_node and (bearable := _bearable(error)) is not error:
            raise bearable from None
        raise
    finally:
        if flow_run.checkpoints:
            flow_run.checkpoints.end(is_completed)
    return cast("dict[str, str]", runner.outputs)


def _run_pipeline(options: Options) -> dict[str, str]:
    """Do what `kedro run` does, and return where each output lives."""
    get_run_logger().info("Initializing Kedro...")
    _keep_generator()
    _free_forks()
    if cast("Any", FlowRunContext.get()).flow_run.deployment_id:  # and no flow that calls this one
        os.chdir(PROJECT_PATH)
    with ExitStack() as loading:
        loading.enter_context(_loading)
        return _run_session_in_flow(options, loading)


# Of the exception that ends a flow, Prefect stores class and message only where it writes JSON.
@flow(name=_flow_name(), persist_result=False, result_serializer="json")
def my_flow(
    pipeline_name: str = "__default__",
    env: str = "",
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
        env (str): The Kedro environment, a folder of `conf`. Default: KEDRO_ENV, or else `base`.
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


def _set_options(options: Options, given: Options) -> Options:
    """Return the options of a run that are not left at their default."""
    named = {"pipeline_name", *(["env"] if "env" in given else [])}
    return {k: v for k, v in options.items() if (v and k != "env") or k in named}


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
        "parameters": _set_options(options, given),
        "entrypoint": f"{THIS_FILE.name}:my_flow",
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": directory}],
        "job_variables": old | {"env": env},
    }
    if "version" in given or not existing:
        fields["version"] = given.get("version", "1.0")
    described = getattr(existing, "description", None) or ""
    if not described or "[register_prefect_flow.py]: #" in described:
        described = _describe(pipeline, _set_options(options, given))
    return fields | {"description": described}


def _print_plan(checked: _Checked, config: _Config, options: Options) -> None:
    """Print the execution layers, where each dataset lives, and what prefect.yml sets."""
    shown = _without_secrets(_set_options(options, {}))
    what = f"Pipeline '{shown.pop('pipeline_name')}' of {my_flow.name}"
    where = f"environment '{_environment(options)}'"
    layers = len(checked.pipeline.grouped_nodes)
    lines = [f"{what}, {where}: {len(checked.pipeline.nodes)} nodes in {layers} layers"]
    lines += [f"  {name}: {value}" for name, value in shown.items()]
    for number, layer in enumerate(checked.pipeline.grouped_nodes, start=1):
        lines.append(f"Layer {number}")
        for node in layer:
            about = _task_options(node, config.tasks) or ""
            reads, writes = (", ".join(names) or "nothing" for names in (node.inputs, node.outputs))
            lines.append(f"  {node.name}: {reads} -> {writes} {about}".rstrip())
    lines.append("Datasets")
    lines += [f"  {name}: {_where(name, found)}" for name, found in checked.datasets.items()]
    for name, value in config.task_runner.items():
        # Other keys are those of Dask, and may hold anything.
        is_own = name in {*_SHAPE["task_runner"], "address"}
        lines.append(f"task_runner.{name}: {value if is_own else '(set)'}")
    click.echo(_without_password("\n".join(lines)))


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


@contextmanager
def _embedded_server() -> Iterator[Callable[[], None]]:
    """Start the server that Prefect needs where none is set, and yield what stops it at once."""
    if not _PREFECT_3 or PREFECT_API_URL.value():
        yield lambda: None  # that of Prefect 2 is no process of its own
        return
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS as PATIENCE

    # It makes its database at its first start: 12 s on a fast machine. Prefect waits 20 s.
    with temporary_settings(set_defaults={PATIENCE: 60}):
        # Ctrl-C reaches all processes of a terminal, and this one has to record how the run
        # ends. What is blocked stays so in a child. Windows blocks nothing.
        block = getattr(signal, "pthread_sigmask", lambda *_: None)
        block(getattr(signal, "SIG_BLOCK", 0), {signal.SIGINT})
        try:
            (server := SubprocessASGIServer()).start()
        finally:
            block(getattr(signal, "SIG_UNBLOCK", 0), {signal.SIGINT})
        yield server.stop


def _run_now(options: Options) -> None:
    """Run the flow in this process; exit code 1 if it fails, 130 if Ctrl-C ends it."""

    def end_at_once(*_: Any) -> None:
        stop_server()
        os._exit(130)

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, end_at_once)
        os.write(2, b"Stopping: no other node starts. Ctrl-C again ends at once.\n")
        raise KeyboardInterrupt

    has_server = bool(PREFECT_API_URL.value())  # without, Prefect starts its embedded one
    if has_server:
        _reach_server()
    state: Any = None
    with _embedded_server() as stop_server:
        signal.signal(signal.SIGINT, stop)
        with suppress(KeyboardInterrupt):
            state = my_flow(**options, return_state=True)
        if _started and not has_server:
            # It stops with this process, and loses what it has not recorded.
            flow_run_id, expected = next(reversed(_started.items()))
            with suppress(Exception):  # a node may have set what keeps it from being asked
                _call_api(_read_task_runs(flow_run_id, expected, patience=10 if state else 2))
    if state is None:
        click.echo("Stopped by Ctrl-C.", err=True)
        sys.exit(130)
    if not state.is_completed():
        raise ClickException(f"The flow run ended as {state.name}. {state.message or ''}")
    outputs = state.result() if state.data else {}  # a slow server sends none
    lines = [f"  {name}: {where}" for name, where in outputs.items()]
    with suppress(ValueError, OSError):  # a node may have closed the output
        click.echo("\n".join(["The flow run has completed. Its outputs:", *lines]))


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
        metadata = _bootstrap()
    _check_telemetry()
    _check_environment(options)
    with _project_errors("Loading prefect.yml"):
        config = _read_config(_open_session(options), options)
    if run and not dry_run:
        return _run_now(options)  # a run loads the project itself, and calls its hooks once
    checked = _check_project(options)
    _check_task_names(config.tasks)
    for note in [*checked.notes, *_note_run_command(metadata)]:
        click.echo(f"Note: {note}")
    if dry_run:
        _print_plan(checked, config, options)
    return None if run else _register(deployment_name, checked.pipeline, options, given, dry_run)


if __name__ == "__main__":
    prefect_deploy()
