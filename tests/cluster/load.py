"""Clients that know the answers, each with one request after another."""

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from engine.llm_engine import LLMEngine
from engine.loader.catalogue import DEFAULT_MODEL
from engine.loader.fetch import resolve_model
from engine.loader.progress import PlainProgress
from engine.request import Request, SamplingParams
from engine.text import TextStream
from engine.tokenizer import load_tokenizer
from loadtest.chaos_clients import ask
from serve_app.config import cache_dir
from tests.serve_app.slow_engine import slow_engine_config

NUM_TOKENS = 120  # with the slow engine, 6 s or more
_HUNG_S = 150.0  # without a byte: the first requests wait for a node


@dataclass(frozen=True)
class Known:
    """A request and the text of its answer."""

    body: dict[str, Any]
    text: str


def known_answers(model: Path, vocab_size: int, count: int) -> list[Known]:
    """Greedy and sampled in turn, answered by an engine in this process."""
    tokenizer = load_tokenizer(resolve_model(DEFAULT_MODEL, cache_dir=cache_dir(), progress=PlainProgress(print)))
    engine = LLMEngine.from_path(model, slow_engine_config())
    bodies = [
        {
            "prompt": [(37 * index + 11 * place) % (vocab_size - 10) + 10 for place in range(8 + 5 * index)],
            "temperature": 0.9 * (index % 2),
            "seed": index,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
        }
        for index in range(count)
    ]
    streams = {}
    texts = dict.fromkeys(map(str, range(count)), "")
    for index, body in enumerate(bodies):
        sampling = SamplingParams(**{name: body[name] for name in ("temperature", "seed", "max_tokens", "ignore_eos")})
        engine.add(Request(str(index), body["prompt"], sampling))
        streams[str(index)] = TextStream(tokenizer.detokenizer(continues_text=True))
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id] += streams[output.request_id].push(output.token_ids).text
            if output.finish_reason is not None:
                texts[output.request_id] += streams[output.request_id].finish().text
    engine.close()
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    return [Known(body | streaming, texts[str(index)]) for index, body in enumerate(bodies)]


class Load:
    """One client for each known request; they run on a thread of their own."""

    def __init__(self, url: str, known: Sequence[Known]) -> None:
        self.faults: list[str] = []
        self.num_answered = 0
        self.longest_pause_s = 0.0  # in any answer
        self._url = url
        self._known = known
        self._answered_s = [-float("inf")] * len(known)  # when each client had its last answer
        self._stopping = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, limit_s: float) -> None:
        """When the requests that are under way have been answered."""
        self._stopping = True
        self._thread.join(limit_s)
        assert not self._thread.is_alive(), f"requests are still unanswered after {limit_s:g} s"

    def all_answered_since(self, since_s: float) -> bool:
        """Whether each client has had an answer after that moment, of time.monotonic()."""
        return min(self._answered_s) > since_s

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=httpx.Timeout(_HUNG_S), limits=limits) as client:
            await asyncio.gather(*(self._ask_again_and_again(client, index) for index in range(len(self._known))))

    async def _ask_again_and_again(self, client: httpx.AsyncClient, index: int) -> None:
        known = self._known[index]
        while not self._stopping:
            try:
                answer, pause_s = await ask(client, self._url, known.body)
            except Exception as error:
                self.faults.append(f"request {index}: {error!r}")
                return
            if answer.texts != (known.text,) or answer.completion_tokens != NUM_TOKENS:
                self.faults.append(f"request {index}: {answer.texts} instead of {known.text!r}")
            self.num_answered += 1
            self.longest_pause_s = max(self.longest_pause_s, pause_s)
            self._answered_s[index] = time.monotonic()
