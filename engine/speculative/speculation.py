"""Speculative decoding as the engine sees it: who gets how many drafts, and what became of them."""

from collections.abc import Sequence

from engine.batch import ScheduledStep
from engine.request import Request, RequestStatus
from engine.speculative.proposer import DraftOrder, Proposer


class Speculation:
    """Orders drafts from a proposer and learns from their verification. One for each engine, called by its thread."""

    def __init__(self, proposer: Proposer, num_draft_tokens: int) -> None:
        self._proposer = proposer
        self._num_draft_tokens = num_draft_tokens

    def propose(self, running: Sequence[Request]) -> None:
        """Give the requests that decode their `draft_token_ids` for the next step."""
        orders = [
            DraftOrder(request, limit)
            for request in running
            if _decodes(request) and (limit := min(self._num_draft_tokens, _num_useful(request))) > 0
        ]
        if not orders:
            return
        for order, drafts in zip(orders, self._proposer.propose(orders, 0.0), strict=True):
            assert len(drafts) <= order.num_draft_tokens
            order.request.draft_token_ids = drafts

    def waits_for(self, sampling: Sequence[Request]) -> bool:
        """Whether the next step had better wait for the tokens of these requests, to be drafted behind."""
        return any(_num_useful(request) > 1 and self._proposer.may_propose(request) for request in sampling)

    def observe_step(self, step: ScheduledStep, step_time_s: float) -> None:
        pass

    def observe_round(self, request: Request, num_drafted_tokens: int, num_accepted_tokens: int) -> None:
        pass

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._proposer.forget(request)

    def close(self) -> None:
        self._proposer.close()


def _decodes(request: Request) -> bool:
    """Whether the next step computes the request's last token and no more of its own."""
    is_next = request.num_tokens - request.num_computed_tokens == 1
    return is_next and request.status is RequestStatus.RUNNING and not request.num_pending_tokens


def _num_useful(request: Request) -> int:
    """Drafts past this are of no use: a token is chosen behind them in any case."""
    return request.max_output_tokens - len(request.output_token_ids) - 1
