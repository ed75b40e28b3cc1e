"""Bad input, a case a line: one message that names the value and the remedy, and no traceback."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from conftest import Server, copy_in, register, run
from forking import Forks
from in_one_process import try_inputs
from sample_projects import KEDRO, write_tiny_project

pytestmark = pytest.mark.skipif(KEDRO < (1, 7), reason="messages of Kedro differ")
NO_SERVER = {"PREFECT_API_URL": ""}
RUN = ("--dry_run", "--run")
YML = "conf/base/prefect.yml"
REGISTRY = "src/tiny/pipeline_registry.py"


class Case(NamedTuple):
    arguments: tuple[str, ...]
    files: dict[str, str | None]  # to write into the project; None: to remove
    code: int
    says: str  # a regular expression


def usage(*arguments: str, says: str) -> Case:
    return Case(arguments, {}, 2, says)


def option(*arguments: str, says: str) -> Case:
    return Case((*RUN, *arguments), {}, 1, says)


def yml(text: str, says: str, *arguments: str) -> Case:
    return Case(arguments or RUN, {YML: text}, 1, says)


def file(path: str, text: str | None, says: str) -> Case:
    # Without hooks: one that gets the catalog may put into it what is missing.
    return Case(RUN, {"src/tiny/settings.py": "", path: text}, 1, says)


def registry(body: str, says: str) -> Case:
    head = "from kedro.pipeline import node, pipeline\n\n\ndef register_pipelines():\n    "
    return file(REGISTRY, head + body + "\n", says)


CASES = [
    # Options that make no sense together, or by themselves.
    usage("--envv", "base", says="No such option '?--envv"),
    usage("--env", says="[Oo]ption '-e' requires an argument|'--env' requires an argument"),
    usage("surplus", says=r"unexpected extra argument \(surplus\)"),
    usage("--logging_level", "LOUD", says="'LOUD' is not one of 'DEBUG', 'INFO'"),
    usage("--params", "a", says="(?s)a.*(key|=|:)"),
    usage("--params", "=1", says="(?i)param"),
    usage("--load-versions", "a", says="(?s)load-versions.*dataset_name:YYYY.*found a"),
    usage("--run", "--work_pool_name", "a", says="leave it out with --run"),
    usage("--run", "--work_queue_name", "a", says="leave it out with --run"),
    usage("--run", "--logging_level", "INFO", says="Set PREFECT_LOGGING_LEVEL instead"),
    *(
        option("--deployment_name", name, says=rf"refuses deployment name '{name}'.*another")
        for name in ("", "a/b", "a%b", "a&b", "a<b", "a>b")
    ),
    # Options that name what is not there.
    option("--pipeline", "nope", says="no pipeline 'nope'.* are: .*__default__"),
    option("--pipeline", "brokn", says="Did you mean broken"),
    option("--pipeline", "__default__,nope", says="no pipeline 'nope'"),
    option("--pipeline", "", says="no pipeline ''"),
    option("--env", "nope", says="'nope' has no folder .*environments are: base, local"),
    option("--env", "lokal", says="Did you mean local"),
    option("--env", "../conf", says=r"'\.\./conf'|no folder|outside"),
    option("--conf-source", "nowhere", says="no configuration at .*nowhere"),
    option("--tags", "nope", says="by tags nope: .*no nodes"),
    option("--nodes", "nope", says=r"by node_names nope: .*\['nope'\]"),
    option("--from-nodes", "nope", says=r"from_nodes nope: .*\['nope'\]"),
    option("--to-nodes", "nope", says=r"to_nodes nope: .*\['nope'\]"),
    option("--from-inputs", "nope", says="from_inputs nope: .*nope"),
    option("--to-outputs", "nope", says="to_outputs nope: .*nope"),
    option("--namespace", "nope", says="namespaces nope: .*nope"),
    option("--nodes", "double", "--tags", "nope", says="by tags nope, node_names double: "),
    option("--load-versions", "nope:2020-01-01T00.00.00.000Z", says="nope"),
    # prefect.yml: what a run reads of it.
    yml("flow: [", "(?s)Loading prefect.yml failed.*prefect.yml"),
    yml("- a", "(?s)prefect.yml"),
    yml("flow: {retries: 1}", "retries of flow runs to PREFECT_FLOW_DEFAULT_RETRIES"),
    yml("flow: 3", "has no section flow any more"),
    yml("task_runner: threads", "task_runner is 'threads', and has to be of type dict"),
    yml("task_runner: {type: proceses}", "'proceses'. Did you mean processes"),
    yml("task_runner: {type: 3}", "task_runner.type is 3"),
    yml("task_runner: {max_workers: 0}", "max_workers is 0, and has to be 1 or more"),
    yml("task_runner: {max_workers: -2}", "max_workers is -2, and has to be 1 or more"),
    yml("task_runner: {max_workers: two}", "max_workers is 'two'"),
    yml("task_runner: {max_workers: 1.5}", "max_workers is 1.5"),
    yml("task_runner: {max_worker: 1}", "no task_runner.max_worker. Did you mean max_workers"),
    yml("task_runner: {is_async: 1}", "is_async is 1, and has to be of type bool"),
    yml("task_runner: {resume: 'no'}", "resume is 'no', and has to be of type bool"),
    yml("checkpoints: 1", "checkpoints is 1"),
    yml("checkpoints: {uri: x}", "no checkpoints.uri. Did you mean url"),
    yml("checkpoints: {url: 1}", "checkpoints.url is 1"),
    yml("artifacts: maybe", "artifacts is 'maybe', and has to be of type bool"),
    yml("artifact: true", "no artifact. Did you mean artifacts"),
    yml("tasks: [a]", r"tasks is \['a'\]"),
    yml("tasks: {double: 1}", "tasks.double is 1"),
    yml("tasks: {doubl: {retries: 1}}", "'doubl', which is no node.*Did you mean double"),
    yml("tasks: {'tag:nope': {retries: 1}}", "'tag:nope', which is no node"),
    yml("tasks: {'namespace:nope': {retries: 1}}", "'namespace:nope', which is no node"),
    yml("tasks: {double: {retry: 1}}", "no tasks.double.retry. Did you mean"),
    yml("tasks: {double: {retries: a}}", "tasks.double.retries is 'a'"),
    yml("tasks: {double: {retries: 1.5}}", "tasks.double.retries is 1.5"),
    yml("tasks: {double: {timeout_seconds: soon}}", "timeout_seconds is 'soon'"),
    yml("tasks: {double: {tags: gpu}}", "tags is 'gpu', and has to be of type list"),
    yml("tasks: {double: {log_prints: 1}}", "log_prints is 1"),
    yml("tasks: {double: {resources: {GPU: 1}}}", "resources are for Dask"),
    yml("tasks: {double: {retry_delay_seconds: x}}", "retry_delay_seconds is 'x'"),
    # prefect.yml: what belongs into Prefect's own file.
    yml("deployment: {tags: [a]}", "Prefect's own file prefect.yaml"),
    yml("deployments: [{name: a}]", "`prefect deploy --all`"),
    # Projects.
    file("pyproject.toml", None, "(?s)as a Kedro project failed.*pyproject.toml"),
    file("pyproject.toml", "[tool.kedro", "(?s)as a Kedro project failed"),
    file("pyproject.toml", "[tool.other]\n", "(?s)as a Kedro project failed"),
    file("src/tiny/settings.py", "HOOKS = (", "(?s)failed.*settings.py"),
    file("src/tiny/settings.py", "import nope\n", "(?s)failed.*nope"),
    file(REGISTRY, "import nope\n", "(?s)failed.*nope.*pipeline_registry.py, line 1"),
    file(REGISTRY, "def register_pipelines():\n    return 1 / 0\n", "(?s)ZeroDivisionError.*line 2"),
    file(REGISTRY, "", "(?s)pipeline_registry"),
    registry("return {}", "no pipeline '__default__'"),
    registry("return {'__default__': pipeline([])}", "'__default__' is empty"),
    registry("return {'__default__': pipeline([node(len, 'a', 'b'), node(len, 'b', 'a')])}",
             "(?s)failed.*[Cc]ircular"),
    registry("return {'__default__': pipeline([node(len, 'a', 'c'), node(len, 'b', 'c')])}",
             "(?s)failed.*c"),
    registry("return {'__default__': pipeline([node(len, 'nope', 'c')])}",
             "provides pipeline input nope.*entries are.*Add it to the catalog in conf"),
    registry("return {'__default__': pipeline([node(len, 'numbrs', 'c')])}",
             "provides pipeline input numbrs. Did you mean numbers"),
    file("conf/base/catalog.yml", None, "input numbers. The entries are: none. Add it"),
    file("conf/base/catalog.yml", "numbers: [", "(?s)catalog"),
    file("conf/base/catalog.yml", "numbers: {filepath: a}", "(?s)numbers.*type"),
    file("conf/base/catalog.yml", "numbers: {type: nope.Dataset}", "(?s)nope.Dataset"),
    file("conf/base/catalog.yml", "numbers: {type: json.JSONDataset}", "(?s)'filepath'.*numbers"),
    file("conf/base/catalog.yml", "numbers: {type: json.JSONDataset, filepath: a, b: 1}",
         "(?s)'b'.*numbers"),
    file("conf/base/catalog.yml",
         "numbers: {type: json.JSONDataset, filepath: a, credentials: door}", "(?s)door"),
    file("conf/base/catalog.yml", "numbers: {type: json.JSONDataset, filepath: '${oc.env:NOPE_}'}",
         "(?s)oc.env.*numbers.filepath"),
    file("conf/base/parameters.yml", "factor: [", "(?s)parameters"),
]  # fmt: skip


def assert_one_message(done: subprocess.CompletedProcess[str], code: int, says: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    assert re.search(says, done.stderr), done.stderr
    assert "Traceback" not in done.stdout + done.stderr


# They differ in options and prefect.yml only: the others need a project, and a process, of their own.
ALIKE = [case for case in CASES if case.files.keys() <= {YML}]


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What comes of those that are alike: starting a process takes longest."""
    project = copy_in(write_tiny_project(tmp_path_factory.mktemp("bad") / "project"))
    pairs = [(case.files.get(YML, ""), case.arguments) for case in ALIKE]
    found = try_inputs(project, pairs)
    return [subprocess.CompletedProcess("", code, "", printed) for code, printed in found]


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """For those that need a process of their own: to start Python takes four times as long."""
    forks = Forks(tmp_path_factory.mktemp("forks"), NO_SERVER)
    yield forks
    forks.end()


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case.says.split())[:60])
def test_it_is_one_message(
    project: Path, in_one_process: list[Any], forks: Forks, case: Case
) -> None:
    if case in ALIKE:
        done = in_one_process[ALIKE.index(case)]
    else:
        for name, text in case.files.items():
            (project / name).unlink() if text is None else (project / name).write_text(text)
        # Where Prefect is imported, its newest versions read this file as well, and if it is broken
        # fail with a traceback of their own.
        cwd = project.parent if "pyproject.toml" in case.files else project
        done = forks.run(project / "register_prefect_flow.py", *case.arguments, cwd=cwd)
    assert_one_message(done, case.code, case.says)
    assert "s3cret" not in done.stdout + done.stderr


class Answers(BaseHTTPRequestHandler):
    """A server that answers everything in the same way."""

    status, body = 500, b""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(type(self).status)
        self.send_header("Content-Length", str(len(type(self).body)))
        self.end_headers()
        self.wfile.write(type(self).body)

    do_GET = do_POST = do_PATCH = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def odd_server() -> Iterator[SimpleNamespace]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/api"
    yield SimpleNamespace(env={"PREFECT_API_URL": url})
    server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (400, b"why", "the server answered 400 Bad Request. why"),
        (401, b"", "401 Unauthorized.*Set PREFECT_API_AUTH_STRING"),
        (403, b"", "403 Forbidden.*Set PREFECT_API_AUTH_STRING"),
        (404, b"no such page", "404 Not Found"),
        (422, b"wrong", "422 Unprocessable"),
        (500, b"broken", "500 Internal Server Error.*broken"),
        (501, b"", "501 Not Implemented"),
        (200, b"<html>a web page", "what answers is no Prefect API, whose URL ends in /api"),
        (200, b"{}", "what answers is no Prefect API, whose URL ends in /api"),
        (200, b"\xff\x00", "what answers is no Prefect API, whose URL ends in /api"),
    ],
)
def test_what_a_server_answers_is_one_message(
    project: Path, odd_server: Any, status: int, body: bytes, says: str
) -> None:
    Answers.status, Answers.body = status, body
    done = register(project, odd_server, "--work_pool_name", "any")
    assert_one_message(done, 1, says)


PARAMETERS: list[tuple[dict[str, Any], str]] = [  # of a flow run, as somebody fills in the form
    (
        {"pipeline_name": "brokn"},
        "(?s)ValueError: Failed to find the pipeline named 'brokn'.*broken",
    ),
    ({"pipeline_name": ""}, "Failed to find the pipeline named ''"),
    ({"env": "lokal"}, "MissingConfigException: .*lokal"),
    ({"conf_source": "nowhere"}, "MissingConfigException: .*nowhere"),
    ({"tags": ["nope"]}, "ValueError: Pipeline contains no nodes"),
    ({"node_names": ["doubl"]}, r"ValueError: .*\['doubl'\]"),
    ({"from_nodes": ["nope"]}, r"ValueError: .*\['nope'\]"),
    ({"from_inputs": ["numbrs"]}, "ValueError: .*numbrs"),
    ({"namespaces": ["nope"]}, "ValueError: .*nope"),
    ({"load_versions": {"nope": "2020-01-01T00.00.00.000Z"}}, "nope"),
    ({"tags": "nope"}, "(?s)tags.*valid list"),
    ({"runtime_params": "factor=2"}, "(?s)runtime_params.*valid dict"),
    ({"checkpoints": "nope://x"}, "nope"),
]
TRY = """
import json, sys
from register_prefect_flow import my_flow
tried = json.loads(sys.argv[1])
print(json.dumps([str(my_flow(**each, return_state=True).message) for each in tried]))
"""


@pytest.mark.slow
def test_a_flow_run_with_wrong_parameters_fails_with_kedros_own_error(
    project: Path, server: Server
) -> None:
    tried = json.dumps([parameters for parameters, _ in PARAMETERS])
    done = run(sys.executable, "-c", TRY, tried, cwd=project, env=server.env)
    assert done.returncode == 0, done.stderr[-3000:]
    messages = json.loads(done.stdout.splitlines()[-1])
    for (parameters, says), message in zip(PARAMETERS, messages, strict=True):
        assert re.search(says, message), (parameters, message)
    assert not list(project.glob("data/*.pickle")), "nothing has been run"
