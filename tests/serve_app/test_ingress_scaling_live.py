"""HTTP processes come with the load, behind HAProxy, and streams that were there before do not notice."""

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve_app.network_namespace import Namespace
from tests.serve_app.served import LIMIT_S, MARKS, serving

NUM_STREAMS = 6
pytestmark = MARKS


@pytest.fixture
def service(default_model_path: Path, tmp_path: Path) -> Iterator[Namespace]:  # noqa: ARG001
    arguments = ["max_num_seqs=8", "ingress_min_replicas=1", "ingress_max_replicas=2", "ingress_target_queue_depth=2"]
    with serving(tmp_path / "output", lambda: bool(replica_of("/ready")), *arguments) as service:
        yield service


def replica_of(path: str) -> str:
    """Of the ingress that answers; empty where none does yet."""
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=LIMIT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.headers["x-slipstream-replica"] if response.status == 200 else ""
    except OSError:
        return ""
    finally:
        connection.close()


def stream(max_tokens: int) -> http.client.HTTPResponse:
    fields = {"prompt": "Hello", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=LIMIT_S)
    connection.request("POST", "/v1/completions", json.dumps(fields), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    return response


def test_a_second_ingress_takes_its_share_and_streams_go_on(service: Namespace) -> None:
    def load() -> tuple[str, set[str], bytes]:
        early = stream(max_tokens=400)
        others = [stream(max_tokens=4000) for _ in range(NUM_STREAMS)]
        first = early.headers["x-slipstream-replica"]
        deadline = time.monotonic() + LIMIT_S
        seen = {first}
        while len(seen) < 2 and time.monotonic() < deadline:
            seen.add(replica_of("/version") or first)
            time.sleep(0.2)
        for response in others:
            response.close()
        return first, seen, early.read()

    first, seen, body = service.inside(load)
    assert len(seen) == 2, f"{service.output()}\nonly {first}"
    assert body.endswith(b"data: [DONE]\n\n")
