"""Continuous batching: what each engine step computes, under a token budget and a pool of blocks."""

from engine.batch import ScheduledChunk, ScheduledStep
from engine.cache.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.errors import InvalidRequest
from engine.request import FinishReason, Request, RequestStatus
from engine.scheduler.ranking import Ranked, RankedRequests, virtual_arrival_s


class Scheduler:
    """Decides which tokens the next step computes. Used by one thread: schedule, run, commit, append, finish, repeat.

    **Order.** All requests stand in one strict order that never changes (`ranking`): priority, aged by waiting, then
    first come. Admission goes down this order without overtaking, and the victim of preemption is always the last of
    it. A preempted request so returns ahead of all that came after it. Admission also waits for a running prefill that
    is about to complete a block of the next request's prefix, which is then found instead of computed again.

    **Progress.** The first of the running requests is never preempted, because a victim stands behind the request in
    need of its block, or is that request. It gets a row in every step or finishes, so it ends in a bounded number of
    steps, and then the next is first. Two large requests therefore cannot preempt each other in turn. The first of
    the waiting ones is admitted at the latest when nobody runs.

    **Rows.** No more requests run than a step has rows, because one is admitted only into a step that has a row left
    after each running request has got one. So every decoding request has its row in every step, and the first prefill
    has at least one: neither waits for the other.

    **Drafts.** Tokens that are proposed behind a decoding request's last one take rows that are left, short of the one
    that a prefill under way has. Those that turn out to be wrong leave nothing behind but their slots, which the right
    ones take.

    **Blocks.** Admission takes blocks for all tokens that the request has, so only decoding ones ever need more. It
    leaves a free block for each running request and the new one: nobody outgrows that within `block_size` steps, so
    an admission is not paid for with a preemption at once. Somebody who would run alone is admitted regardless.
    """

    def __init__(self, config: SchedulerConfig, cache: BlockManager) -> None:
        self._config = config
        self._cache = cache
        self._max_chunk = min(config.max_prefill_chunk or config.token_budget, config.token_budget)
        self._entries: dict[str, Ranked] = {}
        self._waiting = RankedRequests()
        self._running = RankedRequests()
        self._num_added = 0
        self.num_preemptions = 0  # since the start

    @property
    def running(self) -> tuple[Request, ...]:
        """Requests that hold blocks, the most urgent first."""
        return tuple(entry.request for entry in self._running)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests in the order in which they will be admitted."""
        return tuple(entry.request for entry in self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._entries)

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises:
            InvalidRequest: its prompt cannot fit, however empty the engine is, or its id is in use.
        """
        assert request.status is RequestStatus.WAITING, f"request {request.request_id} is {request.status}"
        if request.request_id in self._entries:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", "request_id")
        assert request.num_tokens > 0, f"request {request.request_id} has no tokens"
        for limit, what in (
            (self._config.max_model_len, "the context length"),
            (self._cache.capacity_tokens, "the KV cache"),
        ):
            if request.num_tokens + 1 > limit:
                raise InvalidRequest(
                    f"the prompt has {request.num_tokens} tokens, but {what} holds {limit}, of which one is for output",
                    "prompt",
                )
        arrival_s = virtual_arrival_s(request.arrival_s, request.priority, self._config.priority_aging_s)
        entry = Ranked(arrival_s, self._num_added, request)
        self._num_added += 1
        self._entries[request.request_id] = entry
        self._waiting.add(entry)

    def schedule(self) -> ScheduledStep:
        """Choose the next step: a row for each decoding request, then chunks of running prefills, then new requests.

        The blocks that the chunks write to are in the requests' block tables when it returns. A step may be
        scheduled again if it was not run: nothing counts as computed before `commit`.
        """
        step = ScheduledStep()
        prefills = self._schedule_decodes(step)
        budget = self._config.token_budget - len(step.chunks)
        assert budget >= (1 if prefills else 0), "more requests run than a step has rows"
        if self._config.max_draft_tokens:
            if not step.preempted:
                self._add_drafts(step, min(self._config.max_draft_tokens, budget - (1 if prefills else 0)))
                budget -= step.num_draft_tokens
            for entry in self._running:
                entry.request.draft_token_ids = ()  # they were for this step alone
        for request in prefills:
            budget = self._schedule_prefill(step, request, budget)
        # Blocks are short after a preemption, and whoever gave them up is ahead of most that wait.
        if not step.preempted:
            self._admit(step, budget)
        assert step.chunks or step.exhausted or not self.has_work, "work is pending and nothing is scheduled"
        return step

    def commit(self, step: ScheduledStep) -> None:
        """Count the chunks of a step that has run as computed, and let the cache share the blocks they filled.

        Call it before or after appending the sampled tokens (the chunks' own tokens were known before), but before
        the next `schedule`. Requests that finished since they were scheduled are passed over: nothing of theirs is
        cached.
        """
        block_size, running = self._cache.block_size, RequestStatus.RUNNING
        for chunk in step.chunks:
            request, start = chunk.request, chunk.start
            if request.status is not running:
                continue
            assert request.num_computed_tokens == start, f"request {request.request_id} is committed out of turn"
            stop = start + chunk.num_scheduled_tokens
            if chunk.draft_token_ids:
                stop -= len(chunk.draft_token_ids)
            request.num_computed_tokens = stop
            if stop // block_size != start // block_size:
                self._cache.commit(request)

    def accept(self, request: Request, num_accepted_tokens: int) -> None:
        """Count draft tokens of the step last committed as computed too; their KV is that of the tokens they equal.

        Call it when they have been appended, of requests that are still running.
        """
        assert request.num_computed_tokens + num_accepted_tokens < request.num_tokens, "drafts are accepted unappended"
        request.num_computed_tokens += num_accepted_tokens
        self._cache.commit(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request at any time, also between `schedule` and `commit`, and free its blocks.

        After an error the request's blocks are not shared any more, since what is in them may be wrong. Does nothing
        if the request has finished already.
        """
        if request.status is RequestStatus.FINISHED:
            return
        entry = self._entries.pop(request.request_id)
        assert entry.request is request, f"two requests have the id {request.request_id}"
        (self._running if request.status is RequestStatus.RUNNING else self._waiting).remove(entry)
        if reason is FinishReason.ERROR:
            self._cache.distrust(request)
        self._take_blocks(request)
        self._cache.forget(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason

    def abort(self, request_id: str) -> Request | None:
        """Finish a waiting or running request because nobody wants it any more; None if there is none of this id."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        self.finish(entry.request, FinishReason.ABORT)
        return entry.request

    def check_integrity(self) -> None:
        """Assert that queues, statuses, block tables and pool agree; takes time linear in blocks and tokens.

        Raises:
            AssertionError: naming the request or the block that is wrong.
        """
        max_running = min(self._config.max_num_seqs, self._config.token_budget)
        assert len(self._running) <= max_running, f"{len(self._running)} run, {max_running} may"
        queued = {id(entry) for queue in (self._running, self._waiting) for entry in queue}
        assert queued == {id(entry) for entry in self._entries.values()}, (
            "a request is known but in no queue, or vice versa"
        )
        assert len(self._running) + len(self._waiting) == len(self._entries), "a request is in two queues"
        for queue, status in ((self._running, RequestStatus.RUNNING), (self._waiting, RequestStatus.WAITING)):
            assert list(queue) == sorted(queue), f"the {status} requests are out of order"
            for entry in queue:
                request = entry.request
                name = request.request_id
                assert request.status is status, f"request {name} is {request.status} among the {status}"
                assert bool(request.block_table) == (status is RequestStatus.RUNNING), (
                    f"{status} request {name} and blocks"
                )
                assert request.num_computed_tokens <= request.num_tokens, f"request {name} computed unknown tokens"
                assert request.block_table or not request.num_computed_tokens, f"request {name} computed without blocks"
        self._cache.check_integrity([entry.request for entry in self._entries.values()])

    def _schedule_decodes(self, step: ScheduledStep) -> list[Request]:
        """Give each running request with one token to go a row and a slot; returns the others, which prefill."""
        block_size, running, chunks = self._cache.block_size, RequestStatus.RUNNING, step.chunks
        prefills = []
        for entry in tuple(self._running):  # those further back may leave it meanwhile, as victims
            request = entry.request
            if request.status is not running:
                continue
            num_tokens = request.num_tokens
            pending = num_tokens - request.num_computed_tokens
            if pending != 1:
                assert pending > 1, f"request {request.request_id} is scheduled before its next token is known"
                prefills.append(request)
            elif num_tokens <= len(request.block_table) * block_size or self._make_room(step, entry):
                chunks.append(ScheduledChunk(request, num_tokens - 1, 1))
        return prefills

    def _add_drafts(self, step: ScheduledStep, limit: int) -> None:
        """Let the chunks of decoding requests go on with what is proposed for them, in rows and blocks that are left.

        Nobody loses anything for a draft: one that would need the block that a running request may need next is not
        computed.
        """
        block_size = self._cache.block_size
        for place, chunk in enumerate(step.chunks):
            request = chunk.request
            if not request.draft_token_ids:
                continue
            num_tokens = request.num_tokens
            num_drafts = min(len(request.draft_token_ids), limit - step.num_draft_tokens)
            self._cache.grow(request, num_tokens + num_drafts, num_reserved_blocks=len(self._running))
            num_drafts = min(num_drafts, len(request.block_table) * block_size - num_tokens)
            if num_drafts > 0:
                drafts = request.draft_token_ids[:num_drafts]
                step.chunks[place] = ScheduledChunk(request, chunk.start, 1 + num_drafts, drafts)
                step.num_draft_tokens += num_drafts

    def _make_room(self, step: ScheduledStep, entry: Ranked) -> bool:
        """Find a running request its next block, preempting from the end; False if it had to leave itself.

        Victims stand behind the request, and requests are visited in order, so no victim is in the step yet.
        """
        request = entry.request
        if request.num_tokens > self._cache.capacity_tokens:  # it ends, rather than wait for ever
            self.finish(request, FinishReason.LENGTH)
            step.exhausted.append(request)
            return False
        while not self._cache.grow(request, request.num_tokens):
            victim = self._running[-1]
            self._preempt(step, victim)
            if victim is entry:
                return False
        return True

    def _preempt(self, step: ScheduledStep, entry: Ranked) -> None:
        """Send a running request back to wait, without its blocks. Their cached contents survive until needed."""
        request = entry.request
        self._running.remove(entry)
        self._take_blocks(request)
        request.status = RequestStatus.WAITING
        request.draft_token_ids = ()
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.add(entry)
        step.preempted.append(request)

    def _take_blocks(self, request: Request) -> None:
        self._cache.free(request)
        request.num_computed_tokens = 0

    def _schedule_prefill(self, step: ScheduledStep, request: Request, budget: int) -> int:
        """Schedule as much of a running request's prompt as fits; returns what is left of the budget."""
        start = request.num_computed_tokens
        num_scheduled_tokens = min(request.num_tokens - start, self._max_chunk, budget)
        if num_scheduled_tokens > 0:
            step.chunks.append(ScheduledChunk(request, start, num_scheduled_tokens))
        return budget - num_scheduled_tokens

    def _admit(self, step: ScheduledStep, budget: int) -> None:
        """Start waiting requests in order while there are rows, seats and blocks. Nobody overtakes one that waits."""
        while self._waiting and budget > 0 and len(self._running) < self._config.max_num_seqs:
            entry = self._waiting[0]
            request = entry.request
            # Each running request has a block of its own (its last one is new at admission, and it takes the next one
            # before anyone can be admitted to share that), so who fills the whole pool runs alone and is no victim.
            assert request.num_tokens <= self._cache.capacity_tokens, f"request {request.request_id} waits for ever"
            if self._cache.is_prefix_under_way(request):
                return  # waits for no longer than its own prefill would have kept those behind it waiting
            num_reserved_blocks = len(self._running) + 1 if self._running else 0
            num_cached_tokens = self._cache.admit(request, num_reserved_blocks)
            if num_cached_tokens is None:
                return
            if request.num_preemptions == 0:
                request.num_cached_tokens = min(num_cached_tokens, request.num_prompt_tokens)
            request.num_computed_tokens = num_cached_tokens
            request.status = RequestStatus.RUNNING
            self._waiting.remove(entry)
            self._running.add(entry)
            budget = self._schedule_prefill(step, request, budget)
