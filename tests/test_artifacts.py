"""What Prefect's UI shows of a pipeline and its datasets: drawing, description, previews."""

import base64
import json
import re
import socket
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from conftest import Server, register
from engines import Proxy
from kedro.pipeline import node, pipeline

import register_prefect_flow as script

SVG = "{http://www.w3.org/2000/svg}"


def keep(*data: Any) -> Any:
    return data


def picture(text: str) -> ET.Element:
    """Take a picture out of Markdown."""
    data = re.search(r"!\[the pipeline\]\(data:image/svg\+xml;base64,([^)]+)\)", text)[1]
    return ET.fromstring(base64.b64decode(data))


def boxes(drawn: ET.Element) -> dict[str, tuple[float, float]]:
    """Where each node is drawn."""
    found = {}
    for group in drawn.iter(f"{SVG}g"):
        if (title := group.find(f"{SVG}title")) is not None:
            box = group.find(f"{SVG}rect").attrib
            found[title.text] = float(box["x"]), float(box["y"])
    return found


def test_a_pipeline_is_drawn_from_left_to_right() -> None:
    long = "n" * 60
    drawn = picture(
        script._picture(
            pipeline([
                node(keep, "a", "b", name="first"),
                node(keep, "b", "c", name=long),
                node(keep, "b", "d"),
                node(keep, ["c", "d"], "e", name="last"),
            ])
        )
    )  # fmt: skip
    places = boxes(drawn)
    unnamed = next(name for name in places if name.startswith("keep"))
    assert places["first"][0] < places[long][0] == places[unnamed][0] < places["last"][0]
    assert places[long][1] != places[unnamed][1]
    assert len(drawn.find(f"{SVG}path").attrib["d"].split("M")) - 1 == 4
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert max(map(len, texts)) < 30
    right = max(x for x, _ in places.values())
    assert right + 7 * len("last") <= float(drawn.attrib["width"])


def test_a_large_pipeline_is_not_drawn() -> None:
    nodes = [node(keep, "in", f"out{i}", name=f"n{i}") for i in range(301)]
    assert script._picture(pipeline(nodes)) == "301 nodes, which are too many to draw."
    assert len(boxes(picture(script._picture(pipeline(nodes[:300]))))) == 300


def test_keys_of_artifacts_are_valid_and_no_two_are_the_same() -> None:
    names = [
        "metrics",
        "Metrics",
        "me_trics",
        "me-trics",
        "me.trics",
        "run",
        "ü",
        "_",
        "x" * 300,
    ]
    keys = [script._artifact_key(name) for name in names]
    assert len({*keys}) == len(names)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*", key) for key in keys)
    assert keys[0].endswith("-metrics")
    assert keys == [script._artifact_key(name) for name in names]


NODES = """
import time
from pathlib import Path

import pandas as pd


def table(numbers):
    return pd.DataFrame({"name | x": ["<b>one</b>", "two"], "value": [1, 2]})


def large(numbers):
    return pd.DataFrame({"text": ["x" * 2_000_000]})


def gone(numbers):
    return pd.DataFrame({"a": [1]})


def wait(numbers):
    time.sleep(4)
    return 1


def fails(first, second):
    raise ValueError("no ``` such\\n# thing")
"""
CATALOG = """
table: {type: pandas.CSVDataset, filepath: data/table.csv, save_args: {index: false},
        metadata: {prefect: {preview: true, preview_args: {nrows: 1}}}}
large: {type: pandas.CSVDataset, filepath: data/large.csv, metadata: {prefect: {preview: true}}}
gone: {type: pandas.CSVDataset, filepath: data/gone.csv,
       metadata: {prefect: {preview: true, preview_args: {no_such: 1}}}}
quiet: {type: pandas.CSVDataset, filepath: data/quiet.csv, metadata: {prefect: {preview: false}}}
"""
PIPELINE = """from kedro.pipeline import node, pipeline

from tiny.own import *


def register_pipelines():
    return {"__default__": pipeline([
        node(table, "numbers", "table", name="table"),
        node(large, "numbers", "large", name="large"),
        node(gone, "numbers", "gone", name="gone"),
        node(table, "numbers", "quiet", name="quiet"),
        node(wait, "numbers", "first", name="wait"),
        node(wait, "first", "second", name="again"),
        node(fails, ["first", "second"], "end", name="fails"),
    ])}
"""


@pytest.fixture
def shown(project: Path) -> Path:
    """A project whose catalog asks for previews."""
    pytest.importorskip("pandas")
    (project / "src/tiny/own.py").write_text(NODES)
    (project / "src/tiny/pipeline_registry.py").write_text(PIPELINE)
    with (project / "conf/base/catalog.yml").open("a") as catalog:
        catalog.write(CATALOG)
    return project


@pytest.mark.outer_lanes
def test_datasets_whose_entries_ask_for_it_are_shown(shown: Path, server: Server) -> None:
    done = register(shown, server, "--run")
    assert done.returncode == 1
    output = done.stdout + done.stderr
    [flow_run] = server.post("/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    found = {
        artifact["key"]: artifact
        for artifact in server.post("/artifacts/filter", {})
        if artifact["flow_run_id"] == flow_run["id"] and artifact["key"]
    }
    assert found.keys() == {"tiny-table"}
    table = found["tiny-table"]["data"]
    assert "| name \\| x | value |\n| --- | --- |\n| &lt;b&gt;one&lt;/b&gt; | 1 |\n" in table
    assert "two" not in table
    for name, why in (("large", "more than 1000000"), ("gone", "no_such")):
        assert re.search(rf"No preview of '{name}' in Prefect: .*{why}", output)


@pytest.mark.one_lane
def test_artifacts_can_be_switched_off(project: Path, server: Server) -> None:
    (project / "conf/base/prefect.yml").write_text("artifacts: false\n")

    def keys() -> list[str]:
        return [found["key"] for found in server.post("/artifacts/filter", {}) if found["key"]]

    before = keys()
    assert register(project, server, "--run").returncode == 0
    assert keys() == before


@pytest.mark.outer_lanes
def test_the_description_has_the_drawing(project: Path, server: Server, pool: str) -> None:
    done = register(project, server, "--work_pool_name", pool)
    name = re.search(r"Registered deployment '(.+)' with id", done.stdout)[1]
    description = server.request("GET", f"/deployments/name/{name}")["description"]
    assert {"double", "scale", "add", "report"} <= boxes(picture(description)).keys()
    assert json.dumps(description).count("script") == 0


REFUSED = re.compile(b"POST /api/(artifacts|logs)/ ")


class Refusing(Proxy):
    """Hands on what a client says to the server, but no new artifact and no log lines."""

    def hand_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            to_server = target.getpeername()[1] == self.target
            while data := source.recv(65536):
                if to_server and REFUSED.search(data):
                    source.sendall(b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\n")
                    source.shutdown(socket.SHUT_RDWR)
                    break
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.one_lane
@pytest.mark.slow
def test_a_server_that_refuses_artifacts_and_log_lines_ends_no_run(
    shown: Path, server: Server
) -> None:
    proxy = Refusing(server.port)
    with closing(proxy.listener):
        url = f"http://127.0.0.1:{proxy.port}/api"
        done = register(shown, server, "--run", "--nodes", "table", env={"PREFECT_API_URL": url})
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout + done.stderr
    assert re.search("No preview of 'table' in Prefect: .*403", output)
