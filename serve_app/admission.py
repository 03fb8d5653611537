"""The seam between the HTTP handlers and the engine: what a handler hands over and what it gets back."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.request import RequestOutput, SamplingParams
from engine.tokenizer import Tokenizer
from serve_app.time_limits import NO_LIMITS, TimeLimits


@dataclass(frozen=True)
class GenerateCall:
    """One HTTP request, validated, ready for admission. Text prompts are tokenized at admission, in a batch."""

    request_id: str
    prompts: tuple[str | tuple[int, ...], ...]  # text, or token ids; at least one
    n: int  # choices for each prompt
    sampling: SamplingParams  # its max_tokens holds only where `max_tokens` below does
    max_tokens: int | None  # None: whatever the context still holds
    add_special_tokens: bool  # False where a chat template has already written them
    priority: int = 0
    tenant: str = ""  # on whose behalf: tenants have equal shares where there is not enough for all
    limits: TimeLimits = NO_LIMITS
    arrival_s: float = field(default_factory=time.monotonic)  # when the request had been read

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    def seconds_left(self, has_begun: bool) -> float:
        """Until its next time-out; has_begun: it has a token."""
        return self.arrival_s + self.limits.next_timeout_s(has_begun) - time.monotonic()


class TokenStream(Protocol):
    """The outputs of one choice, in order; iteration ends after the one with a `finish_reason`.

    Outputs are coalesced while the reader is behind: one may carry many tokens.
    """

    @property
    def fingerprints(self) -> Sequence[str]:
        """Of the engines that have produced it so far, in order. More than one where failover may cross them."""

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    def abort(self) -> None:
        """Free the request in the engine; the stream ends. Returns at once; harmless when it has ended already."""


@dataclass(frozen=True)
class Admitted:
    """What became of a GenerateCall: its prompts as ids, and a stream for each choice, prompt by prompt."""

    prompt_token_ids: list[list[int]]
    streams: list[TokenStream]  # streams[prompt_index * n + choice_index]
    seed: int  # the client's, or the one assigned


class Readiness(Protocol):
    """What `/ready` reports."""

    ready: bool
    state: str  # "ready", "scaled_to_zero", or why not


class Admitter(Protocol):
    """Takes calls to the engine replicas.

    `admit` raises InvalidRequest (the prompt does not fit, a token id is out of range, ...),
    OverloadedError (429), UnavailableError (503) or TimedOutError (429, 504), all of serve_app.errors.
    """

    model_name: str
    max_model_len: int
    tokenizer: Tokenizer

    async def admit(self, call: GenerateCall) -> Admitted: ...

    async def readiness(self) -> Readiness: ...

    def retry_after_s(self) -> float:
        """When a place in the queue is likely to be free."""
