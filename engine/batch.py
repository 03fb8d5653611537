"""The records between scheduler, runner and engine: what one step computes and what came of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.request import Request, TokenLogprobs


@dataclass(slots=True)  # not frozen: a full step makes hundreds of them, in a fifth of the time
class ScheduledChunk:
    """`num_scheduled_tokens` consecutive tokens of one request, from position `start` on. Never changed once made.

    The chunk ends in a sampled token exactly when it reaches the request's last known token. It may go on behind that
    with draft tokens, which are among `num_scheduled_tokens`: a token is then sampled behind each of them as well.
    """

    request: Request
    start: int
    num_scheduled_tokens: int
    draft_token_ids: Sequence[int] = ()

    @property
    def stop(self) -> int:
        return self.start + self.num_scheduled_tokens

    @property
    def samples(self) -> bool:
        return self.num_known_tokens == self.request.num_tokens - self.start

    @property
    def num_known_tokens(self) -> int:
        """Those that are no drafts."""
        return self.num_scheduled_tokens - len(self.draft_token_ids)

    @property
    def num_samples(self) -> int:
        """How many of its rows have a token sampled behind them: the last ones."""
        return 1 + len(self.draft_token_ids) if self.samples else 0

    def token_ids(self) -> list[int]:
        """Of its rows; none for a pending token."""
        return [*self.request.token_ids(self.start, self.start + self.num_known_tokens), *self.draft_token_ids]


@dataclass
class ScheduledStep:
    """The chunks of one step, in row order, who had to give up its blocks for them, and whom the cache cannot hold.

    `exhausted` requests have grown past the whole pool: the scheduler has finished them with `FinishReason.LENGTH`,
    and the engine tells their clients. A step of which only this is left has no chunks and is not run.
    `num_draft_tokens`: of all chunks.
    """

    chunks: list[ScheduledChunk] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    exhausted: list[Request] = field(default_factory=list)
    num_draft_tokens: int = 0

    @property
    def num_scheduled_tokens(self) -> int:
        return sum(chunk.num_scheduled_tokens for chunk in self.chunks)


@dataclass(frozen=True)
class SampledToken:
    """The outcome of one chunk that samples. `error` set: this request failed (NaN logits, out of memory)."""

    token_id: int = 0
    logprobs: TokenLogprobs | None = None
    error: str | None = None


@dataclass(frozen=True)
class StepTokens:
    """The outcomes of all chunks of a step that sample, in their order: the token that comes next in each request.

    `details`: by place, of those that have more to tell than the token's id. `verified`: by place, of those that had
    draft tokens, everything that they may keep: the accepted ones, and the one that the target chose behind them.
    """

    token_ids: list[int]
    details: Mapping[int, SampledToken] = field(default_factory=dict)
    verified: Mapping[int, Sequence[SampledToken]] = field(default_factory=dict)
