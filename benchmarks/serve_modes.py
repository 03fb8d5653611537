"""What Serve's fast modes are worth: streams through the whole service, with an engine that computes nothing.

Run with `python -m benchmarks.serve_modes`. Each mode has a Ray of its own, since Serve reads its modes when it starts;
the modes take turns. Clients, HTTP and engine share the machine, as they do for whoever tries the service out.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from statistics import median

from engine.request import FinishReason, Request, RequestOutput
from engine.stats import EngineStats
from serve_app.ports import free_port
from serve_app.serve_modes import HAPROXY_FLAG, THROUGHPUT_FLAG, switch_on

HOST = "127.0.0.1"
STEP_S = 0.002  # of the engine: faster than any stream is brought to its reader here
OFF, THROUGHPUT, HAPROXY = "off", "throughput-optimised", "throughput-optimised, HAProxy"
MAX_NUM_SEQS = 256
SECONDS_PER_MODE = 300


class ScriptedEngine:
    """A duck-typed LLMEngine that gives each request one token a step."""

    fingerprint = "fp_scripted"
    max_model_len = 4096
    vocab_size = 49_152

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._requests: dict[str, Request] = {}
        self._num_steps = 0

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._counts[request.request_id] = 0

    def abort(self, request_id: str) -> RequestOutput | None:
        if self._requests.pop(request_id, None) is None:
            return None
        return RequestOutput(request_id, finish_reason=FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def prepare_next(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to let go of."""

    def step(self) -> list[RequestOutput]:
        self._num_steps += 1
        outputs = []
        for request_id, request in list(self._requests.items()):
            count = self._counts[request_id] = self._counts[request_id] + 1
            ended = count == request.sampling.max_tokens
            finish_reason = FinishReason.LENGTH if ended else None
            outputs.append(RequestOutput(request_id, (1000 + count,), finish_reason=finish_reason))
            if ended:
                del self._requests[request_id]
        time.sleep(STEP_S)
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(num_requests_running=len(self._requests), num_blocks=100, num_steps=self._num_steps)

    def check_integrity(self) -> None:
        """There is nothing that could be wrong."""


async def stream(port: int, max_tokens: int) -> None:
    """Reads one answer to its end."""
    fields = {"model": "m", "prompt": "Hello", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    body = json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection(HOST, port, limit=2**20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    tail = b""
    while data := await reader.read(2**16):
        tail = (tail + data)[-64:]
    writer.close()
    assert b"[DONE]" in tail, tail


async def measure(port: int, num_streams: int, max_tokens: int) -> float:
    """Tokens/s of that many streams at once."""
    began_s = time.perf_counter()
    await asyncio.gather(*(stream(port, max_tokens) for _ in range(num_streams)))
    return num_streams * max_tokens / (time.perf_counter() - began_s)


def run_mode(counts: list[int], max_tokens: int) -> None:
    """In a process of its own, whose environment has the mode. Prints {streams: tokens/s}."""
    import ray
    from ray import serve

    from serve_app.app import bind, load_served_model
    from serve_app.config import parse_config

    port = free_port(HOST)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    serve.start(http_options={"host": HOST, "port": port})
    config = parse_config({"device": "cpu", "served_model_name": "m", "max_num_seqs": MAX_NUM_SEQS})
    serve.run(bind(config, lambda _: ScriptedEngine(), partial(load_served_model, config)))  # type: ignore[arg-type, return-value]
    deadline_s = time.monotonic() + 30
    while True:
        try:
            asyncio.run(measure(port, 4, 50))
            break
        except (AssertionError, OSError):
            if time.monotonic() > deadline_s:
                raise
    print(json.dumps({count: asyncio.run(measure(port, count, max_tokens)) for count in counts}), flush=True)
    ray.shutdown()


def environment_of(mode: str) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_SERVE_", "RAY_ADDRESS"))}
    if mode == OFF:
        return {**environment, THROUGHPUT_FLAG: "0", HAPROXY_FLAG: "0"}
    switch_on("haproxy" if mode == HAPROXY else "ray", HOST, environment)
    return environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="16,32,64")
    parser.add_argument("--tokens", type=int, default=300, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    counts = [int(count) for count in options.streams.split(",")]
    if options.run:
        return run_mode(counts, options.tokens)
    speeds: dict[tuple[str, str], list[float]] = defaultdict(list)
    command = [sys.executable, "-m", "benchmarks.serve_modes", "--run"]
    command += ["--streams", options.streams, "--tokens", str(options.tokens)]
    for _ in range(options.rounds):
        for mode in (OFF, THROUGHPUT, HAPROXY):
            result = subprocess.run(
                command,
                env=environment_of(mode),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=SECONDS_PER_MODE,
            )
            print(f"{mode}: {result.stdout.strip()}; load {os.getloadavg()[0]:.1f}", file=sys.stderr)
            for count, speed in json.loads(result.stdout.splitlines()[-1]).items():
                speeds[mode, count].append(speed)
    print(f"{socket.gethostname()}, {os.cpu_count()} cores: tokens/s, best (median) of {options.rounds}")
    for (mode, count), found in speeds.items():
        print(f"{mode}, {count} streams: {max(found):,.0f} ({median(found):,.0f})")
    return None


if __name__ == "__main__":
    main()
