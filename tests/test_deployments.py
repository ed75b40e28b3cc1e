"""What is registered, by the command line and by prefect.yaml, and what the server keeps."""

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
    BIN,
    DOCUMENTED,
    PREFECT_3,
    QUEUE,
    SCRIPT,
    Server,
    eventually,
    register,
    run,
    schedules_of,
    stop,
)
from test_end_to_end import assert_kept_nowhere

needs_prefect_3 = pytest.mark.skipif(not PREFECT_3, reason="Prefect 2 has none of it")


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


EXAMPLE = re.search(
    r"```yaml\n(# prefect\.yaml\n.+?)```", (SCRIPT.parent / "README.md").read_text(), re.DOTALL
)


def deploy(project: Path, server: Server, text: str) -> None:
    """Register what a prefect.yaml describes, as README says."""
    (project / "prefect.yaml").write_text(text)
    # As a shell does, whose variable PWD the file may name.
    done = server.prefect("--no-prompt", "deploy", "--all", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def example(server: Server, pool: str) -> Iterator[str]:
    """README's example of prefect.yaml, for the work pool that there is."""
    if DOCUMENTED:
        pytest.skip("agents run what the script registers")
    text = EXAMPLE[1].replace("name: my-pool", f"name: {pool}, work_queue_name: {QUEUE}")
    if not PREFECT_3:
        text = re.sub(r"(?m)^    (concurrency_limit|triggers):.*\n(      .*\n)*", "", text)
    yield text
    for deployment in server.post("/deployments/filter", {}):
        server.request("DELETE", f"/deployments/{deployment['id']}")
    if PREFECT_3:
        for automation in server.post("/automations/filter", {}):
            server.request("DELETE", f"/automations/{automation['id']}")


def test_prefect_deploys_the_example_of_readme_and_a_worker_runs_it(
    project: Path, server: Server, example: str
) -> None:
    text = example.replace("pipeline_name: training", "pipeline_name: __default__")
    deploy(project, server, text)
    nightly = server.request("GET", "/deployments/name/tiny/nightly")
    [(schedule, active)] = timings_of(nightly)
    assert (schedule, active) == ({"cron": "0 2 * * *", "timezone": "Europe/Berlin"}, True)
    flow_run = server.finished(server.start_run("tiny/nightly"))
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
    assert json.loads((project / "data/total.json").read_text()) == 30
    if PREFECT_3:  # the one that has completed triggers the other
        scoring = server.request("GET", "/deployments/name/tiny/scoring")
        assert scoring["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
        filters = {"deployments": {"id": {"any_": [scoring["id"]]}}}
        [flow_run] = eventually(lambda: server.post("/flow_runs/filter", filters))
        assert server.finished(flow_run["id"])["state_type"] == "COMPLETED"


@pytest.mark.outer_lanes
@pytest.mark.slow
def test_registering_leaves_what_prefect_yaml_has_set(
    project: Path, server: Server, pool: str, example: str
) -> None:
    deploy(project, server, example)
    before = server.request("GET", "/deployments/name/tiny/nightly")
    names = ("--work_pool_name", pool, "--work_queue_name", QUEUE, "--deployment_name", "nightly")
    done = register(project, server, *names, "--to-nodes", "double")
    assert done.returncode == 0, done.stdout + done.stderr
    after = server.request("GET", "/deployments/name/tiny/nightly")
    assert after["parameters"]["to_nodes"] == ["double"]
    assert timings_of(after) == timings_of(before)
    assert after["tags"] == before["tags"]


@pytest.mark.one_lane
@pytest.mark.slow
@needs_prefect_3
def test_an_image_in_the_job_variables_is_registered(
    project: Path, server: Server, example: str
) -> None:
    server.post("/work_pools/", {"name": "docker", "type": "docker"})
    text = re.sub(
        r"work_pool: .*", "work_pool: {name: docker, job_variables: {image: 'a:1'}}", example
    )
    deploy(project, server, text)
    nightly = server.request("GET", "/deployments/name/tiny/nightly")
    assert job_variables(nightly)["image"] == "a:1"


@pytest.mark.one_lane
@pytest.mark.slow
@needs_prefect_3
def test_prefect_serves_the_flow(project: Path, server: Server) -> None:
    [command] = re.findall(
        r"prefect (flow serve [^`]*?--name \w+)", (SCRIPT.parent / "README.md").read_text()
    )
    env = {**server.env, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    process = server.start([BIN / "prefect", *command.split()], "serve", cwd=project, env=env)
    try:
        eventually(
            lambda: any(d["name"] == "example" for d in server.post("/deployments/filter", {})),
            or_show=server.folder / "serve.log",
        )
        flow_run = server.finished(server.start_run("tiny/example"))
        assert flow_run["state_type"] == "COMPLETED", flow_run["state"]
        assert json.loads((project / "data/total.json").read_text()) == 30
    finally:
        stop(process)


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
    assert again["parameters"] == {"pipeline_name": "broken"}, "of the registration"
    assert (again["tags"], again["version"]) == (["mine"], "3")
    assert again["description"] == "Written by hand."
    assert timings_of(again) == [(schedule, False)]
    assert is_paused(again)
    assert job_variables(again)["image"] == "a"
    env = {"MINE": "1", "MODE": "slow", "PREFECT_LOGGING_LEVEL": "INFO"}
    assert job_variables(again)["env"] == env
    if PREFECT_3:
        limit = again.get("global_concurrency_limit") or {"limit": again["concurrency_limit"]}
        assert limit["limit"] == 2
        assert again["enforce_parameter_schema"] is False

    # What the command line sets wins.
    last = registered("--logging_level", "WARNING", "--version", "4")
    assert (last["tags"], last["version"]) == (["mine"], "4")
    assert timings_of(last) == [(schedule, False)]
    assert job_variables(last)["env"] == {**env, "PREFECT_LOGGING_LEVEL": "WARNING"}


@pytest.mark.one_lane
@pytest.mark.slow
def test_a_description_with_our_marker_is_replaced_and_another_is_not(
    server: Server, registered: Any
) -> None:
    first = registered("--params", "token=secret")
    assert "secret" not in first["description"]
    assert "- runtime_params: token\n" in first["description"]
    second = registered("--tags", "heavy")
    assert second["description"] != first["description"]
    *ours, marker = second["description"].splitlines()
    assert "remove this line" in marker
    edited = "\n".join(["Read this first.", *ours])
    server.request("PATCH", f"/deployments/{first['id']}", {"description": edited})
    assert registered()["description"] == edited


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


@pytest.mark.one_lane
@pytest.mark.slow
def test_a_private_repository_is_cloned_with_a_token_from_a_block(
    tmp_path: Path, project: Path, server: Server, example: str
) -> None:
    total = commit(project)
    save_secret(server, "git-token", f"me:{TOKEN}")  # as git servers want it
    certificate = tmp_path / "certificate.pem"
    with private_repository(project, TOKEN, certificate) as url:
        step = {
            "repository": url,
            "branch": "v1",
            "access_token": "{{ prefect.blocks.secret.git-token }}",
        }
        pull = f"pull:\n  - prefect.deployments.steps.git_clone: {json.dumps(step)}\n"
        text = pull + example[example.index("definitions:") :]
        text = text.replace("env: {", f'env: {{GIT_SSL_CAINFO: "{certificate}", ')
        deploy(project, server, text.replace("pipeline_name: training", "to_outputs: [total]"))
        flow_run = server.finished(server.start_run("tiny/nightly"))
        log = (server.folder / f"{'agent' if DOCUMENTED else 'worker'}.log").read_text()
        assert flow_run["state_type"] == "COMPLETED", log[-3000:]
        assert json.loads(total.read_text()) == 30
        assert TOKEN not in log
        assert_kept_nowhere(server, [TOKEN])


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


@pytest.mark.one_lane
@pytest.mark.slow
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
    assert re.search("Error: (No Prefect server at|Deployment)", done.stderr)


@pytest.mark.one_lane
@pytest.mark.slow
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
