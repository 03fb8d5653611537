"""A draft model: continuous batching for mirrors of requests that are decoded elsewhere."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from engine.batch import ScheduledChunk, ScheduledStep
from engine.cache.block_manager import BlockManager
from engine.cache.block_pool import BlockPool
from engine.config import EngineConfig, SchedulerConfig
from engine.loader.checkpoint import Checkpoint
from engine.quantize.formats import resolve_quantization
from engine.request import SamplingParams
from engine.runner.device import prepare_device
from engine.runner.forward import Forward
from engine.runner.model_runner import LaunchedStep, ModelRunner
from engine.runner.out_of_memory import is_out_of_memory
from engine.runner.start_forward import start_forward
from engine.runner.start_up import StartUp
from engine.sampling.sampler import Sampler
from engine.speculative.mirror import Mirror


class DraftModel:
    """A Drafter with a model of its own: weights, KV cache, and graphs.

    Mirrors can be made anew from what the target knows, so that blocks are simply taken from those that have not been
    asked for longest; their tokens are computed again should they be asked for once more. Nothing is shared between
    mirrors: prompts are short work for a model of this size.
    """

    def __init__(self, forward: Forward, sampler: Sampler, vocab_size: int, limits: SchedulerConfig) -> None:
        self.vocab_size = vocab_size
        self._runner = ModelRunner(forward, sampler)
        self._sampler = sampler
        self._limits = limits
        pool = BlockPool(forward.kv_cache.num_blocks, forward.kv_cache.block_size, enable_prefix_caching=False)
        self._blocks = BlockManager(pool)
        self._max_tokens = min(limits.max_model_len, self._blocks.capacity_tokens)
        self._mirrors: dict[str, Mirror] = {}  # asked for longest ago first
        self._in_flight: LaunchedStep | None = None
        self._grown: dict[str, None] = {}  # keys that no step has returned yet, in order

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, config: EngineConfig, start_up: StartUp | None = None
    ) -> "DraftModel":
        """Load a model. `start_up` shows how far that is, and keeps the memory plan.

        Raises:
            ModelError: the model cannot be loaded.
            ConfigError: the configuration does not fit the model or the device.
        """
        model = checkpoint.config
        device, dtype = prepare_device(config)
        max_model_len = min(config.scheduler.max_model_len, model.max_position_embeddings)
        limits = replace(config.scheduler, max_model_len=max_model_len)
        forward = start_forward(
            checkpoint,
            device,
            dtype,
            resolve_quantization(model, config.quantization),
            config.cache,
            limits,
            warm_up=config.warm_up,
            start_up=start_up or StartUp(),
        )
        return cls(forward, Sampler(model.eos_token_ids), model.vocab_size, limits)

    @property
    def num_mirrors(self) -> int:
        return len(self._mirrors)

    def open(
        self,
        key: str,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        sampling: SamplingParams,
        choice_index: int,
    ) -> None:
        self.drop(key)
        mirror = Mirror(key, prompt_token_ids, output_token_ids, sampling, choice_index)
        mirror.request.stop_ids = self._sampler.stop_ids(sampling)
        mirror.request.is_chosen_by_device = self._runner.chooses_on_device(mirror.request)
        self._mirrors[key] = mirror

    def accept(self, key: str, num_tokens: int, token_ids: Sequence[int]) -> bool:
        self._settle()
        mirror = self._mirrors.get(key)
        return mirror is not None and mirror.accept(num_tokens, token_ids)

    def order(self, key: str, num_draft_tokens: int) -> None:
        if mirror := self._mirrors.pop(key, None):
            self._mirrors[key] = mirror
            mirror.num_ordered_tokens = min(num_draft_tokens, self._max_tokens - mirror.num_accepted_tokens)

    def drop(self, key: str) -> None:
        if key in self._mirrors:
            self._settle()
            self._blocks.free(self._mirrors.pop(key).request)
            self._grown.pop(key, None)

    @property
    def has_work(self) -> bool:
        return bool(self._grown) or self._in_flight is not None or any(self._lacking())

    def step(self) -> list[str]:
        """One forward pass. Where the device chooses by itself, the next is launched before this one is read."""
        launched, self._in_flight = self._in_flight, None
        if launched is None:
            launched = self._launch()
        if launched is not None:
            self._in_flight = self._launch_ahead(launched)
            self._read(launched)
        grown, self._grown = list(self._grown), {}
        return grown

    def drafts(self, key: str) -> tuple[int, list[int]]:
        """Those that are there: not one that is being chosen.

        Raises:
            KeyError: there is no such mirror.
        """
        mirror = self._mirrors[key]
        return mirror.num_accepted_tokens, mirror.drafts

    def check_integrity(self) -> None:
        """Assert that every block is accounted for."""
        self._blocks.check_integrity([mirror.request for mirror in self._mirrors.values()])

    def _lacking(self) -> Iterator[Mirror]:
        return (mirror for mirror in self._mirrors.values() if mirror.lacks_drafts)

    def _launch_ahead(self, launched: LaunchedStep) -> LaunchedStep | None:
        if not self._runner.can_run_ahead(launched):
            return None
        for request in launched.sampling:
            request.expect_output()
        return self._launch()

    def _launch(self) -> LaunchedStep | None:
        chunks = self._schedule()
        if not chunks:
            return None
        try:
            launched = self._runner.launch(ScheduledStep(chunks))
        except RuntimeError as error:
            self._fail(chunks, error)
            return None
        for chunk in chunks:
            chunk.request.num_computed_tokens = chunk.stop
        return launched

    def _schedule(self) -> list[ScheduledChunk]:
        """Mirrors that only lack drafts first, then prompts, as far as rows and blocks go."""
        chunks: list[ScheduledChunk] = []
        budget = self._limits.token_budget
        lacking = sorted(self._lacking(), key=_num_uncomputed_tokens)
        for mirror in lacking:
            request = mirror.request
            count = min(_num_uncomputed_tokens(mirror), budget)
            if len(chunks) == self._limits.max_num_seqs or not count:
                break
            start = request.num_computed_tokens
            if self._make_room(mirror, start + count, is_first=not chunks):
                chunks.append(ScheduledChunk(request, start, count))
                budget -= count
        return chunks

    def _make_room(self, mirror: Mirror, num_tokens: int, *, is_first: bool) -> bool:
        """Find blocks for so many of a mirror's tokens. The first of a step finds them in any case: all others together
        hold no more than the pool has, and it fits."""
        others = [
            other for other in self._mirrors.values() if other is not mirror and not other.request.num_pending_tokens
        ]
        idle = (other for other in others if not other.lacks_drafts)
        for victim in chain((None,), idle, others if is_first else ()):
            if victim is not None:
                self._take_blocks(victim)
            if self._blocks.grow(mirror.request, num_tokens):
                return True
        return False

    def _take_blocks(self, mirror: Mirror) -> None:
        request = mirror.request
        if request.block_table:
            self._blocks.free(request)
            request.num_computed_tokens = 0
            request.num_preemptions += 1

    def _read(self, launched: LaunchedStep) -> None:
        try:
            tokens = self._runner.read(launched)
        except RuntimeError as error:
            self._fail(launched.step.chunks, error)
            return
        for place, (request, token_id) in enumerate(zip(launched.sampling, tokens.token_ids, strict=True)):
            details = tokens.details.get(place)
            if details is not None and details.error is not None:
                request.drop_expected_output()
                self._mirrors[request.request_id].has_failed = True
            else:
                request.append_output(token_id)
                self._grown[request.request_id] = None

    def _fail(self, chunks: Sequence[ScheduledChunk], error: RuntimeError) -> None:
        """Let these mirrors start anew with the target's next tokens, if the device was out of memory."""
        if not is_out_of_memory(error):
            raise error
        for chunk in chunks:
            mirror = self._mirrors[chunk.request.request_id]
            mirror.has_failed = True
            chunk.request.drop_expected_output()
            self._take_blocks(mirror)

    def _settle(self) -> None:
        """Read the step that is under way: mirrors are about to change."""
        launched, self._in_flight = self._in_flight, None
        if launched is not None:
            self._read(launched)


def _num_uncomputed_tokens(mirror: Mirror) -> int:
    return mirror.request.num_tokens - mirror.request.num_computed_tokens
