"""The engine's side of a draft server: a Proposer that asks over a socket, and never depends on the answer."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import zmq

from engine.request import Request
from engine.speculative.proposer import DraftOrder, Proposer
from engine.stats import RemoteStats
from serve_app.circuit_breaker import CircuitBreaker
from serve_app.draft_book import MirrorBook
from serve_app.draft_link import Connection, DraftLink, Resolve
from serve_app.draft_messages import (
    MAX_MIRRORS_OF_ROUND,
    Drafts,
    MalformedCount,
    MalformedError,
    Round,
    decode_from_draft,
)
from serve_app.messages import encode

logger = logging.getLogger("ray.serve")

SILENCE_LIMIT_S = 3.0  # a server that has not said anything for so long, with a round to answer, is given up
MAX_ROUNDS_IN_FLIGHT = 16  # unanswered ones, past which nothing more is sent; one answer covers all before it
MAX_DROPS_HELD = 32  # of requests that have ended: they go with the next round, or by themselves when they are many
MAX_MESSAGES_AT_ONCE = 64  # a server that says more than that is not listened to for longer
POLL_PAUSE_S = 0.0005  # between looks for answers that nobody waits for
SPIN_S = 0.002  # a poll counts whole milliseconds: so long before the end of a wait the thread looks again and again
HOP_SMOOTHING = 0.1  # weight of the newest round in the moving average


class RemoteProposer:
    """A Proposer over a draft server. For one thread, but for `stats`.

    It sends one message a round, looks once for what has come, and waits no longer than it is told to. A request's
    first round opens its mirror and is not waited for: the draft has a prompt to read. Orders that come to nothing go
    to the `fallback`. When the draft is lost, everything goes there until another connection is made.
    """

    def __init__(
        self,
        resolve: Resolve,
        fallback: Proposer,
        *,
        vocab_size: int,
        target_name: str,
        breaker: CircuitBreaker | None = None,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        """resolve: called in a thread of the link's own. vocab_size, target_name: of the target model."""
        self._fallback = fallback
        self._silence_limit_s = silence_limit_s
        self._breaker = breaker or CircuitBreaker()
        self._book = MirrorBook(vocab_size)
        self._link = DraftLink(resolve, vocab_size=vocab_size, target_name=target_name)
        self._connection: Connection | None = None
        self._num_connections = 0
        self._round_number = 0
        self._answered_round = 0
        self._sent_s = 0.0  # the last round
        self._unanswered_since_s: float | None = None
        self._last_poll_s = 0.0
        self._malformed = MalformedCount("the draft server")
        self._stats = RemoteStats()

    def stats(self) -> RemoteStats:
        """A copy, for any thread."""
        return replace(self._stats, garbage=self._malformed.count + self._book.num_garbage)

    def wait_for_connection(self, timeout_s: float) -> bool:
        """Look until there is one; for whoever measures drafts and would not do without. False if the time is over."""
        deadline_s = time.perf_counter() + timeout_s
        while self._connection is None and time.perf_counter() < deadline_s:
            self._poll(time.perf_counter())
            time.sleep(POLL_PAUSE_S)
        return self._connection is not None

    def may_propose(self, request: Request) -> bool:
        now_s = time.perf_counter()
        if now_s - self._last_poll_s > POLL_PAUSE_S:
            self._poll(now_s)
        if self._connection is not None and self._book.may_draft(request, self._breaker.may_wait(now_s), now_s):
            return True
        return self._fallback.may_propose(request)

    def propose(self, orders: Sequence[DraftOrder], wait_s: float) -> Sequence[Sequence[int]]:
        started_s = time.perf_counter()
        self._poll(started_s)
        awaited = self._send_round(orders, started_s)
        if awaited and wait_s > 0 and self._breaker.may_wait(started_s):
            self._wait(awaited, started_s + wait_s)
        proposals: list[Sequence[int]] = [self._book.drafts_for(order) for order in orders]
        num_remote = sum(map(bool, proposals))
        open_places = [place for place, drafts in enumerate(proposals) if not drafts]
        if open_places:
            others = self._fallback.propose([orders[place] for place in open_places], 0.0)
            for place, drafts in zip(open_places, others, strict=True):
                proposals[place] = drafts
        self._stats.rounds += 1
        self._stats.remote_proposals += num_remote
        self._stats.fallback_proposals += sum(map(bool, proposals)) - num_remote
        return proposals

    def forget(self, request: Request) -> None:
        self._fallback.forget(request)
        if self._book.drop(request) and (self._book.num_dropped >= MAX_DROPS_HELD or not len(self._book)):
            self._send(Round(self._round_number, dropped=self._book.take_dropped()))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.socket.close()
            self._connection = None
        self._link.close()
        self._fallback.close()

    def _poll(self, now_s: float) -> None:
        """Look for answers, for the end of the connection, and for a new one. Never waits."""
        self._last_poll_s = now_s
        if self._connection is None:
            self._adopt()
            return
        self._receive()
        since_s = self._unanswered_since_s
        if since_s is not None and now_s - since_s > self._silence_limit_s:
            self._lose(f"it has been silent for {self._silence_limit_s:g} s")

    def _adopt(self) -> None:
        connection = self._link.take()
        if connection is None:
            return
        self._connection = connection
        self._breaker.on_answer()
        again = "again " if self._num_connections else ""
        logger.info(f"connected {again}to draft model {connection.welcome.model_name} at {connection.address}")
        self._stats.is_connected = True
        self._stats.reconnects = self._num_connections
        self._num_connections += 1

    def _lose(self, reason: str) -> None:
        """Nothing of a connection outlives it: the next one may lead to another server."""
        if self._connection is None:
            return
        logger.warning(f"lost the draft server at {self._connection.address}: {reason}")
        self._connection.socket.close()
        self._connection = None
        self._book.clear()
        self._answered_round = self._round_number
        self._unanswered_since_s = None
        self._stats.is_connected = False
        self._stats.num_mirrors, self._stats.draft_step_time_s = 0, 0.0
        self._link.reconnect()

    def _send_round(self, orders: Sequence[DraftOrder], now_s: float) -> dict[str, DraftOrder]:
        """Returns the orders that are worth waiting for, by key."""
        if self._connection is None or self._round_number - self._answered_round >= MAX_ROUNDS_IN_FLIGHT:
            return {}
        number = self._round_number + 1
        message, awaited = self._book.make_round(number, orders[:MAX_MIRRORS_OF_ROUND], now_s)
        if not self._send(message):
            return {}
        if message.orders:
            self._round_number = number
            self._sent_s = time.perf_counter()
            if self._unanswered_since_s is None:
                self._unanswered_since_s = self._sent_s
        return awaited

    def _send(self, message: Round) -> bool:
        """False if there is nobody to send it to."""
        if self._connection is None:
            return False
        try:
            self._connection.socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:  # the other side has closed, or takes nothing any more
            self._lose("it has gone")
            return False
        except zmq.ZMQError as error:
            self._lose(str(error))
            return False
        return True

    def _wait(self, awaited: dict[str, DraftOrder], deadline_s: float) -> None:
        """Until all these orders are answered, or the time is over."""
        waiting = dict(awaited)
        while waiting and self._connection is not None:
            was_answered = self._answered_round == self._round_number
            if self._receive():
                if not was_answered and self._answered_round == self._round_number:
                    self._count_hop(time.perf_counter() - self._sent_s)
                waiting = {key: order for key, order in waiting.items() if not self._book.is_answered(key, order)}
            left_s = deadline_s - time.perf_counter()
            if left_s <= 0 or not waiting:
                break
            if left_s > SPIN_S:
                self._connection.socket.poll(int((left_s - SPIN_S) * 1000) + 1)
            else:
                time.sleep(0)  # lets the process's other threads run
        if self._connection is None:
            return
        if len(waiting) < len(awaited):
            self._breaker.on_answer()
        else:
            self._stats.missed_rounds += 1
            self._breaker.on_miss(time.perf_counter())

    def _count_hop(self, hop_s: float) -> None:
        stats = self._stats
        stats.last_hop_latency_s = hop_s
        stats.hop_latency_s += (HOP_SMOOTHING if stats.hop_latency_s else 1.0) * (hop_s - stats.hop_latency_s)

    def _receive(self) -> bool:
        """Take in what has come. False if there was nothing."""
        for count in range(MAX_MESSAGES_AT_ONCE):
            if self._connection is None:
                return True
            try:
                data = self._connection.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return count > 0
            except zmq.ZMQError as error:
                self._lose(str(error))
                return True
            try:
                message = decode_from_draft(data)
                if not isinstance(message, Drafts) or message.round_number > self._round_number:
                    raise MalformedError("neither asked for nor an answer")
            except MalformedError as error:
                self._malformed.add(error)
            else:
                self._on_answer(message)
        return True

    def _on_answer(self, message: Drafts) -> None:
        now_s = time.perf_counter()
        self._stats.num_mirrors, self._stats.draft_step_time_s = message.num_mirrors, message.step_time_s
        self._answered_round = max(self._answered_round, message.round_number)
        self._unanswered_since_s = None if self._answered_round == self._round_number else now_s
        self._book.take_answer(message, now_s)
