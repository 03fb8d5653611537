"""Remote drafts on a machine of any speed: what is tested is what is drafted, not what comes in time."""

import time
from collections.abc import Sequence
from typing import Any

from engine.speculative.proposer import DraftOrder, Proposer
from serve_app.draft_client import RemoteProposer
from serve_app.draft_link import Resolve

PATIENCE_S = 30.0


class PatientProposer(RemoteProposer):
    """Waits for what is ordered, and until the draft has read the prompts that it was only just told of. A draft that
    says nothing for long is not given up."""

    def __init__(self, resolve: Resolve, fallback: Proposer, **target: Any) -> None:
        super().__init__(resolve, fallback, silence_limit_s=2 * PATIENCE_S, **target)

    def propose(self, orders: Sequence[DraftOrder], wait_s: float) -> Sequence[Sequence[int]]:  # noqa: ARG002
        proposals = super().propose(orders, PATIENCE_S)
        deadline_s = time.monotonic() + PATIENCE_S
        while not all(entry.has_answered for entry in self._book._entries.values()) and time.monotonic() < deadline_s:
            self._poll(time.perf_counter())
            time.sleep(0.001)
        return proposals
