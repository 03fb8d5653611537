"""Draft servers that die, hang and come back, and several engines of one; over real sockets."""

import os
import signal
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import zmq

from engine.request import Request
from serve_app import draft_client, draft_link, draft_server
from serve_app.circuit_breaker import CircuitBreaker
from serve_app.draft_client import RemoteProposer
from serve_app.draft_messages import Hello, MirrorOpening, Round
from serve_app.draft_mirrors import MirrorKeeper
from serve_app.draft_server import DraftServer, LoadedDraft
from serve_app.draft_transport import Endpoint, connect
from serve_app.errors import DraftDeadError
from serve_app.messages import encode
from tests.serve_app.draft_process import draft_process
from tests.serve_app.scripted_draft import ENDLESS_S, PutForwardClock, is_connected, wait_until
from tests.serve_app.toy_drafter import (
    VOCAB_SIZE,
    ScriptedProposer,
    ToyDrafter,
    advance,
    continuation,
    make_request,
    order,
)

WAIT_S = 0.05  # for a draft that does not answer
LIMIT_MS = 60_000
PATIENCE_S = 30.0  # for one that does, on a machine of any speed


@contextmanager
def proposer_of(endpoints: Sequence[Endpoint], **settings: object) -> Iterator[RemoteProposer]:
    """`endpoints` may change. The fallback proposes [7]. Silence is no fault, unless told otherwise."""
    fixed = {"vocab_size": VOCAB_SIZE, "target_name": "target", "silence_limit_s": ENDLESS_S}
    proposer = RemoteProposer(
        lambda _: list(endpoints),
        ScriptedProposer([7]),
        **fixed | settings,  # type: ignore[arg-type]
    )
    try:
        yield proposer
    finally:
        proposer.close()


@contextmanager
def server_of(drafter: ToyDrafter, **settings: object) -> Iterator[DraftServer]:
    keeper = MirrorKeeper(drafter, **settings)  # type: ignore[arg-type]
    server = DraftServer(LoadedDraft(drafter, "toy", "fp"), keeper)
    server.start()
    try:
        yield server
    finally:
        server.shutdown()


def propose(proposer: RemoteProposer, request: Request, wait_s: float = WAIT_S) -> Sequence[int]:
    """One round."""
    [drafts] = proposer.propose([order(request)], wait_s)
    return drafts


def drafts_right(proposer: RemoteProposer, request: Request, wait_s: float = PATIENCE_S) -> bool:
    """Whether the draft model has proposed all that was ordered. The target chooses a token whatever comes."""
    expected = continuation(request.token_ids(0, request.num_tokens), 3)
    drafts = list(propose(proposer, request, wait_s))
    assert drafts in (expected, expected[:2], expected[:1], [7])  # late ones may be fewer
    advance(request)
    return drafts == expected


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the engine's log says of draft servers, one word for each line."""
    said: list[str] = []
    for level in ("warning", "info"):
        monkeypatch.setattr(draft_client.logger, level, lambda line: said.append(line.split()[0]))
    return said


def test_killed_and_replaced(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_link, "CONNECT_S", 0.1)
    endpoints: list[Endpoint] = []
    with proposer_of(endpoints) as proposer, draft_process() as (first, endpoint):
        endpoints.append(endpoint)
        request = make_request()
        wait_until(lambda: is_connected(proposer))
        wait_until(lambda: drafts_right(proposer, request))
        first.send_signal(signal.SIGKILL)
        first.wait()
        wait_until(lambda: not drafts_right(proposer, request, WAIT_S) and not proposer.stats().is_connected)
        for _ in range(100):
            assert not drafts_right(proposer, request, ENDLESS_S)  # one that is known to be dead is not waited for
        with draft_process() as (_, endpoint):
            endpoints[:] = [endpoint]
            wait_until(lambda: drafts_right(proposer, request))
        stats = proposer.stats()
        assert (stats.reconnects, stats.garbage) == (1, 0)
        assert stats.fallback_proposals > 100
    assert [line for line in lines if line != "speculation"] == ["connected", "lost", "connected"]


def test_stopped_and_continued(lines: list[str]) -> None:
    endpoints: list[Endpoint] = []
    breaker = CircuitBreaker(min_pause_s=0.2)
    with (
        draft_process() as (process, endpoint),
        proposer_of(endpoints, breaker=breaker) as proposer,
    ):
        endpoints.append(endpoint)
        request = make_request()
        wait_until(lambda: is_connected(proposer))
        wait_until(lambda: drafts_right(proposer, request))
        process.send_signal(signal.SIGSTOP)
        proposer._silence_limit_s = 1.0
        missed_before = proposer.stats().missed_rounds
        started_s = time.perf_counter()

        def is_lost() -> bool:
            propose(proposer, request)
            advance(request)
            return not proposer.stats().is_connected

        wait_until(is_lost)
        assert time.perf_counter() - started_s > 0.9
        # Three misses at most, then one for each try, after 0.2 and 0.4 s: hardly any time was spent waiting.
        assert proposer.stats().missed_rounds - missed_before <= 6
        proposer._silence_limit_s = ENDLESS_S
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: drafts_right(proposer, request))
        assert proposer.stats().reconnects == 1
    assert [line for line in lines if line != "speculation"] == ["connected", "lost", "connected"]


def test_a_slow_draft_is_used_when_it_is_late_and_not_waited_for() -> None:
    drafter, breaker = ToyDrafter(), CircuitBreaker(min_pause_s=ENDLESS_S, max_pause_s=ENDLESS_S)
    with server_of(drafter) as server, proposer_of([server.ipc], breaker=breaker) as proposer:
        request = make_request()
        wait_until(lambda: is_connected(proposer))
        propose(proposer, request)
        wait_until(lambda: propose(proposer, request, 0.0) == continuation([1, 2, 3], 3))
        drafter.may_step.clear()
        request.append_output(500)
        for _ in range(3):
            propose(proposer, request, 0.01)
        assert proposer.stats().missed_rounds == 3
        for _ in range(5):
            assert propose(proposer, request, ENDLESS_S) == [7]
        drafter.may_step.set()
        wait_until(lambda: propose(proposer, request, 0.0) == continuation([1, 2, 3, 500], 3))
        assert proposer.stats().missed_rounds == 3


def test_several_engines_of_one_draft() -> None:
    drafter = ToyDrafter()
    with server_of(drafter) as server, proposer_of([server.ipc]) as first:
        requests = [make_request("r", [1]), make_request("r", [2])]
        with proposer_of([server.ipc]) as second:
            for proposer, request in zip((first, second), requests, strict=True):
                wait_until(lambda proposer=proposer: is_connected(proposer))  # type: ignore[misc]
                wait_until(lambda proposer=proposer, request=request: drafts_right(proposer, request))  # type: ignore[misc]
            assert drafts_right(first, requests[0])
            assert server.num_mirrors == server.num_engines == 2
            assert second.stats().num_mirrors == 2
        wait_until(lambda: server.num_mirrors == server.num_engines == 1)  # an engine has gone
        assert drafts_right(first, requests[0])
        first.forget(requests[0])
        wait_until(lambda: not drafter.mirrors)


def test_silent_requests_are_dropped_and_opened_anew() -> None:
    drafter = ToyDrafter()
    with server_of(drafter, mirror_idle_s=0.3) as server, proposer_of([server.ipc]) as proposer:
        request = make_request()
        wait_until(lambda: is_connected(proposer))
        wait_until(lambda: drafts_right(proposer, request))
        wait_until(lambda: not drafter.mirrors)
        wait_until(lambda: drafts_right(proposer, request))


def test_garbage_does_not_stop_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.draft_messages.logger.warning", lambda _: None)
    with server_of(ToyDrafter()) as server, zmq.Context() as context:
        socket = connect(context, server.ipc, None)
        assert socket.poll(LIMIT_MS, zmq.POLLOUT)
        foreign = MirrorOpening("0", [VOCAB_SIZE], [], make_request().sampling, 0)
        for data in (b"", b"\xc1garbage", b"\x91" * 5000, encode(Round(1, [foreign]))):
            socket.send(data)
        socket.send_multipart([b"two", b"frames"])
        wait_until(lambda: server.num_malformed == 5)
        socket.send(encode(Hello(1)))
        assert socket.poll(LIMIT_MS)
        server.check_health()
        socket.close()


def test_a_dead_drafter_is_told_by_its_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_server.logger, "exception", lambda _: None)
    drafter = ToyDrafter()

    def fail() -> list[str]:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(drafter, "step", fail)
    with server_of(drafter) as server, proposer_of([server.ipc]) as proposer:
        server.check_health()
        wait_until(lambda: is_connected(proposer))
        request = make_request()
        propose(proposer, request)
        wait_until(lambda: propose(proposer, request, 0.0) == [7] and not proposer.stats().is_connected)
        wait_until(lambda: not server.is_alive)  # its sockets are closed a moment before
        with pytest.raises(DraftDeadError, match="the device is gone"):
            server.check_health()


def test_a_drafter_that_hangs_is_told_by_its_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_server, "time", clock := PutForwardClock())
    drafter = ToyDrafter()
    with server_of(drafter) as server, proposer_of([server.ipc]) as proposer:

        def is_healthy() -> bool:
            with suppress(DraftDeadError):
                server.check_health()
                return True
            return False

        wait_until(lambda: is_connected(proposer))
        clock.skip(2 * draft_server.STALL_LIMIT_S)
        wait_until(is_healthy)  # idle is not hung
        drafter.may_step.clear()
        propose(proposer, make_request())
        wait_until(lambda: drafter.num_steps > 0)
        server.check_health()
        clock.skip(2 * draft_server.STALL_LIMIT_S)
        with pytest.raises(DraftDeadError, match="no step for"):
            server.check_health()
        drafter.may_step.set()
        wait_until(is_healthy)


def test_the_socket_is_for_its_user_only_and_goes_with_the_server() -> None:
    with server_of(ToyDrafter()) as server:
        directory = Path(server.ipc.address.removeprefix("ipc://")).parent
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert not directory.exists()


def test_a_draft_whose_books_are_wrong_is_replaced() -> None:
    """They are looked at whenever there is nothing to draft."""
    drafter = ToyDrafter()
    with server_of(drafter) as server, proposer_of([server.ipc]) as proposer:
        request = make_request()
        wait_until(lambda: drafts_right(proposer, request))
        wait_until(lambda: drafter.num_checks > 0)
        server.check_health()
        drafter.is_broken = True
        propose(proposer, request)
        wait_until(lambda: not server.is_alive)
        with pytest.raises(DraftDeadError, match="a mirror's blocks are lost"):
            server.check_health()
