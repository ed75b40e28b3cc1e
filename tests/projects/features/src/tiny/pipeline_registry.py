"""A pipeline for each feature of Kedro."""

from kedro.pipeline import node, pipeline
from tiny import features_nodes, nodes


def register_pipelines():
    sums = pipeline(
        [
            node(nodes.double, "numbers", "doubled", name="double", tags="light"),
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
    offset = pipeline(
        [
            node(features_nodes.offset, ["numbers", "params:offset"], "shifted", name="shift"),
            node(nodes.double, "shifted", "result", name="double"),
        ]
    )
    spaces = pipeline(offset, inputs="numbers", namespace="left") + pipeline(
        offset, inputs="numbers", namespace="right.inner"
    )
    return {
        "__default__": sums,
        "transcoding": pipeline(
            [
                node(features_nodes.to_list, "numbers", "shared@list", name="to_list"),
                node(features_nodes.to_text, "shared@text", "transcoded", name="to_text"),
            ]
        ),
        "partitions": pipeline(
            [
                node(features_nodes.split, "numbers", "parts", name="split"),
                node(features_nodes.gather, "parts", "parts_sum", name="gather"),
            ]
        ),
        "incremental": pipeline(
            [
                node(
                    features_nodes.read_news,
                    "incoming",
                    "news",
                    name="read_news",
                    confirms="incoming",
                ),
            ]
        ),
        "generator": pipeline(
            [
                node(features_nodes.yield_chunks, "numbers", "chunks", name="yield_chunks"),
                node(features_nodes.count_chunks, "chunks", "news", name="count_chunks"),
            ]
        ),
        "threads": pipeline(
            [
                node(
                    features_nodes.thread_names,
                    ["thread", "other_thread"],
                    "news",
                    name="thread_names",
                ),
            ]
        ),
        "versions": pipeline(
            [
                node(features_nodes.from_report, "report", "from_report", name="from_report"),
            ]
        ),
        "spaces": spaces,
        "nested": pipeline(
            [
                node(
                    features_nodes.nest,
                    ["params:model", "params:model.kind.leaves"],
                    "nested_result",
                    name="nest",
                ),
            ]
        ),
        "copy_modes": pipeline(
            [
                node(features_nodes.make_boxes, None, ["assigned", "copied"], name="make_boxes"),
                node(
                    features_nodes.compare_boxes,
                    ["assigned", "copied"],
                    "same",
                    name="compare_boxes",
                ),
            ]
        ),
        "credentials": pipeline(
            [
                node(nodes.double, "numbers", "guarded", name="guard"),
            ]
        ),
        "hooks": pipeline(
            [
                node(features_nodes.hooked, ["added", "numbers"], "hooked_result", name="hooked"),
            ]
        ),
        "factories": pipeline(
            [
                node(nodes.double, "numbers", "first_made", name="first"),
                node(nodes.double, "first_made", "second_made", name="second"),
            ]
        ),
        "failing": pipeline([node(nodes.fail, "numbers", "nothing", name="fail")]),
    }
