"""Proposers that know what is coming, or do not."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.request import Request
from engine.speculative.proposer import DraftOrder


@dataclass
class Oracle:
    """Proposes what it knows to be each request's output, with an error from time to time.

    outputs: by request id. num_right: draft tokens of each round that are right at least, None for all; the one behind
    them is wrong. coin: with this probability each further draft is right as well.
    """

    outputs: Mapping[str, Sequence[int]]
    vocab_size: int
    num_right: int | None = None
    coin: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(5))
    num_proposed: int = 0
    forgotten: list[str] = field(default_factory=list)

    def may_propose(self, request: Request) -> bool:  # noqa: ARG002
        return True

    def propose(self, orders: Sequence[DraftOrder], wait_s: float) -> list[list[int]]:  # noqa: ARG002
        return [self._drafts(order) for order in orders]

    def _drafts(self, order: DraftOrder) -> list[int]:
        output = self.outputs[order.request.request_id]
        start = len(order.request.output_token_ids)
        drafts = []
        for place, right in enumerate(output[start : start + order.num_draft_tokens]):
            is_right = self.num_right is None or place < self.num_right or self.draw.random() < self.coin
            drafts.append(
                right if is_right else (right + 1 + self.draw.randrange(self.vocab_size - 1)) % self.vocab_size
            )
        self.num_proposed += len(drafts)
        return drafts

    def forget(self, request: Request) -> None:
        self.forgotten.append(request.request_id)

    def close(self) -> None:
        pass


@dataclass
class RandomProposer(Oracle):
    """Proposes anything."""

    def _drafts(self, order: DraftOrder) -> list[int]:
        drafts = [self.draw.randrange(self.vocab_size) for _ in range(order.num_draft_tokens)]
        self.num_proposed += len(drafts)
        return drafts
