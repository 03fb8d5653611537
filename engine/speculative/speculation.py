"""Speculative decoding as the engine sees it: who gets how many drafts, and what became of them."""

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from engine.batch import ScheduledStep
from engine.request import Request, RequestStatus
from engine.speculative.acceptance import AcceptanceEstimate
from engine.speculative.policy import Floats, Ints, choose_num_draft_tokens
from engine.speculative.proposer import DraftOrder, Proposer, ReportingProposer
from engine.speculative.step_times import StepTimes
from engine.stats import SpeculationStats

LIKELY_AT_BEST = 0.95  # acceptance of a batch of which nothing is known yet but that drafts may pay
DECIDED_FOR = 32  # steps for which it stands whether drafts can pay for so many requests
PLANNING_SHARE = 0.02  # of the time, at most: planning takes 0.1 to 0.5 ms, a step of a small model 0.4 ms
LONGEST_PLAN = 32  # steps
NEGLIGIBLE = 0.01  # of a step: drafting that takes less counts as free


class Speculation:
    """Orders drafts from a proposer and learns from their verification. One for each engine, called by its thread.

    The number of drafts follows from how likely each request's are to be accepted and from how long steps take, both
    as seen here: of steps with drafts apart from those without, which the host runs one ahead of. What is chosen
    changes speed and no token.
    """

    def __init__(
        self,
        proposer: Proposer,
        num_draft_tokens: int,
        max_draft_tokens: int,
        padded_sizes: Sequence[int] = (),
        *,
        always: bool = False,
    ) -> None:
        """num_draft_tokens: at most, of each request in each step. max_draft_tokens: of all requests in a step.
        padded_sizes: the row counts that the device's steps are padded to; empty if they are not. always: have
        `num_draft_tokens` in each step, whether they pay or not."""
        self.proposer = proposer
        self._num_draft_tokens = num_draft_tokens
        self._always = always
        self._max_draft_tokens = max_draft_tokens
        self._plain_times = StepTimes(padded_sizes)
        self._drafted_times = StepTimes(padded_sizes)
        self._drafting_times = StepTimes()  # for one token more of so many requests
        self._overall = AcceptanceEstimate()
        self._estimates: dict[Request, tuple[AcceptanceEstimate, int]] = {}  # with the tokens that it has seen
        self._verdicts: dict[int, tuple[bool, int]] = {}  # for so many requests: may drafts pay? Until which step
        self._plan: dict[Request, int] = {}
        self._planned_until = 0  # which step
        self._num_steps = 0
        self._reporting = proposer if isinstance(proposer, ReportingProposer) else None
        self._num_rounds = 0
        self._num_drafted_tokens = 0
        self._num_accepted_tokens = 0

    def propose(self, running: Sequence[Request]) -> None:
        """Give the requests that decode their `draft_token_ids` for the next step."""
        decoding = [request for request in running if _decodes(request)]
        counts = self._choose(decoding)
        orders = [DraftOrder(request, count) for request, count in zip(decoding, counts, strict=True) if count]
        if not orders:
            return
        started = perf_counter()
        proposed = self.proposer.propose(orders, self._worth_waiting_s(decoding, counts))
        self._drafting_times.observe(len(orders), (perf_counter() - started) / max(counts))
        for order, drafts in zip(orders, proposed, strict=True):
            assert len(drafts) <= order.num_draft_tokens
            order.request.draft_token_ids = drafts

    def waits_for(self, sampling: Sequence[Request]) -> bool:
        """Whether the next step had better wait for the tokens of these requests, to be drafted behind."""
        return any(self._choose(sampling, num_coming_tokens=1))

    def observe_step(self, step: ScheduledStep, step_time_s: float) -> None:
        """`step` took so long, without its drafting."""
        self._num_steps += 1
        num_rows = step.num_scheduled_tokens
        if num_rows == len(step.chunks) + step.num_draft_tokens:  # with a prompt's chunk in it, it tells little
            (self._drafted_times if step.num_draft_tokens else self._plain_times).observe(num_rows, step_time_s)

    def observe_round(self, request: Request, num_drafted_tokens: int, num_accepted_tokens: int) -> None:
        """Drafts of a request have been verified. It may have ended with them."""
        if request.finish_reason is None:
            estimate, _ = self._estimates.get(request) or (AcceptanceEstimate(self._overall.probability), 0)
            self._estimates[request] = estimate, request.num_tokens
            estimate.observe(num_drafted_tokens, num_accepted_tokens)
        self._overall.observe(num_drafted_tokens, num_accepted_tokens)
        self._num_rounds += 1
        self._num_drafted_tokens += num_drafted_tokens
        self._num_accepted_tokens += num_accepted_tokens

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._estimates.pop(request, None)
        self._plan.pop(request, None)
        self.proposer.forget(request)

    def close(self) -> None:
        self.proposer.close()

    def stats(self) -> SpeculationStats:
        remote = self._reporting.stats() if self._reporting else None
        return SpeculationStats(self._num_rounds, self._num_drafted_tokens, self._num_accepted_tokens, remote)

    def _choose(self, requests: Sequence[Request], num_coming_tokens: int = 0) -> list[int]:
        """How many drafts to order for each of these, behind so many tokens that are on their way."""
        if not self._always and not self._may_pay(len(requests)):
            return [0] * len(requests)
        # A token is chosen behind the drafts in any case.
        limits = [r.max_output_tokens - len(r.output_token_ids) - num_coming_tokens - 1 for r in requests]
        limits = [
            limit if limit > 0 and self.proposer.may_propose(request) else 0
            for request, limit in zip(requests, limits, strict=True)
        ]
        if self._always:
            return [min(self._num_draft_tokens, limit) for limit in limits]
        return list(map(min, self._planned(requests, limits), limits))

    def _planned(self, requests: Sequence[Request], limits: Sequence[int]) -> list[int]:
        """As a plan says that is still good, or a new one. It is good for as long as makes planning cheap."""
        if self._num_steps < self._planned_until:
            counts = [self._plan.get(request) if limit else 0 for request, limit in zip(requests, limits, strict=True)]
            if None not in counts:
                return counts  # type: ignore[return-value]
        started = perf_counter()
        acceptance = [
            self._estimate(request).probability if limit else 0.0
            for request, limit in zip(requests, limits, strict=True)
        ]
        best = self._best_counts(acceptance)
        self._plan = {request: count for request, count, limit in zip(requests, best, limits, strict=True) if limit}
        step_s = self._plain_times(len(requests)) or float("inf")
        num_steps = (perf_counter() - started) / (PLANNING_SHARE * step_s)
        self._planned_until = self._num_steps + min(int(num_steps), LONGEST_PLAN)
        return best

    def _may_pay(self, num_requests: int) -> bool:
        """Whether drafts could make a step of so many requests faster, were they nearly always right.

        Where not, no more is to be asked about each of many requests, for some steps.
        """
        may_pay, until = self._verdicts.get(num_requests, (False, 0))
        if self._num_steps >= until:
            may_pay = num_requests > 0 and any(self._best_counts([LIKELY_AT_BEST] * num_requests))
            num_steps = DECIDED_FOR if self._plain_times(1) is not None else 1
            self._verdicts[num_requests] = may_pay, self._num_steps + num_steps
        return may_pay

    def _best_counts(self, acceptance: Sequence[float]) -> list[int]:
        row_limit = len(acceptance) + self._max_draft_tokens
        drafting_s = None if self._drafting_is_free() else self._drafting_s
        return choose_num_draft_tokens(acceptance, self._num_draft_tokens, row_limit, self._step_s, drafting_s)

    def _step_s(self, num_rows: Ints) -> Floats | None:
        """Seconds of steps, the first of them without drafts."""
        plain = self._plain_times.of_each(num_rows)
        if plain is None:
            return None
        drafted = self._drafted_times.of_each(num_rows[1:])
        if drafted is not None:
            plain = np.concatenate((plain[:1], drafted))
        return np.maximum.accumulate(plain)

    def _drafting_s(self, max_depth: int, num_drafted: Ints) -> Floats:
        seconds = self._drafting_times.of_each(num_drafted)
        return np.zeros(len(num_drafted)) if seconds is None else max_depth * seconds

    def _drafting_is_free(self) -> bool:
        drafting_s, plain_s = self._drafting_times(1), self._plain_times(1)
        return drafting_s is None or plain_s is None or drafting_s < NEGLIGIBLE * plain_s

    def _worth_waiting_s(self, decoding: Sequence[Request], counts: Sequence[int]) -> float:
        """How much longer a step with these drafts may take before one without them is as good."""
        num_requests = len(decoding)
        seconds = self._step_s(np.array([num_requests, num_requests + sum(counts)]))
        if seconds is None:
            return 0.0
        gained = sum(
            sum(self._estimate(request).probability ** depth for depth in range(1, count + 1))
            for request, count in zip(decoding, counts, strict=True)
        )
        return max(0.0, float(seconds[0] * (num_requests + gained) / num_requests - seconds[1]))

    def _estimate(self, request: Request) -> AcceptanceEstimate:
        """With the tokens that were output without drafts since it was last asked for."""
        known = self._estimates.get(request)
        if known is None:
            estimate, num_seen = AcceptanceEstimate(self._overall.probability), request.num_tokens
        else:
            estimate, num_seen = known
            if num_seen < request.num_tokens:
                estimate.pass_over(request.num_tokens - num_seen)
        self._estimates[request] = estimate, request.num_tokens
        return estimate


def _decodes(request: Request) -> bool:
    """Whether the next step computes the request's last token and no more of its own."""
    is_next = request.num_tokens - request.num_computed_tokens == 1
    return is_next and request.status is RequestStatus.RUNNING and not request.num_pending_tokens
