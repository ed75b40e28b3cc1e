"""A pipeline for each habit, in which `kedro run` and a flow run have to write the same files."""

from kedro.pipeline import node, pipeline
from tiny import hooks_of_habits, nodes


def register_pipelines():
    copies = range(hooks_of_habits.copies)
    made = pipeline(
        [
            *(
                node(lambda _, copy=copy: copy, "numbers", f"made_{copy}", name=f"make_{copy}")
                for copy in copies
            ),
            node(
                lambda *made: sum(made),
                [f"made_{copy}" for copy in copies],
                "made_sum",
                name="sum_made",
            ),
        ]
    )
    made_of = {
        "plots": pipeline(
            [node(nodes.plot(n), None, f"plot{n}", name=f"plot{n}") for n in range(4)]
        ),
        "seeds": pipeline(
            [node(nodes.sample(n), None, f"sample{n}", name=f"sample{n}") for n in range(4)]
        ),
        "folders": pipeline(
            [node(nodes.visit(n), None, f"folder{n}", name=f"visit{n}") for n in range(4)]
        ),
        "signals": pipeline([node(nodes.alarm, None, "alarm", name="alarm")]),
        "warnings": pipeline(
            [
                node(nodes.warn, None, "warned", name="warn"),
                node(nodes.warn_not, None, "nothing", name="warn_not"),
            ]
        ),
        "asyncio": pipeline([node(nodes.run_asyncio, None, "asyncio_ran", name="run_asyncio")]),
        "flows": pipeline([node(nodes.run_flow, None, "flow_ran", name="run_flow")]),
        "variables": pipeline([node(nodes.read_variable, None, "variable", name="read_variable")]),
        "databases": pipeline(
            [
                node(nodes.fill, None, "filled", name="fill"),
                node(nodes.query, "filled", "database_ran", name="query"),
            ]
        ),
        "caches": pipeline(
            [
                node(nodes.to_cache, None, "cached", name="to_cache"),
                node(nodes.from_cache, "cached", "read_cache", name="from_cache"),
            ]
        ),
        "lazy": pipeline(
            [
                node(nodes.make_parts, "numbers", "lazy_parts", name="make_parts"),
                node(nodes.sum_parts, "lazy_parts", "sum_parts", name="sum_parts"),
            ]
        ),
        "incremental": pipeline(
            [
                node(nodes.read_news, "incoming", "news", name="read_news", confirms="incoming"),
            ]
        ),
        "tables": pipeline(
            [
                node(nodes.to_table, "numbers", "table", name="to_table"),
                node(nodes.from_table, "table", "table_sum", name="from_table"),
            ]
        ),
        "generators": pipeline(
            [
                node(nodes.yield_lines, "numbers", "lines", name="yield_lines"),
                node(len, "lines", "line_count", name="count_lines"),
            ]
        ),
        "hooks": pipeline([node(nodes.replaced, "numbers", "hooked", name="replaced")]),
        "lambdas": pipeline(
            [
                node(
                    lambda numbers: [n * 2 for n in numbers], "numbers", "äöü.doppelt", name="zähle"
                ),
                node(lambda doubled: len(doubled), "äöü.doppelt", "äöü.größe", name="größe.messen"),
            ]
        ),
        "keys": pipeline(
            [
                node(
                    nodes.keyed,
                    ["params:prefixes", "params:weights", "params:chosen"],
                    "keyed",
                    name="keyed",
                ),
            ]
        ),
        "copies": made,
        "versions": pipeline(
            [
                node(nodes.write_middle, "numbers", "middle", name="write_middle"),
                node(nodes.someone_else_writes, "middle", "written", name="someone_else_writes"),
                node(nodes.read_middle, ["middle", "written"], "own_version", name="read_middle"),
            ]
        ),
        "trips": pipeline(
            [
                node(nodes.train, "numbers", ["model", "scores"], name="train"),
                node(nodes.yield_and_fail, "numbers", "first_chunk", name="yield_and_fail"),
                node(nodes.tell, "numbers", "told", name="tell"),
            ]
        ),
        "late": pipeline(
            [
                node(nodes.to_name, None, "named", name="to_name"),
                node(nodes.use_late, "params:late", "keyed", name="use_late"),
                node(nodes.fail_once, ["named", "keyed"], "hooked", name="fail_once"),
            ]
        ),
        "rests": pipeline(
            [
                node(nodes.rest(60), None, "rested", name="rest"),
                node(lambda _: nodes.note("after"), "rested", None, name="after"),
            ]
        ),
        "brought": pipeline(
            [
                node(lambda reason: [reason], "params:reason", "of_day", name="bring"),
            ]
        ),
        "handed on": pipeline(
            [
                node(sum, "late_in", "late_sum", name="sum_late"),
                node(lambda late: late, "params:late", "late_text", name="late_text"),
            ]
        ),
        "names": pipeline(
            [
                node(nodes.to_name, None, "named", name="to_name"),
                node(nodes.from_name, "named", "read_named", name="from_name"),
            ]
        ),
    }
    return {"__default__": made_of["lambdas"], **made_of}
