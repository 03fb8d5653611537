import math
from types import MappingProxyType

import msgspec
import pytest

from engine.request import SamplingParams
from serve_app import draft_messages as messages
from serve_app.draft_messages import Acceptance, Drafts, Hello, MirrorDrafts, MirrorOpening, Round, Welcome
from serve_app.messages import encode

SAMPLING = SamplingParams(temperature=0.5, logit_bias=MappingProxyType({7: -1.5}), seed=2**63 - 1, stop_token_ids=(3,))
OPENING = MirrorOpening("0", [1, 2], [3], SAMPLING, 4)


@pytest.mark.parametrize(
    "message",
    [
        Hello(1),
        Round(0),
        Round(7, [OPENING], [Acceptance("1", 9, [5, 6])], [("0", 16), ("1", 1)], ["2"]),
    ],
)
def test_round_trip_from_the_engine(message: messages.FromEngine) -> None:
    assert messages.decode_from_engine(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [Welcome(1, "toy", "fp", 1000), Drafts(3), Drafts(3, [MirrorDrafts("0", 5, [8, 9])], ["1"], ["2"], 4, 0.5)],
)
def test_round_trip_from_the_draft(message: messages.FromDraft) -> None:
    assert messages.decode_from_draft(encode(message)) == message


def raw(*fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\x00garbage",
        encode(Round(1))[:-1],
        raw("unknown", 1),
        raw("welcome", 1, "toy", "fp", 1000),  # the other direction
        raw("round", -1, [], [], [], []),
        raw("round", 2**63, [], [], [], []),
        raw("round", 1, [], [["k", 0, [-1]]], [], []),
        raw("round", 1, [], [["k", -1, [1]]], [], []),
        raw("round", 1, [], [["k", 0, [True]]], [], []),
        raw("round", 1, [], [], [["k", 0]], []),
        raw("round", 1, [], [], [["k", 17]], []),
        raw("round", 1, [], [], [["k" * 65, 1]], []),
        raw("round", 1, [], [], [["", 1]], []),
        raw("round", 1, [], [], [], ["k"] * 4097),
        raw("round", 1, [["k", [1], [], {"temperature": -1.0}, 0]], [], [], []),
        b"\x91" * 100_000,  # lists in lists
        b"\x92\xa5hello" + b"\x91" * 100_000 + b"\x01",
    ],
)
def test_malformed_bytes_of_an_engine(data: bytes) -> None:
    with pytest.raises(messages.MalformedError):
        messages.decode_from_engine(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encode(Round(1)),
        raw("drafts", 1, [["k", 0, [1.5]]], [], [], 0, 0.0),
        raw("drafts", 1, [["k", 0, [1] * 65]], [], [], 0, 0.0),
        raw("drafts", 1, [["k", 0, [2**31]]], [], [], 0, 0.0),
        raw("drafts", 1, [], [], [], 0, math.nan),
        raw("drafts", 1, [], [], [], 0, math.inf),
        raw("welcome", 1, "n" * 5000, "fp", 1000),
    ],
)
def test_malformed_bytes_of_a_draft(data: bytes) -> None:
    with pytest.raises(messages.MalformedError):
        messages.decode_from_draft(data)


def test_the_largest_round_is_within_the_message_limit() -> None:
    """A larger message would end the connection."""
    tokens = [2**31 - 1] * messages.MAX_ROUND_TOKENS
    assert len(encode(Round(1, [MirrorOpening("0", tokens, [], SAMPLING, 0)]))) < messages.MAX_MESSAGE_BYTES


def test_one_round_costs_few_bytes() -> None:
    """64 requests in hundreds of rounds a second."""
    acceptances = [Acceptance(str(key), 1000, [1000, 2000, 3000]) for key in range(64)]
    orders = [(str(key), 4) for key in range(64)]
    assert len(encode(Round(1000, [], acceptances, orders))) < 64 * 32


def test_the_log_hears_of_malformed_messages_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(messages.logger, "warning", lines.append)
    malformed = messages.MalformedCount("somebody")
    for _ in range(1000):
        malformed.add(messages.MalformedError("nonsense"))
    assert malformed.count == 1000
    assert lines == ["ignored a malformed message of somebody (1 so far): nonsense"]
