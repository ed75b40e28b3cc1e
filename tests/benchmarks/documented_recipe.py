"""What the recipe in Kedro's documentation does, in words of our own and for today's versions.

Every node is a task that is called, not submitted: layer after layer, one node after the other.
See https://docs.kedro.org/en/0.18.10/deployment/prefect.html.
"""

from typing import Any

from kedro.framework.hooks.manager import _NullPluginManager
from kedro.framework.project import pipelines
from kedro.framework.session import KedroSession
from kedro.io import MemoryDataset
from kedro.runner import Task as KedroTask
from prefect import get_run_logger, task


@task
def init_kedro(project: Any, pipeline_name: str) -> dict[str, Any]:
    """Give all tasks one catalog, in which every dataset that is not there is kept in memory."""
    session = KedroSession.create(project_path=project, env="base")
    catalog = session.load_context().catalog
    for name in pipelines[pipeline_name].datasets():
        if name not in catalog:
            catalog[name] = MemoryDataset()
    return {"catalog": catalog, "run_id": session.session_id}


def make_task(node: Any, config: dict[str, Any]) -> Any:
    """Make the task of one node."""

    def run_node() -> None:
        KedroTask(
            node, config["catalog"], is_async=False, hook_manager=_NullPluginManager(),
            run_id=config["run_id"],
        ).execute()  # fmt: skip

    return task(run_node, name=node.name)


def run(project: Any, pipeline_name: str) -> None:
    """Run a pipeline; to be called in a flow."""
    logger = get_run_logger()
    config = init_kedro(project, pipeline_name)
    layers = [
        [make_task(node, config) for node in layer]
        for layer in pipelines[pipeline_name].grouped_nodes
    ]
    for layer in layers:
        logger.info("Running a layer of %d nodes", len(layer))
        for node_task in layer:
            node_task()
