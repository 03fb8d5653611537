"""One process's part of the load: which request is next, how it is written, and that it is sent."""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import gevent
from gevent.event import Event
from gevent.pool import Group

from loadtest.arrivals import arrival_gaps, dispatch
from loadtest.request_record import UNFINISHED, RequestRecord
from loadtest.settings import Settings
from loadtest.streaming_client import CHAT, StreamingClient, epoch_s
from loadtest.workloads import Prompt, draw_prompt

CLIENT_FULL = "client: too many requests in flight"
_DRAIN_CHECK_S = 0.02
_STRIDE = 10_000_000  # between the first requests of two processes


class Load:
    """Sends requests; `finished(record)` is called for each, in the greenlet that sent it.

    `process_index` counts the processes of a distributed run: each has requests of its own.
    """

    def __init__(
        self,
        settings: Settings,
        client: StreamingClient,
        model: str,
        process_index: int,
        finished: Callable[[RequestRecord], None],
    ) -> None:
        self.stopping = Event()
        self._settings = settings
        self._client = client
        self._model = model
        self._process_index = process_index
        self._finished = finished
        self._indices = count(process_index * _STRIDE)
        self._dispatchers = count()
        self._spawned = Group()
        self._under_way: dict[int, RequestRecord] = {}
        self._is_drained = False

    def send_one(self) -> None:
        """The next request, to its end."""
        self._send(
            draw_prompt(self._settings.workload, self._settings.seed, next(self._indices), self._settings.limits)
        )

    def send_at_arrivals(self, rate: float) -> None:
        """Requests at `rate` a second until told to stop, and then to the end of the last."""
        settings = self._settings
        draw = random.Random(f"{settings.seed}/arrivals/{self._process_index}/{next(self._dispatchers)}")
        gaps = arrival_gaps(settings.arrivals, rate, draw, settings.burst_size, settings.burstiness)
        dispatch(gaps, self._arrive, self.stopping)

    def drain(self, limit_s: float) -> None:
        """No more requests; returns when all have ended, or after `limit_s`, with the others noted as unfinished."""
        self.stopping.set()
        deadline_s = time.perf_counter() + limit_s
        while self._under_way and time.perf_counter() < deadline_s:
            gevent.sleep(_DRAIN_CHECK_S)
        if self._is_drained:
            return
        self._is_drained = True
        now_s = epoch_s(time.perf_counter())
        for record in self._under_way.values():
            age_s = now_s - record.sent_s
            self._finished(replace(record, due_s=record.due_s or record.sent_s, e2e_latency_s=age_s, error=UNFINISHED))

    def _arrive(self, due_s: float) -> None:
        index = next(self._indices)  # also where it is not sent: the others stay the same
        prompt = draw_prompt(self._settings.workload, self._settings.seed, index, self._settings.limits)
        if len(self._under_way) >= self._settings.max_in_flight:
            self._finished(
                RequestRecord(prompt.workload, due_s=epoch_s(due_s), sent_s=epoch_s(due_s), error=CLIENT_FULL)
            )
            return
        self._spawned.add(gevent.spawn(self._send, prompt, due_s))

    def _send(self, prompt: Prompt, due_s: float | None = None) -> None:
        body = self._body(prompt)
        now_s = epoch_s(time.perf_counter())
        record = RequestRecord(prompt.workload, due_s=0.0 if due_s is None else epoch_s(due_s), sent_s=now_s)
        self._under_way[id(record)] = record
        try:
            self._client.send(self._settings.endpoint, body, record)
        finally:
            del self._under_way[id(record)]
            record.due_s = record.due_s or record.sent_s
            if not self._is_drained:
                self._finished(record)

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "max_tokens": prompt.max_tokens, "stream": True}
        if self._settings.endpoint == CHAT:
            body["messages"] = prompt.messages
        else:
            body["prompt"] = "\n\n".join(message["content"] for message in prompt.messages)
        if self._settings.wants_usage:
            body["stream_options"] = {"include_usage": True}
        return body | self._settings.extra_body
