"""A draft model: continuous batching for mirrors of requests that are decoded elsewhere."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from engine.batch import ScheduledChunk, ScheduledStep
from engine.cache.block_manager import BlockManager
from engine.cache.block_pool import BlockPool
from engine.config import EngineConfig, SchedulerConfig
from engine.loader.checkpoint import Checkpoint
from engine.quantize.formats import resolve_quantization
from engine.request import Request, SamplingParams
from engine.runner.device import prepare_device
from engine.runner.forward import MAX_FURTHER, Forward
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
    mirrors, but with their branches: prompts are short work for a model of this size.
    """

    def __init__(
        self, forward: Forward, sampler: Sampler, vocab_size: int, limits: SchedulerConfig, *, may_branch: bool = False
    ) -> None:
        """may_branch: whether `branch` may do something, for which the likeliest tokens are noted in each step."""
        self.vocab_size = vocab_size
        self._may_branch = may_branch
        self._runner = ModelRunner(forward, sampler)
        self._sampler = sampler
        self._limits = limits
        pool = BlockPool(forward.kv_cache.num_blocks, forward.kv_cache.block_size, enable_prefix_caching=False)
        self._blocks = BlockManager(pool)
        self._max_tokens = min(limits.max_model_len, self._blocks.capacity_tokens)
        self._mirrors: dict[str, Mirror] = {}  # asked for longest ago first
        self._mirror_of: dict[Request, Mirror] = {}  # branches too
        self._in_flight: deque[LaunchedStep] = deque()  # in order
        self._grown: dict[str, None] = {}  # keys that no step has returned yet, in order

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, config: EngineConfig, start_up: StartUp | None = None, *, may_branch: bool = False
    ) -> "DraftModel":
        """Load a model. `start_up` shows how far that is, and keeps the memory plan. may_branch: see the constructor.

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
        return cls(forward, Sampler(model.eos_token_ids), model.vocab_size, limits, may_branch=may_branch)

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
        mirror = Mirror.of(key, prompt_token_ids, output_token_ids, sampling, choice_index, may_branch=self._may_branch)
        request = mirror.request
        request.stop_ids = self._sampler.stop_ids(sampling)
        request.is_chosen_by_device = self._runner.chooses_on_device(request)
        self._mirrors[key] = self._mirror_of[request] = mirror

    def accept(self, key: str, num_tokens: int, token_ids: Sequence[int]) -> bool:
        self._settle()
        mirror = self._mirrors.get(key)
        if mirror is None:
            return False
        before = _requests_of(mirror)
        is_known = mirror.accept(num_tokens, token_ids)
        self._mirror_of[mirror.request] = mirror
        for gone in before - _requests_of(mirror):
            self._forget(gone)
        return is_known

    def order(self, key: str, num_draft_tokens: int) -> None:
        if mirror := self._mirrors.pop(key, None):
            self._mirrors[key] = mirror
            mirror.num_ordered_tokens = min(num_draft_tokens, self._max_tokens - mirror.num_accepted_tokens)

    def branch(self, key: str, num_branches: int, num_draft_tokens: int) -> None:
        mirror = self._mirrors.get(key)
        if mirror is None or mirror.branches or not self._may_branch or not mirror.request.block_table:
            return
        request = mirror.request
        for position, token_id in mirror.likeliest_corrections(num_branches):
            branch = mirror.branch(position, token_id)
            # What is behind its last whole block before the branch leaves is computed once more.
            num_common = min(position, request.num_computed_tokens)
            branch.request.num_computed_tokens = self._blocks.share(request, branch.request, num_common)
            branch.num_ordered_tokens = min(num_draft_tokens, self._max_tokens - branch.num_accepted_tokens)
            self._mirror_of[branch.request] = branch

    def drop(self, key: str) -> None:
        if key in self._mirrors:
            self._settle()
            for request in _requests_of(self._mirrors.pop(key)):
                self._forget(request)
            self._grown.pop(key, None)

    @property
    def has_work(self) -> bool:
        return bool(self._grown) or bool(self._in_flight) or any(self._lacking())

    def step(self) -> list[str]:
        """One forward pass. Where the device chooses by itself, the next ones are launched before this one is read."""
        if not self._in_flight:
            self._launch()
        if self._in_flight:
            launched = self._in_flight.popleft()
            if not self._in_flight:
                self._launch_ahead(launched)
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
        requests = [request for mirror in self._mirrors.values() for request in _requests_of(mirror)]
        self._blocks.check_integrity(requests)
        assert self._mirror_of.keys() == set(requests), "a request is remembered without a mirror, or the reverse"

    def _lacking(self) -> Iterator[Mirror]:
        return (mirror for mirror in self._mirror_of.values() if mirror.lacks_drafts)

    def _launch_ahead(self, launched: LaunchedStep) -> None:
        if self._runner.can_run_ahead(launched):
            for request in launched.sampling:
                mirror = self._mirror_of.get(request)
                if mirror is not None and not mirror.has_failed:
                    request.expect_output()
            self._launch()

    def _launch(self) -> None:
        """One step as scheduled, and behind it those that need nothing of the host any more."""
        chunks = self._schedule()
        if not chunks:
            return
        num_further = self._num_further(chunks)
        try:
            launched = self._runner.launch(ScheduledStep(chunks), num_further)
            for chunk in chunks:
                chunk.request.num_computed_tokens = chunk.stop
            self._in_flight.append(launched)
            for _ in range(num_further):
                launched = self._runner.launch_further(launched)
                for request in launched.sampling:
                    request.expect_output()
                    request.num_computed_tokens += 1
                self._in_flight.append(launched)
        except RuntimeError as error:
            self._fail(chunks, error)

    def _num_further(self, chunks: Sequence[ScheduledChunk]) -> int:
        """How many steps the same requests can go on for behind this one: until the first of them has all its drafts.

        Each has the blocks for them then.
        """
        requests = [chunk.request for chunk in chunks]
        may_go_on = self._runner.forward.feeds_back and not self._may_branch  # for which log-probabilities are read
        if not may_go_on or not all(
            chunk.stop == chunk.request.num_tokens and chunk.request.is_chosen_by_device for chunk in chunks
        ):
            return 0
        mirrors = [self._mirror_of[request] for request in requests]
        count = min(mirror.num_ordered_tokens - mirror.num_drafts for mirror in mirrors) - 1
        count = min(count, MAX_FURTHER)
        if count > 0 and not all(self._blocks.grow(request, request.num_tokens + count) for request in requests):
            return 0
        return count

    def _schedule(self) -> list[ScheduledChunk]:
        """Mirrors that only lack drafts first, then prompts, as far as rows and blocks go."""
        chunks: list[ScheduledChunk] = []
        budget = self._limits.token_budget
        lacking = sorted(self._lacking(), key=_urgency)
        for mirror in lacking:
            request = mirror.request
            count = min(_num_uncomputed_tokens(mirror), budget)
            if len(chunks) == self._limits.max_num_seqs or not count:
                break
            if request not in self._mirror_of:  # a branch that was given up for one of those before
                continue
            start = request.num_computed_tokens
            if self._make_room(mirror, start + count, is_first=not chunks):
                chunks.append(ScheduledChunk(request, start, count))
                budget -= count
        return chunks

    def _make_room(self, mirror: Mirror, num_tokens: int, *, is_first: bool) -> bool:
        """Find blocks for so many of a mirror's tokens.

        Those of mirrors that lack no drafts are taken, and before them their branches are given up. The first mirror of
        a step finds room in any case, since it would fit with the pool to itself. Nobody gives anything for a branch.
        """
        if self._blocks.grow(mirror.request, num_tokens):
            return True
        if mirror.is_branch:
            mirror.has_failed = True
            return False
        for other in self._mirrors.values():
            self._give_up_branches(other)
        others = [
            other for other in self._mirrors.values() if other is not mirror and not other.request.num_pending_tokens
        ]
        idle = [other for other in others if not other.lacks_drafts]
        for victim in (None, *idle, *(others if is_first else ())):
            if victim is not None:
                self._take_blocks(victim)
            if self._blocks.grow(mirror.request, num_tokens):
                return True
        return False

    def _take_blocks(self, mirror: Mirror) -> None:
        self._give_up_branches(mirror)
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
            mirror = self._mirror_of.get(request)
            details = tokens.details.get(place)
            if mirror is None or mirror.has_failed:  # a branch that was given up for somebody's blocks; or no numbers
                continue
            if details is not None and details.error is not None:
                request.drop_expected_output()
                mirror.has_failed = True
            else:
                mirror.append(token_id, None if details is None else details.logprobs)
                if not mirror.is_branch:
                    self._grown[request.request_id] = None

    def _fail(self, chunks: Sequence[ScheduledChunk], error: RuntimeError) -> None:
        """Let these mirrors start anew with the target's next tokens, if the device was out of memory."""
        if not is_out_of_memory(error):
            raise error
        for chunk in chunks:
            mirror = self._mirror_of.get(chunk.request)
            if mirror is not None:
                mirror.has_failed = True
                chunk.request.drop_expected_output()
                self._take_blocks(mirror)

    def _give_up_branches(self, mirror: Mirror) -> None:
        branches, mirror.branches = mirror.branches, {}
        for branch in branches.values():
            self._forget(branch.request)

    def _forget(self, request: Request) -> None:
        self._blocks.free(request)
        del self._mirror_of[request]

    def _settle(self) -> None:
        """Read the steps that are under way: mirrors are about to change."""
        while self._in_flight:
            self._read(self._in_flight.popleft())


def _num_uncomputed_tokens(mirror: Mirror) -> int:
    return mirror.request.num_tokens - mirror.request.num_computed_tokens


def _urgency(mirror: Mirror) -> tuple[bool, int]:
    return mirror.is_branch, _num_uncomputed_tokens(mirror)


def _requests_of(mirror: Mirror) -> set[Request]:
    return {mirror.request, *(branch.request for branch in mirror.branches.values())}
