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
from functools import lru_cache
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import click
import kedro
import prefect

PROJECT_PATH = Path(__file__).absolute().parent
ENTRYPOINT = "register_prefect_flow.py:my_flow"
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

from kedro.framework.project import pipelines, settings
from kedro.framework.session import KedroSession
from kedro.framework.startup import ProjectMetadata, _get_project_metadata, bootstrap_project
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from kedro.runner import SequentialRunner
from prefect import Flow, Task, flow, get_client, get_run_logger, task
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

_KEDRO_1 = _version(kedro.__version__) >= (1,)
_PREFECT_3 = _version(prefect.__version__) >= (3,)

try:  # Kedro 0.19.10 put Task in the place of run_node, which 1.0 removed.
    from kedro.runner import Task as _KedroTask
except ImportError:
    from kedro.runner import run_node  # type: ignore[attr-defined,unused-ignore]

    def _run_node(
        node: Node, catalog: Any, hook_manager: Any, is_async: bool, run_id: str | None
    ) -> None:
        run_node(node, catalog, hook_manager, is_async, run_id)
else:

    def _run_node(
        node: Node, catalog: Any, hook_manager: Any, is_async: bool, run_id: str | None
    ) -> None:
        _KedroTask(node, catalog, is_async, hook_manager, run_id).execute()


def _run_session(session: Any, pipeline_name: str, runner: SequentialRunner) -> None:
    """Pass on what `kedro run` passes on, for hooks get to see it."""
    names = [] if pipeline_name == "__default__" else [pipeline_name]
    if "pipeline_names" in inspect.signature(session.run).parameters:  # Kedro 1.2
        session.run(pipeline_names=names, runner=runner, load_versions={})
    else:
        session.run(pipeline_name=next(iter(names), None), runner=runner, load_versions={})


def _get_dataset(catalog: Any, name: str) -> Any | None:
    """Return the dataset of a catalog entry or pattern; None: the runner keeps it in memory."""
    if _KEDRO_1:  # catalog.get returns None for what the catalog does not have
        return catalog.get(name)
    # Kedro 0.18.12 brought patterns, and `in` to ask for them.
    known = catalog if hasattr(catalog, "__contains__") else catalog.list()
    return catalog._get_dataset(name) if name in known else None


if _PREFECT_3:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.flows import serve
    from prefect.runner.storage import LocalStorage
    from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS
    from prefect.task_runners import ThreadPoolTaskRunner

    _SUGGESTED_POOL_TYPE = "process"
    _AGENT_POOL_TYPES: tuple[str, ...] = ()
    _CAN_SERVE = True
    # The embedded server makes its database at its first start: 12 s on a fast machine. Prefect
    # waits 20 s (3.0: 10 s).
    _RUN_SETTINGS: dict[Any, Any] = {PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 60}

    @contextmanager
    def _task_runner(max_workers: int) -> Iterator[Callable[[Any, list[Any]], Any]]:
        """Yield a function that submits a task, given the futures it waits for."""
        runner: ThreadPoolTaskRunner[None] = ThreadPoolTaskRunner(max_workers=max_workers)
        with runner:
            yield lambda task, wait_for: runner.submit(task, parameters={}, wait_for=wait_for)

    def _call_when_done(future: Any, callback: Callable[[], None]) -> None:
        future.add_done_callback(lambda _: callback())

    def _final_state(future: Any) -> Any:
        future.wait()
        return future.state

    def _make_deployment(registered_flow: Flow[..., Any], **options: Any) -> Any:
        deployment: Any = registered_flow.to_deployment(**options)
        deployment.entrypoint = ENTRYPOINT
        return deployment

    def _register(
        registered_flow: Flow[..., Any],
        job_variables: dict[str, Any],
        existing: Any,
        **options: Any,
    ) -> Any:
        deployment = _make_deployment(registered_flow, job_variables=job_variables, **options)
        deployment.storage = LocalStorage(path=str(PROJECT_PATH))
        if existing and _version(prefect.__version__) < (3, 2):  # these replace, and do not update
            deployment.paused = existing.paused
            deployment.schedules = [
                DeploymentScheduleCreate(schedule=schedule.schedule, active=schedule.active)
                for schedule in existing.schedules
            ]
        # What is not set stays as it is on the server, where users may have changed it.
        deployment.model_fields_set.difference_update({"schedules", "paused", "tags"})
        return deployment.apply()

    def _serve(registered_flow: Flow[..., Any], **options: Any) -> None:
        with suppress(KeyboardInterrupt):  # which Prefect itself does since 3.0.11
            serve(_make_deployment(registered_flow, **options))

else:
    from prefect.deployments import Deployment

    # Agents gave way to workers in Prefect 2.16.4.
    _is_agent_time = _version(prefect.__version__) < (2, 16, 4)
    _SUGGESTED_POOL_TYPE = "prefect-agent" if _is_agent_time else "process"
    _AGENT_POOL_TYPES = ("prefect-agent",)
    _CAN_SERVE = False
    _RUN_SETTINGS = {}

    @contextmanager
    def _task_runner(max_workers: int) -> Iterator[Callable[[Any, list[Any]], Any]]:
        """Yield a function that submits a task, given the futures it waits for."""
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

    def _register(
        registered_flow: Flow[..., Any],
        job_variables: dict[str, Any],
        existing: Any,
        **options: Any,
    ) -> Any:
        with warnings.catch_warnings():  # deprecated since 2.16.4, and all that knows agents
            warnings.simplefilter("ignore", DeprecationWarning)
            deployment: Any = Deployment.build_from_flow(  # type: ignore[attr-defined]
                flow=registered_flow,
                path=str(PROJECT_PATH),
                entrypoint=ENTRYPOINT,
                # Without a working directory the run gets a temporary copy of the project, and
                # its output files are gone with it.
                infra_overrides={**job_variables, "working_dir": str(PROJECT_PATH)},
                ignore_file=os.devnull,  # or else it leaves an empty .prefectignore behind
                **options,
            )
        if existing:  # the pause, which 2.20 does not load with the other existing settings
            deployment.is_schedule_active = existing.is_schedule_active
        return deployment.apply()


def _default_max_workers() -> int:
    # Prefect 2 and 3.0.0 lack this setting; unset, the thread pool would have no limit.
    setting = getattr(prefect.settings, "PREFECT_TASKS_RUNNER_THREAD_POOL_MAX_WORKERS", None)
    return (setting and setting.value()) or min(32, (os.cpu_count() or 1) + 4)


def _call_api(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a call of Prefect's client, whether or not the caller has an event loop."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(contextvars.copy_context().run, asyncio.run, coroutine).result()


# ---- Kedro: the project, and what has to be right before it can run ----


@lru_cache  # a second time would load all pipelines again
def _bootstrap(project_path: Path) -> ProjectMetadata:
    return bootstrap_project(project_path)


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
    """List the names there are, those first that are spelled like the one asked for."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{hint} The {kind} are: {', '.join(names) or 'none'}."


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


def _check_environment(env: str) -> None:
    conf = PROJECT_PATH / settings.CONF_SOURCE
    if conf.is_dir() and not (conf / env).is_dir():
        existing = [path.name for path in conf.iterdir() if path.is_dir()]
        raise click.ClickException(
            f"Environment '{env}' has no folder {conf / env}."
            + _close_matches(env, existing, "environments")
        )


def _load_pipeline(pipeline_name: str) -> Pipeline:
    with _project_errors("Loading the pipelines (pipeline_registry.py)"):
        registered: dict[str, Pipeline] = dict(pipelines)
    if pipeline_name not in registered:
        raise click.ClickException(
            f"There is no pipeline '{pipeline_name}'."
            + _close_matches(pipeline_name, registered, "pipelines")
        )
    if not registered[pipeline_name].nodes:
        raise click.ClickException(f"Pipeline '{pipeline_name}' is empty: it has no node to run.")
    return registered[pipeline_name]


def _load_datasets(pipeline: Pipeline, env: str) -> dict[str, Any | None]:
    """Make every dataset of the pipeline, as a run would; None stands for memory."""
    names = set(chain.from_iterable([*node.inputs, *node.outputs] for node in pipeline.nodes))
    with _project_errors(f"Loading the catalog and parameters of environment '{env}'"):
        session = KedroSession.create(project_path=PROJECT_PATH, env=env, save_on_close=False)
        catalog = session.load_context().catalog
        datasets = {name: _get_dataset(catalog, name) for name in sorted(names)}
    missing = sorted(name for name in pipeline.inputs() if datasets[name] is None)
    if missing:
        raise click.ClickException(
            f"No catalog entry, pattern or parameter provides pipeline input {', '.join(missing)}."
            f" Add it to {settings.CONF_SOURCE}/base or {settings.CONF_SOURCE}/{env}."
        )
    return datasets


class _Plan(NamedTuple):
    """What was checked, and is now going to be shown, run or registered."""

    package_name: str
    pipeline_name: str
    env: str
    pipeline: Pipeline
    datasets: dict[str, Any | None]

    @property
    def parameters(self) -> dict[str, str]:
        return {"pipeline_name": self.pipeline_name, "env": self.env}


def _check_project(pipeline_name: str, env: str) -> _Plan:
    with _project_errors(f"Loading {PROJECT_PATH}, where this file lies, as a Kedro project"):
        metadata = _bootstrap(PROJECT_PATH)
    _check_telemetry()
    _check_environment(env)
    pipeline = _load_pipeline(pipeline_name)
    datasets = _load_datasets(pipeline, env)
    return _Plan(metadata.package_name, pipeline_name, env, pipeline, datasets)


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


def _print_plan(plan: _Plan) -> None:
    """Print the execution layers, and where each dataset lives."""
    layers = plan.pipeline.grouped_nodes
    click.echo(
        f"Pipeline '{plan.pipeline_name}' of {plan.package_name}, environment '{plan.env}': "
        f"{len(plan.pipeline.nodes)} nodes in {len(layers)} layers"
    )
    for number, layer in enumerate(layers, start=1):
        click.echo(f"Layer {number}")
        for node in layer:
            inputs, outputs = ", ".join(node.inputs), ", ".join(node.outputs)
            click.echo(f"  {node.name}: {inputs or 'nothing'} -> {outputs or 'nothing'}")
    click.echo("Datasets")
    for name, dataset in plan.datasets.items():
        click.echo(f"  {name}: {_where(name, dataset)}")


# ---- Nodes as tasks ----


def kedro_task(node: Node, execution_config: dict[str, Any]) -> None:
    """Run one node as Kedro does: load, run, save, with its hooks."""
    _run_node(node, **execution_config)


def instantiate_task(
    node: Node, execution_config: dict[str, Any], tags: Iterable[str] = ()
) -> Task[[], None]:
    """Make the Prefect task that runs a node, under the node's name."""

    def run_node_task() -> None:
        kedro_task(node, execution_config)

    node_task = Task(
        fn=run_node_task,
        name=node.name,
        task_run_name=lambda: node.name,
        tags=set(tags),
        persist_result=False,  # data goes through the catalog: nothing to hash, keep or look up
    )
    # Prefect 2 finds the task runs of a retried flow run by this key, which has to be the node's.
    node_task.task_key = f"{__name__}.{node.name}"
    return node_task


def init_kedro_tasks_by_execution_layer(
    pipeline: Pipeline, execution_config: dict[str, Any], tags: Iterable[str] = ()
) -> list[dict[Node, Task[[], None]]]:
    """Make a task for each node, in groups of nodes that need only nodes of earlier groups.

    Args:
        pipeline: The pipeline whose nodes are to run.
        execution_config: What every node runs with: catalog, hook_manager, is_async and run_id.
        tags: The Kedro tags that become Prefect tags.

    Returns:
        One dictionary per layer, from node to task.
    """
    return [
        {node: instantiate_task(node, execution_config, node.tags & set(tags)) for node in layer}
        for layer in pipeline.grouped_nodes
    ]


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

    Raises:
        ValueError: If max_workers is less than 1.
    """

    def __init__(self, is_async: bool = False, max_workers: int | None = None) -> None:
        super().__init__(is_async=is_async)
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers is {max_workers}, and has to be 1 or more")
        self._max_workers = max_workers or _default_max_workers()

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
        layers = init_kedro_tasks_by_execution_layer(pipeline, config, tags)
        tasks = {node: node_task for layer in layers for node, node_task in layer.items()}

        done_nodes: list[Node] = []
        failed: list[Any] = []
        load_counts = Counter(chain.from_iterable(node.inputs for node in pipeline.nodes))
        kept = pipeline.inputs() | pipeline.outputs()
        for node, future in self._run_tasks(pipeline, tasks):
            if not _final_state(future).is_completed():
                failed.append(future)
                continue
            done_nodes.append(node)
            self._logger.info("Completed node: %s", node.name)
            self._logger.info("Completed %d out of %d tasks", len(done_nodes), len(tasks))
            # Release what this node was the last to need, as Kedro's own runners do.
            load_counts.subtract(node.inputs)
            for name in {*node.inputs, *node.outputs} - kept:
                if load_counts[name] < 1:
                    catalog.release(name)
        if failed:
            self._suggest_resume_scenario(pipeline, done_nodes, catalog)
            failed[0].result()  # raises: it ended first, so it is no node that waited for another
            raise RuntimeError(f"A task run ended as {_final_state(failed[0]).name}")

    def _run_tasks(
        self, pipeline: Pipeline, tasks: dict[Node, Task[[], None]]
    ) -> Iterator[tuple[Node, Any]]:
        """Submit each task when the nodes it needs have ended; yield nodes and futures as they end.

        A task behind a failed one is submitted as well: Prefect does not run it, and shows it as
        NotReady.
        """
        nodes, needed = pipeline.nodes, pipeline.node_dependencies
        position = {node: index for index, node in enumerate(nodes)}
        sorter = TopologicalSorter(needed)
        sorter.prepare()
        ready: list[int] = []  # a heap of positions: what Kedro would run first goes first
        futures: dict[Node, Any] = {}
        ended: queue.SimpleQueue[Node] = queue.SimpleQueue()
        running = 0
        with _task_runner(self._max_workers) as submit:
            while sorter.is_active():
                for node in sorter.get_ready():
                    heapq.heappush(ready, position[node])
                while ready and running < self._max_workers:
                    node = nodes[heapq.heappop(ready)]
                    wait_for = [futures[n] for n in sorted(needed[node], key=position.__getitem__)]
                    futures[node] = submit(tasks[node], wait_for)
                    _call_when_done(futures[node], lambda node=node: ended.put(node))  # type: ignore[misc]
                    running += 1
                node = ended.get()
                running -= 1
                yield node, futures[node]
                sorter.done(node)


# ---- The flow ----


@task(persist_result=False)
def kedro_init(project_path: Path, env: str) -> Any:
    """Bootstrap the project, and make the Kedro session of this flow run."""
    logger = get_run_logger()
    logger.info("Bootstrapping project")
    metadata = _bootstrap(project_path)
    session = KedroSession.create(project_path=project_path, env=env)
    logger.info("Project %s: session created with ID %s", metadata.project_name, session.session_id)
    return session


def _flow_name() -> str:
    """Name the flow after the project's package: on one server, projects must not share a flow."""
    try:
        return _get_project_metadata(PROJECT_PATH).package_name
    except (RuntimeError, ValueError):  # not in a Kedro project: prefect_deploy says so
        return "my_flow"


@flow(name=_flow_name())
def my_flow(pipeline_name: str = "__default__", env: str = "base") -> None:
    """Run a Kedro pipeline, each of its nodes as a Prefect task.

    Args:
        pipeline_name (str): The registered pipeline to run. Default: `__default__`.
        env (str): The Kedro configuration environment, a folder of `conf`. Default: `base`.
    """
    get_run_logger().info("Initializing Kedro...")
    session: Any = kedro_init(PROJECT_PATH, env)
    with session:
        _run_session(session, pipeline_name, PrefectRunner())


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


async def _find_work_pool(pool_name: str, queue_name: str, pool_type: str | None, dry: bool) -> Any:
    """Return the work pool, after checking or making it and its queue."""
    async with get_client() as client:
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


async def _find_deployment(full_name: str) -> Any | None:
    async with get_client() as client:
        try:
            return await client.read_deployment_by_name(full_name)
        except ObjectNotFound:
            return None


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
        given = context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE
        if given and (run or serve):
            raise click.UsageError(
                f"--{option} is for work pools: leave it out with --{'run' if run else 'serve'}."
                + (" Set PREFECT_LOGGING_LEVEL instead." if option == "logging_level" else "")
            )


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
    pipeline_name: str,
    env: str,
    deployment_name: str,
    work_pool_name: str,
    work_queue_name: str,
    work_pool_type: str | None,
    version: str,
    logging_level: str,
    run: bool,
    serve: bool,
    dry_run: bool,
) -> None:
    """Register a Kedro pipeline as a Prefect deployment, or run it as a flow."""
    _check_usage(context, deployment_name, run, serve)
    plan = _check_project(pipeline_name, env)
    if dry_run:
        _print_plan(plan)
    options = {"name": deployment_name, "version": version, "parameters": plan.parameters}
    if run:
        return None if dry_run else _run_now(plan)
    _reach_server()
    if serve:
        return None if dry_run else _serve(my_flow, **options)
    pool = _call_api(_find_work_pool(work_pool_name, work_queue_name, work_pool_type, dry_run))
    if dry_run:
        return None
    options |= {"work_pool_name": work_pool_name, "work_queue_name": work_queue_name}
    job_variables = {"env": {"PREFECT_LOGGING_LEVEL": logging_level}}
    full_name = f"{plan.package_name}/{deployment_name}"
    existing = _call_api(_find_deployment(full_name))
    deployment_id = _register(my_flow, job_variables, existing, **options)
    return _print_next_steps(deployment_id, full_name, pool, work_queue_name)


if __name__ == "__main__":
    os.chdir(PROJECT_PATH)  # as with `kedro run`, nodes may read and write relative to the project
    prefect_deploy()
