"""Pipelines, parameters, names and files as Hypothesis makes them: whatever Kedro accepts.

They are made first and run together, in one process: starting one takes longer than its runs.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sample_projects import write_tiny_project

# Computes from its inputs and its name, notes that it was run, and fails as its pipeline says:
# always, or once, as a flow run that is retried needs it.
FUNCTIONS = """\
import zlib
from pathlib import Path


def make(name, outputs, fails):
    def compute(*inputs):
        with open("data/ran.txt", "a") as file:
            file.write(name + "\\\\n")
        failed = Path(f"data/failed_{name}")
        if fails == "always" or (fails == "once" and not failed.exists()):
            failed.touch()
            raise RuntimeError(f"{name} fails")
        return [zlib.crc32(repr((name, index, inputs)).encode()) for index in range(outputs)]

    return compute
"""

REGISTRY = """\
import json
from pathlib import Path

from kedro.pipeline import node, pipeline
from tiny.functions import make


def register_pipelines():
    made = {}
    for name, nodes in json.loads(Path(__file__).with_name("random.json").read_text()).items():
        for fails in ("never", "always", "once"):
            made[f"{name}-{fails}"] = pipeline([
                node(
                    make(each["name"], len(each["outputs"]), fails if each["fails"] else "never"),
                    each["inputs"], each["outputs"], name=each["name"], tags=each["tags"],
                    namespace=each["namespace"],
                )
                for each in nodes
            ])
    return {"__default__": made["p0-never"], **made}
"""


def draw(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Let Hypothesis make so many examples, the same ones each time."""
    drawn: list[Any] = []

    @settings(
        max_examples=count, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def keep(example: Any) -> None:
        drawn.append(example)

    keep()
    return drawn


@st.composite
def pipelines(choose: Callable[..., Any], with_failure: bool) -> dict[str, Any]:
    """1 to 60 nodes, any DAG; what each makes is in memory, in a file, or in a versioned one."""
    count = choose(st.integers(1, 60))
    made, nodes, kinds = ["numbers"], [], {}
    for number in range(count):
        newest = st.sampled_from(made[-8:])
        inputs = choose(
            st.lists(newest | st.sampled_from(made), min_size=1, max_size=4, unique=True)
        )
        inputs += choose(st.sampled_from([[], ["params:factor"]]))
        outputs = [f"d{number}_{index}" for index in range(choose(st.integers(1, 3)))]
        made += outputs
        for name in outputs:
            kinds[name] = choose(st.sampled_from(["memory", "file", "versioned"]))
        nodes.append({
            "name": f"n{number}", "inputs": inputs, "outputs": outputs, "fails": False,
            "tags": choose(st.lists(st.sampled_from("abc"), unique=True, max_size=2)),
            "namespace": choose(st.sampled_from([None, None, "left", "right", "right.inner"])),
        })  # fmt: skip
    if with_failure:
        nodes[choose(st.integers(0, count - 1))]["fails"] = True
    return {"nodes": nodes, "kinds": kinds, "filter": choose(filters(nodes))}


def full_name(node: dict[str, Any]) -> str:
    return f"{node['namespace']}.{node['name']}" if node["namespace"] else node["name"]


def filters(nodes: list[dict[str, Any]]) -> st.SearchStrategy[list[str]]:
    names = st.sampled_from([full_name(node) for node in nodes])
    one = st.one_of(
        st.just([]),
        *(names.map(lambda name, option=option: [option, name]) for option in
          ("--from-nodes", "--to-nodes")),
        st.sampled_from("abc").map(lambda tag: ["--tags", tag]),
        st.sampled_from(["left", "right"]).map(lambda space: ["--namespaces", space]),
    )  # fmt: skip
    return st.one_of(st.just([]), one, st.tuples(one, one).map(lambda two: [*two[0], *two[1]]))


CATALOG = """\
numbers: {type: json.JSONDataset, filepath: data/numbers.json}
"{pipeline}_file_{name}": {type: json.JSONDataset, filepath: "data/{pipeline}/{name}.json"}
"{pipeline}_versioned_{name}":
  {type: json.JSONDataset, filepath: "data/{pipeline}/{name}.json", versioned: true}
"""


def write_random_project(path: Path, examples: list[dict[str, Any]]) -> Path:
    """Write a project with these pipelines: p0-never, p0-always, p0-once, p1-never ..."""
    write_tiny_project(path)
    registry = {
        f"p{number}": [
            node | {
                side: [f"p{number}_{kinds[name]}_{name}" if name in kinds else name for name in node[side]]
                for side in ("inputs", "outputs")
            }
            for node in example["nodes"]
        ]
        for number, example in enumerate(examples) for kinds in [example["kinds"]]
    }  # fmt: skip
    (path / "conf/base/catalog.yml").write_text(CATALOG)
    source = path / "src/tiny"
    (source / "random.json").write_text(json.dumps(registry))
    (source / "functions.py").write_text(FUNCTIONS.replace("\\\\n", "\\n"))
    (source / "pipeline_registry.py").write_text(REGISTRY)
    return path


# ---- What is read: prefect.yml, parameters and names ----

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
KNOWN = st.sampled_from(
    ["deployment", "deployments", "flow", "task_runner", "checkpoints", "artifacts", "tasks",
     "retries", "type", "max_workers", "default", "double", "url", "name", "tags", "resources"]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS | st.sampled_from(["threads", "processes", "dask", "${globals:x}", "${oc.env:PATH}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KNOWN | TEXT, inner, max_size=3),
    max_leaves=8,
)
CONFIGS = st.one_of(
    st.dictionaries(KNOWN, VALUES, max_size=3).map(lambda found: yaml.safe_dump(found)),
    st.dictionaries(KNOWN | TEXT, VALUES, max_size=4).map(lambda found: yaml.safe_dump(found)),
    VALUES.map(lambda found: yaml.safe_dump(found)),
    TEXT,
)
PARAMS = st.one_of(
    st.lists(st.tuples(st.sampled_from(["factor", "model.depth", "a.b.c"]) | TEXT, TEXT), max_size=3)
    .map(lambda pairs: ",".join(f"{key}={value}" for key, value in pairs)),
    TEXT,
)  # fmt: skip
INPUTS = st.one_of(
    CONFIGS.map(lambda text: [text, []]),
    PARAMS.map(lambda text: ["", ["--params", text]]),
    TEXT.map(lambda text: ["", ["--deployment_name", text]]),
    TEXT.map(lambda text: ["", ["--pipeline", text]]),
    TEXT.map(lambda text: ["", ["--nodes", text]]),
    TEXT.map(lambda text: ["", ["--env", text]]),
)  # fmt: skip

NAMED = """\
import json
from pathlib import Path

from kedro.pipeline import node, pipeline


def count(numbers):
    return len(numbers)


def register_pipelines():
    made = {}
    names = json.loads(Path(__file__).with_name("names.json").read_text())
    for number, (node_name, dataset, namespace) in enumerate(names):
        made[f"p{number}"] = pipeline([
            node(list, "numbers", dataset, name=node_name or None, namespace=namespace or None),
            node(count, dataset, "total", name="count"),
        ])
    return {"__default__": made["p0"], **made}
"""


def accepted_by_kedro(names: tuple[str, str, str]) -> bool:
    from kedro.pipeline import node, pipeline

    node_name, dataset, namespace = names
    try:
        made = node(list, "numbers", dataset, name=node_name or None, namespace=namespace or None)
        pipeline([made, node(len, dataset, "total", name="count")])
    except Exception:  # noqa: BLE001
        return False
    return dataset not in ("numbers", "total")


def write_named_project(path: Path, names: list[tuple[str, str, str]]) -> Path:
    """Write a project with these names of nodes, datasets in memory, and namespaces."""
    write_tiny_project(path)
    (path / "src/tiny/names.json").write_text(json.dumps(names))
    (path / "src/tiny/pipeline_registry.py").write_text(NAMED)
    return path


NAMES = st.tuples(
    st.text(max_size=10) | st.from_regex(r"[\w.-]{1,10}", fullmatch=True),
    st.text(min_size=1, max_size=12),
    st.just("") | st.from_regex(r"[a-z.]{0,6}", fullmatch=True),
)
