"""Who proposes draft tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from engine.request import Request
from engine.stats import RemoteStats


@dataclass(frozen=True)
class DraftOrder:
    """Up to `num_draft_tokens` (at least 1) tokens are wanted behind the last token of `request`, which decodes and
    has no pending token."""

    request: Request
    num_draft_tokens: int


class Proposer(Protocol):
    """Proposes what comes next in requests. Called by the engine's thread, between its steps.

    It reads requests and never changes them. Whatever it returns, no output changes; it does not raise for anything
    that happens outside the process.
    """

    def may_propose(self, request: Request) -> bool:
        """Whether it is likely to have drafts for the token after the next: the engine then waits for the token that is
        being chosen, instead of launching the step behind it at once. Cheap: asked for each request in each step."""
        ...

    def propose(self, orders: Sequence[DraftOrder], wait_s: float) -> Sequence[Sequence[int]]:
        """Token ids for each order, at most as many as it wants and none where there is nothing to propose.

        wait_s: how long the engine would rather wait for drafts than go without; a proposer that computes them here
        and now takes the time that it takes.
        """
        ...

    def forget(self, request: Request) -> None:
        """The request has ended. Also called for requests that were never proposed for."""
        ...

    def close(self) -> None:
        """The engine stops."""
        ...


@runtime_checkable
class ReportingProposer(Proposer, Protocol):
    """A Proposer whose draft model runs in another process, which can be late, lost or wrong."""

    def stats(self) -> RemoteStats:
        """A copy, for any thread."""
        ...
