"""Remote drafts on a machine of any speed: what is tested is what is drafted, not what comes in time."""

import time
from collections.abc import Sequence

from engine.speculative.proposer import DraftOrder
from serve_app.draft_client import RemoteProposer

PATIENCE_S = 30.0


class PatientProposer(RemoteProposer):
    """Waits for what is ordered, and until the draft has read the prompts that it was only just told of."""

    def propose(self, orders: Sequence[DraftOrder], wait_s: float) -> Sequence[Sequence[int]]:  # noqa: ARG002
        proposals = super().propose(orders, PATIENCE_S)
        deadline_s = time.monotonic() + PATIENCE_S
        while not all(entry.has_answered for entry in self._book._entries.values()) and time.monotonic() < deadline_s:
            self._poll(time.perf_counter())
            time.sleep(0.001)
        return proposals
