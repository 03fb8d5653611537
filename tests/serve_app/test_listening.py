"""`serve run serve_app:app` as users start it: its modes, who listens where, and what HAProxy lets through."""

import http.client
import json
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from tests.serve_app.network_namespace import ADDRESS, Namespace
from tests.serve_app.served import LIMIT_S, MARKS, serving, wait_until

_LIST = """
import json, psutil
listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
print(json.dumps([(c.pid, c.laddr.ip, c.laddr.port) for c in listening]))
"""
MAX_QUEUED = 4
pytestmark = MARKS

# What listens beyond this machine, and docs/operations.md tells of: gRPC of Ray, which wants its token, ...
GRPC = {
    "serve",
    "gcs_server",
    "raylet",
    "ray::DashboardAgent",
    "ray::ServeController",
    "ray::ProxyActor",
    "ray::HAProxyManager",
    "ray::ServeReplica:default:engine",
    "ray::ServeReplica:default:ingress",
}
# ... and HTTP of Ray: an agent that wants it too, and metrics.
HTTP = {"ray::RuntimeEnvAgent", "ray::DashboardAgent", "dashboard.py", "monitor.py"}


@pytest.fixture(scope="module")
def service(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:  # noqa: ARG001
    output = tmp_path_factory.mktemp("listening") / "output"
    arguments = ["max_num_seqs=1", f"max_queued_requests={MAX_QUEUED}"]
    with serving(output, lambda: get("/ready") == 200, *arguments) as service:
        yield service


def get(path: str, headers: dict[str, str] | None = None) -> int:
    """The status; 0 where nobody answers yet."""
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=LIMIT_S)
    try:
        connection.request("GET", path, headers=headers or {})
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def ask(max_tokens: int, *, is_stream: bool = False, timeout_s: float = LIMIT_S) -> http.client.HTTPConnection:
    """For a completion, with the body in a packet after the headers'."""
    fields = {"model": "smollm2-135m", "prompt": "Hello", "max_tokens": max_tokens, "ignore_eos": True}
    body = json.dumps({**fields, "stream": is_stream}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=timeout_s)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    time.sleep(0.05)
    connection.send(body)
    return connection


def kind(process: psutil.Process) -> str:
    """Such as ray::ProxyActor, or the script of a Python process."""
    words = " ".join(process.cmdline()).split()  # a title that a process has given itself is one word for psutil
    name = words[0] if words[0].startswith("ray::") else Path(words[0]).name
    if name.startswith("python"):
        name = next(Path(word).name for word in words[1:] if not word.startswith("-"))
    return name.split(".")[0] if name.startswith("ray::") else name


def listeners(service: Namespace) -> list[tuple[str, str, int]]:
    """(kind of process, address, port) of everything that accepts connections."""
    found = []
    for pid, ip, port in json.loads(service.run_inside([sys.executable, "-c", _LIST])):
        assert pid is not None, (ip, port)
        found.append((kind(psutil.Process(pid)), ip, port))
    return found


def speaks_http(port: int, limit_s: float) -> bool:
    """Whether somebody on the other side of the interface would get an answer to a plain question."""
    with socket.create_connection((ADDRESS, port), timeout=LIMIT_S) as connection:
        connection.settimeout(limit_s)
        try:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return connection.recv(16).startswith(b"HTTP/")
        except OSError:
            return False


def test_the_fast_modes_are_on(service: Namespace) -> None:
    assert "Serve is throughput-optimised, with HAProxy in front" in service.output()
    [controller] = [process for process in service.processes() if kind(process) == "ray::ServeController"]
    environment = controller.environ()
    assert environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    [haproxy] = [name for name, _, port in listeners(service) if port == 8000]
    assert haproxy == "haproxy"


def test_http_is_for_this_machine_alone(service: Namespace) -> None:
    def outside(found: list[tuple[str, str, int]]) -> list[tuple[str, int]]:
        return [(name, port) for name, ip, port in found if not ip_address(ip).is_loopback]

    # Ray's agents may still be starting.
    wait_until(lambda: {name for name, _ in outside(listeners(service))} >= GRPC | HTTP, service)
    found = listeners(service)
    serving = {(name, port): ip_address(ip).is_loopback for name, ip, port in found}
    for where in (("haproxy", 8000), ("haproxy", 8404), ("haproxy", 9101), ("ray::ProxyActor", 8500)):
        assert serving[where]
    [replica_port] = [port for name, port in serving if "ingress" in name and 30_000 <= port <= 31_000]
    assert serving["ray::ServeReplica:default:ingress", replica_port]
    assert {name for name, _ in outside(found)} == GRPC | HTTP
    for limit_s in (2.0, 8.0, 32.0):  # whoever speaks it may be busy; whoever does not may say nothing for ever
        with_http = {name for name, port in outside(found) if service.inside(partial(speaks_http, port, limit_s))}
        if with_http >= HTTP:
            break
    assert with_http == HTTP


def test_headers_bodies_and_streams_pass_haproxy(service: Namespace) -> None:
    assert service.inside(lambda: get("/version", {"X-Long": "a" * 65_000})) == 200
    assert service.inside(lambda: get("/version", {"X-Long": "a" * 70_000})) == 431

    def long_body() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=LIMIT_S)
        connection.request("POST", "/v1/completions", b"x" * (33 << 20), {"Content-Type": "application/json"})
        return connection.getresponse().status

    assert service.inside(long_body) == 413


@pytest.mark.parametrize("is_stream", [True, False])
def test_who_leaves_makes_room(service: Namespace, is_stream: bool) -> None:
    """The engine runs one request at a time; this one would take minutes."""

    def begin_and_leave() -> None:
        connection = ask(8_000, is_stream=is_stream, timeout_s=LIMIT_S if is_stream else 1.0)
        if is_stream:
            response = connection.getresponse()
            assert response.readline().startswith(b"data:")
            response.close()
        else:
            with pytest.raises(TimeoutError):
                connection.getresponse()
        connection.close()

    service.inside(begin_and_leave)
    assert service.inside(lambda: ask(1).getresponse().status) == 200


def test_who_finds_the_queue_full_is_told_when_to_come_again(service: Namespace) -> None:
    """Not by HAProxy, which would let them wait, but by the ingress."""
    num_excess = 3

    def crowd() -> list[tuple[int, int, str]]:
        connections = [ask(8_000, is_stream=True) for _ in range(1 + MAX_QUEUED + num_excess)]
        answers = []
        running = []  # one, which goes on
        deadline = time.monotonic() + LIMIT_S
        while len(answers) < num_excess and time.monotonic() < deadline:
            readable, _, _ = select.select([each.sock for each in connections if each.sock], [], [], 1.0)
            for connection in [each for each in connections if each.sock in readable]:
                response = connection.getresponse()
                if response.status == 200:
                    running.append(connection)
                else:
                    error = json.loads(response.read())["error"]
                    answers.append((response.status, int(response.headers["Retry-After"]), error["code"]))
                connections.remove(connection)
        for connection in (*connections, *running):
            connection.close()
        return answers

    answers = service.inside(crowd)
    assert len(answers) >= num_excess
    assert {(status, code) for status, _, code in answers} == {(429, "overloaded")}
    assert all(1 <= retry_after_s <= 600 for _, retry_after_s, _ in answers)
    wait_until(lambda: service.inside(lambda: ask(1).getresponse().status) == 200, service)  # all have left


def test_the_log_has_the_phases_of_the_start(service: Namespace) -> None:
    output = service.output()
    for phase in ("importing libraries", "reading headers", "loading weights: 272/272 tensors, 0.30 GiB,"):
        [line] = [line for line in output.splitlines() if f"{phase}" in line and line.endswith(" s")]
        seconds = re.search(r"([0-9.]+) s$", line)
        assert seconds is not None
        assert 0 <= float(seconds[1]) < 60
    assert output.count("ready in ") == 1


def test_it_ends_when_it_is_interrupted(service: Namespace) -> None:
    service.command.send_signal(signal.SIGINT)
    deadline = time.monotonic() + LIMIT_S
    while not service.has_ended:
        assert time.monotonic() < deadline, service.output()
        time.sleep(0.1)
