"""What each peer is asked, and what is measured of its answers."""

import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from gevent.pool import Pool

from benchmarks.peers.peer import Peer
from loadtest.request_record import RequestRecord
from loadtest.streaming_client import CHAT, NO_DONE, StreamingClient
from loadtest.workloads import LengthLimits, Prompt, draw_prompt

SILENCE_S = 300.0
ANSWER_S = 120.0
STRIDE = 10_000  # between the first requests of two batches
WARM_UP_ROUND = 1_000  # requests that no round has


@dataclass(frozen=True)
class Traffic:
    """The same for each peer: greedy, streamed, as many output tokens as the peer can be made to give.

    streams: how many requests are under way at once, one level after the other; num_requests: of each level, at least.
    """

    workload: str
    seed: int
    prompt_tokens: int
    output_tokens: int
    streams: tuple[int, ...]
    num_requests: int

    def prompts(self, round_number: int, level: int) -> list[Prompt]:
        """No two rounds and levels share any, so that no prefix cache knows them."""
        first = (round_number * len(self.streams) + level) * STRIDE
        limits = LengthLimits(prompt=self.prompt_tokens, output=self.output_tokens)
        count = max(self.streams[level], self.num_requests)
        return [draw_prompt(self.workload, self.seed, first + number, limits) for number in range(count)]


@dataclass(frozen=True)
class Sample:
    """Of one level in one round. tokens_per_answer: as the server counted them, else as chunks were."""

    output_tokens_per_s: float  # of all answers, from the first request to the end of the last
    ttft_p50_s: float
    tpot_p50_s: float
    itl_p99_s: float
    tokens_per_answer: float
    prompt_tokens: float | None
    is_usage: bool

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> "Sample":
        """Raises ValueError where a request failed: what the others say is then of another load."""
        if errors := [record.error for record in records if record.error]:
            raise ValueError(f"{len(errors)} of {len(records)} requests failed: {errors[0]}")
        seconds = max(record.ended_s for record in records) - min(record.sent_s for record in records)
        gaps = [gap for record in records for gap in record.itl_s]
        tpots = [record.tpot_s for record in records if record.tpot_s is not None]
        if not gaps or not tpots:
            raise ValueError("no answer had two tokens")
        prompts = [record.prompt_tokens for record in records if record.prompt_tokens is not None]
        return cls(
            output_tokens_per_s=sum(record.output_tokens for record in records) / seconds,
            ttft_p50_s=median(record.chunk_s[0] for record in records),
            tpot_p50_s=median(tpots),
            itl_p99_s=float(np.percentile(gaps, 99)),
            tokens_per_answer=fmean(record.output_tokens for record in records),
            prompt_tokens=fmean(prompts) if prompts else None,
            is_usage=all(record.is_usage for record in records),
        )


class Client:
    """Of one running server."""

    def __init__(self, url: str, peer: Peer, model: str) -> None:
        self._url = url
        self._peer = peer
        self._model = model

    def measure(self, prompts: Sequence[Prompt], num_streams: int) -> Sample:
        """Raises ValueError where a request failed."""
        pool = Pool(num_streams)
        return Sample.of(list(pool.imap_unordered(self._stream, prompts)))

    def answer(self, messages: Sequence[dict[str, str]], max_tokens: int, limit_s: float = ANSWER_S) -> dict[str, Any]:
        """A whole answer as JSON, which may end before `max_tokens`.

        Raises:
            OSError: there is none.
            ValueError: it is not JSON.
        """
        fields = {"model": self._model, "messages": list(messages), "max_tokens": max_tokens, **self._peer.greedy}
        request = urllib.request.Request(
            f"{self._url}/v1/{CHAT}", json.dumps(fields).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=limit_s) as response:
            body: dict[str, Any] = json.loads(response.read())
            return body

    def is_ready(self) -> bool:
        """Whether it says so, and gives an answer."""
        try:
            with urllib.request.urlopen(f"{self._url}{self._peer.ready_path}", timeout=ANSWER_S):
                pass
            return bool(self.answer([{"role": "user", "content": "Hello"}], 1)["choices"])
        except (OSError, ValueError, KeyError):
            return False

    def _stream(self, prompt: Prompt) -> RequestRecord:
        body = {
            "model": self._model,
            "messages": prompt.messages,
            "max_tokens": prompt.max_tokens,
            **self._peer.greedy,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        record = RequestRecord(prompt.workload, due_s=0.0, sent_s=0.0)
        # A connection for each request: some servers close them, and who asks at that moment gets nothing.
        http = StreamingClient(self._url, "", SILENCE_S, 1, insecure=False)
        http.send(CHAT, body | self._peer.full_length(prompt.max_tokens), record)
        http.close()
        if record.error == NO_DONE and record.finish_reason and not self._peer.says_done:
            record.error = ""
        return record
