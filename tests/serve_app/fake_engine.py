"""An engine without a model, which can be told to fail. It stands in for LLMEngine in the real deployments."""

import os
import time
from dataclasses import dataclass

from engine.request import FinishReason, Request, RequestOutput
from engine.stats import EngineStats

# A prompt that begins with one of these makes the engine do so; any other is answered. What CRASHES or DIES has done
# so once: at its second attempt, the request is answered.
FAILS, CRASHES, DIES, IS_FAST, IS_SILENT = range(11, 16)


@dataclass
class _Running:
    request: Request
    num_output_tokens: int = 0

    @property
    def prompt_kind(self) -> int:
        return self.request.prompt_token_ids[0]


def answer(prompt_token_ids: list[int], count: int, choice_index: int = 0, start: int = 0) -> list[int]:
    """What the engine says to a prompt: so many tokens, but for those before `start`."""
    first = sum(prompt_token_ids) + 1000 * choice_index
    return [(first + position) % 40_000 for position in range(start, count)]


def load_fake_engine(_find_drafts: object, step_s: float = 0.002) -> "FakeEngine":
    """What bind() wants."""
    return FakeEngine(step_s)


class FakeEngine:
    """Duck-typed LLMEngine: one token for each request and step, a step every `step_s`."""

    fingerprint = "fp_fake"
    max_model_len = 4096
    vocab_size = 49_152

    def __init__(self, step_s: float = 0.002) -> None:
        self._step_s = step_s
        self._running: dict[str, _Running] = {}
        self._num_steps = 0
        self._num_integrity_checks = 0

    def add(self, request: Request) -> None:
        self._running[request.request_id] = _Running(request, len(request.output_token_ids))

    def abort(self, request_id: str) -> RequestOutput | None:
        known = self._running.pop(request_id, None)
        return None if known is None else RequestOutput(request_id, finish_reason=FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def prepare_next(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to let go of."""

    def step(self) -> list[RequestOutput]:
        self._num_steps += 1
        audible = {key: running for key, running in self._running.items() if running.prompt_kind != IS_SILENT}
        outputs = [self._advance(request_id, running) for request_id, running in audible.items()]
        for output in outputs:
            if output.finish_reason is not None:
                del self._running[output.request_id]
        time.sleep(self._step_s)
        return outputs

    def _advance(self, request_id: str, running: _Running) -> RequestOutput:
        request = running.request
        kind = running.prompt_kind
        if running.num_output_tokens == 2 and kind == FAILS:
            return RequestOutput(request_id, finish_reason=FinishReason.ERROR, error="the logits are not numbers")
        is_first = "#" not in request_id
        if running.num_output_tokens == 2 and is_first and kind == CRASHES:
            raise RuntimeError("the device is gone")
        if running.num_output_tokens == 2 and is_first and kind == DIES:
            os._exit(1)
        count = request.sampling.max_tokens if kind == IS_FAST else 1
        before, running.num_output_tokens = running.num_output_tokens, running.num_output_tokens + count
        new = tuple(answer(request.prompt_token_ids, running.num_output_tokens, request.choice_index, before))
        ended = running.num_output_tokens >= request.sampling.max_tokens
        return RequestOutput(request_id, new, finish_reason=FinishReason.LENGTH if ended else None)

    def stats(self) -> EngineStats:
        num = len(self._running)
        return EngineStats(
            num_requests_running=num,
            num_blocks=100,
            num_blocks_in_use=num,
            num_steps=self._num_steps,
            num_integrity_checks=self._num_integrity_checks,
        )

    def check_integrity(self) -> None:
        assert len(self._running) <= 10_000
        self._num_integrity_checks += 1
