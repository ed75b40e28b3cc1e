"""A hook that changes what nodes load."""

from kedro import io
from kedro.framework.hooks import hook_impl

MemoryDataset = getattr(io, "MemoryDataset", None) or io.MemoryDataSet  # Kedro 0.18.12


class Adding:
    @hook_impl
    def after_catalog_created(self, catalog):
        if hasattr(catalog, "add"):
            catalog.add("added", MemoryDataset("added by a hook"), replace=True)
        else:  # Kedro 1.0
            catalog["added"] = MemoryDataset("added by a hook")

    @hook_impl
    def before_node_run(self, node):
        return {"numbers": "replaced by a hook"} if node.name == "hooked" else None
