"""What is registered: deployments by name, what the server keeps, and what it refuses."""

import base64
import json
import os
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    DOCUMENTED,
    PREFECT_3,
    QUEUE,
    SCRIPT,
    Server,
    copy_in,
    eventually,
    register,
    run,
    schedules_of,
    stop,
)
from test_end_to_end import assert_kept_nowhere
from tiny_project import write_tiny_project

needs_prefect_3 = pytest.mark.skipif(not PREFECT_3, reason="Prefect 2 has none of it")


def write(project: Path, text: str) -> None:
    (project / "conf/base/prefect.yml").write_text(text)


@pytest.fixture
def registered(project: Path, server: Server, pool: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """Register, and return the deployment; at the end, forget it."""
    made: set[str] = set()

    def registered(*arguments: str, name: str = "configured", **options: Any) -> dict[str, Any]:
        pools = ("--work_pool_name", pool, "--work_queue_name", QUEUE)
        where = options.pop("project", project)
        done = register(where, server, *pools, "--deployment_name", name, *arguments, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        deployment_id = re.search(r"with id (\S+)", done.stdout)[1]
        made.add(deployment_id)
        deployment = server.request("GET", f"/deployments/{deployment_id}")
        return {**deployment, "output": done.stdout}

    yield registered
    for deployment_id in made:
        server.request("DELETE", f"/deployments/{deployment_id}")


def job_variables(deployment: dict[str, Any]) -> dict[str, Any]:
    return deployment.get("job_variables") or deployment["infra_overrides"]


def timings_of(deployment: dict[str, Any]) -> list[tuple[Any, bool]]:
    """What the schedules of a deployment say, and whether each is active."""
    names = ("cron", "interval", "rrule", "timezone")
    return [
        ({name: schedule[name] for name in names if schedule.get(name)}, active)
        for schedule, active in schedules_of(deployment)
        if schedule
    ]


NIGHTLY = {"cron": "0 2 * * *", "timezone": "Europe/Berlin"}

DEPLOYMENTS = """
deployment:
  tags: [forecasting]
  work_pool: {{name: {pool}, work_queue_name: {queue}, job_variables: {{image: "forecast:1.4", env: {{MODE: fast}}}}}}
deployments:
  - name: nightly
    version: 2
    parameters: {{tags: [heavy], runtime_params: {{factor: 4}}}}
    schedules: [{{cron: "0 2 * * *", timezone: Europe/Berlin}}]
    work_pool: {{job_variables: {{env: {{MODE: slow}}}}}}
  - name: scoring
    description: Mine.
    parameters: {{pipeline_name: broken}}
"""


def forget(server: Server, *names: str) -> None:
    for name in names:
        found = server.request("GET", f"/deployments/name/tiny/{name}")
        server.request("DELETE", f"/deployments/{found['id']}")


def test_a_deployment_is_registered_by_its_name(project: Path, server: Server, pool: str) -> None:
    write(project, DEPLOYMENTS.format(pool=pool, queue=QUEUE))
    done = register(project, server, "--deployment_name", "nightly", "--params", "other=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"--pool {pool} --work-queue {QUEUE}" in done.stdout
    nightly = server.request("GET", "/deployments/name/tiny/nightly")
    assert timings_of(nightly) == [(NIGHTLY, True)]
    assert (nightly["tags"], nightly["version"]) == (["forecasting"], "2")
    assert nightly["work_pool_name"] == pool
    assert nightly["parameters"] == {
        "pipeline_name": "__default__",
        "env": "base",
        "tags": ["heavy"],
        "runtime_params": {"factor": 4, "other": 1},
    }
    variables = job_variables(nightly)
    assert variables["image"] == "forecast:1.4"
    assert variables["env"] == {"MODE": "slow", "PREFECT_LOGGING_LEVEL": "DEBUG"}

    # What is not in the file gets nothing of what is meant for others.
    done = register(project, server, "--deployment_name", "nightli", "--version", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prefect.yml has no deployment 'nightli'" in done.stdout
    assert "Did you mean nightly? The deployments are: nightly, scoring." in done.stdout
    other = server.request("GET", "/deployments/name/tiny/nightli")
    assert (timings_of(other), other["version"]) == ([], "7")
    assert other["tags"] == ["forecasting"]
    forget(server, "nightly", "nightli")


def test_all_deployments_are_checked_before_the_first_is_registered(
    project: Path, server: Server, pool: str
) -> None:
    text = DEPLOYMENTS.format(pool=pool, queue=QUEUE)
    write(project, text.replace("pipeline_name: broken", "pipeline_name: brokn"))
    done = register(project, server, "--all_deployments")
    assert done.returncode == 1
    assert "There is no pipeline 'brokn'" in done.stderr
    assert not server.post("/deployments/filter", {"deployments": {"name": {"any_": ["nightly"]}}})

    write(project, text)
    done = register(project, server, "--all-deployments")
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [line for line in done.stdout.splitlines() if line.startswith("Registered")]
    assert [re.sub(" with id .*", "", line) for line in outcomes] == [
        "Registered deployment 'tiny/nightly'",
        "Registered deployment 'tiny/scoring'",
    ]
    scoring = server.request("GET", "/deployments/name/tiny/scoring")
    assert (timings_of(scoring), scoring["description"]) == ([], "Mine.")
    assert scoring["parameters"]["pipeline_name"] == "broken"
    forget(server, "nightly", "scoring")


TRIGGERED = """
deployments:
  - name: training
    parameters: {to_nodes: [double]}
  - name: scoring
    parameters: {pipeline_name: __default__}
    triggers:
      - expect: [prefect.flow-run.Completed]
        match_related: {prefect.resource.name: training, prefect.resource.role: deployment}
"""


@needs_prefect_3
def test_scoring_runs_when_training_has_completed(project: Path, server: Server, pool: str) -> None:
    write(project, TRIGGERED)
    pools = ("--work_pool_name", pool, "--work_queue_name", QUEUE)
    for _ in range(2):  # the second time in the place of the first
        done = register(project, server, "--all_deployments", *pools)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(server.post("/automations/filter", {})) == 1
    assert server.finished(server.start_run("tiny/training"))["state_type"] == "COMPLETED"
    scoring = server.request("GET", "/deployments/name/tiny/scoring")
    filters = {"deployments": {"id": {"any_": [scoring["id"]]}}}
    [flow_run] = eventually(lambda: server.post("/flow_runs/filter", filters))
    assert server.finished(flow_run["id"])["state_type"] == "COMPLETED"
    assert json.loads((project / "data/total.json").read_text()) == 30
    forget(server, "training", "scoring")


@pytest.mark.skipif(PREFECT_3, reason="Prefect 3 has all of it")
@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("concurrency_limit: 1", "deployment.concurrency_limit"),
        ("triggers: [{expect: [any]}]", "deployment.triggers"),
        ("schedules: [{cron: '@daily', slug: a}]", "deployment.schedules[0].slug"),
        ("schedules: [{cron: '@daily', parameters: {}}]", "deployment.schedules[0].parameters"),
    ],
)
def test_what_prefect_2_lacks_is_refused_by_name(
    project: Path, server: Server, pool: str, text: str, key: str
) -> None:
    write(project, f"deployment: {{{text}}}\n")
    done = register(project, server, "--work_pool_name", pool, "--work_queue_name", QUEUE)
    assert done.returncode == 1
    assert f"prefect.yml: {key} needs Prefect 3" in done.stderr


@pytest.mark.skipif(not DOCUMENTED, reason="Prefect 2.16 brought them")
def test_several_schedules_are_refused_where_there_is_one(project: Path) -> None:
    write(project, "deployment: {schedules: [{cron: '0 1 * * *'}, {cron: '0 2 * * *'}]}\n")
    done = register(project, None)
    assert done.returncode == 1
    assert "more than one of schedules needs Prefect 2.16" in done.stderr


def pause(server: Server, deployment: dict[str, Any]) -> None:
    path = f"/deployments/{deployment['id']}"
    server.post(f"{path}/{'pause_deployment' if PREFECT_3 else 'set_schedule_inactive'}", {})
    if "schedules" in deployment:
        for schedule in deployment["schedules"]:
            server.request("PATCH", f"{path}/schedules/{schedule['id']}", {"active": False})


def is_paused(deployment: dict[str, Any]) -> bool:
    return deployment["paused"] if PREFECT_3 else not deployment["is_schedule_active"]


def test_what_the_file_does_not_set_stays_as_it_is_on_the_server(
    project: Path, server: Server, registered: Any
) -> None:
    write(project, "deployment: {work_pool: {job_variables: {env: {MODE: fast}}}}\n")
    first = registered("--tags", "heavy", "--version", "3", "--logging_level", "INFO")
    path = f"/deployments/{first['id']}"
    variables = {"env": {**job_variables(first)["env"], "MINE": "1", "MODE": "slow"}, "image": "a"}
    changes: dict[str, Any] = {"tags": ["mine"], "description": "Written by hand."}
    schedule = {"cron": "0 6 * * *", "timezone": "UTC"}
    if "job_variables" in first:
        changes["job_variables"] = variables
        server.post(f"{path}/schedules", [{"schedule": schedule, "active": True}])
    elif "schedules" in first:
        changes["infra_overrides"] = variables
        server.post(f"{path}/schedules", [{"schedule": schedule, "active": True}])
    else:
        changes |= {"infra_overrides": variables, "schedule": schedule}
    if PREFECT_3:
        changes |= {"concurrency_limit": 2, "enforce_parameter_schema": False}
    server.request("PATCH", path, changes)
    pause(server, server.request("GET", path))

    again = registered("--pipeline", "broken")
    assert again["id"] == first["id"]
    assert again["parameters"] == {"pipeline_name": "broken", "env": "base"}, "of the registration"
    assert (again["tags"], again["version"]) == (["mine"], "3")
    assert again["description"] == "Written by hand."
    assert timings_of(again) == [(schedule, False)]
    assert is_paused(again)
    assert job_variables(again)["image"] == "a"
    env = {"MINE": "1", "MODE": "fast", "PREFECT_LOGGING_LEVEL": "INFO"}
    assert job_variables(again)["env"] == env
    if PREFECT_3:
        limit = again.get("global_concurrency_limit") or {"limit": again["concurrency_limit"]}
        assert limit["limit"] == 2
        assert again["enforce_parameter_schema"] is False

    # What the file and the command line set wins.
    write(
        project,
        "deployment: {tags: [ours], description: Ours., paused: false, schedules: [{interval: 3600}]}",
    )
    last = registered("--logging_level", "WARNING", "--version", "4")
    assert (last["tags"], last["version"], last["description"]) == (["ours"], "4", "Ours.")
    [(timing, active)] = timings_of(last)
    assert (timing["interval"], active, is_paused(last)) == (3600, True, False)
    assert job_variables(last)["env"] == {**env, "PREFECT_LOGGING_LEVEL": "WARNING"}
    # An interval that counts from its registration must not start anew with each.
    pause(server, last)
    write(project, "deployment: {schedules: [{interval: 3600}]}")
    assert timings_of(registered()) == [(timing, False)]
    assert schedules_of(registered())[0][0] == schedules_of(last)[0][0]
    # Another one replaces it; a schedule that says so is not active.
    write(project, "deployment: {schedules: [{rrule: FREQ=DAILY, active: false}]}")
    [(timing, active)] = timings_of(registered())
    assert timing["rrule"].endswith("FREQ=DAILY")
    assert active is False


def test_a_description_of_ours_is_replaced_and_an_edited_one_is_not(
    server: Server, registered: Any
) -> None:
    first = registered("--params", "token=secret")
    assert "secret" not in first["description"]
    assert "- runtime_params: \\['token'\\]" in first["description"]
    second = registered("--tags", "heavy")
    assert second["description"] != first["description"]
    edited = "Read this first.\n" + second["description"]
    server.request("PATCH", f"/deployments/{first['id']}", {"description": edited})
    assert registered()["description"] == edited


@needs_prefect_3
def test_a_limit_may_have_a_strategy(project: Path, registered: Any) -> None:
    write(project, "deployment: {concurrency_limit: {limit: 1, collision_strategy: CANCEL_NEW}}\n")
    for _ in range(2):
        deployment = registered()
        limit = deployment.get("global_concurrency_limit")
        assert (limit or {"limit": deployment["concurrency_limit"]})["limit"] == 1
        assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


def test_another_copy_of_the_project_that_takes_over_says_so(
    project: Path, tmp_path: Path, registered: Any
) -> None:
    assert "until now" not in registered()["output"]
    assert "until now" not in registered()["output"]
    other = copy_in(write_tiny_project(tmp_path / "other"))
    output = registered(project=other)["output"]
    assert f"until now it ran in {project}, from now on in {other}" in output


def git(project: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=tiny", "-c", "user.email=tiny@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=project, check=True)


def commit(project: Path) -> Path:
    """Tag the project as v1, and return where its runs write the total: to no clone."""
    total = project.parent / "outputs/total.json"
    catalog = project / "conf/base/catalog.yml"
    catalog.write_text(catalog.read_text().replace("data/total.json", str(total)))
    git(project, "init", "--quiet", "--initial-branch", "main")
    git(project, "add", ".")
    git(project, "commit", "--quiet", "--message", "as it is to run")
    git(project, "tag", "v1")
    return total


def test_the_project_may_come_from_git_or_lie_elsewhere_on_the_worker(
    tmp_path: Path, project: Path, server: Server, registered: Any
) -> None:
    total = commit(project)
    (project / "conf/base/parameters.yml").write_text("factor: 100\npause: 0\n")
    git(project, "commit", "--quiet", "--all", "--message", "newer")
    write(project, f"deployment: {{source: 'git+file://{project}@v1'}}\n")
    registered()
    flow_run = server.finished(server.start_run("tiny/configured"))
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]["message"]
    assert json.loads(total.read_text()) == 30, "of the tag, not of the newest"

    image = copy_in(write_tiny_project(tmp_path / "image"))
    write(project, f"deployment: {{path: {image}}}\n")
    assert f"from now on in {image}" in registered()["output"]
    flow_run = server.finished(server.start_run("tiny/configured"))
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]["message"]
    assert json.loads((image / "data/total.json").read_text()) == 30
    assert not (project / "data/total.json").exists()


@contextmanager
def private_repository(folder: Path, token: str, certificate: Path) -> Iterator[str]:
    """Serve a repository by git's own HTTP server, over TLS, to those who have the token."""
    git(folder, "clone", "--quiet", "--bare", ".", str(folder.parent / f"bare/{folder.name}.git"))
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", f"{certificate}.key", "-out", certificate]
    subprocess.run([*new, *names, *files], check=True, capture_output=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization", "").removeprefix("Basic ")
            if token not in base64.b64decode(given).decode():
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="git"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            path, _, query = self.path.partition("?")
            length = int(self.headers.get("Content-Length", 0))
            done = subprocess.run(
                ["git", "http-backend"],
                input=self.rfile.read(length),
                capture_output=True,
                env={
                    **os.environ,
                    "GIT_PROJECT_ROOT": str(folder.parent),
                    "GIT_HTTP_EXPORT_ALL": "1",
                    "PATH_INFO": path,
                    "QUERY_STRING": query,
                    "REQUEST_METHOD": self.command,
                    "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                    "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                    "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                },
            )
            head, _, body = done.stdout.partition(b"\r\n\r\n")
            self.send_response(200)
            for line in head.decode().splitlines():
                self.send_header(*line.split(": ", 1))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, f"{certificate}.key")
        http.socket = context.wrap_socket(http.socket, server_side=True)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{http.server_port}/bare/{folder.name}.git"
        http.shutdown()


TOKEN = "t0k3n-of-a-block"


def save_secret(server: Server, name: str, value: str) -> None:
    code = (
        f"from prefect.blocks.system import Secret; Secret(value={value!r}).save({name!r}, "
        "overwrite=True)"
    )
    done = run(sys.executable, "-c", code, cwd=SCRIPT.parent, env=server.env)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_private_repository_is_cloned_with_a_token_from_a_block(
    tmp_path: Path, project: Path, server: Server, registered: Any
) -> None:
    total = commit(project)
    save_secret(server, "git-token", f"me:{TOKEN}")  # as git servers want it
    certificate = tmp_path / "certificate.pem"

    def describe(block: str) -> None:
        token = f"{{{{ prefect.blocks.secret.{block} }}}}"
        source = {"repository": url, "branch": "v1", "access_token": token}
        variables = {"env": {"GIT_SSL_CAINFO": str(certificate)}}
        deployment = {"source": source, "work_pool": {"job_variables": variables}}
        write(project, json.dumps({"deployment": deployment}))

    with private_repository(project, TOKEN, certificate) as url:
        describe("git-tokn")
        pools = ("--work_pool_name", "pool", "--work_queue_name", QUEUE)
        done = register(project, server, *pools, "--deployment_name", "configured")
        assert done.returncode == 1
        assert "deployment.source needs a block that is not there" in done.stderr
        assert "git-tokn" in done.stderr
        assert "Traceback" not in done.stderr

        describe("git-token")
        assert TOKEN not in json.dumps(registered())
        flow_run = server.finished(server.start_run("tiny/configured"))
        log = (server.folder / f"{'agent' if DOCUMENTED else 'worker'}.log").read_text()
        assert flow_run["state_type"] == "COMPLETED", log[-3000:]
        assert json.loads(total.read_text()) == 30
        assert TOKEN not in log
        assert_kept_nowhere(server, [TOKEN])


def test_what_stands_before_the_at_of_a_url_is_not_printed(
    project: Path, server: Server, registered: Any
) -> None:
    token = "t0k3n-in-a-url"
    url = f"https://user:{token}@example.org/forecast.git"
    write(project, f"deployment: {{source: 'git+{url}@v1'}}\n")
    outputs = [register(project, server, "--run", "--dry_run", "--deployment_name", "a").stdout]
    assert "https://***@example.org/forecast.git@v1" in outputs[0]
    outputs.append(registered()["output"])
    write(project, "")
    outputs.append(registered()["output"])
    assert "until now it ran in https://***@example.org/forecast.git" in outputs[-1]
    write(project, f"deployment: {{source: '{url}'}}\n")
    outputs.append(register(project, server, "--work_pool_name", "pool").stderr)
    assert "and not git+URL@ref" in outputs[-1]
    assert not any(token in output for output in outputs)


@needs_prefect_3
def test_serve_says_what_of_the_file_it_does_not_use(project: Path, server: Server) -> None:
    write(project, f"deployment: {{path: {project}, work_pool: {{name: any}}, tags: [served]}}\n")
    done = register(project, server, "--serve", "--dry_run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Note: --serve runs in this process and folder, without path, work_pool." in done.stdout


def test_the_work_pools_own_schema_is_the_servers_business(
    project: Path, server: Server, pool: str
) -> None:
    if DOCUMENTED:
        pytest.skip("pools for agents have no schema")
    write(project, "deployment: {work_pool: {job_variables: {stream_output: [no, bool]}}}\n")
    names = ("--work_pool_name", pool, "--work_queue_name", QUEUE)
    done = register(project, server, *names, "--deployment_name", "refused")
    assert done.returncode == 1
    assert (
        "Error: Deployment 'tiny/refused' is not registered: the server answered 4" in done.stderr
    )
    assert "Traceback" not in done.stderr


@contextmanager
def proxy(server: Server, requests: int) -> Iterator[str]:
    """Let some requests through to the server, and close all connections after them."""
    left = [requests]
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with lock:
                left[0] -= 1
                if left[0] < 0:
                    self.connection.close()
                    return
            connection = HTTPConnection("127.0.0.1", server.port)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {k: v for k, v in self.headers.items() if k != "Accept-Encoding"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"] or "text/plain")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PATCH = do_DELETE = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/api"
        http.shutdown()


@pytest.mark.parametrize("requests", [0, 2, 5])
def test_a_connection_that_is_lost_half_way_is_one_message(
    project: Path, server: Server, pool: str, requests: int
) -> None:
    with proxy(server, requests) as url:
        env = {"PREFECT_API_URL": url, "PREFECT_CLIENT_MAX_RETRIES": "0"}
        names = ("--work_pool_name", pool, "--work_queue_name", QUEUE)
        arguments = (*names, "--deployment_name", "lost")
        done = register(project, None, *arguments, env=env)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert re.search("Error: (No Prefect server at|Nothing is registered|Deployment)", done.stderr)


@needs_prefect_3
def test_a_wrong_password_is_one_message(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "admin:right")
    guarded = Server(tmp_path)
    monkeypatch.undo()
    try:
        eventually(guarded.is_up)
        env = {**guarded.env, "PREFECT_API_AUTH_STRING": "admin:wrong"}
        for arguments in (["--work_pool_name", "any"], ["--run"]):
            done = register(project, None, *arguments, env=env)
            assert done.returncode == 1
            assert "the server answered 401 Unauthorized" in done.stderr
            assert "Set PREFECT_API_AUTH_STRING" in done.stderr
            assert "Traceback" not in done.stdout + done.stderr
            assert "wrong" not in done.stdout + done.stderr
    finally:
        stop(guarded.process)
