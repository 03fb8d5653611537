"""The scripted engine with few seats: the other requests wait. It begins when it may."""

import itertools
import time
from pathlib import Path

from engine.request import RequestOutput
from engine.stats import EngineStats
from tests.serve_app.fake_engine import FakeEngine

SEATS = 4
STEP_S = 0.02


class SeatedEngine(FakeEngine):
    """Those that came first have the seats."""

    def __init__(self, step_s: float, may_begin: Path) -> None:
        """may_begin: as soon as it exists."""
        super().__init__(step_s)
        self._may_begin = may_begin

    def step(self) -> list[RequestOutput]:
        if not self._may_begin.exists():
            time.sleep(self._step_s)
            return []
        everyone = self._running
        self._running = dict(itertools.islice(everyone.items(), SEATS))
        waiting = {request_id: each for request_id, each in everyone.items() if request_id not in self._running}
        outputs = super().step()
        self._running |= waiting
        return outputs

    def stats(self) -> EngineStats:
        num_running = min(SEATS, len(self._running))
        return EngineStats(
            num_requests_running=num_running,
            num_requests_waiting=len(self._running) - num_running,
            num_blocks=100,
            num_blocks_in_use=num_running,
            num_steps=self._num_steps,
        )


def load_seated_engine(may_begin: Path, _find_drafts: object) -> FakeEngine:
    """What bind() wants, with the path bound to it."""
    return SeatedEngine(STEP_S, may_begin)
