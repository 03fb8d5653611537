"""Admission: what arrives within a short window is tokenized together and handed to the engines together.

`@serve.batch` batches the admission only. A batch keeps its permit until its function returns, and one item that
raises fails the whole batch; so the function returns as soon as everything is handed over, and an error of one
item is its result.
"""

import asyncio
import logging
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ray import serve

from engine.errors import InvalidRequest, SlipstreamError
from engine.request import SamplingParams
from engine.tokenizer import Tokenizer
from serve_app.admission import Admitted, GenerateCall
from serve_app.engine_client import EngineClient
from serve_app.errors import GenerationError, OverloadedError
from serve_app.group import PlacedPrompt
from serve_app.messages import Opening, SubmittedPrompt
from serve_app.prompt_encoding import PromptEncoder, TextPrompt, too_long
from serve_app.queue_places import QueuePlaces
from serve_app.readiness import ReadinessCheck, ReadinessState
from serve_app.token_stream import RequestStream

logger = logging.getLogger("ray.serve")

MAX_BATCH_SIZE = 64
BATCH_WAIT_S = 0.002
MAX_CONCURRENT_BATCHES = 8  # one batch tokenizes while others hand over


@dataclass(eq=False)
class _Item:
    """One call on its way through a batch."""

    call: GenerateCall
    prompts: list[TextPrompt | list[int]]
    cancelled: bool = False  # its client has left while it waited
    streams: list[RequestStream] = field(default_factory=list)


@dataclass(frozen=True)
class _Handed:
    """An item that has been handed to engines, which may not have taken it yet."""

    admitted: Admitted
    openings: list[asyncio.Future[Opening]]


class BatchAdmitter:
    """The Admitter of one ingress replica."""

    def __init__(
        self,
        client: EngineClient,
        readiness: ReadinessCheck,
        tokenizer: Tokenizer,
        *,
        model_name: str,
        max_model_len: int,
        vocab_size: int,
        places: QueuePlaces,
    ) -> None:
        self.model_name = model_name
        self.max_model_len = max_model_len
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._client = client
        self._readiness = readiness
        self._encoder = PromptEncoder(tokenizer, max_model_len)
        self._places = places  # of choices that have had no output yet
        self.num_unplaced = 0  # of those, the ones that no engine replica has taken

    async def readiness(self) -> ReadinessState:
        return await self._readiness.state()

    def retry_after_s(self) -> float:
        return self._places.retry_after_s()

    async def admit(self, call: GenerateCall) -> Admitted:
        """See serve_app.admission.Admitter. Returns when an engine replica has taken every prompt."""
        self._places.take(call.tenant, call.num_choices, time.monotonic())
        self.num_unplaced += call.num_choices
        seconds_left = call.seconds_left(has_begun=False)
        try:
            async with asyncio.timeout(None if seconds_left == math.inf else seconds_left):
                return await self._admit(call)
        except TimeoutError:
            raise call.limits.error(has_begun=False, retry_after_s=self.retry_after_s()) from None
        except OverloadedError as error:  # of the engines, which do not know when that will be over
            raise OverloadedError(str(error), self.retry_after_s(), error.reason) from None
        finally:
            self.num_unplaced -= call.num_choices

    async def _admit(self, call: GenerateCall) -> Admitted:
        """With places taken, which it gives back, or the streams do."""
        item = _Item(call, [_as_prompt(prompt, call.add_special_tokens) for prompt in call.prompts])
        try:
            await self._encode_long(item)
            handed: _Handed | SlipstreamError = await self._admit_batch(item)
            if isinstance(handed, SlipstreamError):
                raise handed
            for opening in handed.openings:
                await asyncio.shield(opening)  # shared with the other members of the group
        except BaseException:
            item.cancelled = True
            for stream in item.streams:
                stream.abort()
            raise
        finally:
            if not item.streams:  # else each gives its own back
                self._release(call.tenant, call.num_choices)
        return handed.admitted

    def _release(self, tenant: str, num_choices: int) -> None:
        self._places.give_back(tenant, num_choices, time.monotonic())

    async def _encode_long(self, item: _Item) -> None:
        for index, prompt in enumerate(item.prompts):
            if isinstance(prompt, TextPrompt):
                item.prompts[index] = await self._encoder.encode_long(prompt) or prompt

    @serve.batch(
        max_batch_size=MAX_BATCH_SIZE,
        batch_wait_timeout_s=BATCH_WAIT_S,
        max_concurrent_batches=MAX_CONCURRENT_BATCHES,
    )
    async def _admit_batch(self, items: list[_Item]) -> list[_Handed | SlipstreamError]:
        texts = [prompt for item in items for prompt in item.prompts if isinstance(prompt, TextPrompt)]
        encoded = iter(await self._encoder.encode(texts))
        plans: list[list[PlacedPrompt] | SlipstreamError] = []
        for item in items:
            ids = [next(encoded) if isinstance(prompt, TextPrompt) else prompt for prompt in item.prompts]
            plans.append(self._plan_or_error(item, ids))
        openings = iter(self._client.submit([prompt for plan in plans if isinstance(plan, list) for prompt in plan]))
        return [
            plan if isinstance(plan, SlipstreamError) else _handed(plan, [next(openings) for _ in plan])
            for plan in plans
        ]

    def _plan_or_error(
        self, item: _Item, encoded: Sequence[list[int] | InvalidRequest]
    ) -> list[PlacedPrompt] | SlipstreamError:
        if item.cancelled:
            return GenerationError("the client has left")
        try:
            return self._plan(item, encoded)
        except SlipstreamError as error:
            return error
        except Exception:
            logger.exception(f"admission of {item.call.request_id} failed")
            return GenerationError("internal error at admission")

    def _plan(self, item: _Item, encoded: Sequence[list[int] | InvalidRequest]) -> list[PlacedPrompt]:
        call = item.call
        sampling = call.sampling.seeded()
        self._check_ids("logit_bias", sampling.logit_bias)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        placed = []
        for prompt, ids in zip(item.prompts, encoded, strict=True):
            if isinstance(ids, InvalidRequest):
                raise ids
            self._check_ids("prompt", ids)
            fitted = self._fit(call, sampling, ids, prompt if isinstance(prompt, TextPrompt) else None)
            names = [self._client.unique_request_id(call.request_id) for _ in range(call.n)]
            choices = [(name, index) for index, name in enumerate(names)]
            streams = [RequestStream(name, partial(self._release, call.tenant, 1)) for name in names]
            placed.append(PlacedPrompt(SubmittedPrompt(ids, fitted, choices, call.priority, call.tenant), streams))
        item.streams = [stream for prompt in placed for stream in prompt.streams]
        return placed

    def _check_ids(self, param: str, ids: Collection[int]) -> None:
        wrong = next((id_ for id_ in (min(ids), max(ids)) if not 0 <= id_ < self._vocab_size), None) if ids else None
        if wrong is not None:
            raise InvalidRequest(f"{param} holds token id {wrong}; ids must be 0 to {self._vocab_size - 1}", param)

    def _fit(
        self, call: GenerateCall, sampling: SamplingParams, ids: list[int], prompt: TextPrompt | None
    ) -> SamplingParams:
        """Sampling with the `max_tokens` that this prompt leaves room for."""
        if not ids:
            raise InvalidRequest("the prompt is empty", "prompt")
        room = self.max_model_len - len(ids)
        if room < 1:
            raise too_long(self.max_model_len, len(ids), prompt)
        if call.max_tokens is not None and call.max_tokens > room:
            raise InvalidRequest(
                f"this model's maximum context length is {self.max_model_len} tokens, but {len(ids)} in the prompt "
                f"and max_tokens of {call.max_tokens} make {len(ids) + call.max_tokens}",
                "max_tokens",
            )
        return replace(sampling, max_tokens=call.max_tokens or room)


def _as_prompt(prompt: str | tuple[int, ...], add_special_tokens: bool) -> TextPrompt | list[int]:
    return TextPrompt(prompt, add_special_tokens) if isinstance(prompt, str) else list(prompt)


def _handed(plan: list[PlacedPrompt], openings: list[asyncio.Future[Opening]]) -> _Handed:
    seed = plan[0].prompt.sampling.seed
    assert seed is not None
    streams = [stream for placed in plan for stream in placed.streams]
    return _Handed(Admitted([placed.prompt.token_ids for placed in plan], list(streams), seed), openings)
