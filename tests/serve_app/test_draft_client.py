"""The engine's side of a draft server, against one that says what the test wants."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from engine.speculative.speculation import Speculation
from serve_app import draft_book, draft_client, draft_link
from serve_app.draft_client import MAX_ROUNDS_IN_FLIGHT, RemoteProposer
from serve_app.draft_messages import PROTOCOL, Drafts, MirrorDrafts
from serve_app.messages import encode
from tests.serve_app.scripted_draft import (
    ENDLESS_S,
    CountingProposer,
    PutForwardClock,
    ScriptedDraft,
    SilentSocket,
    WaitingClock,
    connected,
    is_connected,
    wait_until,
)
from tests.serve_app.toy_drafter import (
    VOCAB_SIZE,
    ScriptedProposer,
    advance,
    continuation,
    make_request,
    order,
)

WAIT_S = 0.05
LONG_S = 60.0  # of a wait that ends before
Pair = tuple[ScriptedDraft, CountingProposer]


@pytest.fixture
def fallback() -> ScriptedProposer:
    return ScriptedProposer()


@pytest.fixture
def pair(tmp_path: Path, fallback: ScriptedProposer) -> Iterator[Pair]:
    with connected(tmp_path, fallback) as both:
        yield both


def drafts(pair: Pair, round_number: int, *mirrors: MirrorDrafts, **fields: object) -> None:
    """Sends drafts, which then have arrived."""
    draft, proposer = pair
    draft.send(Drafts(round_number, list(mirrors), **fields))  # type: ignore[arg-type]
    draft.wait_until_heard(proposer)


def test_rounds_tell_only_what_is_new(pair: Pair) -> None:
    draft, proposer = pair
    first, second = make_request("a", [1, 2, 3]), make_request("b", [4])
    advance(second, 2)
    assert proposer.propose([order(first, 2)], 0.0) == [[]]
    message = draft.receive_round()
    assert (message.number, message.orders) == (1, [("0", 2)])
    assert (message.openings[0].prompt_token_ids, message.openings[0].output_token_ids) == ([1, 2, 3], [])

    advance(first, 3)
    proposer.propose([order(first, 2), order(second, 99)], 0.0)
    message = draft.receive_round()
    assert message.acceptances[0].position == 3
    assert message.acceptances[0].token_ids == first.output_token_ids
    [opening] = message.openings
    assert (opening.key, opening.prompt_token_ids, opening.output_token_ids) == ("1", [4], second.output_token_ids)
    assert message.orders == [("0", 2), ("1", 16)]

    proposer.forget(first)  # told with the next round
    proposer.propose([order(second, 1)], 0.0)
    message = draft.receive_round()
    assert (message.openings, message.acceptances, message.dropped) == ([], [], ["0"])
    proposer.forget(second)  # the last one: told at once
    assert draft.receive_round().dropped == ["1"]


def test_drafts_are_used_while_their_beginning_agrees(pair: Pair) -> None:
    """A late answer to the first round is as good as one to the last, where it begins with what was chosen since."""
    _, proposer = pair
    request = make_request()
    proposer.propose([order(request)], 0.0)
    ahead = continuation([1, 2, 3], 7)
    drafts(pair, 1, MirrorDrafts("0", 3, ahead))
    assert proposer.propose([order(request)], 0.0) == [ahead[:3]]
    advance(request, 2)
    assert proposer.propose([order(request)], 0.0) == [ahead[2:5]]
    advance(request, 3)
    assert proposer.propose([order(request)], 0.0) == [ahead[5:]]  # fewer than ordered
    advance(request, 2)
    assert proposer.propose([order(request)], 0.0) == [[]]
    drafts(pair, 1, MirrorDrafts("0", 8, [*ahead[5:], 77, 78]))  # still late
    assert proposer.propose([order(request)], 0.0) == [[77, 78]]
    request.append_output(79)  # not what was drafted
    assert proposer.propose([order(request)], 0.0) == [[]]
    assert proposer.stats().garbage == 0


def test_the_engine_reports_how_it_goes(pair: Pair) -> None:
    _, proposer = pair
    remote = Speculation(proposer, 4, 16).stats().remote
    assert remote == proposer.stats()
    assert remote.is_connected


def become_silent(proposer: CountingProposer, monkeypatch: pytest.MonkeyPatch) -> WaitingClock:
    """From now on nothing comes, and only waiting takes time."""
    clock = WaitingClock()
    monkeypatch.setattr(draft_client, "time", clock)
    assert proposer._connection is not None
    silent = SilentSocket(clock, proposer._connection.socket)
    proposer._connection = replace(proposer._connection, socket=silent)  # type: ignore[arg-type]
    return clock


def test_waits_for_an_answer_and_no_longer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, proposer = pair
    request = make_request()
    assert proposer.propose([order(request)], ENDLESS_S) == [[]]  # its prompt has to be read: not waited for
    drafts(pair, 1, MirrorDrafts("0", 3, []))
    drafts(pair, 0)  # a sign of life answers nothing

    clock = become_silent(proposer, monkeypatch)
    started_s = clock.now_s
    assert proposer.propose([order(request)], WAIT_S) == [[]]
    assert WAIT_S <= clock.now_s - started_s < WAIT_S + 0.001
    assert proposer.stats().missed_rounds == 1


def test_a_server_that_falls_silent_is_soon_not_waited_for_and_then_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(tmp_path, ScriptedProposer([7]), draft_client.SILENCE_LIMIT_S) as (draft, proposer):
        request = make_request()
        proposer.propose([order(request)], 0.0)
        drafts((draft, proposer), 1, MirrorDrafts("0", 3, []))
        clock = become_silent(proposer, monkeypatch)
        started_s = clock.now_s
        while proposer.stats().is_connected:
            assert proposer.propose([order(request)], WAIT_S) == [[7]]
            advance(request)
            clock.sleep(0.002)
        assert 0 < clock.now_s - started_s - draft_client.SILENCE_LIMIT_S < 0.01
        assert proposer.stats().missed_rounds == 3


def test_an_answer_to_a_round_that_was_never_sent_is_garbage(pair: Pair) -> None:
    _, proposer = pair
    request = make_request()
    proposer.propose([order(request)], 0.0)
    drafts(pair, 2, MirrorDrafts("0", 3, [5]))
    assert proposer.propose([order(request)], 0.0) == [[]]
    assert proposer.stats().garbage == 1


def test_hop_latency_is_of_rounds_that_were_waited_for(tmp_path: Path) -> None:
    with connected(tmp_path, ScriptedProposer()) as (draft, proposer):
        request = make_request()
        proposer.propose([order(request)], 0.0)
        draft.receive_round()
        drafts((draft, proposer), 1, MirrorDrafts("0", 3, []))
        assert proposer.stats().last_hop_latency_s == 0.0

        def answer() -> None:
            message = draft.receive_round()
            wait_until(lambda: proposer._unanswered_since_s is not None)  # the time of sending has been taken
            time.sleep(0.03)
            draft.send(Drafts(message.number, [MirrorDrafts("0", 3, [8])]))  # fewer than ordered, and all there is

        thread = threading.Thread(target=answer)
        thread.start()
        assert proposer.propose([order(request)], LONG_S) == [[8]]
        thread.join()
        stats = proposer.stats()
        assert 0.03 <= stats.last_hop_latency_s == stats.hop_latency_s < LONG_S
        assert stats.missed_rounds == 0


@pytest.mark.parametrize(
    "answer",
    [
        MirrorDrafts("0", 3, [VOCAB_SIZE]),
        MirrorDrafts("0", 4, [1]),  # past what the draft was told
        MirrorDrafts("0", 2**31 - 1, [1]),
    ],
)
def test_impossible_drafts_are_dropped(pair: Pair, answer: MirrorDrafts) -> None:
    _, proposer = pair
    request = make_request()
    proposer.propose([order(request)], 0.0)
    drafts(pair, 1, answer)
    assert proposer.propose([order(request)], 0.0) == [[]]
    assert proposer.stats().garbage == 1
    drafts(pair, 1, MirrorDrafts("0", 3, [5]))
    assert proposer.propose([order(request)], 0.0) == [[5]]


def test_malformed_bytes_are_counted_and_passed_over(pair: Pair) -> None:
    draft, proposer = pair
    request = make_request()
    proposer.propose([order(request)], 0.0)
    for data in (b"", b"\xc1" * 50, b"\x91" * 5000, msgspec.msgpack.encode(["drafts", 1, [["0", 3, ["5"]]]])):
        draft.send_bytes(data)
    drafts(pair, 1, MirrorDrafts("0", 3, [5]), num_mirrors=7, step_time_s=0.25)
    assert proposer.propose([order(request)], 0.0) == [[5]]
    stats = proposer.stats()
    assert stats.garbage == 4
    assert (stats.num_mirrors, stats.draft_step_time_s, stats.is_connected) == (7, 0.25, True)


def test_a_flood_of_messages_does_not_hold_the_engine(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, proposer = pair
    request = make_request()
    proposer.propose([order(request)], 0.0)
    become_silent(proposer, monkeypatch)
    flood = [encode(Drafts(1))] * 900
    monkeypatch.setattr(SilentSocket, "recv", lambda *_: flood.pop())
    proposer.propose([order(request)], 0.0)
    assert proposer.num_taken_in == draft_client.MAX_MESSAGES_AT_ONCE


def test_a_lost_mirror_is_opened_anew(pair: Pair) -> None:
    draft, proposer = pair
    request = make_request()
    proposer.propose([order(request)], 0.0)
    draft.receive_round()
    advance(request)
    drafts(pair, 1, unknown=["0", "nobody"])
    proposer.propose([order(request)], 0.0)
    [opening] = draft.receive_round().openings
    assert (opening.key, opening.output_token_ids) == ("1", request.output_token_ids)
    drafts(pair, 2, MirrorDrafts("0", 4, [1]), MirrorDrafts("1", 4, [2]))
    assert proposer.propose([order(request)], 0.0) == [[2]]


def test_a_refused_request_is_left_alone_for_a_while(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, proposer = pair
    monkeypatch.setattr(draft_client, "time", clock := PutForwardClock())
    monkeypatch.setattr(draft_book, "REFUSED_PAUSE_S", LONG_S)
    request, other = make_request("a"), make_request("b")
    proposer.propose([order(request)], 0.0)
    draft.receive_round()
    drafts(pair, 1, refused=["0"])
    assert not proposer.may_propose(request)
    proposer.propose([order(request), order(other)], WAIT_S)
    assert draft.receive_round().orders == [("1", 3)]
    clock.skip(LONG_S)
    assert proposer.may_propose(request)
    proposer.propose([order(request)], 0.0)
    [opening] = draft.receive_round().openings
    assert opening.key == "2"


def test_the_fallback_serves_what_the_draft_does_not(pair: Pair, fallback: ScriptedProposer) -> None:
    _, proposer = pair
    fallback.answer = [9, 9]
    first, second = make_request("a"), make_request("b")
    assert proposer.propose([order(first), order(second)], WAIT_S) == [[9, 9], [9, 9]]
    drafts(pair, 1, MirrorDrafts("1", 3, [5, 6, 7]))
    assert proposer.propose([order(first), order(second)], 0.0) == [[9, 9], [5, 6, 7]]
    stats = proposer.stats()
    assert (stats.rounds, stats.remote_proposals, stats.fallback_proposals) == (2, 1, 3)
    proposer.forget(first)
    assert fallback.forgotten == ["a"]


def test_the_engine_need_not_wait_while_a_prompt_is_read(pair: Pair) -> None:
    draft, proposer = pair
    request = make_request()
    assert proposer.may_propose(request)  # to be told of
    proposer.propose([order(request)], 0.0)
    assert not proposer.may_propose(request)
    draft.send(Drafts(1, [MirrorDrafts("0", 3, [])]))
    wait_until(lambda: proposer.may_propose(request))  # which looks by itself


def test_nothing_is_sent_to_a_server_that_is_far_behind(pair: Pair) -> None:
    draft, proposer = pair
    request = make_request()
    for _ in range(MAX_ROUNDS_IN_FLIGHT + 5):
        proposer.propose([order(request)], 0.0)
        advance(request)
    numbers = [draft.receive_round().number for _ in range(MAX_ROUNDS_IN_FLIGHT)]
    assert numbers == list(range(1, MAX_ROUNDS_IN_FLIGHT + 1))
    drafts(pair, numbers[-1])
    proposer.propose([order(request)], 0.0)
    message = draft.receive_round()
    assert message.number == MAX_ROUNDS_IN_FLIGHT + 1
    assert message.acceptances[0].token_ids == request.output_token_ids[MAX_ROUNDS_IN_FLIGHT - 1 :]


def test_a_request_that_is_too_long_for_a_message_is_not_told(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, proposer = pair
    monkeypatch.setattr(draft_book, "MAX_ROUND_TOKENS", 10)
    first, second, huge = make_request("a", [1] * 6), make_request("b", [1] * 6), make_request("c", [1] * 11)
    assert not proposer.may_propose(huge)
    proposer.propose([order(first), order(second), order(huge)], 0.0)
    assert len(draft.receive_round().openings) == 1
    proposer.propose([order(first), order(second), order(huge)], 0.0)
    assert [opening.key for opening in draft.receive_round().openings] == ["1"]


def test_requests_that_end_are_told_before_they_are_many(pair: Pair) -> None:
    draft, proposer = pair
    requests = [make_request(str(place)) for place in range(draft_client.MAX_DROPS_HELD + 1)]
    proposer.propose([order(request) for request in requests], 0.0)
    draft.receive_round()
    for request in requests[:-1]:
        proposer.forget(request)
    assert len(draft.receive_round().dropped) == draft_client.MAX_DROPS_HELD


@pytest.mark.parametrize(
    ("vocab_size", "protocol", "complaint"),
    [
        (
            VOCAB_SIZE + 1,
            PROTOCOL,
            "draft model toy has a vocabulary of 1001 tokens and target one of 1000: "
            "a draft model must have the vocabulary of its target",
        ),
        (VOCAB_SIZE, PROTOCOL + 1, "the draft server speaks version 2 of the protocol, this engine 1"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused_with_one_line(
    tmp_path: Path,
    vocab_size: int,
    protocol: int,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    fallback: ScriptedProposer,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(draft_link.logger, "warning", lines.append)
    monkeypatch.setattr(draft_link, "CONNECT_S", LONG_S)
    monkeypatch.setattr(draft_link, "HANDSHAKE_S", LONG_S)
    draft = ScriptedDraft(tmp_path)
    proposer = RemoteProposer(lambda _: [draft.endpoint], fallback, vocab_size=VOCAB_SIZE, target_name="target")
    for _ in range(3):  # it keeps trying: the draft may be replaced
        draft.welcome(vocab_size, protocol)
    draft.welcome()
    wait_until(lambda: is_connected(proposer))
    proposer.close()
    draft.close()
    assert lines == [f"speculation goes on without a draft model: {complaint}"]


def test_without_a_draft_the_fallback_does_it_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fallback: ScriptedProposer
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(draft_link.logger, "warning", lines.append)
    monkeypatch.setattr(draft_link, "CONNECT_S", 0.1)
    calls = 0

    def resolve(_: str | None) -> list[draft_link.Endpoint]:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise RuntimeError("the deployment is starting")
        return [draft_link.Endpoint(f"ipc://{tmp_path}/nobody"), draft_link.Endpoint("nonsense")]

    proposer = RemoteProposer(resolve, fallback, vocab_size=VOCAB_SIZE, target_name="target")
    request = make_request()
    assert not proposer.may_propose(request)
    fallback.answer = [4]
    assert proposer.may_propose(request)
    assert proposer.propose([order(request)], ENDLESS_S) == [[4]]
    wait_until(lambda: calls >= 5)  # with a pause that grows
    proposer.forget(request)
    proposer.close()
    assert fallback.is_closed
    assert lines[0].endswith("no draft server can be found: RuntimeError('the deployment is starting')")
    assert len(lines) == 3, "a line for each reason, not for each try"
