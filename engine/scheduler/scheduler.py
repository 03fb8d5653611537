"""Continuous batching: what each engine step computes, under a token budget and a pool of blocks."""

from collections.abc import Sequence

from engine.batch import ScheduledChunk, ScheduledStep
from engine.cache.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.errors import InvalidRequest
from engine.request import FinishReason, Request, RequestStatus
from engine.scheduler.fair_exchange import fair_exchange, fair_victim
from engine.scheduler.ranking import Ranked, RankedRequests, virtual_arrival_s
from engine.scheduler.waiting_requests import WaitingRequests


class Scheduler:
    """Decides which tokens the next step computes. Used by one thread: schedule, run, commit, append, finish, repeat.

    **Order.** All requests stand in one strict order that never changes (`ranking`): priority, aged by waiting, then
    first come. Admission goes down this order without overtaking, and the victim of preemption is always the last of
    it. A preempted request so returns ahead of all that came after it. Admission also waits for a running prefill that
    is about to complete a block of the next request's prefix, which is then found instead of computed again.

    **Fairness.** Between several tenants, the order holds for each. Their requests of one priority are admitted by
    turns (`fair_queue`), for which the rows that they get are counted; running prefills share the rows of a step; the
    victim is the last of the tenant that holds most; and where the next one finds no room, the tenant that holds least
    may take some from that one (`fair_exchange`). So a tenant that comes late waits neither for the queue of another
    nor for its answers. With one tenant, nothing of this costs a step anything.

    **Progress.** The first of the running requests is never preempted, because a victim stands behind the request in
    need of its block, or is that request, or among tenants is any other than the first. It gets a row in every step or
    finishes, so it ends in a bounded number of steps, and then the next is first. Two large requests therefore cannot
    preempt each other in turn. The first of the waiting ones is admitted at the latest when nobody runs.

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
        self._waiting = WaitingRequests(config.fair_quantum_tokens or max(1, config.token_budget // 2))
        self._running = RankedRequests()
        self._num_added = 0
        self.num_preemptions = 0  # since the start
        self.is_displacement_due = False  # the last `schedule` might not displace anybody, and would have

    @property
    def running(self) -> tuple[Request, ...]:
        """Requests that hold blocks, the most urgent first."""
        return tuple(entry.request for entry in self._running)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests in the order in which they will be admitted, as far as they are of one tenant."""
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
        self._waiting.enter(entry)

    def schedule(self, may_displace: bool = True) -> ScheduledStep:
        """Choose the next step: a row for each decoding request, then chunks of running prefills, then new requests.

        The blocks that the chunks write to are in the requests' block tables when it returns. A step may be
        scheduled again if it was not run: nothing counts as computed before `commit`. may_displace: one tenant's
        requests may be preempted for another's; False where these expect tokens that would be lost.
        """
        step = ScheduledStep()
        self.is_displacement_due = False
        prefills = self._schedule_decodes(step)
        budget = self._config.token_budget - len(step.chunks)
        assert budget >= (1 if prefills else 0), "more requests run than a step has rows"
        if self._config.max_draft_tokens:
            if not step.preempted:
                self._add_drafts(step, min(self._config.max_draft_tokens, budget - (1 if prefills else 0)))
                budget -= step.num_draft_tokens
            for entry in self._running:
                entry.request.draft_token_ids = ()  # they were for this step alone
        if not self._waiting.are_shared:
            for request in prefills:
                budget = self._schedule_prefill(step, request, budget)
            self._admit(step, budget, may_displace)
        else:
            if prefills:
                budget = self._share_rows(step, prefills, budget)
            for chunk in step.chunks:
                self._waiting.charge(chunk.request, chunk.num_known_tokens)
            budget = self._admit(step, budget, may_displace)
            self._share_rest(step, prefills, budget)
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
        self._waiting.leave(entry)
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
        self._waiting.check_integrity()
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
        return [request for request in prefills if request.status is running] if step.preempted else prefills

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
        """Find a running request its next block, preempting others; False if it had to leave itself."""
        request = entry.request
        if request.num_tokens > self._cache.capacity_tokens:  # it ends, rather than wait for ever
            self.finish(request, FinishReason.LENGTH)
            step.exhausted.append(request)
            return False
        while not self._cache.grow(request, request.num_tokens):
            victim = self._victim()
            self._unschedule(step, victim.request)
            self._preempt(step, victim)
            if victim is entry:
                return False
        return True

    def _victim(self) -> Ranked:
        """Who is preempted where blocks are short: the last in order; among tenants, of the one that holds most."""
        last = self._running[-1]
        if not self._waiting.are_shared:
            return last  # and as requests are visited in order, it is not in the step yet
        priority = last.request.priority
        victim = fair_victim([entry for entry in self._running if entry.request.priority == priority])
        return victim if victim is not self._running[0] else last

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

    def _share_rows(self, step: ScheduledStep, prefills: Sequence[Request], budget: int) -> int:
        """Schedule running prefills; returns what is left of the budget.

        Of those with the priority of the first, each tenant's have an equal part of the rows, and one more part is kept
        for another tenant that waits. So nobody's first token waits for the end of another's long prompt.
        """
        priority = prefills[0].priority
        tenants = {request.tenant for request in prefills if request.priority == priority}
        others_wait = (
            bool(self._waiting)
            and self._waiting.next().request.priority == priority
            and any(head.request.tenant not in tenants for head in self._waiting.heads())
        )
        part = max(1, budget // (len(tenants) + others_wait))
        num_left = dict.fromkeys(tenants, part)
        for request in prefills:
            is_peer = request.priority == priority
            num_rows = min(num_left[request.tenant], budget) if is_peer else max(0, budget - part * others_wait)
            num_used = num_rows - self._schedule_prefill(step, request, num_rows)
            if is_peer:
                num_left[request.tenant] -= num_used
            budget -= num_used
        return budget

    def _share_rest(self, step: ScheduledStep, prefills: Sequence[Request], budget: int) -> None:
        """Give the rows that some tenants did not need to the prefills of others."""
        places = {chunk.request: place for place, chunk in enumerate(step.chunks)}
        for request in prefills:
            if budget <= 0 or request.status is not RequestStatus.RUNNING:
                continue
            if (place := places.get(request)) is None:
                num_left = self._schedule_prefill(step, request, budget)
                self._waiting.charge(request, budget - num_left)
                budget = num_left
                continue
            chunk = step.chunks[place]
            num_tokens = chunk.num_scheduled_tokens
            more = min(request.num_tokens - chunk.stop, self._max_chunk - num_tokens, budget)
            step.chunks[place] = ScheduledChunk(request, chunk.start, num_tokens + more)
            self._waiting.charge(request, more)
            budget -= more

    def _admit(self, step: ScheduledStep, budget: int, may_displace: bool) -> int:
        """Start waiting requests in order while there are rows, seats and blocks; returns what is left of the budget.

        Nobody of its own tenant overtakes one that waits.
        """
        # Blocks are short after a preemption, and whoever gave them up is ahead of most that wait.
        is_short = bool(step.preempted)
        while self._waiting and budget > 0:
            entry: Ranked | None = self._waiting.next()
            assert entry is not None
            if not is_short and self._cache.is_prefix_under_way(entry.request):
                break  # waits for no longer than its own prefill would have kept those behind it waiting
            if is_short or not self._start(entry):
                entry = self._displace(step, may_displace) if self._waiting.are_shared else None
                if entry is None:
                    break
                budget = self._config.token_budget - step.num_scheduled_tokens
            num_left = self._schedule_prefill(step, entry.request, budget)
            self._waiting.charge(entry.request, budget - num_left)
            budget = num_left
        return budget

    def _start(self, entry: Ranked) -> bool:
        """Let a waiting request run, if there are a seat and blocks for it."""
        if len(self._running) >= self._config.max_num_seqs:
            return False
        request = entry.request
        # Each running request has a block of its own (its last one is new at admission, and it takes the next one
        # before anyone can be admitted to share that), so who fills the whole pool runs alone and is no victim.
        assert request.num_tokens <= self._cache.capacity_tokens, f"request {request.request_id} waits for ever"
        num_reserved_blocks = len(self._running) + 1 if self._running else 0
        num_cached_tokens = self._cache.admit(request, num_reserved_blocks)
        if num_cached_tokens is None:
            return False
        if request.num_preemptions == 0:
            request.num_cached_tokens = min(num_cached_tokens, request.num_prompt_tokens)
        request.num_computed_tokens = num_cached_tokens
        request.status = RequestStatus.RUNNING
        self._waiting.remove(entry)
        self._running.add(entry)
        return True

    def _displace(self, step: ScheduledStep, may_displace: bool) -> Ranked | None:
        """Start the next request of the tenant that holds least in the room of the one that holds most, if it is due.

        Returns it. Who was displaced waits, and finds again what of its blocks is not used meanwhile.
        """
        priority = self._waiting.next().request.priority
        peers = [entry for entry in self._running if entry.request.priority == priority]
        entry, victims = fair_exchange(peers, self._waiting.heads(), self._cache.num_blocks_for)
        if not victims or self._cache.is_prefix_under_way(entry.request):
            return None
        if not may_displace:
            self.is_displacement_due = True
            return None
        for victim in victims:
            self._waiting.charge(victim.request, -self._unschedule(step, victim.request))
            self._preempt(step, victim)
            if self._start(entry):
                return entry
        return None

    def _unschedule(self, step: ScheduledStep, request: Request) -> int:
        """Take a request's chunk, if it has one, out of a step that is being made; returns its tokens, not drafts."""
        for place, chunk in enumerate(step.chunks):
            if chunk.request is request:
                step.num_draft_tokens -= len(chunk.draft_token_ids)
                del step.chunks[place]
                return chunk.num_known_tokens
        return 0
