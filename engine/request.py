"""A generation request: what the client asked for, and how far the engine has got with it."""

import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from engine.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
GREEDY_EPSILON = 1e-5  # a temperature below this is greedy: 1/temperature would overflow float32 logits
SEED_BITS = 63  # seeds travel as signed 64-bit integers


class FinishReason(StrEnum):
    """Why a request ended, in the words of the OpenAI API where it has one."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context length
    ABORT = "abort"  # for no fault of its own: the client went away, or the engine did
    ERROR = "error"  # this request failed; the engine goes on


class RequestStatus(StrEnum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"  # holds blocks
    FINISHED = "finished"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Applied in this order (design: one order for every path):

    logit bias, penalties, temperature, top-k, top-p, min-p; then Gumbel-max with counter-based noise.

    Raises:
        InvalidRequest: a value is out of range; `param` is the field's name.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output (Keskar et al. 2019)
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # None: assigned at admission and reported
    max_tokens: int = 16
    min_tokens: int = 0  # end-of-sequence and stop tokens are masked before this many
    stop: tuple[str, ...] = ()  # applied to text by engine.text, not by the engine's step
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token's and the k likeliest

    def __post_init__(self) -> None:
        def check(ok: bool, param: str, accepted: str) -> None:
            if not ok:
                raise InvalidRequest(f"{param} must be {accepted}, not {getattr(self, param)!r}", param)

        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            check(math.isfinite(getattr(self, name)), name, "a finite number")
        check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        check(self.top_k >= 0, "top_k", "0 (off) or more")
        check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        check(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "above 0 and at most 100")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        check(all(-100.0 <= b <= 100.0 for b in self.logit_bias.values()), "logit_bias", "between -100 and 100")
        check(self.seed is None or 0 <= self.seed < 1 << SEED_BITS, "seed", f"between 0 and 2^{SEED_BITS} - 1")
        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens")
        stops = len(self.stop) <= MAX_STOP_STRINGS and all(self.stop)
        check(stops, "stop", f"up to {MAX_STOP_STRINGS} texts, none empty")
        check(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"between 0 and {MAX_LOGPROBS}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON

    def seeded(self) -> "SamplingParams":
        """These parameters with a seed: their own, or a fresh random one."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(SEED_BITS))


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one output position, from the raw logits (before bias, penalties, temperature)."""

    logprob: float  # of the chosen token
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first, ties by id


@dataclass(eq=False, slots=True)
class Request:
    """One stream of tokens. Mutated by the scheduler and the engine only.

    Token positions count from 0 through prompt and output together. `num_computed_tokens` is how many
    of them have their KV in this request's blocks. What every step asks of every request is a plain attribute.

    A request that another engine has begun comes with the `output_token_ids` that it has so far. It goes on as one that
    was preempted here: they are computed again, and everything counts from the border of prompt and output.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams  # its seed is never None here
    choice_index: int = 0  # which of the `n` choices: part of the noise key
    priority: int = 0  # lower runs first; equal ones of a tenant first come, first served
    arrival_s: float = 0.0  # time.monotonic()
    tenant: str = ""  # on whose behalf: tenants share the engine fairly (engine.scheduler.fair_queue)

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0  # chosen on the device and not read yet: positions are known, ids are not
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache at first admission
    num_preemptions: int = 0
    draft_token_ids: Sequence[int] = ()  # proposed for the next step
    num_drafted_tokens: int = 0  # that have been verified
    num_accepted_tokens: int = 0  # of those, the ones that the target chose too and that were output
    finish_reason: FinishReason | None = None
    num_tokens: int = field(init=False)  # of prompt and output, with the pending ones

    # Filled in by the engine, which knows the model.
    stop_ids: frozenset[int] = frozenset()  # the tokens that end it
    max_output_tokens: int = 0  # `max_tokens`, or what the context leaves for an answer
    is_chosen_by_device: bool = False  # its tokens need nothing of the host

    _output_counts: Counter[int] = field(default_factory=Counter, init=False, repr=False)
    _num_counted_tokens: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_tokens = len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def output_counts(self) -> Counter[int]:
        """How often each token was output, for the penalties; counted when asked for, since few requests have any."""
        if self._num_counted_tokens < len(self.output_token_ids):
            self._output_counts.update(self.output_token_ids[self._num_counted_tokens :])
            self._num_counted_tokens = len(self.output_token_ids)
        return self._output_counts

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens at positions [start, stop) of prompt and output together; none for a pending one."""
        border = len(self.prompt_token_ids)
        if stop <= border:
            return self.prompt_token_ids[start:stop]
        if start >= border:
            return self.output_token_ids[start - border : stop - border]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - border]

    def expect_output(self) -> None:
        """The device is choosing the next token."""
        self.num_pending_tokens += 1
        self.num_tokens += 1

    def append_output(self, token_id: int) -> None:
        """Add the next token, the first expected one if there is any."""
        self.output_token_ids.append(token_id)
        if self.num_pending_tokens:
            self.num_pending_tokens -= 1
        else:
            self.num_tokens += 1

    def drop_expected_output(self) -> None:
        """Forget the tokens that the device is choosing, if any: nobody wants them."""
        self.num_tokens -= self.num_pending_tokens
        self.num_pending_tokens = 0


@dataclass(slots=True)  # not frozen: a full step makes hundreds of them, in a fifth of the time
class RequestOutput:
    """What one engine step produced for one request. Never changed once it is made."""

    request_id: str
    token_ids: tuple[int, ...] = ()  # new since the last output
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each new token, or empty
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the end-of-sequence or stop token that ended it (the last of token_ids)
    error: str | None = None  # with FinishReason.ERROR; with ABORT, what became of the engine
    num_cached_tokens: int = 0  # of the prompt
    num_drafted_tokens: int = 0  # these two of the request up to now, also where the step verified no drafts of it
    num_accepted_tokens: int = 0

    @classmethod
    def last(cls, request: Request, reason: FinishReason, error: str | None = None) -> "RequestOutput":
        """Of a request that has ended without another token."""
        return cls(
            request.request_id,
            finish_reason=reason,
            error=error,
            num_cached_tokens=request.num_cached_tokens,
            num_drafted_tokens=request.num_drafted_tokens,
            num_accepted_tokens=request.num_accepted_tokens,
        )
