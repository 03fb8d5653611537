"""Drafts from a model in the engine's own process."""

from collections.abc import Sequence

from engine.request import Request
from engine.speculative.drafter import Drafter
from engine.speculative.proposer import DraftOrder


class LocalProposer:
    """A Proposer that has a draft model compute what is ordered while the engine waits."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._num_told: dict[Request, int] = {}  # tokens that the draft model knows

    def may_propose(self, request: Request) -> bool:  # noqa: ARG002
        return True

    def propose(self, orders: Sequence[DraftOrder], wait_s: float) -> list[list[int]]:  # noqa: ARG002
        for order in orders:
            self._tell(order.request)
            self._drafter.order(order.request.request_id, order.num_draft_tokens)
        while self._drafter.has_work:
            self._drafter.step()
        drafts = (self._drafter.drafts(order.request.request_id)[1] for order in orders)
        return [ids[: order.num_draft_tokens] for order, ids in zip(orders, drafts, strict=True)]

    def forget(self, request: Request) -> None:
        if self._num_told.pop(request, None) is not None:
            self._drafter.drop(request.request_id)

    def close(self) -> None:
        for request in list(self._num_told):
            self.forget(request)

    def _tell(self, request: Request) -> None:
        key, num_told = request.request_id, self._num_told.get(request)
        if num_told is None or not self._drafter.accept(key, num_told, request.token_ids(num_told, request.num_tokens)):
            self._drafter.open(
                key, request.prompt_token_ids, request.output_token_ids, request.sampling, request.choice_index
            )
        self._num_told[request] = request.num_tokens
