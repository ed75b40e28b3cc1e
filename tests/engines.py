"""What nodes in other processes need: a Dask cluster, a bucket for checkpoints, and who listens in."""

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import BIN, DASK, stop, write_config

ENGINES = ["processes", DASK]
with_dask = pytest.mark.skipif(not find_spec("distributed"), reason="not installed")
with_s3 = pytest.mark.skipif(not find_spec("moto"), reason="not installed")


class Proxy:
    """Hands on what is said between a flow and a scheduler, and keeps it."""

    def __init__(self, port: int) -> None:
        self.said = b""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.target = port
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self.hand_on, args=pair, daemon=True).start()

    def hand_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.said += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@contextmanager
def dask_cluster(folder: Path) -> Iterator[tuple[int, list[subprocess.Popen[bytes]]]]:
    """A scheduler, and two workers that were started in folders of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scheduler: list[Any] = ["scheduler", "--port", port, "--no-dashboard"]
    worker = ["worker", f"tcp://127.0.0.1:{port}", "--nthreads", 1, "--no-dashboard"]
    processes = []
    for number, command in enumerate([scheduler, worker, worker]):
        place = folder / f"dask-{number}"
        place.mkdir()
        with (place / "log.txt").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [str(part) for part in [BIN / "dask", *command]],
                    cwd=place,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
    yield port, processes
    for process in reversed(processes):
        stop(process)


@contextmanager
def s3_bucket(project: Path) -> Iterator[Any]:
    """A bucket for checkpoints, with credentials that `conf/local` has."""
    import boto3
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    try:
        url = f"http://127.0.0.1:{moto.get_host_and_port()[1]}"
        keys = {"aws_access_key_id": "xyzzy4711", "aws_secret_access_key": "4711xyzzy"}
        s3 = boto3.resource("s3", endpoint_url=url, region_name="us-east-1", **keys)
        bucket = s3.Bucket("bucket")
        bucket.create()
        (project / "conf/local/credentials.yml").write_text(
            "bucket: {key: xyzzy4711, secret: 4711xyzzy, client_kwargs:"
            f" {{endpoint_url: '{url}'}}}}\n"
        )
        (project / "conf/local/parameters.yml").write_text("")
        place = "{url: 's3://bucket/handed_on', credentials: bucket}"
        write_config(project, f"task_runner: {{type: processes}}\ncheckpoints: {place}")
        yield bucket
    finally:
        moto.stop()
