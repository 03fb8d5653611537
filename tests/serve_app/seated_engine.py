"""The scripted engine with few seats: the other requests wait."""

import itertools

from engine.request import RequestOutput
from engine.stats import EngineStats
from tests.serve_app.fake_engine import FakeEngine

SEATS = 4
STEP_S = 0.02


class SeatedEngine(FakeEngine):
    """Those that came first have the seats."""

    def step(self) -> list[RequestOutput]:
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


def load_seated_engine(_find_drafts: object) -> FakeEngine:
    """What bind() wants."""
    return SeatedEngine(STEP_S)
