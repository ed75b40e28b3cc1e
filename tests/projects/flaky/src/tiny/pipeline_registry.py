"""A pipeline that fails until it is mended."""

from kedro.pipeline import node, pipeline
from tiny import nodes


def register_pipelines():
    flaky = pipeline(
        [
            node(nodes.save, "numbers", "saved", name="save"),
            node(nodes.keep, "numbers", ["kept", "kept_copy"], name="keep"),
            node(nodes.aside, "numbers", "aside", name="aside"),
            node(nodes.finish_aside, ["aside"], "side", name="finish_aside"),
            node(nodes.flaky, ["saved", "kept"], "result", name="flaky"),
            node(nodes.last, "result", "end", name="last"),
        ]
    )
    return {"__default__": flaky, "flaky": flaky}
