"""deploy/spot_watch.sh against clouds that are played here: a node is drained when it is announced, not before."""

import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.deploy.files import ROOT


class Cloud(ThreadingHTTPServer):
    """A metadata service. `polls` counts questions that were answered with no; from `taken` on it is yes."""

    def __init__(self, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), Metadata)
        self.kind = kind
        self.polls = 0
        self.taken = threading.Event()
        self.asked = threading.Event()


class Metadata(BaseHTTPRequestHandler):
    server: Cloud

    def do_PUT(self) -> None:
        known = self.server.kind == "ec2" and self.path == "/latest/api/token"
        self._answer(200 if known else 404, "a-token")

    def do_GET(self) -> None:
        taken = self.server.taken.is_set()
        if self.server.kind == "ec2" and self.path == "/latest/meta-data/spot/instance-action":
            status = 401 if self.headers["X-aws-ec2-metadata-token"] != "a-token" else 200 if taken else 404
            self._answer(status, '{"action": "terminate"}')
        elif self.server.kind == "google" and self.path == "/computeMetadata/v1/instance/preempted":
            status = 200 if self.headers["Metadata-Flavor"] == "Google" else 403
            self._answer(status, "TRUE" if taken else "FALSE")
        else:
            self._answer(404, "")
            return
        self.server.polls += not taken
        if self.server.polls >= 3:
            self.server.asked.set()

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["ec2", "google"])
def cloud(request: pytest.FixtureRequest) -> Iterator[Cloud]:
    with Cloud(request.param) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def test_drains_when_the_node_is_taken_back_and_only_then(cloud: Cloud, tmp_path: Path) -> None:
    drained = tmp_path / "drained"
    write_program(tmp_path / "ray", f'echo "$@" >> {drained}')
    write_program(tmp_path / "pgrep", "echo 17 /somewhere/raylet/raylet --port=0 --node_id=0123abcd --head=false")
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "METADATA_URL": f"http://127.0.0.1:{cloud.server_port}",
        "POLL_S": "0.05",
        "TMPDIR": str(tmp_path),
    }
    command = ["bash", str(ROOT / "deploy/spot_watch.sh")]
    with subprocess.Popen(command, env=environment) as watch:
        try:
            assert cloud.asked.wait(timeout=120)
            assert not drained.exists()
            assert subprocess.run(command, env=environment, timeout=120).returncode == 0  # a second one leaves at once
            cloud.taken.set()
            assert watch.wait(timeout=120) == 0
        finally:
            watch.kill()
    seconds = {"ec2": "110", "google": "25"}[cloud.kind]
    [line] = drained.read_text().splitlines()
    assert line.startswith("drain-node --node-id 0123abcd --reason DRAIN_NODE_REASON_PREEMPTION ")
    assert line.endswith(f" --deadline-remaining-seconds {seconds}")
