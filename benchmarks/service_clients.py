"""Clients of the whole service that cost little: they read streams as bytes, in several processes."""

import asyncio
import json
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import fmean

HOST = "127.0.0.1"
START_S = 1.0  # between the order and the first request: for all processes to have heard of it
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Answer:
    """One answer that was read to its end: times of time.monotonic(), which all processes share."""

    sent_s: float
    first_s: float  # the first byte of a token
    ended_s: float


@dataclass(frozen=True)
class Traffic:
    """What is sent: prompts of random tokens, each answered with `output_tokens`, greedily."""

    port: int
    vocab_size: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Outcome:
    """Of many answers."""

    output_tokens_per_s: float  # of all answers, from the first request to the end of the last
    ttft_p50_s: float
    ttft_p99_s: float
    mean_concurrency: float  # requests under way, over the same time

    @classmethod
    def of(cls, answers: list[Answer], output_tokens: int) -> "Outcome":
        seconds = max(answer.ended_s for answer in answers) - min(answer.sent_s for answer in answers)
        ttfts = sorted(answer.first_s - answer.sent_s for answer in answers)
        return cls(
            len(answers) * output_tokens / seconds,
            ttfts[len(ttfts) // 2],
            ttfts[min(len(ttfts) - 1, int(0.99 * len(ttfts)))],
            fmean(answer.ended_s - answer.sent_s for answer in answers) * len(answers) / seconds,
        )


class Clients:
    """`num_processes` of them, until it is closed."""

    def __init__(self, traffic: Traffic, num_processes: int) -> None:
        self._traffic = traffic
        self._num_processes = num_processes
        self._pool = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"))
        for starting in [self._pool.submit(time.sleep, 0.2) for _ in range(num_processes)]:  # each in its own
            starting.result(TIMEOUT_S)

    def together(self, num_streams: int) -> list[Answer]:
        """As many requests, all at once."""
        return self._run([0.0] * num_streams)

    def arriving(self, requests_per_s: float, duration_s: float, seed: int = 1) -> list[Answer]:
        """Poisson arrivals, which do not wait for answers."""
        draw = random.Random(seed)
        delays, at_s = [], 0.0
        while (at_s := at_s + draw.expovariate(requests_per_s)) < duration_s:
            delays.append(at_s)
        return self._run(delays)

    def close(self) -> None:
        self._pool.shutdown()

    def _run(self, delays_s: list[float]) -> list[Answer]:
        started_s = time.monotonic() + START_S
        starts = [started_s + delay_s for delay_s in delays_s]
        shares = [starts[number :: self._num_processes] for number in range(self._num_processes)]
        futures = [self._pool.submit(_read_all, self._traffic, share) for share in shares if share]
        return [answer for future in futures for answer in future.result(TIMEOUT_S)]


def _read_all(traffic: Traffic, starts_s: list[float]) -> list[Answer]:
    async def run() -> list[Answer]:
        return await asyncio.gather(*(_read(traffic, start_s) for start_s in starts_s))

    return asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))


async def _read(traffic: Traffic, start_s: float) -> Answer:
    """Raises RuntimeError if there is no whole answer."""
    fields = {
        "model": "m",
        "prompt": random.choices(range(traffic.vocab_size), k=traffic.input_tokens),
        "max_tokens": traffic.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    await asyncio.sleep(start_s - time.monotonic())
    sent_s = time.monotonic()
    reader, writer = await asyncio.open_connection(HOST, traffic.port, limit=2**20)
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    first_s, tail = 0.0, b""
    while data := await reader.read(2**16):
        tail = tail[-1024:] + data
        if not first_s and b'"text"' in tail:
            first_s = time.monotonic()
    writer.close()
    if b"[DONE]" not in tail:
        raise RuntimeError(f"the stream ended early: {tail[-300:]!r}")
    return Answer(sent_s, first_s, time.monotonic())
