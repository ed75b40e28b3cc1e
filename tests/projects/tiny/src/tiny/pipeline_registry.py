"""Four nodes that work, three of which one does not, and none."""

from kedro.pipeline import node, pipeline

from tiny import nodes


def register_pipelines():
    sums = pipeline(
        [
            node(nodes.double, "numbers", "doubled", name="double"),
            node(
                nodes.scale,
                ["numbers", "params:factor", "params:pause"],
                "scaled",
                name="scale",
                tags=["heavy", "unlimited"],
            ),
            node(nodes.add, ["doubled", "scaled"], "total", name="add"),
            node(nodes.report, "total", "report", name="report"),
        ]
    )
    broken = pipeline(
        [
            node(nodes.fail, "numbers", "nothing", name="fail"),
            node(nodes.behind, "nothing", "more_nothing", name="behind"),
            node(nodes.side, "numbers", "side", name="side"),
        ]
    )
    return {"__default__": sums, "broken": broken, "empty": pipeline([])}
