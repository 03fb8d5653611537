"""Clients of all sorts, who ask for more than the service can do and are told to come again."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtest.chaos_clients import WORDS, Answer, BrokenError, FailedError, ask

# Without a byte. Longer than a request may wait for its first token (`queue_timeout_s`) and then take for the last one,
# of which a client that does not stream hears nothing.
HUNG_S = 300.0
MAX_RETRY_PAUSE_S = 5.0
LEAVES, IS_KNOWN = 0.15, 0.15  # parts of the requests: whose client loses patience; whose answer is known
MAX_PATIENCE_S = 4.0
NUM_USERS = 10_000  # most are seen once


@dataclass
class TrafficCounts:
    """What became of all requests."""

    by_outcome: Counter[str] = field(default_factory=Counter)
    wrong: int = 0  # answers that were known, and came out differently
    errors: list[str] = field(default_factory=list)  # the first of those that nobody should see


def draw_request(draw: random.Random, max_tokens: int, max_words: int) -> tuple[str, dict[str, Any]]:
    """An endpoint and a body: short and long, chat and text, whole and streamed, plain and with everything."""
    words = " ".join(draw.choices(WORDS, k=min(max_words, int(draw.paretovariate(1.1) * 4))))
    body: dict[str, Any] = {
        "max_tokens": draw.randint(1, max_tokens),
        "temperature": draw.choice([0, 0.7, 1.0]),
        "stream": draw.random() < 0.6,
        "user": f"user-{draw.randrange(NUM_USERS)}",
    }
    if draw.random() < 0.1:
        body["n"] = 2
    if draw.random() < 0.1:
        body["stop"] = ["the", "qq"]
    if draw.random() < 0.1:
        body["frequency_penalty"] = 0.5
    if draw.random() < 0.03:
        body["temperature"] = -1  # which is refused
    if draw.random() < 0.4:
        if draw.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 3}
        return "chat/completions", body | {"messages": [{"role": "user", "content": words}]}
    return "completions", body | {"prompt": words}


class Traffic:
    """So many clients, each with one request after another until told to stop."""

    def __init__(
        self,
        url: str,
        known: Sequence[tuple[dict[str, Any], Answer]],
        seed: int,
        *,
        max_tokens: int = 200,
        max_words: int = 200,
    ) -> None:
        """known: requests, and what the service has answered to them while it had nothing else to do."""
        self.counts = TrafficCounts()
        self.stopping = False
        self._url = url
        self._known = known
        self._draw = random.Random(seed)
        self._max_tokens = max_tokens
        self._max_words = max_words

    async def run(self, num_clients: int) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_clients // 2)
        async with httpx.AsyncClient(timeout=httpx.Timeout(HUNG_S), limits=limits) as client:
            await asyncio.gather(*(self._one(client) for _ in range(num_clients)))

    async def _one(self, client: httpx.AsyncClient) -> None:
        while not self.stopping:
            try:
                outcome = await self._request(client)
            except Exception as error:
                outcome = "failed"
                if len(self.counts.errors) < 20:
                    self.counts.errors.append(repr(error))
                await asyncio.sleep(MAX_RETRY_PAUSE_S)
            self.counts.by_outcome[outcome] += 1

    async def _request(self, client: httpx.AsyncClient) -> str:
        if self._draw.random() < IS_KNOWN:
            return await self._known_request(client)
        endpoint, body = draw_request(self._draw, self._max_tokens, self._max_words)
        patience_s = self._draw.uniform(0.0, MAX_PATIENCE_S) if self._draw.random() < LEAVES else None
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                return await self._read(client, f"{self._url}/{endpoint}", body)
        return "left"

    async def _known_request(self, client: httpx.AsyncClient) -> str:
        body, expected = self._draw.choice(self._known)
        try:
            answer, _ = await ask(client, self._url, body)
        except TimeoutError:
            raise TimeoutError(f"nothing came for {HUNG_S:g} s") from None
        except FailedError as error:
            if error.status != 429:
                raise
            await asyncio.sleep(MAX_RETRY_PAUSE_S)
            return "turned away"
        except BrokenError as error:
            raise ConnectionError(str(error)) from None
        self.counts.wrong += answer != expected
        return "known answer"

    async def _read(self, client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> str:
        async with client.stream("POST", url, json=body) as response:
            content = await response.aread()
        if response.status_code == 429:
            await asyncio.sleep(min(MAX_RETRY_PAUSE_S, float(response.headers["retry-after"])))
            return "turned away"
        if response.status_code == 400 and body["temperature"] < 0:
            return "refused"
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {content[:200]!r}")
        if not body["stream"]:
            return "whole answer"
        if b'data: {"error"' in content or not content.endswith(b"data: [DONE]\n\n"):
            raise ValueError(f"a stream that ends with {content[-200:]!r}")
        return "stream"
