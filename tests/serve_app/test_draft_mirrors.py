"""What a draft server does with rounds, without sockets."""

from collections.abc import Sequence

import pytest

from engine.errors import InvalidRequest
from engine.request import SamplingParams
from serve_app import draft_mirrors
from serve_app.draft_messages import Acceptance, Drafts, MalformedError, MirrorDrafts, MirrorOpening, Round
from serve_app.draft_mirrors import MirrorKeeper
from tests.serve_app.toy_drafter import VOCAB_SIZE, ToyDrafter, continuation

A, B = (0, b"a"), (0, b"b")
PROMPT = [1, 2, 3]


def opening(key: str, prompt: Sequence[int] = PROMPT, seed: int | None = 1, **sampling: object) -> MirrorOpening:
    return MirrorOpening(key, list(prompt), [], SamplingParams(seed=seed, **sampling), 0)  # type: ignore[arg-type]


def run(keeper: MirrorKeeper) -> list[tuple[draft_mirrors.Peer, Drafts]]:
    """All replies until nothing is left to do."""
    replies = []
    for _ in range(1000):
        if not keeper.has_work:
            return replies
        keeper.work()
        replies += keeper.replies()
    raise AssertionError("the keeper does not come to an end")


def drafts_of(replies: Sequence[tuple[draft_mirrors.Peer, Drafts]]) -> list[MirrorDrafts]:
    return [drafts for _, message in replies for drafts in message.drafts]


def opened(keeper: MirrorKeeper, key: str, num_draft_tokens: int, peer: draft_mirrors.Peer = A) -> None:
    """A request that is new no more."""
    keeper.apply(peer, Round(1, [opening(key)], [], [(key, 1)]))
    run(keeper)
    keeper.apply(peer, Round(2, [], [], [(key, num_draft_tokens)]))


def test_a_new_request_is_answered_with_its_first_draft() -> None:
    keeper = MirrorKeeper(ToyDrafter(), runs_ahead=False)
    keeper.apply(A, Round(1, [opening("x")], [], [("x", 3)]))
    ahead = continuation(PROMPT, 3)
    assert drafts_of(run(keeper)) == [MirrorDrafts("x", 3, ahead[:1]), MirrorDrafts("x", 3, ahead)]


def test_an_order_is_answered_at_once_and_again_after_running_ahead() -> None:
    keeper = MirrorKeeper(ToyDrafter())
    opened(keeper, "x", 5)
    replies = run(keeper)
    assert [peer for peer, _ in replies] == [A, A]
    assert [message.round_number for _, message in replies] == [2, 2]
    ahead = continuation(PROMPT, 11)
    assert drafts_of(replies) == [MirrorDrafts("x", 3, ahead[:5]), MirrorDrafts("x", 3, ahead)]
    assert replies[0][1].num_mirrors == 1

    keeper.apply(A, Round(3, [], [Acceptance("x", 3, ahead[:4])], [("x", 3)]))
    keeper.work()  # full acceptance: the next drafts are there
    [(_, reply)] = keeper.replies()
    assert reply.round_number == 3
    assert reply.drafts[0].position == 7
    assert reply.drafts[0].token_ids[:7] == ahead[4:]


def test_rejected_drafts_are_drafted_anew() -> None:
    keeper = MirrorKeeper(ToyDrafter(), runs_ahead=False)
    keeper.apply(A, Round(1, [opening("x")], [], [("x", 2)]))
    run(keeper)
    keeper.apply(A, Round(2, [], [Acceptance("x", 3, [500])], [("x", 2)]))
    assert drafts_of(run(keeper)) == [MirrorDrafts("x", 4, continuation([*PROMPT, 500], 2))]


def test_without_running_ahead_nothing_more_than_ordered_is_drafted() -> None:
    drafter = ToyDrafter()
    keeper = MirrorKeeper(drafter, runs_ahead=False)
    keeper.apply(A, Round(1, [opening("x")], [], [("x", 3)]))
    run(keeper)
    assert drafter.num_steps == 4  # the prompt, and three drafts


def test_orders_come_before_running_ahead() -> None:
    drafter = ToyDrafter()
    keeper = MirrorKeeper(drafter)
    keeper.apply(A, Round(1, [opening("x")], [], [("x", 8)]))
    while len(drafter.drafts("1.x")[1]) < 9:
        keeper.work()  # x runs ahead
    keeper.replies()
    num_ahead = len(drafter.drafts("1.x")[1])
    keeper.apply(B, Round(1, [opening("y", [9])], [], [("y", 2)]))
    replies: list[tuple[draft_mirrors.Peer, Drafts]] = []
    while not replies:
        keeper.work()
        replies = keeper.replies()
    assert replies[0][0] == B
    assert len(drafter.drafts("1.x")[1]) == num_ahead
    assert drafts_of(run(keeper))[-1].token_ids == continuation(PROMPT, 17)  # x goes on


def test_engines_may_use_the_same_keys() -> None:
    keeper = MirrorKeeper(ToyDrafter(), runs_ahead=False)
    keeper.apply(A, Round(1, [opening("x", [1])], [], [("x", 2)]))
    keeper.apply(B, Round(5, [opening("x", [2])], [], [("x", 2)]))
    replies = {peer: message for peer, message in run(keeper) if message.drafts}  # the last of each
    assert replies[A].drafts == [MirrorDrafts("x", 1, continuation([1], 2))]
    assert replies[B].drafts == [MirrorDrafts("x", 1, continuation([2], 2))]
    assert (replies[A].round_number, replies[B].round_number) == (1, 5)
    keeper.forget(A)
    assert keeper.num_mirrors == 1
    assert [peer for peer, _ in keeper.signs_of_life()] == [B]


def test_the_end_of_the_context_is_answered_with_what_there_is() -> None:
    keeper = MirrorKeeper(ToyDrafter(max_tokens=4))
    keeper.apply(A, Round(1, [opening("x")], [], [("x", 3)]))
    assert drafts_of(run(keeper)) == [MirrorDrafts("x", 3, continuation(PROMPT, 1))]


def test_lost_mirrors_are_named() -> None:
    drafter = ToyDrafter()
    keeper = MirrorKeeper(drafter)
    keeper.apply(A, Round(1, [opening("x"), opening("y")]))
    drafter.drop("1.x")  # the drafter has lost it
    keeper.apply(
        A, Round(2, [], [Acceptance("x", 3, [5]), Acceptance("z", 3, [5]), Acceptance("y", 9, [5])], [("w", 1)])
    )
    keeper.work()
    [(_, reply)] = keeper.replies()
    assert set(reply.unknown) == {"x", "y", "z", "w"}
    assert keeper.num_mirrors == 0
    assert not drafter.mirrors


def test_too_many_mirrors_are_refused() -> None:
    drafter = ToyDrafter()
    keeper = MirrorKeeper(drafter, max_mirrors=2, runs_ahead=False)
    keeper.apply(A, Round(1, [opening(key) for key in "xyz"], [], [(key, 1) for key in "xyz"]))
    replies = run(keeper)
    assert [message.refused for _, message in replies if message.refused] == [["z"]]
    assert not any(message.unknown for _, message in replies)
    assert {drafts.key for drafts in drafts_of(replies)} == {"x", "y"}
    keeper.apply(A, Round(2, [opening("z")], [], [("z", 1)], ["x"]))  # drops come first
    assert [drafts.key for drafts in drafts_of(run(keeper))] == ["z"]
    keeper.apply(A, Round(3, [opening("z", [7])], [], [("z", 1)]))  # replaces its own
    assert drafts_of(run(keeper))[0].position == 1
    assert keeper.num_mirrors == len(drafter.mirrors) == 2


def test_what_the_drafter_refuses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = ToyDrafter()

    def refuse(*_: object) -> None:
        raise InvalidRequest("too long")

    monkeypatch.setattr(drafter, "open", refuse)
    keeper = MirrorKeeper(drafter)
    keeper.apply(A, Round(1, [opening("x")], [], [("x", 1)]))
    assert [message.refused for _, message in keeper.replies()] == [["x"]]
    assert not keeper.has_work


@pytest.mark.parametrize(
    "message",
    [
        Round(1, [opening("x", [VOCAB_SIZE])]),
        Round(1, [opening("x", logit_bias={VOCAB_SIZE: 1.0})]),
        Round(1, [opening("x", logit_bias={-1: 1.0})]),
        Round(1, [opening("x", [])]),
        Round(1, [opening("x", seed=None)]),
        Round(1, [opening("x")], [Acceptance("x", 3, [5, VOCAB_SIZE])]),
    ],
)
def test_a_round_that_cannot_be_meant_changes_nothing(message: Round) -> None:
    keeper = MirrorKeeper(ToyDrafter())
    with pytest.raises(MalformedError):
        keeper.apply(A, message)
    assert keeper.num_mirrors == 0
    assert not keeper.replies()


def test_silent_mirrors_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(draft_mirrors.time, "monotonic", lambda: now_s)
    drafter = ToyDrafter()
    keeper = MirrorKeeper(drafter, mirror_idle_s=10.0)
    keeper.apply(A, Round(1, [opening("x"), opening("y")], [], [("x", 1), ("y", 1)]))
    now_s = 105.0
    keeper.apply(A, Round(2, [], [Acceptance("x", 3, [4])]))
    now_s = 111.0
    keeper.expire()
    assert list(drafter.mirrors) == ["1.x"]
    now_s = 116.0
    keeper.expire()
    assert not drafter.mirrors
    assert keeper.num_engines == 0
    assert not run(keeper)
