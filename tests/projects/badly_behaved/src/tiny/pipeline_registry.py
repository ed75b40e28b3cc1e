"""A pipeline for each badly behaved node: one node is beside it, and one behind it."""

import inspect

from kedro.pipeline import node, pipeline
from tiny import badly

HELPERS = {"beside", "behind", "count_in_a_fork", "serve"}


def register_pipelines():
    """Name each pipeline after its node."""
    found = inspect.getmembers(badly, inspect.isfunction)
    return {
        name: pipeline([
            node(function, "numbers", "bad", name=name),
            node(badly.behind, "bad", "behind", name="the_one_behind"),
            node(badly.beside, "numbers", "beside", name="the_one_beside"),
        ])
        for name, function in found
        if function.__module__ == badly.__name__ and name not in HELPERS
    }  # fmt: skip
