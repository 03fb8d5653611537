"""Messages between engines and draft servers: msgpack over sockets, one message a round, nothing ever unpickled.

A round names requests by keys that the engine's side makes up; they mean something on their connection only. Whatever
a decoder accepts is within the bounds given here; token ids remain to be compared with the vocabulary.
"""

import logging
import time
from typing import Annotated

import msgspec
from msgspec import Meta

from engine.config import MAX_DRAFT_TOKENS
from engine.request import SamplingParams

logger = logging.getLogger("ray.serve")

PROTOCOL = 1
MAX_MESSAGE_BYTES = 8 << 20  # a larger one ends its connection
MAX_ROUND_TOKENS = 1 << 20  # ids of prompts and answers in one round: at most five bytes each, so below the limit
MAX_KEY_CHARS = 64
MAX_MIRRORS_OF_ROUND = 4096
_LOG_PAUSE_S = 30.0

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Position = Annotated[int, Meta(ge=0, lt=2**31)]
RoundNumber = Annotated[int, Meta(ge=0, lt=2**62)]
Key = Annotated[str, Meta(min_length=1, max_length=MAX_KEY_CHARS)]
Keys = Annotated[list[Key], Meta(max_length=MAX_MIRRORS_OF_ROUND)]
Tokens = Annotated[list[TokenId], Meta(max_length=MAX_ROUND_TOKENS)]
NumDraftTokens = Annotated[int, Meta(ge=1, le=MAX_DRAFT_TOKENS)]
Name = Annotated[str, Meta(max_length=4096)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e6)]


class Hello(msgspec.Struct, tag="hello", array_like=True):
    """The first message of an engine: who is there? Answered by a Welcome."""

    protocol: int


class Welcome(msgspec.Struct, tag="welcome", array_like=True):
    """Who drafts."""

    protocol: int
    model_name: Name
    fingerprint: Name
    vocab_size: Annotated[int, Meta(ge=1, lt=2**31)]


class MirrorOpening(msgspec.Struct, array_like=True):
    """A request that the draft does not know yet. `sampling` has a seed."""

    key: Key
    prompt_token_ids: Tokens
    output_token_ids: Tokens
    sampling: SamplingParams
    choice_index: Annotated[int, Meta(ge=0, lt=2**31)]


class Acceptance(msgspec.Struct, array_like=True):
    """What the target has chosen from `position` on, since the last round that named the request."""

    key: Key
    position: Position
    token_ids: Tokens


class Round(msgspec.Struct, tag="round", array_like=True):
    """Everything that an engine tells and asks at once. Carried out in the order drops, openings, acceptances, orders.

    `number` grows by 1 with each round that orders something.
    """

    number: RoundNumber
    openings: Annotated[list[MirrorOpening], Meta(max_length=MAX_MIRRORS_OF_ROUND)] = []
    acceptances: Annotated[list[Acceptance], Meta(max_length=MAX_MIRRORS_OF_ROUND)] = []
    orders: Annotated[list[tuple[Key, NumDraftTokens]], Meta(max_length=MAX_MIRRORS_OF_ROUND)] = []
    dropped: Keys = []


class MirrorDrafts(msgspec.Struct, array_like=True):
    """Drafts of one request from `position` on, where the tokens end that the draft knew to be accepted."""

    key: Key
    position: Position
    token_ids: Annotated[list[TokenId], Meta(max_length=4 * MAX_DRAFT_TOKENS)]


class Drafts(msgspec.Struct, tag="drafts", array_like=True):
    """From the draft: as soon as a request has what was ordered (a new one: its first draft), again when the draft has
    run ahead, and once in a while without any drafts, as a sign of life. A request that is in it has been answered,
    with however few drafts.

    round_number: of the last round that was carried out before. unknown: mirrors that are lost, to be opened anew.
    refused: mirrors that were not opened, for there are too many.
    """

    round_number: RoundNumber
    drafts: Annotated[list[MirrorDrafts], Meta(max_length=MAX_MIRRORS_OF_ROUND)] = []
    unknown: Keys = []
    refused: Keys = []
    num_mirrors: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    step_time_s: Seconds = 0.0


FromEngine = Hello | Round
FromDraft = Welcome | Drafts

_from_engine = msgspec.msgpack.Decoder(FromEngine)
_from_draft = msgspec.msgpack.Decoder(FromDraft)
# What decoding foreign bytes raises: the last for lists in lists in lists.
_DECODING_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)


class MalformedError(ValueError):
    """Bytes from a socket that are no message, or a message that cannot be meant."""


def decode_from_engine(data: bytes) -> FromEngine:
    """Raises MalformedError."""
    try:
        return _from_engine.decode(data)
    except _DECODING_ERRORS as error:
        raise MalformedError(str(error)) from None


def decode_from_draft(data: bytes) -> FromDraft:
    """Raises MalformedError."""
    try:
        return _from_draft.decode(data)
    except _DECODING_ERRORS as error:
        raise MalformedError(str(error)) from None


class MalformedCount:
    """Counts malformed messages, and tells the log of them once in a while."""

    def __init__(self, sender: str) -> None:
        self.count = 0
        self._sender = sender
        self._last_logged_s = -_LOG_PAUSE_S

    def add(self, error: MalformedError) -> None:
        self.count += 1
        now_s = time.monotonic()
        if now_s - self._last_logged_s >= _LOG_PAUSE_S:
            self._last_logged_s = now_s
            logger.warning(f"ignored a malformed message of {self._sender} ({self.count} so far): {error}")
