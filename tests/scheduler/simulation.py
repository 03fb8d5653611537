"""An engine whose model is a hash function and whose KV cache remembers what was written where.

The KV of a position is simulated by the tokens up to it, which is what real KV is a function of. A chunk checks that
each earlier position of its request holds exactly that, so a wrongly shared, reused, evicted or unwritten block is
an error at once, and the token it samples is a function of what the cache holds, not of what the request says.
"""

import random
from collections.abc import Iterator, Sequence

from engine.batch import ScheduledChunk, ScheduledStep
from engine.cache.block_manager import BlockManager
from engine.cache.block_pool import BlockPool
from engine.config import SchedulerConfig
from engine.request import FinishReason, Request, RequestStatus, SamplingParams
from engine.scheduler.scheduler import Scheduler

VOCAB_SIZE = 3  # few tokens: continuations of different requests often agree, and their blocks are shared

Prefix = tuple[int, ...]


def next_token(prefix: Prefix) -> int:
    return sum((i + 1) * (token + 1) for i, token in enumerate(prefix)) // 2 % VOCAB_SIZE


def solo_run(prompt: list[int], max_tokens: int, max_num_tokens: int) -> list[int]:
    """What a request outputs when it has the engine to itself and room for `max_num_tokens` tokens."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens and len(tokens) < max_num_tokens:
        tokens.append(next_token(tuple(tokens)))
    return tokens[len(prompt) :]


class SimulatedKV:
    """The tokens that each slot's KV was computed from; None where the KV is broken."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, Prefix | None] = {}

    def run(self, chunks: list[ScheduledChunk], broken: Request | None = None) -> list[list[int | None]]:
        """Compute a step. Returns for each chunk that samples a token behind its last known one and behind each draft.

        The KV of `broken`'s chunk comes out wrong.
        """
        for chunk in chunks:
            self._check(chunk.request, chunk.start)
        written: set[int] = set()
        for chunk in chunks:
            for position, slot in self._slots(chunk.request, chunk.start, chunk.stop):
                assert slot not in written, f"slot {slot} is written twice in a step"
                assert slot >= self.block_size, "a request writes to the null block"
                written.add(slot)
                prefix = (*chunk.request.token_ids(0, position + 1), *chunk.draft_token_ids)[: position + 1]
                self.slots[slot] = None if chunk.request is broken else prefix
        sampled: list[list[int | None]] = []
        for chunk in chunks:
            if chunk.request is not broken:
                # Nobody else wrote over it in this step.
                self._check(chunk.request, chunk.start + chunk.num_known_tokens)
            if chunk.samples:
                held = [
                    self.slots[slot]
                    for _, slot in self._slots(chunk.request, chunk.stop - chunk.num_samples, chunk.stop)
                ]
                sampled.append([None if prefix is None else next_token(prefix) for prefix in held])
        return sampled

    def _check(self, request: Request, stop: int) -> None:
        for position, slot in self._slots(request, 0, stop):
            expected = tuple(request.token_ids(0, position + 1))
            held = self.slots.get(slot)
            assert held == expected, f"request {request.request_id} position {position}: {held}, not {expected}"

    def _slots(self, request: Request, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for position in range(start, stop):
            block = request.block_table[position // self.block_size]
            yield position, block * self.block_size + position % self.block_size


class SimulatedEngine:
    """Drives a scheduler as the engine does, and checks every promise of its interface at every step."""

    def __init__(self, config: SchedulerConfig, num_blocks: int, block_size: int, caching: bool = True) -> None:
        self.config = config
        self.cache = BlockManager(BlockPool(num_blocks, block_size, caching))
        self.scheduler = Scheduler(config, self.cache)
        self.kv = SimulatedKV(block_size)
        self.requests: list[Request] = []
        self.num_steps = 0
        self.num_accepted_tokens = 0
        self._last_admission_step = -(10**9)
        self._draw = random.Random(1)

    @property
    def max_num_tokens(self) -> int:
        """The most tokens of a request: the last one needs no slot."""
        return min(self.config.max_model_len, self.cache.capacity_tokens + 1)

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        priority: int = 0,
        arrival_s: float | None = None,
        tenant: str = "",
    ) -> Request:
        name = f"r{len(self.requests)}"
        arrival_s = float(self.num_steps) if arrival_s is None else arrival_s
        sampling = SamplingParams(seed=0, max_tokens=max_tokens)
        request = Request(name, prompt, sampling, priority=priority, arrival_s=arrival_s, tenant=tenant)
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def step(self, failing: int | None = None, aborting: int | None = None, late: bool = False) -> ScheduledStep:
        """One step. The chunk numbered `failing` computes wrong KV, noticed before the commit or (`late`) after it;
        the request of the chunk numbered `aborting` is aborted while the step runs."""
        before = self.scheduler.running
        waiting = self.scheduler.waiting
        self._propose()
        step = self.scheduler.schedule()
        self._check_step(step, before, waiting)
        chunks = step.chunks
        broken = chunks[failing % len(chunks)].request if failing is not None and chunks else None
        sampling = [(chunk.request, chunk.draft_token_ids) for chunk in chunks if chunk.samples]
        sampled = self.kv.run(chunks, broken)
        if broken is not None and not late:
            self.scheduler.finish(broken, FinishReason.ERROR)
        if aborting is not None and chunks:
            self.scheduler.abort(chunks[aborting % len(chunks)].request.request_id)
        self.scheduler.commit(step)
        if broken is not None and late:
            self.scheduler.finish(broken, FinishReason.ERROR)
        for (request, drafts), tokens in zip(sampling, sampled, strict=True):
            if request.status is RequestStatus.RUNNING:
                self._advance(request, drafts, tokens)
        self.scheduler.check_integrity()
        self.num_steps += 1
        return step

    def _propose(self) -> None:
        """Up to three drafts for those that decode, each with the odds to be right that a guess has, or better ones."""
        for request in self.scheduler.running if self.config.max_draft_tokens else ():
            tokens = request.token_ids(0, request.num_tokens)
            for _ in range(self._draw.randrange(4)):
                is_right = self._draw.random() < 0.6
                tokens.append(next_token(tuple(tokens)) if is_right else self._draw.randrange(VOCAB_SIZE))
            request.draft_token_ids = tokens[request.num_tokens :]

    def _advance(self, request: Request, drafts: Sequence[int], tokens: list[int | None]) -> None:
        num_accepted = 0
        for place, token in enumerate(tokens):
            assert token is not None
            request.append_output(token)
            num_outputs = len(request.output_token_ids)
            if num_outputs == request.sampling.max_tokens or request.num_tokens == self.config.max_model_len:
                self.scheduler.finish(request, FinishReason.LENGTH)
                return
            if place == len(drafts) or token != drafts[place]:
                break
            num_accepted += 1
        if num_accepted:
            self.scheduler.accept(request, num_accepted)
            self.num_accepted_tokens += num_accepted

    def drain(self) -> None:
        """Step until all is done, which must be soon, in the right words, and leave nothing behind."""
        pending = [*self.scheduler.running, *self.scheduler.waiting]
        # In every step the first of the running ones advances by a token at least, and it is displaced at most once by
        # each request ahead of it.
        work = sum(request.num_prompt_tokens + request.sampling.max_tokens + 1 for request in pending)
        for _ in range(work * len(pending)):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"{self.scheduler.num_waiting} wait and {self.scheduler.num_running} run"
        assert self.cache.pool.num_blocks_in_use == 0
        self.cache.check_integrity([])
        for request in self.requests:
            self._check_outputs(request)

    def _check_outputs(self, request: Request) -> None:
        expected = solo_run(request.prompt_token_ids, request.sampling.max_tokens, self.max_num_tokens)
        assert request.status is RequestStatus.FINISHED
        if request.finish_reason is FinishReason.LENGTH:
            assert request.output_token_ids == expected
        else:
            assert request.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)
            assert request.output_token_ids == expected[: len(request.output_token_ids)]

    def _check_step(self, step: ScheduledStep, before: tuple[Request, ...], waiting: tuple[Request, ...]) -> None:
        config, scheduler = self.config, self.scheduler
        assert step.num_scheduled_tokens <= config.token_budget
        assert scheduler.num_running <= config.max_num_seqs
        assert step.num_draft_tokens == sum(len(chunk.draft_token_ids) for chunk in step.chunks)
        assert step.num_draft_tokens <= config.max_draft_tokens
        assert not any(request.draft_token_ids for request in (*scheduler.running, *scheduler.waiting))
        longest = config.max_prefill_chunk or config.token_budget
        rows = {chunk.request: chunk for chunk in step.chunks}
        assert len(rows) == len(step.chunks), "a request has two chunks in a step"
        for chunk in step.chunks:
            assert 1 <= chunk.num_known_tokens <= longest
            assert chunk.start == chunk.request.num_computed_tokens
            assert chunk.stop <= chunk.request.num_tokens + len(chunk.draft_token_ids)
            assert chunk.samples or not chunk.draft_token_ids
            assert chunk.request.status is RequestStatus.RUNNING
        # Whoever was decoding and is still here has its row; the first to prefill has at least one.
        prefilling = [r for r in before if r in scheduler.running and r.num_tokens - r.num_computed_tokens > 1]
        for request in before:
            assert request in rows or request in prefilling or request in step.preempted + step.exhausted
        assert not prefilling or prefilling[0] in rows, "a prefill starves"
        # Admission is in order, and not in a step that took blocks from somebody.
        admitted = [request for request in waiting if request.status is RequestStatus.RUNNING]
        left = [request for request in waiting if request.status is RequestStatus.WAITING]
        if len({request.tenant for request in self.requests}) > 1:
            self._check_order_of_tenants(admitted, left, waiting)
            return
        assert [*admitted, *left] == [r for r in waiting if r not in step.exhausted], "a request overtook another"
        assert not (admitted and step.preempted)
        # Victims are the last of the order, and nobody is a victim soon after an admission.
        survivors = [self._rank(request) for request in scheduler.running]
        assert all(self._rank(victim) > max(survivors, default=(-1e9, 0)) for victim in step.preempted)
        if step.preempted:
            # A block lasts for `block_size` steps, or with three drafts accepted in each, a quarter of that.
            steps_for_a_block = self.cache.block_size // (4 if config.max_draft_tokens else 1)
            assert self.num_steps - self._last_admission_step > steps_for_a_block, "an admission cost a preemption"
        if admitted:
            self._last_admission_step = self.num_steps
        for request in step.exhausted:
            assert request.num_tokens == self.cache.capacity_tokens + 1
            assert request.finish_reason is FinishReason.LENGTH

    @staticmethod
    def _check_order_of_tenants(admitted: list[Request], left: list[Request], waiting: tuple[Request, ...]) -> None:
        """Of one tenant and one priority, nobody overtakes."""
        for kind in {(request.tenant, request.priority) for request in waiting}:
            mine = [r for r in (*admitted, *left) if (r.tenant, r.priority) == kind]
            assert mine == [r for r in waiting if (r.tenant, r.priority) == kind], "a request overtook another"

    def _rank(self, request: Request) -> tuple[float, int]:
        virtual_arrival_s = request.arrival_s + request.priority * self.config.priority_aging_s
        return virtual_arrival_s, self.requests.index(request)
