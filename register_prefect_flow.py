"""Register this Kedro project's pipeline as a Prefect deployment: each node becomes a task.

Copy this file into the root of a Kedro project, next to pyproject.toml. Then

    python register_prefect_flow.py --run                # run the pipeline now, in this process
    python register_prefect_flow.py --dry_run --run      # check everything, show what would run
    python register_prefect_flow.py --work_pool_name X   # register it, for agents and workers

Everything is checked before anything is registered. In a flow run a failing node stops only those
that need its output. Everything else is what `kedro run --env base` does, because Kedro does it.

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
import operator
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
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from itertools import chain, combinations, filterfalse
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

THIS_FILE = Path(__file__).absolute()
PROJECT_PATH = THIS_FILE.parent
if __name__ == "__main__":
    # As with `kedro run`. Kedro looks for conf/logging.yml here when it is imported.
    os.chdir(PROJECT_PATH)

import click
import kedro
import prefect
from click import ClickException

__version__ = "1.0.0"
Options = dict[str, Any]  # of a run: what `kedro run` may be told, and what the flow takes
FILTERS = (
    "tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "to_outputs", "namespaces",
)  # fmt: skip
NAMES_SHOWN = 50  # in a message that lists what there is
TEXT_SHOWN, LOG_SHOWN = 10_000, 100_000  # characters of an exception, of a log line, in Prefect
PREVIEW_SHOWN = 1_000_000  # characters of a dataset's preview that Prefect shows and stores
NODES_DRAWN, NAME_DRAWN = 300, 22  # nodes in a picture of a pipeline, characters of a name
SERVER_TIMEOUT = 10  # seconds in which a Prefect server has to answer


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
from kedro import runner as kedro_runner
from kedro.config import AbstractConfigLoader, MissingConfigException
from kedro.framework import project as kedro_project
from kedro.framework.cli.utils import _split_load_versions as split_load_versions
from kedro.framework.cli.utils import _split_params as split_params
from kedro.framework.cli.utils import split_node_names, split_string
from kedro.framework.project import pipelines, settings
from kedro.framework.session import KedroSession
from kedro.framework.startup import ProjectMetadata, bootstrap_project
from kedro.framework.startup import _get_project_metadata as get_project_metadata
from kedro.logging import RichHandler
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from prefect import Task, flow, get_client, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings
from prefect.utilities.callables import parameter_schema

# ---- Compatibility: what differs between versions, and what is private, has one name here ----


def _run_node(node: Any, catalog: Any, hook_manager: Any, is_async: bool, run_id: Any) -> None:
    """Run a node; Kedro 0.19.10 put Task in the place of run_node, which 1.0 removed."""
    if hasattr(kedro_runner, "Task"):
        kedro_runner.Task(node, catalog, is_async, hook_manager, run_id).execute()
    else:
        vars(kedro_runner)["run_node"](node, catalog, hook_manager, is_async, run_id)


_hook_manager = operator.attrgetter("_hook_manager")  # of a session
_catalog_names = operator.methodcaller("keys" if _KEDRO_1 else "list")  # of a catalog
# Kedro 0.18.12 renamed them.
_Dataset: Any = vars(kedro_io).get("AbstractDataset", vars(kedro_io).get("AbstractDataSet"))
_CachedDataset: Any = vars(kedro_io).get("CachedDataset", vars(kedro_io).get("CachedDataSet"))
_MemoryDataset: Any = vars(kedro_io).get("MemoryDataset", vars(kedro_io).get("MemoryDataSet"))


def _filter_pipeline(pipeline: Pipeline, options: Options) -> Pipeline:
    filters = {name: options[name] for name in FILTERS}
    spaces = filters.pop("namespaces")  # Kedro 1.0 brought the plural.
    own = {"node_namespaces": spaces} if _KEDRO_1 else {"node_namespace": next(iter(spaces), None)}
    return pipeline.filter(**filters, **own)


def _request_pipelines(names: list[str]) -> None:
    """Tell Kedro 1.5 and newer to load these pipelines only; without names, all."""
    if hasattr(pipelines, "set_requested"):
        pipelines.set_requested(names or None)


def _session_class() -> Any:
    """Return the class of the project's session, which is a setting since Kedro 1.3."""
    return getattr(settings, "SESSION_CLASS", KedroSession)


def _create_session(env: str, conf: str | None, runtime_params: Options) -> Any:
    """Make a session as `kedro run` does; one of another class takes runtime parameters later."""
    name = "runtime_params" if _KEDRO_1 else "extra_params"
    params = {name: runtime_params} if issubclass(_session_class(), KedroSession) else {}
    return _session_class().create(project_path=PROJECT_PATH, env=env, conf_source=conf, **params)


def _adopt_run_id(session: Any, run_id: str) -> None:
    """Let a session save as this version; one of another class takes the run id in `run`."""
    if isinstance(session, KedroSession):
        session.session_id = session._store["session_id"] = session._store._session_id = run_id


def _with_params(method: Any, options: Options) -> Any:
    """Call a method of a session, which may be of the class that takes the parameters here."""
    takes_them = "runtime_params" in inspect.signature(method).parameters
    return method(**{"runtime_params": options["runtime_params"]} if takes_them else {})


def _config_loader(session: Any, options: Options) -> Any:
    """Return the project's config loader, without the context, whose hooks the run calls."""
    return _with_params(session._get_config_loader, options)


def _load_catalog(context: Any, options: Options, run_id: str) -> Any:
    """Make the catalog as `kedro run` does."""
    context._pipelines_to_validate = _pipeline_names(options) or None  # by Kedro 1.7
    own = {"catalog_class": settings.DATA_CATALOG_CLASS} if _KEDRO_1 else {}
    return context._get_catalog(save_version=run_id, load_versions=options["load_versions"], **own)


def _run_arguments(options: Options, run_id: str = "") -> Options:
    """Return what `kedro run` passes to the project's session; refuse what that does not take."""
    parameters = inspect.signature(_session_class().run).parameters
    accepted = {*parameters}
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        accepted |= {*inspect.signature(KedroSession.run).parameters}
    names = (*FILTERS, "load_versions", "only_missing_outputs", *({"runtime_params"} & accepted))
    arguments = {name: options[name] for name in names}
    arguments |= {"tags": tuple(options["tags"]), "node_names": tuple(options["node_names"])}
    arguments["pipeline_names"] = _pipeline_names(options)
    # Kedro 1.0 brought several namespaces, and 1.2 several pipelines.
    for plural in {"pipeline_names", "namespaces"} - accepted:
        if not arguments[plural][1:]:
            arguments[plural.removesuffix("s")] = next(iter(arguments.pop(plural)), None)
    for name, value in arguments.items():
        if value and name not in accepted:
            problem = f"{_session_class().__name__} of Kedro {kedro.__version__} does not take"
            raise ClickException(f"{problem} {name} {value}: leave it out, or change that.")
    arguments["run_id"] = run_id
    return {name: value for name, value in arguments.items() if name in accepted}


def _get_dataset(catalog: Any, name: str) -> Any | None:
    """Return the dataset of a catalog entry or pattern; None: the runner keeps it in memory."""
    if _KEDRO_1:  # catalog.get returns None for what the catalog does not have
        return catalog.get(name)
    # Kedro 0.18.12 brought patterns, and `in` to ask for them.
    known = catalog if hasattr(catalog, "__contains__") else catalog._data_sets
    return catalog._get_dataset(name) if name in known else None


def _set_dataset(catalog: Any, name: str, dataset: Any) -> None:
    # Kedro warns of a name that is replaced.
    vars(catalog).get("_datasets", vars(catalog).get("_data_sets")).pop(name, None)
    (catalog.__setitem__ if _KEDRO_1 else catalog.add)(name, dataset)


def _is_in_memory(dataset: Any | None) -> bool:
    """Tell whether what a dataset has is lost with the process; Kedro 0.18 had no mark for it."""
    is_kedros = isinstance(dataset, _MemoryDataset)
    return dataset is None or bool(getattr(dataset, "_EPHEMERAL", is_kedros))


def _copy_mode(dataset: Any | None) -> Any:
    """Return how what is in memory is handed on, if the catalog says it; of a cache, too."""
    return getattr(getattr(dataset, "_cache", dataset), "_copy_mode", None)


def _inner(dataset: Any | None) -> Any:
    """Return what a cache is of; every other dataset as it is."""
    return dataset._dataset if isinstance(dataset, _CachedDataset) else dataset


def _saved_path(dataset: Any, version: str = "") -> str | None:
    """Return where a dataset has saved this version, or its own; None: it has no versions."""
    # Datasets of other packages use the name _version for something else.
    if not isinstance(getattr(dataset, "_version", None), kedro_io.Version):
        return None
    path = str(dataset._get_versioned_path(version or dataset.resolve_save_version()))
    return path if dataset._exists_function(path) else ""


def _is_missing(dataset: Any) -> bool:
    """Tell whether this run has saved nothing; a dataset that cannot tell counts as saved."""
    if (path := _saved_path(dataset)) is not None:  # else another run's version would count
        return not path
    can_tell = not _is_in_memory(dataset) and type(dataset)._exists is not _Dataset._exists
    return can_tell and not dataset.exists()


def _pin_versions(node: Node, catalog: Any, run_id: str) -> None:
    """Let a node load what this run has saved, even if another run has saved since."""
    for name in node.inputs:
        dataset = _inner(_get_dataset(catalog, name))
        if _saved_path(dataset, run_id) and not dataset._version.load:
            dataset._version = kedro_io.Version(run_id, dataset._version.save)
            dataset.release()  # It remembers which version is the newest.


def _remove_versions(node: Node, catalog: Any) -> None:
    """Let a node save again what an earlier attempt has saved, whole or half, in this version."""
    for name in node.outputs:
        dataset = _inner(_get_dataset(catalog, name))
        if (path := _saved_path(dataset)) and hasattr(dataset, "_fs"):
            dataset._fs.rm(path, recursive=True)
            dataset.release()  # It remembers which version it has saved.


def _path(dataset: Any) -> str:
    """Return the file or URL of a dataset, if its description has one."""
    described = dataset._describe()
    described = described if isinstance(described, dict) else {}  # some return a text
    filepath, protocol = described.get("filepath", ""), described.get("protocol", "file")
    return str(filepath if protocol == "file" else f"{protocol}://{filepath}")


def _preview_method(dataset: Any) -> Any:
    return getattr(dataset, "preview", None) or dataset._preview  # as kedro-datasets 1 calls it


def _forget_events(topic: str, dask_scheduler: Any) -> None:
    """Let a Dask scheduler forget what was logged, as it does an hour after a client has left."""
    if hasattr(dask_scheduler, "_broker"):  # distributed 2024.3 brought it.
        dask_scheduler._broker.truncate(topic)
    else:
        dask_scheduler.events.pop(topic, None)


def _default_workers(otherwise: int = 1) -> int:
    """Return how many tasks run at once by Prefect's setting, which Prefect 2 lacks."""
    setting: Any = getattr(prefect.settings, "PREFECT_TASKS_RUNNER_THREAD_POOL_MAX_WORKERS", None)
    return (setting and setting.value()) or otherwise


# Agents gave way to workers in Prefect 2.16.4.
_POOL_TYPE = "process" if _version(prefect.__version__) >= (2, 16, 4) else "prefect-agent"
_TASKS_END = _PREFECT_3  # Some tasks of Prefect 2 are waited for in vain.

if _PREFECT_3:
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.client.schemas.objects import TaskRunResult
    from prefect.task_engine import run_task

    def _run_task(node_task: Any, upstream: list[Any], stopped: threading.Event) -> Any:
        """Run a task after others, given their states, and return its state."""
        # Waiting for a state loads its result, which an earlier attempt has not kept. So it waits
        # for a failed one, to be NotReady, or for None, without which Prefect draws no edges.
        failed: list[Any] = [state for state in upstream if not state.is_completed()]
        ids = {state.state_details.task_run_id for state in upstream}
        arguments: Any = {"parameters": {}, "wait_for": failed[:1] or [None]}
        arguments["dependencies"] = {"wait_for": {TaskRunResult(id=each) for each in ids}}
        # Once it is set, no task calls its function again.
        context = {"cancel_event": stopped}
        return run_task(node_task, return_type="state", context=context, **arguments)

    async def _save_deployment(new: Any, name: str, fields: Any, old: Any, agent: bool) -> Any:  # noqa: ARG001
        """Create or update a deployment; what is not set stays as it is on the server."""
        fields["parameter_openapi_schema"] = parameter_schema(new).model_dump(exclude_unset=True)
        async with get_client() as client:
            if old:
                await client.update_deployment(old.id, DeploymentUpdate(**fields))
                return old.id
            flow_id = await client.create_flow_from_name(new.name)
            return await client.create_deployment(flow_id, name, **fields)

else:

    def _run_task(node_task: Any, upstream: list[Any], stopped: threading.Event) -> Any:  # noqa: ARG001
        return node_task(wait_for=upstream, return_state=True)

    async def _save_deployment(new: Any, name: str, fields: Any, old: Any, agent: bool) -> Any:
        """Create or replace a deployment; what is not set is sent as it is on the server."""
        accepted = inspect.signature(PrefectClient.create_deployment).parameters
        kept = {"version", "tags", "description", "paused", "enforce_parameter_schema"}
        kept |= {"schedules"} if "schedules" in accepted else {"schedule", "is_schedule_active"}
        existing: Any = {each: getattr(old, each) for each in kept if hasattr(old, each)}
        if "schedules" in existing:  # Prefect 2.16 brought several.
            existing["schedules"] = [s.dict(include={"schedule", "active"}) for s in old.schedules]
        fields = existing | fields | {"parameter_openapi_schema": parameter_schema(new).dict()}
        if agent:  # For an agent, job variables hold in infrastructure blocks only.
            from prefect.infrastructure import Process

            fields["infrastructure_document_id"] = await Process()._save(is_anonymous=True)
        if "job_variables" not in accepted:  # Prefect 2.19 renamed them.
            fields["infra_overrides"] = fields.pop("job_variables")
        async with get_client() as client:
            flow_id = await client.create_flow_from_name(new.name)
            return await client.create_deployment(flow_id, name, **fields)


# ---- Errors: what a user can fix is one message without a traceback ----


def _require_versions(feature: str) -> None:
    """Refuse what is not tested with older versions of Kedro and Prefect, or on Windows."""
    if os.name != "posix":
        raise ClickException(f"{feature} needs Linux or macOS: leave it out.")
    for package, floor in ((kedro, "0.19"), (prefect, "3.2")):
        name = package.__name__
        if _version(package.__version__) < _version(floor):
            problem = f"{feature} needs {name.title()} {floor} or newer, and this is {name.title()}"
            remedy = f"leave it out, or pip install '{name}>={floor}'"
            raise ClickException(f"{problem} {package.__version__}: {remedy}")


def _unknown(problem: str, name: str, names: Iterable[str], kind: str, remedy: str = "") -> Any:
    """Return an error with the names that are spelled like the one asked for, and all others."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    listed = f" The {kind} are: {', '.join(names[:NAMES_SHOWN]) or 'none'}{more}."
    return ClickException(problem + hint + listed + remedy)


def _import_optional(module: str, package: str, feature: str) -> Any:
    """Import what only those need who use a feature."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        problem = f"prefect.yml: {feature} needs {package}, which is not installed"
        raise ClickException(f'{problem}: pip install "{package}" where the flow runs') from error


@contextmanager
def _project_errors(doing: str) -> Iterator[None]:
    """Say in one line what the project's own code or configuration raised, and where."""
    try:
        yield
    except ClickException:
        raise
    except Exception as error:
        line = ""
        for frame in traceback.extract_tb(error.__traceback__):
            path = Path(frame.filename)
            is_other = path == THIS_FILE or path.is_relative_to(sys.prefix)  # a venv in the project
            if path.is_relative_to(PROJECT_PATH) and not is_other:
                line = f"\n  at {path}, line {frame.lineno}"
        raise ClickException(f"{doing} failed.\n  {type(error).__name__}: {error}{line}") from error


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


def _writable(text: str) -> str:
    """Return a text that can be written as UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _text_of(error: BaseException) -> str:
    try:
        return _writable(str(error))
    except Exception as broken:
        return f"no text, for making it raises {type(broken).__name__}"


def _stand_in(module: str, name: str, text: str) -> Exception:
    """Make an exception that looks like one that cannot be passed on."""
    return cast("Exception", type(name, (Exception,), {"__module__": module})(text))


def _storable(error: BaseException) -> Exception:
    """Return an exception that Prefect can print and store, and end a task with.

    Prefect fails at a text that is no Unicode, and stores a long one several times. What is no
    Exception would end more than the task, and Prefect 2 waits for ever after a StopIteration.
    """
    trace, text = "".join(traceback.format_exception(error)), _text_of(error)
    is_short = len(text) <= TEXT_SHOWN and len(trace) <= LOG_SHOWN
    ends_loops = isinstance(error, (StopIteration, StopAsyncIteration))
    if isinstance(error, Exception) and is_short and trace == _writable(trace) and not ends_loops:
        return error
    if len(text) > TEXT_SHOWN:
        text = f"{text[:TEXT_SHOWN]}... (cut: {len(text)} characters)"
    stand_in = _stand_in(type(error).__module__, type(error).__name__, text)
    return stand_in.with_traceback(error.__traceback__)


# ---- Project: environment, pipeline, catalog ----


# Held while Kedro loads a project: a process has one list of pipelines, and may have several runs.
_loading = threading.Lock()


def _bootstrap() -> ProjectMetadata:
    """Let this be the project that Kedro has open: a process may run flows of several."""
    metadata = get_project_metadata(PROJECT_PATH)
    if metadata.package_name != kedro_project.PACKAGE_NAME:
        bootstrap_project(PROJECT_PATH)
        _log_plain_lines()
    return metadata


def _log_plain_lines() -> None:
    """Where the output is no terminal, let lines of Kedro's own Rich handler stay whole.

    It would break each at 80 columns, and draw it for a millisecond. A handler that the project has
    configured stays as it is.
    """
    root, of_project = logging.getLogger(), kedro_project.LOGGING.get("handlers", {})
    for index, handler in enumerate(root.handlers):
        is_kedros = {*of_project.get(handler.name, {})} <= {"class", "level", "rich_tracebacks"}
        if type(handler) is RichHandler and is_kedros and not handler.console.is_terminal:
            with suppress(AttributeError):  # A worker stops reading at what is not UTF-8.
                cast("Any", handler.console.file).reconfigure(errors="backslashreplace")
            root.handlers[index] = plain = logging.StreamHandler(handler.console.file)
            plain.setLevel(handler.level)
            layout = "%(asctime)s | %(levelname)-7s | %(name)s - %(message)s"
            plain.setFormatter(logging.Formatter(layout))


def _flow_name() -> str:
    """Name the flow after the project's package: on one server, projects must not share a flow."""
    try:
        return get_project_metadata(PROJECT_PATH).package_name
    except (RuntimeError, ValueError):  # This is no Kedro project, as prefect_deploy will say.
        return "my_flow"


def _check_telemetry() -> None:
    """Refuse a run that would stop to ask for consent where nobody can answer."""
    name = "kedro-telemetry"
    decided = (PROJECT_PATH / ".telemetry").exists() or name in settings.DISABLE_HOOKS_FOR_PLUGINS
    with suppress(importlib.metadata.PackageNotFoundError):
        if _version(importlib.metadata.version(name)) < (0, 6) and not decided:
            problem = f"{name} would stop every flow run to ask for consent: decide in a file"
            raise ClickException(f"{problem}: cp .telemetry.example .telemetry")


def _conf_source(options: Options) -> str:
    """Return the folder, archive or URL of the configuration; a path is relative to the project."""
    conf: str = options["conf_source"] or settings.CONF_SOURCE
    return conf if "://" in conf else str(PROJECT_PATH / conf)


def _environment(options: Options) -> str:
    """Return the environment; `base` is the project's base environment, whatever its name is."""
    env: str = options["env"] or os.environ.get("KEDRO_ENV") or "base"
    if env == "base" and not Path(_conf_source(options), env).is_dir():
        return str(settings.CONFIG_LOADER_ARGS.get("base_env", env))
    return env


def _check_environment(options: Options) -> None:
    conf, env = Path(_conf_source(options)), _environment(options)
    if options["conf_source"] and "://" not in options["conf_source"] and not conf.exists():
        raise ClickException(f"There is no configuration at {conf}: give another conf_source")
    # A project's own config loader may keep environments elsewhere than in folders.
    loader = settings.CONFIG_LOADER_CLASS
    is_own = loader.__base__ is AbstractConfigLoader and not loader.__module__.startswith("kedro.")
    if conf.is_dir() and not (conf / env).is_dir() and not is_own:
        folders = [path.name for path in conf.iterdir() if path.is_dir() and path.name[0] != "."]
        problem = f"Environment '{env}' has no folder {conf / env}."
        raise _unknown(problem, env, folders, "environments")


def _other_environment(options: Options) -> str:
    """Say that a run leaves out an environment that `kedro run` reads, if it has anything."""
    other = settings.CONFIG_LOADER_ARGS.get("default_run_env", "local")
    env = _environment(options)
    if other == env or not any(Path(_conf_source(options), other).glob("**/*.y*ml")):
        return ""
    problem = f"Environment {env} was read. `kedro run` reads environment {other}, too"
    return f"{problem}: try --env {other}."


def _open_session(options: Options) -> Any:
    """Make the Kedro session of a run; it loads nothing yet."""
    # What shapes the pipelines may be read from the context: an earlier run's are of no use.
    pipelines.configure(f"{kedro_project.PACKAGE_NAME}.pipeline_registry")
    conf = _conf_source(options) if options["conf_source"] else None
    with _project_errors("Making a Kedro session"):
        return _create_session(_environment(options), conf, options["runtime_params"])


def _read_credentials(session: Any, options: Options, name: str) -> dict[str, Any]:
    """Return an entry of credentials.yml; without a name, nothing."""
    entries: dict[str, Any] = {}
    with suppress(MissingConfigException):
        entries = _config_loader(session, options)["credentials"] if name else {}
    if name and name not in entries:
        problem = f"There are no credentials '{name}' in environment '{_environment(options)}'."
        raise _unknown(problem, name, entries, "credentials")
    return cast("dict[str, Any]", entries.get(name, {}))


def _pipeline_names(options: Options) -> list[str]:
    """Name the pipelines as `kedro run` does: none, if it is the default one."""
    names = list(dict.fromkeys(name.strip() for name in options["pipeline_name"].split(",")))
    return [] if names == ["__default__"] else names


def _is_parameter(name: str) -> bool:
    return name == "parameters" or name.startswith("params:")


def _load_project(session: Any, options: Options, only: list[str]) -> tuple[Any, Pipeline]:
    """Load context and nodes of a run, in Kedro's order, of these pipelines only, or of all."""
    _request_pipelines(only)
    with _project_errors(f"Loading environment '{_environment(options)}'"):
        context = _with_params(session.load_context, options)
    names = _pipeline_names(options) or ["__default__"]
    with _project_errors("Loading the pipelines (pipeline_registry.py)"):
        found: list[Any] = [pipelines.get(name) for name in names]
        for name, pipeline in zip(names, found, strict=True):
            if pipeline is None:
                raise _unknown(f"There is no pipeline '{name}'.", name, pipelines, "pipelines")
            if not pipeline.nodes:
                raise ClickException(f"Pipeline '{name}' is empty: it has no node to run.")
    try:
        return context, _filter_pipeline(sum(found, Pipeline([])), options)
    except ValueError as error:
        chosen = [f"{name} {','.join(options[name])}" for name in FILTERS if options[name]]
        problem = f"Filtering pipeline '{options['pipeline_name']}' by {', '.join(chosen)}"
        raise ClickException(f"{problem}: {error}") from error


class _CheckedProject(NamedTuple):
    """What is known of a run before it starts."""

    pipeline: Pipeline
    datasets: dict[str, Any | None]  # None: the runner keeps it in memory
    notes: list[str]  # what has to come with the run


def _note_missing(pipeline: Pipeline, catalog: Any) -> list[str]:
    """Name inputs that nothing provides: as an error, or as notes if runs or hooks may do it."""
    names = _catalog_names(catalog)
    missing = sorted(name for name in pipeline.inputs() if _get_dataset(catalog, name) is None)
    notes = []
    if inputs := [*filterfalse(_is_parameter, missing)]:
        problem = f"No catalog entry, pattern or parameter provides pipeline input {inputs[0]}"
        problem = ", ".join([problem, *inputs[1:]]) + "."
        # Those of plugins do not count: kedro-telemetry takes the catalog, and brings no input.
        hooks = (getattr(hook, "before_pipeline_run", None) for hook in settings.HOOKS)
        if not any(hook and "catalog" in inspect.signature(hook).parameters for hook in hooks):
            remedy = f" Add it to the catalog in {settings.CONF_SOURCE}, or run what makes it."
            raise _unknown(problem, inputs[0], filterfalse(_is_parameter, names), "entries", remedy)
        notes.append(f"{problem} A hook has to (before_pipeline_run), or each run fails.")
    for name in filter(_is_parameter, missing):
        close = difflib.get_close_matches(name, filter(_is_parameter, names), n=1)
        hint = f" Or did you mean {close[0]}?" if close else ""
        parameter = name.removeprefix("params:")
        notes.append(f"Each run has to bring '{parameter}' in runtime_params, or a hook.{hint}")
    return notes


def _check_project(options: Options) -> _CheckedProject:
    """Open the project as a run would, with hooks of context and catalog; run no node."""
    _run_arguments(options)  # It refuses what this Kedro does not take.
    context, pipeline = _load_project(_open_session(options), options, only=[])
    names = sorted(pipeline.all_inputs() | pipeline.all_outputs())
    try:
        with _project_errors(f"Loading catalog and parameters of '{_environment(options)}'"):
            catalog = _load_catalog(context, options, kedro_io.core.generate_timestamp())
            datasets = {name: _get_dataset(catalog, name) for name in names}
        return _CheckedProject(pipeline, datasets, _note_missing(pipeline, catalog))
    except ClickException as error:
        if "Runtime parameter" not in str(error.__cause__):  # Kedro has no class for that.
            message = f"{error.message} {_other_environment(options)}".rstrip()
            raise ClickException(message) from error
        reason = str(error.__cause__).splitlines()[0]
        note = f"Each run has to bring runtime_params. {reason} Without them (--params) the catalog"
        return _CheckedProject(pipeline, {}, [f"{note} is not checked."])


# ---- conf/<env>/prefect.yml ----

_NUMBER = (int, float)
_SHAPE: dict[str, Any] = {
    "task_runner": {"type": str, "max_workers": int, "is_async": bool, "resume": bool},
    "checkpoints": (str, {"url": str, "credentials": str}), "artifacts": bool,
    "tasks": {str: {
        "retries": int, "retry_delay_seconds": (*_NUMBER, list), "retry_jitter_factor": _NUMBER,
        "timeout_seconds": _NUMBER, "tags": list, "log_prints": bool, "description": str,
        "version": str, "resources": dict,
    }},
}  # fmt: skip
_ENGINES = ("processes", "dask")
_MOVED = {"deployment", "deployments", "flow"}  # sections of earlier copies of this file


class _Config(NamedTuple):
    """What prefect.yml says of how nodes are run."""

    task_runner: dict[str, Any]
    tasks: dict[str, dict[str, Any]]  # from a name of nodes to options of their tasks
    checkpoints: Any = None  # URL, or URL and credentials
    artifacts: bool = True

    @property
    def engine(self) -> str:
        """Return what runs nodes in other processes, or nothing."""
        kind = self.task_runner.get("type", "threads")
        return "" if kind == "threads" else str(kind)


def _check_shape(path: str, value: Any, shape: Any) -> None:
    """Refuse unknown keys of prefect.yml, and values of another type."""
    shapes = shape if isinstance(shape, tuple) else (shape,)
    types = tuple(each if isinstance(each, type) else type(each) for each in shapes)
    is_bool_for_number = isinstance(value, bool) and not {bool, object} & {*types}
    if is_bool_for_number or not isinstance(value, types):
        names = " or ".join(each.__name__ for each in types)
        raise ClickException(f"prefect.yml: {path} is {value!r}, and has to be of type {names}.")
    keys: Any = next((each for each in shapes if isinstance(each, dict)), None)
    if isinstance(value, dict) and keys is not None:
        for key, item in value.items():
            item_path = f"{path}.{key}".lstrip(".")
            if key not in keys and str not in keys:
                raise _unknown(f"prefect.yml has no {item_path}.", str(key), keys, "keys")
            _check_shape(item_path, item, keys.get(key, keys.get(str)))


def _load_config(session: Any, options: Options) -> dict[str, Any]:
    """Load prefect.yml with the project's own config loader; without the file, nothing."""
    section: Any = {}
    with _project_errors("Loading prefect.yml"), suppress(MissingConfigException, KeyError):
        loader = _config_loader(session, options)
        if hasattr(loader, "config_patterns"):
            loader.config_patterns.setdefault("prefect", ["prefect.*"])
        try:
            section = loader["prefect"] or {}
        except (AttributeError, OSError, TypeError):  # A project's own loader may say so by these.
            if any(Path(_conf_source(options)).rglob("prefect*.y*ml")):
                raise
    return {name: value for name, value in section.items() if value is not None}


def _read_config(session: Any, options: Options) -> _Config:
    """Read prefect.yml, and check it."""
    sections = _load_config(session, options)
    for name in sorted(sections.keys() & _MOVED):
        raise ClickException(
            f"prefect.yml says how nodes are run, and has no section {name} any more. Deployments"
            " belong in Prefect's own file prefect.yaml (`prefect deploy --all`), retries of flow"
            " runs to PREFECT_FLOW_DEFAULT_RETRIES and PREFECT_FLOW_DEFAULT_RETRY_DELAY_SECONDS."
        )
    shape, task_runner = dict(_SHAPE), sections.get("task_runner")
    if isinstance(task_runner, dict) and task_runner.get("type") == "dask":
        shape["task_runner"] = _SHAPE["task_runner"] | {str: object}  # Dask checks its own keys.
    _check_shape("", sections, shape)
    config = _Config(**{"task_runner": {}, "tasks": {}, **sections})
    if config.engine not in ("", *_ENGINES):
        problem = f"prefect.yml: task_runner.type is '{config.engine}'."
        raise _unknown(problem, config.engine, ("threads", *_ENGINES), "types")
    with _project_errors("Reading task_runner in prefect.yml"):
        PrefectRunner(max_workers=config.task_runner.get("max_workers"))  # refuses less than 1
    if config.engine:
        _require_versions(f"prefect.yml: task_runner.type {config.engine}")
    elif config.checkpoints or options["checkpoints"]:
        _require_versions("Keeping checkpoints")
    for name, task_options in config.tasks.items():
        for option, problem in (
            ("resources", "" if config.engine == "dask" else "are for Dask"),
            ("log_prints", "is not for other processes" if config.engine else ""),
        ):
            if problem and option in task_options:
                kind = f"task_runner.type is '{config.engine or 'threads'}'"
                raise ClickException(f"prefect.yml: tasks.{name}.{option} {problem}, and {kind}.")
        with _project_errors(f"Reading tasks.{name} in prefect.yml"):
            Task(fn=lambda: None, **_prefect_options(task_options))  # refuses what is no option
    return config


def _prefect_options(task_options: dict[str, Any]) -> dict[str, Any]:
    """Return those options of a task that are Prefect's."""
    return {name: value for name, value in task_options.items() if name != "resources"}


def _names_in_config(node: Node) -> set[str]:
    """Return the names by which the tasks section may refer to a node."""
    parts = node.namespace.split(".") if node.namespace else []
    spaces = (".".join(parts[: end + 1]) for end in range(len(parts)))  # of a.b: a, and a.b
    tags = (f"tag:{tag}" for tag in node.tags)
    return {"default", node.name, *tags, *(f"namespace:{name}" for name in spaces)}


def _task_options(node: Node, tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what the tasks section says of a node; its later lines win over earlier ones."""
    names = _names_in_config(node)
    return dict(chain.from_iterable(tasks[name].items() for name in tasks if name in names))


def _check_task_names(tasks: Iterable[str]) -> None:
    nodes = chain.from_iterable(pipeline.nodes for pipeline in pipelines.values())
    known = set(chain({"default"}, *map(_names_in_config, nodes)))
    for name in set(tasks) - known:
        problem = f"prefect.yml: tasks has '{name}', which is no node of any pipeline."
        raise _unknown(problem, name, known, "names")


# ---- Checkpoints: what nodes hand on to others, in files of a flow run ----


class _Checkpoint(_Dataset):  # type: ignore[misc]  # a class of any version of Kedro
    """A dataset that is pickled into a file, whole or not at all."""

    def __init__(
        self, folder: str, credentials: dict[str, Any], name: str, node_name: str = ""
    ) -> None:
        # Any name makes a file name, and no two make the same.
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        path = f"{folder}/{re.sub(r'[^A-Za-z0-9.-]', '_', name)[:50]}-{digest}.pickle"
        dataset: Any = importlib.import_module("kedro_datasets.pickle").PickleDataset
        self._make = functools.partial(dataset, backend="cloudpickle", credentials=credentials)
        self._name, self._node_name = name, node_name
        self._filepath, self._file = path, self._make(filepath=path)

    def load(self) -> Any:
        return self._file.load()

    def save(self, data: Any) -> None:
        part = Path(f"{self._filepath}.part")
        try:
            if "://" in self._filepath:  # An object store shows a file when all of it is written.
                self._file.save(data)
            else:
                part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._make(filepath=str(part)).save(data)
                part.replace(self._filepath)
        except Exception as error:
            part.unlink(missing_ok=True)
            maker = f", which node '{self._node_name}' makes," if self._node_name else ""
            problem = (
                f"Dataset '{self._name}'{maker} cannot be pickled to {self._filepath}: {error}"
            )
            remedy = "Nodes hand it on in that file, unless the catalog says how to save it."
            raise kedro_io.DatasetError(f"{problem} {remedy}") from error

    def _exists(self) -> bool:
        return bool(self._file.exists())

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath}


@dataclass
class _Checkpoints:
    """The checkpoints of one flow run, in a folder of its own."""

    folder: str  # or URL
    credentials: dict[str, Any]

    def make(self, name: str, node_name: str = "") -> _Checkpoint:
        """Return the checkpoint of a dataset, which the node makes."""
        return _Checkpoint(self.folder, self.credentials, name, node_name)

    def add_to(self, catalog: Any, pipeline: Pipeline, kept: Iterable[str], cache: bool) -> None:
        """Put checkpoints in the place of what nodes write to memory, but for what is kept there.

        A cache of a checkpoint serves readers in this process, and to Kedro it is in memory: what
        Kedro advises to resume must not count on a file that `kedro run` would not find.
        """
        for node in pipeline.nodes:
            for name in set(node.outputs).difference(kept):
                dataset = _get_dataset(catalog, name)
                if _is_in_memory(_inner(dataset)):
                    checkpoint: Any = self.make(name, node.name)
                    if cache:
                        checkpoint = _CachedDataset(checkpoint, copy_mode=_copy_mode(dataset))
                    _set_dataset(catalog, name, checkpoint)

    def remove(self, logger: Any) -> None:
        """Remove them all; the run has completed, whatever keeps them from being removed."""
        fsspec = importlib.import_module("fsspec.core")
        try:
            files, path = fsspec.url_to_fs(self.folder, **self.credentials)
            if files.exists(path):
                files.rm(path, recursive=True)
        except Exception as error:
            logger.warning("Checkpoints in %s: %s", self.folder, error)


def _remote_key(task_runner: dict[str, Any]) -> str:
    """Return the key of task_runner that lets nodes run on other machines, or nothing."""
    host = urlsplit(str(task_runner.get("address", ""))).hostname
    if host not in (None, "localhost", "127.0.0.1", "::1"):
        return "address"
    if not str(task_runner.get("cluster_class", "LocalCluster")).endswith("LocalCluster"):
        return "cluster_class"
    return next((key for key in ("scheduler_file", "host") if key in task_runner), "")


def _find_checkpoints(config: _Config, options: Options) -> tuple[str, str]:
    """Return where checkpoints of runs lie, if there are any, and the name of credentials."""
    section = config.checkpoints or {}
    section = section if isinstance(section, dict) else {"url": section}
    url, credentials = options["checkpoints"] or section.get("url"), section.get("credentials", "")
    if not url and config.engine:
        if key := _remote_key(config.task_runner):
            problem = f"prefect.yml: with task_runner.{key}, nodes hand data on between machines"
            raise ClickException(f"{problem}: checkpoints: <a URL or folder that all reach>")
        url = str(prefect.settings.PREFECT_LOCAL_STORAGE_PATH.value() / "kedro-checkpoints")
    if url:
        _import_optional("kedro_datasets.pickle", "kedro-datasets[pickle]", "checkpoints")
        url = url if "://" in url else str(PROJECT_PATH / url)
    return url or "", credentials


# ---- Nodes as tasks ----
#
# A flow run is Prefect's. It runs a Kedro session, whose run id, the version of what is saved, is
# the same in all attempts. Each node has a task run in each attempt. A pipeline that runs in this
# process is looked up by an id: tasks are given nothing but names.


@dataclass
class _RunningPipeline:
    """What tasks look up, and what the states of their runs do not tell."""

    nodes: dict[str, Node]  # by name, as attempts and errors
    catalog: Any
    executor: Any  # _InProcess or _InChildren, which is defined below
    has_previews: bool = False
    attempts: Counter[str] = field(default_factory=Counter)
    errors: dict[str, BaseException] = field(default_factory=dict)  # of the last attempts


_running: dict[str, _RunningPipeline] = {}  # by the id that tasks are given


class _InProcess(NamedTuple):
    """Runs nodes in this process, each in the thread of its task."""

    catalog: Any
    hook_manager: Any
    is_async: bool
    run_id: str | None
    pins_versions: bool  # Other processes or attempts of the run may have saved what nodes load.

    def run(self, node: Node, _attempt: int) -> None:
        """Run a node as Kedro does."""
        if self.run_id and self.pins_versions:
            _pin_versions(node, self.catalog, self.run_id)
        _run_node(node, self.catalog, self.hook_manager, self.is_async, self.run_id)


class _NodeKey(NamedTuple):
    """What a node does in a run: it tells a retried flow run what need not run again."""

    options_digest: str  # of the run
    run_id: str
    digest: str  # of the node's inputs and outputs, values of parameters, and paths of outputs
    node_name: str

    def __str__(self) -> str:
        return "/".join(("node", *self))

    @classmethod
    def parse(cls, task_key: str) -> "_NodeKey | None":
        """Read the task key of a task run; None: it is not the task run of a node."""
        return cls(*task_key.split("/", 4)[1:]) if task_key.startswith("node/") else None


def _make_key(node: Node, catalog: Any, options_digest: str, run_id: str | None) -> _NodeKey:
    parameters = list(filter(_is_parameter, node.inputs))
    datasets: Any = {name: _get_dataset(catalog, name) for name in (*parameters, *node.outputs)}
    values = {name: datasets[name].load() for name in parameters if datasets[name] is not None}
    lasting = [name for name in node.outputs if not _is_in_memory(_inner(datasets[name]))]
    locations = {name: _location(name, datasets[name]) for name in lasting}
    digest = _digest(node.inputs, node.outputs, values, locations)
    return _NodeKey(options_digest, str(run_id), digest, node.name)


def _canonical(value: Any) -> str:
    """Write a value so that equal ones read the same in each process, whatever they hold."""
    if isinstance(value, dict):
        items = (f"{_canonical(key)}: {_canonical(item)}" for key, item in value.items())
        return f"{{{', '.join(sorted(items))}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_canonical, value)))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_canonical, value))}]"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # an object's address in memory


def _digest(*values: Any) -> str:
    text = _canonical(values).encode(errors="backslashreplace")
    return hashlib.sha256(text).hexdigest()[:16]


def _location(name: str, dataset: Any | None) -> str:
    """Say where a dataset lives."""
    if _is_parameter(name):
        return "parameters"
    if dataset is None:
        return "memory, released after its last reader"
    dataset = _inner(dataset)
    if _is_in_memory(dataset) or isinstance(dataset, _Checkpoint):
        return "memory"
    return f"{type(dataset).__name__} {_path(dataset)}".rstrip()


def kedro_task(node_name: str, pipeline_run_id: str) -> None:
    """Run one node of a pipeline as Kedro does: load, run, save, with its hooks."""
    running = _running[pipeline_run_id]
    node = running.nodes[node_name]
    running.attempts[node_name] += 1
    running.errors.pop(node_name, None)
    try:
        if running.attempts[node_name] > 1:
            _remove_versions(node, running.catalog)
        running.executor.run(node, running.attempts[node_name])
    except KeyboardInterrupt as error:
        running.errors[node_name] = error
        raise
    except SystemExit as error:  # It is a failure of this node, and the end of nothing else.
        failure = RuntimeError(f"Node '{node_name}' called sys.exit({_text_of(error)})")
        running.errors[node_name] = failure
        raise failure from error
    except BaseException as error:
        if type(error).__module__.startswith("prefect.") and not isinstance(error, Exception):
            raise  # Prefect stops the task: a timeout, or a flow run that is suspended.
        storable = _storable(error)
        # What is no Exception fails the run as it is: Kedro tells no hook of it.
        running.errors[node_name] = storable if isinstance(error, Exception) else error
        if storable is error:
            raise
        raise storable from None
    if running.has_previews:
        _show_previews(node, running.catalog)


def instantiate_task(node: Node, pipeline_run_id: str, task_options: Any) -> Task[[], None]:
    """Make the Prefect task that runs a node, under the node's name."""
    # Of a function instead of a partial, Prefect would read and parse this file for each task.
    fn: Any = functools.partial(kedro_task, node.name, pipeline_run_id)
    names: Any = {"name": node.name, "task_run_name": lambda: node.name}
    return Task(fn=fn, persist_result=False, **names, **_prefect_options(task_options))


def init_kedro_tasks_by_execution_layer(
    pipeline: Pipeline, pipeline_run_id: str, tasks: dict[str, dict[str, Any]] | None = None
) -> list[dict[Node, Task[[], None]]]:
    """Make a task for each node, in layers of nodes that need only nodes of earlier layers."""
    options = {node: _task_options(node, tasks or {}) for node in pipeline.nodes}
    return [
        {node: instantiate_task(node, pipeline_run_id, options[node]) for node in layer}
        for layer in pipeline.grouped_nodes
    ]


# ---- PrefectRunner ----


@dataclass
class _Setup:
    """What a flow run gives its runner."""

    run_id: str = ""  # of Kedro: the version of what is saved, in all attempts
    options_digest: str = ""  # with other options than before, all nodes run again
    earlier: dict[str, Any] = field(default_factory=dict)  # task runs of attempts before, by node
    can_resume: bool = True
    has_previews: bool = False
    checkpoints: _Checkpoints | None = None
    open_executor: Callable[..., Any] | None = None  # Without it, nodes run in this process.
    loading: ExitStack = field(default_factory=ExitStack)  # holds a lock until Kedro has loaded


@dataclass
class _Outcome:
    """What a run leaves behind."""

    outputs: dict[str, str] = field(default_factory=dict)  # where each lives
    failure: BaseException | None = None  # of the node that failed first


# How many task runs were started, by flow run: Prefect 3 records them late, and to read them is to
# wait for so many.
_started: Counter[str] = Counter()


def _longest_path_first(pipeline: Pipeline) -> list[Node]:
    """Order nodes by how many have to run after them, one after the other; else as Kedro does."""
    behind, needs = dict.fromkeys(pipeline.nodes, 0), pipeline.node_dependencies
    for node in reversed(pipeline.nodes):
        for needed in needs[node]:
            behind[needed] = max(behind[needed], behind[node] + 1)
    return sorted(behind, key=behind.__getitem__, reverse=True)


def _schedule(
    pipeline: Pipeline, start: Callable[..., None], limit: Callable[[], int]
) -> Iterator[tuple[Node, Any]]:
    """Start each node when those it needs have ended, and yield it with its state at its end.

    One that needs a failed node is started as well: Prefect calls it NotReady, and does not run it.
    """
    nodes = pipeline.nodes if limit() == 1 else _longest_path_first(pipeline)
    position = {node: index for index, node in enumerate(nodes)}
    needs = pipeline.node_dependencies  # Kedro 0.18 makes it anew each time.
    waiting = TopologicalSorter(needs)
    waiting.prepare()
    ready: list[int] = []  # a heap of positions
    ended: queue.SimpleQueue[tuple[Node, Any]] = queue.SimpleQueue()
    states: dict[Node, Any] = {}
    running = 0
    stopped_by: BaseException | None = None
    while waiting.is_active():
        for node in waiting.get_ready():
            heapq.heappush(ready, position[node])
        while ready and running < limit() and stopped_by is None:
            node = nodes[heapq.heappop(ready)]
            upstream = [states[needed] for needed in needs[node]]
            running += 1
            start(node, upstream, lambda state, node=node: ended.put((node, state)))
        if stopped_by is not None and not running:
            raise stopped_by
        try:  # It waits in steps, so that Prefect can interrupt it, and that a cluster may grow.
            node, state = ended.get(timeout=1)
        except queue.Empty:
            continue
        running -= 1
        if isinstance(state, KeyboardInterrupt):
            raise state
        if isinstance(state, BaseException):
            # Prefect has stopped the run: nodes that run are waited for, and no other starts.
            stopped_by = stopped_by or state
        else:
            states[node] = state
            waiting.done(node)
            yield node, state


@contextmanager
def _node_threads(count: int) -> Iterator[Callable[[Callable[[], None]], Any]]:
    """Yield what calls a function in a thread, and wait for all; a single thread is this one."""

    def call_in_daemon(call: Callable[[], None]) -> None:
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(call,), daemon=True).start()

    with ThreadPoolExecutor(count) as pool:
        if not _TASKS_END:
            yield call_in_daemon
        elif count == 1:
            yield lambda call: call()
        else:
            yield lambda call: pool.submit(contextvars.copy_context().run, call)


def _warn_of_shared_files(pipeline: Pipeline, catalog: Any, logger: logging.Logger) -> None:
    """Warn of files that several nodes write, if these may run at the same time."""
    writers: dict[str, list[Node]] = {}
    for node in pipeline.nodes:
        for name in node.outputs:
            dataset = _inner(_get_dataset(catalog, name))
            path = "" if _is_in_memory(dataset) else _path(dataset)
            if path and node not in writers.setdefault(path, []):
                writers[path].append(node)
    for path, nodes in writers.items():
        behind = {node: pipeline.from_nodes(node.name).nodes for node in nodes if nodes[1:]}
        for one, other in combinations(nodes, 2):
            if other not in behind[one] and one not in behind[other]:
                names = f"{one.name} and {other.name}"
                logger.warning("Nodes %s may write %s at the same time", names, path)


class PrefectRunner(kedro_runner.SequentialRunner):
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
        task_options: dict[str, dict[str, Any]] | None = None,
        _setup: _Setup | None = None,
    ) -> None:
        super().__init__(is_async=is_async)
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers is {max_workers}, and has to be 1 or more")
        self._max_workers = max_workers
        self._task_options = task_options or {}
        self._setup = _setup or _Setup()
        self.outcome = _Outcome()

    @property
    def _logger(self) -> logging.Logger:
        # Kedro's logging configuration shows what its own loggers say, not those of this module.
        return logging.getLogger("kedro.runner.prefect_runner")

    def _run(
        self, pipeline: Pipeline, catalog: Any, hook_manager: Any = None, run_id: str | None = None
    ) -> None:
        """Run the nodes, and raise the exception of the first one that failed."""
        setup = self._setup
        setup.loading.close()  # The project is loaded: other flow runs may load theirs.
        # Keys come first: a child, too, makes them before there are checkpoints.
        keys = {n: _make_key(n, catalog, setup.options_digest, run_id) for n in pipeline.nodes}
        if setup.checkpoints:
            # What is returned stays in memory, unless a child has to hand it on.
            kept = () if setup.open_executor else pipeline.outputs()
            setup.checkpoints.add_to(catalog, pipeline, kept, cache=True)
        completed: dict[Node, Any] = {}
        if setup.earlier:
            get_run_logger().info("Resuming session %s", run_id)
            completed = _find_completed(pipeline, catalog, keys, setup.earlier)
        left = Pipeline([node for node in pipeline.nodes if node not in completed])
        needs = pipeline.node_dependencies
        earlier = {n: [completed[m] for m in needs[n] & completed.keys()] for n in left.nodes}
        here = _InProcess(catalog, hook_manager, self._is_async, run_id, bool(setup.earlier))
        executor_context: Any = nullcontext(here)
        if setup.open_executor:
            executor_context = setup.open_executor(left, catalog, hook_manager, keys)
        self._run_tasks(left, catalog, executor_context, keys, earlier)
        for name in sorted(pipeline.outputs()):
            dataset = _get_dataset(catalog, name)
            self.outcome.outputs[name] = _location(name, dataset)
            # Kedro returns the outputs of a run, before 1.0 as values that it loads.
            if name not in left.all_outputs() and _is_in_memory(_inner(dataset)):
                self._logger.warning("%s was only in memory: the run returns None for it", name)
                _set_dataset(catalog, name, _MemoryDataset(None))

    def _run_tasks(
        self,
        pipeline: Pipeline,
        catalog: Any,
        executor_context: Any,
        keys: dict[Node, _NodeKey],
        earlier: dict[Node, list[Any]],
    ) -> None:
        """Make the tasks, and run each after those it needs, in this attempt or an earlier one."""
        pipeline_run_id, flow_run_id = uuid.uuid4().hex, str(runtime.flow_run.id)
        layers = init_kedro_tasks_by_execution_layer(pipeline, pipeline_run_id, self._task_options)
        tasks = dict(chain.from_iterable(layer.items() for layer in layers))
        for node, node_task in tasks.items():
            # Prefect keeps it with the task run: there a retried flow run finds what was done.
            node_task.task_key = str(keys[node])
        nodes = {node.name: node for node in pipeline.nodes}
        in_children, workers = bool(self._setup.open_executor), self._max_workers
        # In children as many nodes run as there is room for, which may grow: each gets a thread.
        threads = workers or (max(len(nodes), 1) if in_children else _default_workers())
        stopped = threading.Event()
        with _node_threads(threads) as call, executor_context as executor:
            limit = executor.engine.capacity if in_children and not workers else lambda: threads
            self._warn(pipeline, catalog, limit())
            running = _RunningPipeline(nodes, catalog, executor, self._setup.has_previews)

            def run(node: Node, upstream: list[Any], report: Callable[[Any], None]) -> None:
                try:
                    report(_run_task(tasks[node], [*upstream, *earlier[node]], stopped))
                except BaseException as error:  # Prefect or a node has stopped the run.
                    report(error)

            def start(node: Node, upstream: list[Any], report: Callable[[Any], None]) -> None:
                _started[flow_run_id] += 1
                call(functools.partial(run, node, upstream, report))

            _running[pipeline_run_id] = running
            try:
                self._follow(_schedule(pipeline, start, limit), running, pipeline)
            finally:
                stopped.set()
                del _running[pipeline_run_id]

    def _warn(self, pipeline: Pipeline, catalog: Any, limit: int) -> None:
        """Say what running nodes one at a time, or side by side, means for this pipeline."""
        widest = max(map(len, pipeline.grouped_nodes), default=0)
        if limit > 1:
            _warn_of_shared_files(pipeline, catalog, self._logger)
        elif widest > 1 and not self._max_workers:
            place = "see task_runner in conf/base/prefect.yml, or max_workers of PrefectRunner"
            advice = "%d nodes run one at a time. Up to %d could run side by side: %s"
            self._logger.info(advice, len(pipeline.nodes), widest, place)

    def _follow(self, schedule: Any, running: _RunningPipeline, pipeline: Pipeline) -> None:
        """Do all that follows from a node's end, until all have ended."""
        load_counts = Counter(chain.from_iterable(node.inputs for node in pipeline.nodes))
        never_released = pipeline.inputs() | pipeline.outputs()
        done_nodes: list[Node] = []
        failed: list[tuple[Node, Any]] = []
        for node, state in schedule:
            error = running.errors.get(node.name)
            if isinstance(error, KeyboardInterrupt):
                raise error
            if not state.is_completed():
                failed.append((node, state))
                continue
            load_counts.subtract(node.inputs)
            for name in dict.fromkeys([*node.inputs, *node.outputs]):  # as Kedro's own runners do
                if load_counts[name] < 1 and name not in never_released:
                    running.catalog.release(name)
            done_nodes.append(node)
            self._logger.info("Completed node: %s", node.name)
            self._logger.info("Completed %d out of %d tasks", len(done_nodes), len(pipeline.nodes))
        if failed:
            self._suggest_resume_scenario(pipeline, done_nodes, running.catalog)
            node, state = failed[0]  # It ended first, so it is no node that waited for another.
            problem = f"The task run of node '{node.name}' ended as {state.name}: {state.message}"
            # What was raised first: Prefect may end that task after another's.
            errors = [*running.errors.values()] if node.name in running.errors else []
            self.outcome.failure = errors[0] if errors else RuntimeError(problem)
            raise self.outcome.failure


# ---- Resuming: a flow run that is retried goes on where it failed ----


async def _read_task_runs(flow_run_id: Any, expected: int, patience: float) -> list[Any]:
    """Return the task runs of a flow run when so many have ended, or nothing changes for a time."""
    this_run = FlowRunFilter(id=FlowRunFilterId(any_=[uuid.UUID(str(flow_run_id))]))
    ended, changed = -1, time.monotonic()
    async with get_client() as client:
        while True:
            task_runs: dict[Any, Any] = {}  # by id: pages overlap while task runs are added
            offset = 0
            while page := await client.read_task_runs(flow_run_filter=this_run, offset=offset):
                task_runs.update({each.id: each for each in page if each.state})
                offset += len(page)
            before, states = ended, [each.state for each in task_runs.values()]
            ended = sum(state.is_final() or state.name == "NotReady" for state in states)
            if ended != before:
                changed = time.monotonic()
            if ended >= expected or time.monotonic() - changed > patience:
                return list(task_runs.values())
            await asyncio.sleep(0.2)


def _find_earlier(options_digest: str) -> tuple[str, dict[str, Any]]:
    """Return the run id of earlier attempts, if any, and each node's last task run, by name."""
    logger, flow_run = get_run_logger(), cast("Any", FlowRunContext.get()).flow_run
    if flow_run.start_time == flow_run.state.timestamp:
        return "", {}  # It runs for the first time; one that was suspended has been running before.
    # Of the task runs that this process has started, kedro_init goes on.
    found = _call_api(_read_task_runs(flow_run.id, _started[str(flow_run.id)] - 1, patience=10))
    # By attempt first, because clocks can be set back.
    found.sort(key=lambda run: (run.flow_run_run_count, run.expected_start_time or run.created))
    attempts = [(key, each) for each in found if (key := _NodeKey.parse(each.task_key))]
    if not attempts:
        logger.warning("All nodes run again: none has been run")
        return "", {}
    last, _ = attempts[-1]
    if last.options_digest != options_digest:
        logger.warning("All nodes run again: the run has other parameters than before")
        return "", {}
    of_run = [(key, each) for key, each in attempts if key.run_id == last.run_id]
    return last.run_id, {key.node_name: each for key, each in of_run}


def _find_what_runs_again(
    pipeline: Pipeline, catalog: Any, keys: dict[Node, _NodeKey], earlier: dict[str, Any]
) -> dict[Node, str]:
    """Return the nodes to run, each with the reason: Kedro's resume suggestion, node by node."""
    datasets = {name: _inner(_get_dataset(catalog, name)) for name in pipeline.all_outputs()}
    needs = pipeline.node_dependencies
    again: dict[Node, str] = {}
    for node in pipeline.nodes:  # in the order of their needs
        task_run, reason = earlier.get(node.name), ""
        if task_run is None or not task_run.state.is_completed():
            reason = str(task_run.state.name) if task_run else "not run"
        elif task_run.task_key != str(keys[node]):
            reason = "its inputs, outputs, parameters or catalog entries have changed"
        elif lost := ", ".join(name for name in node.outputs if _is_missing(datasets[name])):
            reason = f"{lost} is gone"
        if reason or needs[node] & again.keys():
            again[node] = reason or "what it needs is made again"
    to_visit = list(again)
    while to_visit:
        node = to_visit.pop()
        for maker in needs[node] - again.keys():
            used = [name for name in maker.outputs if name in node.inputs]
            if lost := ", ".join(name for name in used if _is_in_memory(datasets[name])):
                again[maker] = f"{lost} was only in memory"
                to_visit.append(maker)
    return again


def _find_completed(
    pipeline: Pipeline, catalog: Any, keys: dict[Node, _NodeKey], earlier: dict[str, Any]
) -> dict[Node, Any]:
    """Return what earlier attempts of this flow run have completed, each with its state."""
    logger = get_run_logger()
    again = _find_what_runs_again(pipeline, catalog, keys, earlier)
    for node in again:
        if node.confirms and earlier.get(node.name) and earlier[node.name].state.is_completed():
            problem = f"Node '{node.name}' has confirmed {', '.join(node.confirms)}, and cannot run"
            remedy = "Save what it hands on, with the catalog or checkpoints, and start a new run."
            raise RuntimeError(f"{problem} again, but {again[node]}. {remedy}")
        _remove_versions(node, catalog)
    completed = sum(task_run.state.is_completed() for task_run in earlier.values())
    logger.info("%d of %d nodes had completed", completed, len(pipeline.nodes))
    for node in list(again)[:NAMES_SHOWN]:
        logger.info("Runs again: %s (%s)", node.name, again[node])
    return {node: earlier[node.name].state for node in pipeline.nodes if node not in again}


# ---- Pictures and artifacts: what Prefect's UI shows of a pipeline and of its datasets ----

# In a description of ours, and invisible there: one without this line is somebody's own.
_MARKER = "[register_prefect_flow.py]: # (to keep what you write here, remove this line)"
_ROW = 36  # pixels from one node to the next below it, in a picture of a pipeline


def _escape_markdown(text: str) -> str:
    """Write a text in Markdown so that nothing in it is markup, and it stays in its table cell."""
    text = html.escape(" ".join(text.split()), quote=False)
    # Backslashes, because the older UI decodes few entities.
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", text)


def _label(node: Node) -> str:
    """Return what fits into the box of a node."""
    return node.name if len(node.name) <= NAME_DRAWN else f"{node.name[:NAME_DRAWN]}..."


def _picture(pipeline: Pipeline) -> str:
    """Draw a pipeline in Markdown: layers from left to right, nodes near those that they need."""
    if len(pipeline.nodes) > NODES_DRAWN:
        return f"{len(pipeline.nodes)} nodes, which are too many to draw."
    layers, needed = pipeline.grouped_nodes, pipeline.node_dependencies
    height, left = _ROW * max(map(len, layers)), 4
    ends: dict[Node, tuple[int, float]] = {}  # the right end of each box, where lines start
    boxes, lines = [], []
    for layer in layers:
        heights = {node: [ends[other][1] for other in needed[node]] or [0] for node in layer}
        means = {node: sum(heights[node]) / len(heights[node]) for node in layer}
        width = 7 * max(len(_label(node)) for node in layer) + 16
        top = (height - _ROW * len(layer)) / 2
        for row, node in enumerate(sorted(layer, key=means.__getitem__)):
            y = top + _ROW * (row + 0.5)
            boxes.append(  # with the whole name under the pointer
                f'<g><title>{html.escape(node.name)}</title><rect x="{left}" y="{y - 14:g}"'
                f' width="{width}" height="28" rx="5" fill="#334155"/>'
                f'<text x="{left + width / 2:g}" y="{y + 4.5:g}">'
                f"{html.escape(_label(node))}</text></g>"
            )
            for x, middle in (ends[other] for other in needed[node]):
                bend = f"{x + 14} {middle:g} {left - 14} {y:g}"
                lines.append(f"M {x} {middle:g} C {bend} {left} {y:g}")
            ends[node] = left + width, y
        left += width + 24
    drawn = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left - 20}" height="{height}"'
        f' viewBox="0 0 {left - 20} {height}" font-family="sans-serif" font-size="13"'
        f' text-anchor="middle"><path d="{" ".join(lines)}" fill="none" stroke="#94a3b8"'
        f' stroke-width="1.5"/><g fill="#fff">{"".join(boxes)}</g></svg>'
    )
    return f"![the pipeline](data:image/svg+xml;base64,{base64.b64encode(drawn.encode()).decode()})"


def _without_secrets(options: Options) -> Options:
    """Return the options of a run as they may be shown: no runtime values, no passwords in URLs."""
    names = ", ".join(options.get("runtime_params", ()))
    shown = options | ({"runtime_params": names} if names else {})
    return {name: _without_password(str(value)) for name, value in shown.items()}


def _without_password(text: str) -> str:
    """Remove users and passwords from URLs."""
    return re.sub(r"(?<=://)[^/\s]+@", "***@", text)


def _describe_deployment(pipeline: Pipeline, options: Options) -> str:
    """Describe what a deployment runs in Markdown."""
    shown = _without_secrets(options)
    lines = [f"- {name}: {_escape_markdown(text)}" for name, text in shown.items()]
    return "\n".join([*lines, f"\n{_picture(pipeline)}", f"\n{_MARKER}"])


def _artifact_key(name: str) -> str:
    """Return the key of an artifact of this project: it may hold a-z, 0-9 and hyphens only."""
    package, slug = (re.sub(r"[^a-z0-9]+", "-", n.lower()).strip("-") for n in (_flow_name(), name))
    if slug != name or "-" in name:  # so that no two are the same
        slug = f"{slug[:50]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".strip("-")
    return f"{package}-{slug}"


def _render(name: str, dataset: Any, arguments: dict[str, Any]) -> str:
    """Return a dataset's own preview as Markdown, under its name."""
    preview = _preview_method(dataset)
    content: Any = preview(**arguments)
    if "ImagePreview" in str(inspect.signature(preview).return_annotation):
        shown = f"![preview](data:image/png;base64,{content})"
    elif isinstance(content, dict) and {"columns", "data"} <= content.keys():
        lines = [content["columns"], *content["data"]]
        rows = [" | ".join(_escape_markdown(str(cell)) for cell in line) for line in lines]
        rows.insert(1, " | ".join("---" for _ in content["columns"]))
        shown = "\n".join(f"| {row} |" for row in rows)
    else:
        with suppress(TypeError, ValueError):  # It is a text that is JSON, or else shown as it is.
            content = json.loads(content)
        text = content if isinstance(content, str) else json.dumps(content, indent=2, default=str)
        shown = textwrap.indent(text, " " * 4)
    if len(shown) > PREVIEW_SHOWN:
        raise ValueError(f"it has {len(shown)} characters, more than {PREVIEW_SHOWN}")
    return f"### {_escape_markdown(name)}\n\n{shown}\n"


def _show_previews(node: Node, catalog: Any) -> None:
    """Show those of a node's outputs whose catalog entry asks for it; the server keeps them."""
    for name in node.outputs:
        dataset = _inner(_get_dataset(catalog, name))
        try:
            metadata = getattr(dataset, "metadata", None)
            wanted = metadata.get("prefect") if isinstance(metadata, dict) else None
            if isinstance(wanted, dict) and wanted.get("preview"):
                text = _render(name, dataset, wanted.get("preview_args") or {})
                _call_api(_create_artifact(text, _artifact_key(name)), SERVER_TIMEOUT)
        except Exception as error:
            logging.getLogger("kedro").warning("No preview of '%s' in Prefect: %r", name, error)


async def _create_artifact(text: str, key: str) -> None:
    """Add Markdown to the task run that goes on here."""
    created: Any = create_markdown_artifact(text, key=key)
    if inspect.isawaitable(created):  # In Prefect 2 it is done by now.
        await created


# ---- Engines: nodes in children, here and under Dask workers ----
#
# A child is a process that has opened the project for one flow run, with its code as it is now.
# Names of nodes go there; log records come back, and how each node ended. After a run it ends as a
# Python process does; with all that it has started it is killed when a node is stopped, or when its
# parent is gone. Dask says which machine has room for a node. What starts children is an engine: it
# runs a job, says how many it can run at once, stops, and closes.

_PARAMETERS = "parameters"  # the name of the checkpoint that hands on their values
_CHILD = """
import importlib.util, sys
for stream in (sys.stdout, sys.stderr):  # Others write there at the same time: lines stay whole.
    stream.reconfigure(line_buffering=True, write_through=False)
spec = importlib.util.spec_from_file_location("register_prefect_flow", sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module._be_child(int(sys.argv[2]))
"""


class _Job(NamedTuple):
    """What a child is told of a flow run, and of the node to run."""

    options: Options
    run_id: str
    options_digest: str
    is_async: bool
    versions: dict[str, str]  # of Kedro, Python and code, in the flow
    folder: str  # of checkpoints
    credentials: str  # the name of the entry for that folder
    handed_on: tuple[str, ...] = ()  # names of datasets that have a checkpoint from the flow
    node_name: str = ""
    key: str = ""  # of the node, in the flow
    attempt: int = 1
    id: str = ""  # of this attempt
    runs_once: bool = False  # Dask starts it again where the worker that ran it is lost.


def _versions(metadata: ProjectMetadata) -> dict[str, str]:
    """Return what has to be the same wherever nodes of a run are run: versions, and code."""
    package = Path(metadata.source_dir) / metadata.package_name
    files = [THIS_FILE, *(path for path in package.rglob("*.py") if path.is_file())]
    code = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    python = platform.python_version().rpartition(".")[0]
    return {"Kedro": kedro.__version__, "Python": python, **code}


def _check_versions(metadata: ProjectMetadata, of_flow: dict[str, str]) -> None:
    """Refuse to run nodes with another version, or with code that is not that of the flow."""
    # A file that is not loaded may be new: no node runs it.
    loaded = {str(getattr(module, "__file__", "")) for module in [*sys.modules.values()]}
    for name, version in _versions(metadata).items():
        if name in ("Kedro", "Python") and version != of_flow[name]:
            problem = f"{name} is {version} on {platform.node()}, and {of_flow[name]} in the flow"
            raise RuntimeError(f"{problem}. Install the same there.")
        if name in loaded and version != of_flow.get(name):
            problem = f"{name} on {platform.node()} is not as it was when the flow run started"
            raise RuntimeError(f"{problem}. Start the run again; elsewhere, update it first.")


def _run_job(keys: dict[str, _NodeKey], checkpoints: _Checkpoints, job: _Job) -> None:
    """Run a node in a child, if it is the same node there as in the flow."""
    running = _running[job.run_id]
    node = running.nodes[job.node_name]
    if str(keys[node.name]) != job.key:
        problem = f"Node '{node.name}' has other inputs, outputs or paths in its process than here"
        remedy = "Does a resolver give another value each time? Put the value into a parameter."
        raise RuntimeError(f"{problem}. {remedy}")
    if job.runs_once:
        begun = checkpoints.make(f"begun-{job.id}")
        if begun.exists():
            raise RuntimeError(f"The process that ran node '{node.name}' is lost with its worker")
        begun.save(node.name)
    running.attempts[node.name] = job.attempt - 1
    try:
        kedro_task(node.name, job.run_id)
    finally:
        for name in filterfalse(_is_parameter, {*node.inputs, *node.outputs}):
            running.catalog.release(name)


def _open_run(job: _Job) -> Callable[[_Job], None]:
    """Open the project in a child, with the values of the flow, and return what runs its nodes."""
    session = _open_session(job.options)
    context, pipeline = _load_project(session, job.options, _pipeline_names(job.options))
    _check_versions(_bootstrap(), job.versions)
    catalog = _load_catalog(context, job.options, job.run_id)
    credentials = _read_credentials(session, job.options, job.credentials)
    checkpoints = _Checkpoints(job.folder, credentials)
    if _PARAMETERS in job.handed_on:
        for name, value in checkpoints.make(_PARAMETERS).load().items():
            _set_dataset(catalog, name, _MemoryDataset(value))
    run_id, digest = job.run_id, job.options_digest
    keys = {node.name: _make_key(node, catalog, digest, run_id) for node in pipeline.nodes}
    checkpoints.add_to(catalog, pipeline, kept=(), cache=False)
    for name in {*job.handed_on} - {_PARAMETERS}:
        _set_dataset(catalog, name, checkpoints.make(name))
    hooks = _hook_manager(session)
    executor = _InProcess(catalog, hooks, job.is_async, run_id, pins_versions=True)
    nodes = {node.name: node for node in pipeline.nodes}
    _running[run_id] = _RunningPipeline(nodes, catalog, executor)
    return functools.partial(_run_job, keys, checkpoints)


def _pack_error(error: BaseException, with_object: bool) -> bytes:
    """Write an exception down: as itself, if that can be, and as text."""
    names = type(error).__module__, type(error).__name__
    trace, pickled = _writable("".join(traceback.format_exception(error))), b""
    with suppress(Exception):  # There is much that cannot be pickled.
        pickled = pickle.dumps(error) if with_object else b""
    return pickle.dumps((pickled, (*names, _text_of(error)), trace))


def _unpack_error(payload: bytes) -> BaseException:
    pickled, description, trace = pickle.loads(payload)
    error: Any = None
    with suppress(Exception):  # Its class may need other arguments than it keeps.
        error = pickle.loads(pickled)
    error = error if isinstance(error, BaseException) else _stand_in(*description)
    error.__cause__ = RuntimeError(f"in another process\n{trace}")
    return cast("BaseException", error)


def _send_logs(send: Callable[..., None]) -> None:
    """Send what is logged in a child to the flow, which has the project's handlers."""
    records: Any = SimpleNamespace(put_nowait=lambda record: send("log", pickle.dumps(record)))
    for name in logging.root.manager.loggerDict:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.root.handlers = [logging.handlers.QueueHandler(records)]


def _be_child(connection_number: int) -> None:
    """Run nodes of a flow run, and send messages, until there is nothing more to do."""
    os.environ["KEDRO_DISABLE_TELEMETRY"] = "1"  # The flow sends it.
    os.set_inheritable(connection_number, False)
    connection, lock, child = Connection(connection_number), threading.Lock(), os.getpid()
    jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def send(kind: str, payload: bytes = b"") -> None:
        with lock:
            connection.send((kind, payload))

    def listen() -> None:
        with suppress(EOFError, OSError):
            while True:
                jobs.put(connection.recv())
        # The flow is gone, whatever a node is doing: a fork leaves the group, and kills it.
        if not os.fork():
            os.setsid()
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # Others wait for the ends of their pipes.
            _kill_group(child)
            os._exit(0)

    # A fork holds no connection, which is the child's only, and prints what is logged.
    os.register_at_fork(after_in_child=connection.close)
    os.register_at_fork(after_in_child=functools.partial(logging.basicConfig, force=True))
    threading.Thread(target=listen, daemon=True).start()
    run_job: Callable[[_Job], None] | None = None
    while fields := jobs.get():
        try:
            job = _Job(**fields)
            if not run_job:
                _bootstrap()
                _send_logs(send)
                run_job = _open_run(job)
            run_job(job)
            send("completed")
        except BaseException as error:  # What opening raises may refer to credentials.
            send("failed", _pack_error(error, with_object=bool(run_job)))


def _kill_group(leader: int) -> None:
    """Kill a process, and then all that it has started.

    These have a second to clean up: what frees the shared memory of joblib does not heed SIGTERM,
    and ends by itself when the others have ended.
    """
    gone = ProcessLookupError, PermissionError  # macOS says the latter of what is not reaped.
    with suppress(*gone):
        os.kill(leader, signal.SIGKILL)
    with suppress(*gone):
        os.killpg(leader, signal.SIGTERM)
        time.sleep(1)
    with suppress(*gone):
        os.killpg(leader, signal.SIGKILL)


def _log_record(payload: bytes) -> None:
    """Log what has been logged in a child."""
    try:
        record = pickle.loads(payload)
    except Exception as error:  # It may hold an object that cannot be made again.
        logging.getLogger("kedro").warning("A log line of a node cannot be read: %r", error)
    else:
        logging.getLogger(record.name).handle(record)


class _Child:
    """A child, as whoever started it sees it."""

    def __init__(self, script: str) -> None:
        self._connection, end = Pipe()
        command = [sys.executable, "-c", _CHILD, script, str(end.fileno())]
        arguments: Any = {"stdin": subprocess.DEVNULL, "cwd": Path(script).parent}
        arguments |= {"start_new_session": True, "pass_fds": [end.fileno()]}
        self._process = subprocess.Popen(command, **arguments)
        end.close()
        self.node_name = ""  # of the node that it runs, or has run last
        self._reaping = threading.Lock()

    def send(self, job: dict[str, Any] | None) -> None:
        """Give the child a node to run; without one, it ends when its threads have ended."""
        with suppress(OSError):  # It has died, as listening will tell.
            self._connection.send(job)

    def receive(self) -> tuple[str, bytes]:
        """Wait for a message, in steps, so that a timeout of Prefect can interrupt it."""
        while not self._connection.poll(0.2):
            # What it has started may hold its connection longer than it lives.
            if not self.is_alive() and not self._connection.poll():
                return "ended", b""
        try:
            return cast("tuple[str, bytes]", self._connection.recv())
        except (EOFError, OSError):
            return "ended", b""
        except Exception as error:
            return "ended", f"for what it sent cannot be read: {error!r}".encode()

    def listen(self, hear: Callable[[bytes], None] = _log_record) -> tuple[str, bytes]:
        """Let its log records be heard, and return how its node, or it itself, has ended."""
        while (message := self.receive())[0] == "log":
            hear(message[1])
        return message

    def is_alive(self) -> bool:
        """Tell whether it runs."""
        with self._reaping:
            return self._process.poll() is None

    def kill(self) -> int:
        """Kill it, and all that it has started, and return its exit code."""
        with self._reaping:
            if self._process.returncode is None:  # Else its pid may have been given to another.
                _kill_group(self._process.pid)
            return self._process.wait()

    def wait(self) -> None:
        """Wait until it has ended, and log what it says meanwhile."""
        problem = "The process that ran node '%s' goes on, and is waited for: a thread?"
        warning = threading.Timer(10, logging.getLogger("kedro").warning, [problem, self.node_name])
        warning.start()
        self.listen()
        while self.is_alive():
            time.sleep(0.02)
        warning.cancel()


class _ChildPool:
    """The children of a flow run on one machine. Sent to Dask's workers by value."""

    def __init__(self, script: str) -> None:
        self._script = script
        self._busy: dict[str, Any] = {}  # by id of the job
        self._idle: list[Any] = []
        self._is_stopped = False

    def capacity(self) -> int:
        """Return how many nodes this machine can run at once."""
        return os.cpu_count() or 1

    def run(
        self, job: dict[str, Any], _resources: Any = None, hear: Callable[..., None] = _log_record
    ) -> tuple[str, bytes]:
        """Run a node in a child, let its log records be heard, and return how it ended."""
        if not Path(self._script).exists():
            problem = "the project has to be at the same path there, with this file"
            raise FileNotFoundError(f"{platform.node()} has no {self._script}: {problem}.")
        child, kind = self._take(job), "ended"
        try:
            child.send(job)
            kind, payload = child.listen(hear)
        finally:
            del self._busy[job["id"]]
            if kind == "ended":
                code = child.kill()
            else:
                self._idle.append(child)
        if kind != "ended":
            return kind, payload
        reason = "with its run" if self._is_stopped else "perhaps for lack of memory"
        by = f" (killed, {payload.decode() or reason})" if code == -signal.SIGKILL else ""
        return "died", f"died with exit code {code}{by}".encode()

    def _take(self, job: dict[str, Any]) -> Any:
        """Make an idle child, or a new one, a busy one."""
        child: Any = None
        # An idle one may have been killed, for lack of memory.
        while child is None or not child.is_alive():
            try:
                child = self._idle.pop()
            except IndexError:
                child = _Child(self._script)
        self._busy[job["id"]], child.node_name = child, job["node_name"]
        if self._is_stopped:
            child.kill()
        return child

    def kill(self, job_id: str) -> None:
        """Kill the child that runs a job, if any does."""
        if child := self._busy.get(job_id):
            child.kill()

    def stop(self) -> None:
        """Kill all children, if any runs a node."""
        self._is_stopped = True
        children = [*self._busy.values(), *self._idle] if self._busy else []
        with ThreadPoolExecutor(len(children) or 1) as threads:
            threads.map(lambda child: child.kill(), children)

    def close(self) -> None:
        """Let all children end as Python processes do, and wait for them."""
        children, self._idle = self._idle, []
        try:
            for child in children:
                child.send(None)
            for child in children:
                child.wait()
        except BaseException:
            for child in children:
                child.kill()
            raise


def _make_plugin(distributed: Any, name: str, topic: str, script: str) -> Any:
    """Make what keeps the children of a flow run on each Dask worker; it is sent by value."""
    if __name__ != "__main__":
        importlib.import_module("cloudpickle").register_pickle_by_value(sys.modules[__name__])

    class FlowRunChildren(distributed.WorkerPlugin):  # type: ignore[misc]
        def setup(self, worker: Any) -> None:
            self._worker, self._children = worker, _ChildPool(script)
            self._jobs: set[str] = set()  # that have run here

        async def teardown(self, worker: Any) -> None:  # noqa: ARG002
            self._children.stop()
            await asyncio.to_thread(self._children.close)

        def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
            """Kill the child of a node that the flow has cancelled; end all if it is gone."""
            if key in self._jobs and finish == "released":
                kill = functools.partial(self._children.kill, key)
                threading.Thread(target=kill if start == "executing" else self._leave).start()

        def _leave(self) -> None:
            with suppress(Exception):  # Another worker may have been faster.
                # Dask also lets go of what has failed, and moves what a worker has that retires.
                clients = self._client.run_on_scheduler(
                    lambda dask_scheduler: [*dask_scheduler.clients]
                )
                if topic not in clients:
                    self._client.unregister_worker_plugin(name)

        def run(self, job: dict[str, Any]) -> None:
            """Run a node in a child, and pass on its messages."""
            key, self._client = job["id"], distributed.get_client()
            self._jobs.add(key)
            send = functools.partial(self._worker.log_event, topic)
            ended = self._children.run(job, hear=lambda record: send((key, "log", record)))
            send((key, *ended))

    return FlowRunChildren()


def _connect(distributed: Any, stack: ExitStack, task_runner: dict[str, Any]) -> Any:
    """Return a client of the Dask cluster that task_runner describes, when it has a worker."""
    own = _SHAPE["task_runner"]
    arguments = {"timeout": 20} | {k: v for k, v in task_runner.items() if k not in own}
    place: Any = "this machine"
    try:
        if name := arguments.pop("cluster_class", None):
            module, _, class_name = name.rpartition(".")
            make = getattr(_import_optional(module, module.partition(".")[0], name), class_name)
            arguments["address"] = stack.enter_context(make(**arguments.pop("cluster_kwargs", {})))
        elif not {"address", "host", "scheduler_file"} & arguments.keys():
            # A cluster here needs no processes: its workers do nothing but start children.
            boards = dict.fromkeys(("dashboard_address", "worker_dashboard_address"), "127.0.0.1:0")
            arguments = {"processes": False, "memory_limit": 0} | boards | arguments
        place = arguments.get("address", place)
        message = "Waiting up to %s s for Dask workers at %s"
        logging.getLogger("kedro").info(message, arguments["timeout"], place)
        client = stack.enter_context(distributed.Client(**arguments))
        client.wait_for_workers(1, timeout=arguments["timeout"])
    except TypeError as error:  # It names the argument.
        raise ClickException(f"prefect.yml: Dask refuses a key of task_runner: {error}") from error
    except (OSError, asyncio.TimeoutError, ValueError, RuntimeError) as error:
        problem = f"prefect.yml: there is no Dask cluster with workers at {place}: {error}"
        remedy = "Start `dask scheduler` and `dask worker`, and give task_runner.address"
        raise ClickException(f"{problem}. {remedy}, or a longer timeout.") from error
    return client


class _Dask:
    """A Dask cluster, whose workers run nodes of a flow run in children."""

    def __init__(self, script: str, task_runner: dict[str, Any]) -> None:
        self._name = f"kedro-{uuid.uuid4().hex}"
        self._futures: list[Any] = []  # held as long as the flow lives
        self._messages: dict[str, queue.SimpleQueue[Any]] = {}  # of nodes that run
        self._capacity, self._asked_at = 1, 0.0
        distributed = _import_optional("distributed", "distributed", "task_runner.type dask")
        with ExitStack() as stack:
            logger = logging.getLogger("distributed")  # whose level is set by its import
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
            self._client = _connect(distributed, stack, task_runner)
            self._client.subscribe_topic(self._client.id, self._hear)
            plugin = _make_plugin(distributed, self._name, self._client.id, script)
            self._client.register_plugin(plugin, name=self._name)
            self._stack = stack.pop_all()

    def capacity(self) -> int:
        """Return how many nodes the cluster can run at once; it is asked each second."""
        if time.monotonic() > self._asked_at + 1:
            self._asked_at = time.monotonic()
            with suppress(Exception):  # The cluster is lost: nodes fail with the reason.
                self._capacity = sum(self._client.nthreads().values()) or 1
        return self._capacity

    def _hear(self, event: Any) -> None:
        _, message = event
        if isinstance(message, tuple):  # else it is Dask's own
            job_id, *of_node = message
            if messages := self._messages.get(job_id):
                messages.put(of_node)

    def run(self, job: dict[str, Any], resources: Any) -> tuple[str, bytes]:
        """Run a node in a child of the worker that has room, and return how it ended."""
        name, job_id = self._name, job["id"]
        messages = self._messages[job_id] = queue.SimpleQueue()

        def run_on_worker(job: dict[str, Any]) -> None:
            importlib.import_module("distributed").get_worker().plugins[name].run(job)

        future = self._client.submit(run_on_worker, job, key=job_id, resources=resources)
        self._futures.append(future)
        try:
            # What the node has sent is there when the future is done.
            while not future.done() or not messages.empty():
                with suppress(queue.Empty):  # In steps, a timeout of Prefect can interrupt it.
                    kind, payload = messages.get(timeout=0.2)
                    if kind != "log":
                        return kind, payload
                    _log_record(payload)
            future.result()  # raises what kept the node from being run
            return "ended", b"has sent nothing"
        except BaseException:
            future.cancel()
            raise
        finally:
            del self._messages[job_id]

    def stop(self) -> None:
        """Have those children killed that run nodes."""
        self._client.cancel([future for future in self._futures if not future.done()])

    def close(self) -> None:
        """Let all children end, and wait for them."""
        with suppress(Exception):  # There may be no cluster any more.
            self._client.unsubscribe_topic(self._client.id)  # Dask says there that it has closed.
            self._client.unregister_worker_plugin(self._name)
            self._client.run_on_scheduler(_forget_events, self._client.id)
        self._stack.close()


class _InChildren(NamedTuple):
    """Runs nodes in children."""

    engine: _ChildPool | _Dask
    job: _Job  # what is the same for all nodes
    keys: dict[Node, _NodeKey]
    tasks: dict[str, dict[str, Any]]  # of prefect.yml

    def run(self, node: Node, attempt: int) -> None:
        """Run a node where the engine has room for it."""
        job_id, key = f"{node.name}-{uuid.uuid4().hex}", str(self.keys[node])
        job = self.job._replace(id=job_id, node_name=node.name, key=key, attempt=attempt)
        resources = _task_options(node, self.tasks).get("resources")
        kind, payload = self.engine.run(job._asdict(), resources)
        if kind == "failed":
            raise _unpack_error(payload)
        if kind != "completed":
            raise RuntimeError(f"The process that ran node '{node.name}' {payload.decode()}")


def _hand_on(catalog: Any, pipeline: Pipeline, checkpoints: _Checkpoints) -> tuple[str, ...]:
    """Put parameters, and what hooks have put in memory, into checkpoints, and name these."""
    datasets: Any = {name: _get_dataset(catalog, name) for name in sorted(pipeline.inputs())}
    in_memory = [n for n, each in datasets.items() if _is_in_memory(_inner(each)) and each.exists()]
    names = list(filterfalse(_is_parameter, in_memory))
    for name in names:
        checkpoints.make(name).save(datasets[name].load())
    if values := {name: datasets[name].load() for name in filter(_is_parameter, in_memory)}:
        checkpoints.make(_PARAMETERS).save(values)
        names.append(_PARAMETERS)
    return tuple(names)


def _check_for_children(pipeline: Pipeline, catalog: Any, hook_manager: Any) -> None:
    """Refuse what would be lost between processes, and warn of what each has for itself."""
    logger = logging.getLogger("kedro")
    for node in pipeline.nodes:
        if lost := sorted(set(node.confirms) - set(node.inputs)):
            problem = f"Node '{node.name}' confirms {lost[0]}, which another node reads"
            remedy = "Each has a process of its own: let the node confirm it that reads it"
            raise ValueError(f"{problem}. {remedy}, or leave out task_runner.type.")
    for name in sorted(pipeline.all_outputs()):
        if _copy_mode(_get_dataset(catalog, name)) == "assign":
            logger.warning("%s has copy_mode assign: nodes in other processes get copies", name)
    for plugin in hook_manager.get_plugins():
        calls = {call.name for call in hook_manager.get_hookcallers(plugin) or ()}
        of_nodes = any("node" in name or "dataset" in name for name in calls)
        if of_nodes and calls & {"before_pipeline_run", "after_pipeline_run"}:
            name = type(plugin).__qualname__
            place = "for the pipeline in this process, and for nodes in theirs"
            effect = "what it sets, opens or collects in one is not there in others"
            logger.warning("Hooks of %s are called %s: %s", name, place, effect)


@contextmanager
def _open_executor(
    config: _Config,
    job: _Job,
    checkpoints: _Checkpoints,
    pipeline: Pipeline,
    catalog: Any,
    hook_manager: Any,
    keys: dict[Node, _NodeKey],
) -> Iterator[_InChildren]:
    """Yield what runs the nodes of a run in children; at the end, wait for all of these to end."""
    _check_for_children(pipeline, catalog, hook_manager)
    is_dask, script = config.engine == "dask", str(THIS_FILE)
    handed_on = _hand_on(catalog, pipeline, checkpoints)
    job = job._replace(handed_on=handed_on, runs_once=is_dask)
    engine = _Dask(script, config.task_runner) if is_dask else _ChildPool(script)
    try:
        yield _InChildren(engine, job, keys, config.tasks)
    except BaseException:
        engine.stop()  # Else nodes that run would be waited for.
        raise
    finally:
        engine.close()


# ---- Logs ----


class _RunLogs(APILogHandler):
    """Sends to Prefect what is logged in a flow run, also by threads that its nodes start."""

    def __init__(self, flow_run_id: str) -> None:
        super().__init__()
        self._flow_run_id, self._process = flow_run_id, os.getpid()

    def filter(self, record: Any) -> Any:
        """Take a line of this run: several runs may go on in one process."""
        if os.getpid() != self._process:  # In a fork, Prefect's threads and locks do not work.
            return False
        if not getattr(record, "flow_run_id", None):
            flow_run_id = runtime.flow_run.id or self._flow_run_id
            # An agent of Prefect 2 writes it without hyphens.
            record.flow_run_id = str(uuid.UUID(str(flow_run_id)))
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
        ancestor: Any = logger
        while ancestor and APILogHandler not in map(type, ancestor.handlers):
            ancestor = ancestor.parent if ancestor.propagate else None
        if not ancestor:  # Else what it logs is sent already.
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
        with suppress(ImportError):  # Which of them there are depends on the version.
            module = importlib.import_module(f"websockets.{name}")
            if getattr(module, "random", None) is random:
                cast("Any", module).random = random.Random()  # noqa: S311  # as it was


@functools.cache  # The handler stays for the life of the process, and once is enough.
def _free_forks() -> None:
    """Let SIGTERM end what a node forks: Prefect's handler, which it inherits, would not.

    A `multiprocessing.Pool` ends its workers by this signal, and waits for them.
    """

    def restore() -> None:
        handler = signal.getsignal(signal.SIGTERM)
        if str(getattr(handler, "__module__", "")).startswith("prefect."):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=restore)


def _add_checkpoints(setup: _Setup, config: _Config, session: Any, options: Options) -> None:
    """Add checkpoints, and what runs nodes in children, if prefect.yml or the run asks for it."""
    url, entry = _find_checkpoints(config, options)
    if url:
        folder = f"{url.rstrip('/')}/{runtime.flow_run.id}"
        setup.checkpoints = _Checkpoints(folder, _read_credentials(session, options, entry))
    if setup.checkpoints and config.engine:
        is_async = config.task_runner.get("is_async", False)
        versions = _versions(get_project_metadata(PROJECT_PATH))
        job = _Job(options, setup.run_id, setup.options_digest, is_async, versions, folder, entry)
        setup.open_executor = functools.partial(_open_executor, config, job, setup.checkpoints)


@task(persist_result=False)
def kedro_init(options: Options, loading: ExitStack) -> Any:
    """Bootstrap the project, and make the Kedro session and the runner of this flow run."""
    flow_run_id = str(runtime.flow_run.id)
    _started[flow_run_id] += 1
    (logger := get_run_logger()).info("Bootstrapping project")
    metadata = _bootstrap()
    _run_arguments(options)  # It refuses what this Kedro does not take.
    session = _open_session(options)
    config = _read_config(session, options)
    digest = _digest(options | {"env": _environment(options)})
    can_resume = config.task_runner.get("resume", True)
    run_id, earlier = _find_earlier(digest) if can_resume else ("", {})
    # Kedro names versions by the millisecond, in which another flow run may start as well.
    digits = f"{uuid.UUID(flow_run_id).int % 1000:03}Z"
    run_id = run_id or kedro_io.core.generate_timestamp().removesuffix("Z") + digits
    _adopt_run_id(session, run_id)
    logger.info("Project %s: session created with ID %s", metadata.project_name, run_id)
    setup = _Setup(run_id, digest, earlier, can_resume, config.artifacts, loading=loading)
    _add_checkpoints(setup, config, session, options)
    max_workers = config.task_runner.get("max_workers")
    if config.task_runner.get("type") == "threads" and not max_workers:
        # To name the type is to ask for nodes side by side.
        max_workers = _default_workers(otherwise=min(32, (os.cpu_count() or 1) + 4))
    is_async = config.task_runner.get("is_async", False)
    return session, setup, PrefectRunner(is_async, max_workers, config.tasks, setup)


def _run_session(options: Options, loading: ExitStack) -> dict[str, str]:
    """Run the session; if it fails, say how to go on."""
    logger = get_run_logger()
    session, setup, runner = cast("Any", kedro_init(options, loading))
    try:
        with _logs_to_prefect(), session:
            session.run(runner=runner, **_run_arguments(options, setup.run_id))
    except BaseException as error:
        is_of_node = error is runner.outcome.failure
        if is_of_node and setup.can_resume:
            if runtime.deployment.id:  # No other flow run can be retried by a user.
                logger.info("Retry this flow run, and it goes on where it failed.")
        elif isinstance(error, Exception) and (hint := _other_environment(options)):
            logger.info(hint)
        if is_of_node and (storable := _storable(error)) is not error:
            raise storable from None
        raise
    if setup.checkpoints:
        setup.checkpoints.remove(logger)
    return cast("dict[str, str]", runner.outcome.outputs)


def _run_pipeline(options: Options) -> dict[str, str]:
    """Do what `kedro run` does, and return where each output lives."""
    get_run_logger().info("Initializing Kedro...")
    _keep_generator()
    _free_forks()
    # When another flow calls this one, the current folder is that flow's.
    if cast("Any", FlowRunContext.get()).flow_run.deployment_id:
        os.chdir(PROJECT_PATH)
    with ExitStack() as loading:
        loading.enter_context(_loading)
        return _run_session(options, loading)


# Kedro sets up logging again for each package. Where other flow runs of this process log meanwhile,
# that can deadlock with Prefect's log handler: at import, none is running yet.
if hasattr(kedro_project.LOGGING, "set_project_logging"):  # Kedro 0.18.10 does not.
    kedro_project.LOGGING.set_project_logging(_flow_name())


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
    options = {
        "pipeline_name": pipeline_name, "env": env, "runtime_params": runtime_params, "tags": tags,
        "node_names": node_names, "from_nodes": from_nodes, "to_nodes": to_nodes,
        "from_inputs": from_inputs, "to_outputs": to_outputs, "namespaces": namespaces,
        "load_versions": load_versions, "only_missing_outputs": only_missing_outputs,
        "conf_source": conf_source, "checkpoints": checkpoints,
    }  # fmt: skip
    return _run_pipeline(options)


# ---- Registering: checks, plan, deployment ----


def _reach_server() -> None:
    """Refuse to register on a server that does not answer, or on none."""

    async def ask() -> None:
        async with get_client() as client:
            try:
                await client.read_flows(limit=1)
            except ValueError as error:
                raise OSError("what answers is no Prefect API, whose URL ends in /api") from error

    command = "prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api"
    remedy = f"Start one with `prefect server start`, and name it with `{command}`."
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
        create = f" Create it: prefect work-pool create --type {_POOL_TYPE} {quoted}"
        raise _unknown(problem, name, pools, "work pools", create) from None
    if _PREFECT_3 and pool.type == "prefect-agent":
        problem = f"Work pool '{name}' is for agents, which Prefect 3 does not have. Create one for"
        raise ClickException(f"{problem} workers: prefect work-pool create --type process <name>")
    queues = [each.name for each in await client.read_work_queues(work_pool_name=name)]
    if queue_name not in queues:
        problem = f"Work pool '{name}' has no queue '{queue_name}'."
        create = f" Create it: prefect work-queue create --pool {quoted} {quoted_queue}"
        raise _unknown(problem, queue_name, queues, "queues", create)
    if pool.is_paused:
        resume = f"prefect work-pool resume {quoted}"
        click.echo(f"Warning: work pool '{name}' is paused. Runs start after: {resume}")
    return pool


def _without_defaults(options: Options, given: dict[str, Any]) -> Options:
    """Return the options of a run that somebody has chosen, and always the pipeline's name."""
    chosen = {name: value for name, value in options.items() if value and name != "env"}
    environment = {"env": options["env"]} if "env" in given else {}
    return {"pipeline_name": options["pipeline_name"]} | environment | chosen


async def _look_up(full_name: str, given: dict[str, Any]) -> tuple[Any, Any, dict[str, str]]:
    """Return a deployment, if it is there, its work pool, and the fields that name both."""
    existing: Any = None
    async with get_client() as client:
        with suppress(ObjectNotFound):
            existing = await client.read_deployment_by_name(full_name)
        old_pool = getattr(existing, "work_pool_name", None)
        pool_name = given.get("work_pool_name", old_pool or "default")
        old_queue = existing.work_queue_name if old_pool == pool_name else None
        queue_name = given.get("work_queue_name", old_queue or "default")
        pool = await _read_work_pool(client, pool_name, queue_name)
    return existing, pool, {"work_pool_name": pool_name, "work_queue_name": queue_name}


def _job_variables(existing: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return a deployment's job variables, with the logging level; Prefect 2.19 renamed them."""
    old = getattr(existing, "job_variables", getattr(existing, "infra_overrides", None)) or {}
    env = {"PREFECT_LOGGING_LEVEL": "DEBUG"} | old.get("env", {})
    if "logging_level" in given:
        env["PREFECT_LOGGING_LEVEL"] = given["logging_level"]
    return {**old, "env": env}


def _deployment_fields(
    pipeline: Pipeline, options: Options, given: dict[str, Any], existing: Any
) -> dict[str, Any]:
    """Return what the command line says of a deployment; schedules, tags and others stay."""
    parameters = _without_defaults(options, given)
    directory = {"directory": str(PROJECT_PATH)}
    fields: dict[str, Any] = {
        "parameters": parameters,
        "entrypoint": f"{THIS_FILE.name}:my_flow",
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": directory}],
        "job_variables": _job_variables(existing, given),
        "description": getattr(existing, "description", None),
    }
    if "version" in given or not existing:
        fields["version"] = given.get("version", "1.0")
    if not fields["description"] or _MARKER in fields["description"]:
        fields["description"] = _describe_deployment(pipeline, parameters)
    return fields


def _print_plan(project: _CheckedProject, config: _Config, options: Options) -> None:
    """Print the execution layers, where each dataset lives, and what prefect.yml sets."""
    shown = _without_secrets(_without_defaults(options, {}))
    name, layers = shown.pop("pipeline_name"), project.pipeline.grouped_nodes
    title = f"Pipeline '{name}' of {my_flow.name}, environment '{_environment(options)}'"
    lines = [f"{title}: {len(project.pipeline.nodes)} nodes in {len(layers)} layers"]
    lines += [f"  {name}: {value}" for name, value in shown.items()]
    for number, layer in enumerate(layers, start=1):
        lines.append(f"Layer {number}")
        for node in layer:
            task_options = _task_options(node, config.tasks) or ""
            reads, writes = (", ".join(names) or "nothing" for names in (node.inputs, node.outputs))
            lines.append(f"  {node.name}: {reads} -> {writes} {task_options}".rstrip())
    lines.append("Datasets")
    lines += [f"  {name}: {_location(name, found)}" for name, found in project.datasets.items()]
    for name, value in config.task_runner.items():
        # Other keys are those of Dask, and may hold anything.
        is_own = name in {*_SHAPE["task_runner"], "address"}
        lines.append(f"task_runner.{name}: {value if is_own else '(set)'}")
    click.echo(_without_password("\n".join(lines)))


def _check_registration(name: str, given: dict[str, Any]) -> Any:
    """Return what `_look_up` returns, or refuse what would keep the deployment from running."""
    full_name = f"{my_flow.name}/{name}"
    _reach_server()
    with _server_errors(f"Deployment '{full_name}' is not registered"):
        return _call_api(_look_up(full_name, given), SERVER_TIMEOUT)


def _register(name: str, pipeline: Pipeline, options: Options, given: dict[str, Any]) -> None:
    """Create a deployment, or update what the command line says of it; print what comes next."""
    full_name = f"{my_flow.name}/{name}"
    existing, pool, pool_fields = _check_registration(name, given)
    fields = _deployment_fields(pipeline, options, given, existing) | pool_fields
    is_for_agent = pool.type == "prefect-agent"
    save = _save_deployment(my_flow, name, fields, existing, is_for_agent)
    with _server_errors(f"Deployment '{full_name}' is not registered"):
        deployment_id = _call_api(save, 6 * SERVER_TIMEOUT)  # Its database may be busy.
    kind, ui = "agent" if is_for_agent else "worker", (PREFECT_UI_URL.value() or "").rstrip("/")
    pool_name = shlex.quote(pool_fields["work_pool_name"])
    queue_name = shlex.quote(pool_fields["work_queue_name"])
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
        yield lambda: None  # That of Prefect 2 is no process of its own.
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

    has_server = bool(PREFECT_API_URL.value())  # Without, Prefect starts its embedded one.
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
            with suppress(Exception):  # A node may have set what keeps it from being asked.
                _call_api(_read_task_runs(flow_run_id, expected, patience=10 if state else 2))
    if state is None:
        click.echo("Stopped by Ctrl-C.", err=True)
        sys.exit(130)
    if not state.is_completed():
        raise ClickException(f"The flow run ended as {state.name}. {state.message or ''}")
    outputs = state.result() if state.data else {}  # A slow server sends none.
    lines = [f"  {name}: {location}" for name, location in outputs.items()]
    with suppress(ValueError, OSError):  # A node may have closed the output.
        click.echo("\n".join(["The flow run has completed. Its outputs:", *lines]))


# Flow parameter; spelling and parser of `kedro run`; form; meaning. A new one is a parameter of
# my_flow, too, and if Kedro's session takes it, it stands in _run_arguments.
_KEDRO_RUN_OPTIONS = (
    ("runtime_params", "--params", split_params, "K=V,...", "Override parameters."),
    ("tags", "-t --tags", split_string, "TAG,...", "Only nodes with one of these tags."),
    ("node_names", "-n --nodes", split_node_names, "NODE,...", "Only these nodes."),
    ("from_nodes", "--from-nodes", split_node_names, "NODE,...", "Only from these on."),
    ("to_nodes", "--to-nodes", split_node_names, "NODE,...", "Only up to these."),
    ("from_inputs", "--from-inputs", split_string, "DATA,...", "Only what needs these."),
    ("to_outputs", "--to-outputs", split_string, "DATA,...", "Only what these need."),
    ("namespaces", "-ns --namespaces --namespace", split_node_names, "NAME,...", "Only these."),
    ("load_versions", "-lv --load-versions", split_load_versions, "DATA:VERSION", "Versions."),
    ("conf_source", "--conf-source", None, "PATH", "Configuration in another place than conf."),
    ("checkpoints", "--checkpoints", None, "URL", "Where nodes hand on data."),
)  # fmt: skip


def _parse_as_kedro(parse: Any, context: click.Context, option: Any, value: Any) -> Any:
    try:
        return parse(context, option, value) if parse else value
    except Exception as error:  # Kedro's prints itself without its message.
        raise click.BadParameter(getattr(error, "message", str(error))) from None


def _kedro_run_options(command: Any) -> Any:
    """Add the options of `kedro run` that become flow parameters."""
    for name, spelling, parse, form, meaning in reversed(_KEDRO_RUN_OPTIONS):
        arguments: Any = {"callback": functools.partial(_parse_as_kedro, parse), "default": ""}
        arguments |= {"metavar": form, "help": meaning, "show_default": False}
        command = click.option(name, *spelling.split(), **arguments)(command)
    return command


def _check_usage(given: dict[str, Any], deployment_name: str) -> None:
    """Refuse what Prefect would refuse, and options that would do nothing."""
    if not deployment_name or re.search(r"[/%&<>]", deployment_name):
        problem = f"Prefect refuses deployment name '{deployment_name}': it is empty, or has one of"
        raise ClickException(f"{problem} / % & < >. Choose another --deployment_name.")
    unused = given.keys() & {"work_pool_name", "work_queue_name", "logging_level"}
    for option in unused if "run" in given else ():
        hint = " Set PREFECT_LOGGING_LEVEL instead." if option == "logging_level" else ""
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
        _bootstrap()
    _check_telemetry()
    _check_environment(options)
    config = _read_config(_open_session(options), options)
    if run and not dry_run:
        return _run_now(options)  # A run loads the project itself, and calls its hooks once.
    project = _check_project(options)
    _check_task_names(config.tasks)
    for note in project.notes:
        click.echo(f"Note: {note}")
    if not dry_run:
        return _register(deployment_name, project.pipeline, options, given)
    _print_plan(project, config, options)
    if not run:
        _check_registration(deployment_name, given)
    return None


if __name__ == "__main__":
    prefect_deploy()
