"""Hooks that make pipelines, parameters and inputs."""

from pathlib import Path

from kedro import io
from kedro.framework.hooks import hook_impl

MemoryDataset = getattr(io, "MemoryDataset", None) or io.MemoryDataSet  # Kedro 0.18.12
copies = 1


class Habits:
    @hook_impl
    def after_context_created(self, context):
        global copies
        given = getattr(context.config_loader, "runtime_params", None) or {}
        copies = int(given.get("copies", 1))

    @hook_impl
    def after_catalog_created(self, catalog):
        chosen = MemoryDataset({"oslo", "bergen", "tromsø"})
        if hasattr(catalog, "add"):
            catalog.add("params:chosen", chosen)
        else:  # Kedro 1.0
            catalog["params:chosen"] = chosen

    @hook_impl
    def before_pipeline_run(self, catalog):
        if hasattr(catalog, "add"):
            catalog.add("params:late", MemoryDataset("late"), replace=True)
            catalog.add("late_in", MemoryDataset([1, 2, 3]), replace=True)
        else:
            catalog["params:late"] = MemoryDataset("late")
            catalog["late_in"] = MemoryDataset([1, 2, 3])

    @hook_impl
    def after_dataset_saved(self, dataset_name):
        if dataset_name == "told" and not Path("was_told").exists():
            Path("was_told").touch()
            raise RuntimeError("after the save")

    @hook_impl
    def before_node_run(self, node):
        return {"numbers": [7, 8, 9]} if node.name == "replaced" else None
