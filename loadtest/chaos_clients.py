"""Clients that know the answers: each compares what it reads with what an undisturbed service had said."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

REPLICA_HEADER = "x-slipstream-replica"  # of the ingress that answers
HUNG_S = 60.0  # without a byte
LAST_RETRIES = 5  # when no more faults come: before that, each retry may meet another
RETRY_PAUSE_S = 2.0
WORDS = ["tide", "harbour", "lantern", "rope", "storm", "gull", "anchor", "salt", "keel", "chart", "compass", "reef"]


@dataclass(frozen=True)
class Answer:
    """What must be the same each time. `token_ids` are the tokens as the API writes them."""

    texts: tuple[str, ...]
    tokens: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    completion_tokens: int


@dataclass(frozen=True)
class Broken:
    """A connection that broke, or a 5xx. `at_s`: time.monotonic()."""

    at_s: float
    ingress: str | None  # the replica at its other end, if it has said so: not before the first token


@dataclass
class Outcomes:
    """What became of all requests of a run."""

    completed: int = 0
    wrong: list[str] = field(default_factory=list)
    hung: int = 0
    error_events: list[str] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    healed: int = 0  # of those, requests that a retry answered
    unhealed: int = 0
    longest_pauses_s: list[float] = field(default_factory=list)  # of each completed stream


class BrokenError(Exception):
    """The connection, or what a proxy says when there is nobody behind it. ingress: see Broken."""

    def __init__(self, message: str, ingress: str | None = None) -> None:
        super().__init__(message)
        self.ingress = ingress


class FailedError(Exception):
    """An error event within the stream, or instead of it (then with its status)."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def make_bodies(count: int, max_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Different prompts; greedy and sampled in turn, some with penalties, several choices, or token by token."""
    draw = random.Random(seed)
    variants: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9, "top_p": 0.95, "logprobs": 0},
        {"temperature": 0, "frequency_penalty": 0.6, "logprobs": 0},
        {"temperature": 1.0, "presence_penalty": 0.4, "repetition_penalty": 1.1},
        {"temperature": 0.8, "top_k": 40, "n": 2},
    ]
    return [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(4, 60))),
            "max_tokens": max_tokens,
            "seed": draw.randrange(1 << 40),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **variants[index % len(variants)],
        }
        for index in range(count)
    ]


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> tuple[Answer, float]:
    """The whole answer, and the longest pause between two events."""
    texts: dict[int, str] = {}
    tokens: dict[int, list[str]] = {}
    reasons: dict[int, str] = {}
    usage = 0
    ingress: str | None = None
    done = False
    last_s, longest_s = time.monotonic(), 0.0
    try:
        async with client.stream("POST", f"{url}/completions", json=body) as response:
            ingress = response.headers.get(REPLICA_HEADER)
            if response.status_code >= 500:
                raise BrokenError(f"status {response.status_code}: {(await response.aread())[:200]!r}", ingress)
            if response.status_code != 200:
                message = f"status {response.status_code}: {(await response.aread())[:200]!r}"
                raise FailedError(message, response.status_code)
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                now_s = time.monotonic()
                longest_s, last_s = max(longest_s, now_s - last_s), now_s
                if line == "data: [DONE]":
                    done = True
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise FailedError(str(event["error"]))
                usage = event["usage"]["completion_tokens"] if event.get("usage") else usage
                for choice in event["choices"]:
                    index = choice["index"]
                    texts[index] = texts.get(index, "") + choice["text"]
                    tokens.setdefault(index, []).extend((choice["logprobs"] or {}).get("tokens", ()))
                    reasons[index] = choice["finish_reason"] or reasons.get(index, "")
    except httpx.ReadTimeout:
        raise TimeoutError from None
    except httpx.TransportError as error:
        raise BrokenError(repr(error), ingress) from None
    if not done:
        raise BrokenError("the stream ended without [DONE]", ingress)
    order = sorted(texts)
    every_token = tuple(token for index in order for token in tokens[index])
    return Answer(tuple(texts[i] for i in order), every_token, tuple(reasons[i] for i in order), usage), longest_s


async def undisturbed(url: str, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """What the service answers while it has nothing else to do."""
    async with httpx.AsyncClient(timeout=120) as client:
        return [(await ask(client, url, body))[0] for body in bodies]


class Clients:
    """So many at once, each with one request after another until told to stop."""

    def __init__(self, url: str, bodies: Sequence[dict[str, Any]], answers: Sequence[Answer], seed: int) -> None:
        self.outcomes = Outcomes()
        self.stopping = False
        self._url = url
        self._known = list(zip(bodies, answers, strict=True))
        self._draw = random.Random(seed)

    async def run(self, num_streams: int) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=httpx.Timeout(HUNG_S), limits=limits) as client:
            await asyncio.gather(*(self._one(client) for _ in range(num_streams)))

    async def _one(self, client: httpx.AsyncClient) -> None:
        while not self.stopping:
            body, expected = self._draw.choice(self._known)
            await self._request(client, body, expected)

    async def _request(self, client: httpx.AsyncClient, body: dict[str, Any], expected: Answer) -> None:
        outcomes = self.outcomes
        was_broken = False
        num_last_retries = 0
        while num_last_retries <= LAST_RETRIES:
            try:
                answer, longest_s = await ask(client, self._url, body)
            except TimeoutError:
                outcomes.hung += 1
                return
            except FailedError as error:
                outcomes.error_events.append(str(error))
                return
            except BrokenError as error:
                outcomes.broken.append(Broken(time.monotonic(), error.ingress))
                was_broken = True
                num_last_retries += self.stopping
                await asyncio.sleep(RETRY_PAUSE_S)
                continue
            if answer != expected:
                outcomes.wrong.append(_difference(answer, expected))
            outcomes.completed += 1
            outcomes.healed += was_broken
            outcomes.longest_pauses_s.append(longest_s)
            return
        outcomes.unhealed += 1


def _difference(answer: Answer, expected: Answer) -> str:
    for text, right in zip(answer.texts, expected.texts, strict=False):
        if text != right:
            place = next(
                (i for i, (a, b) in enumerate(zip(text, right, strict=False)) if a != b), len(min(text, right))
            )
            return f"at character {place}: {text[place : place + 40]!r} instead of {right[place : place + 40]!r}"
    return f"{answer.completion_tokens} tokens, {answer.finish_reasons} instead of {expected.finish_reasons}"
