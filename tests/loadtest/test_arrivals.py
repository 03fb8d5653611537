"""Open-loop arrivals have the rate and the burstiness that they say, whatever the server does."""

import itertools
import random
import time

import gevent
import numpy as np
import pytest
from gevent.event import Event

from loadtest.arrivals import OPEN_LOOPS, arrival_gaps, dispatch

# Variance of the gaps ÷ their mean squared. Bursts of 4: three gaps of 0 and one that is exponential.
DISPERSIONS = {"poisson": 1.0, "bursts": 7.0, "gamma": 4.0, "constant": 0.0}


@pytest.mark.parametrize("kind", OPEN_LOOPS)
def test_gaps_have_rate_and_dispersion(kind: str) -> None:
    gaps = np.array(
        list(itertools.islice(arrival_gaps(kind, 20.0, random.Random(1), burst_size=4, burstiness=0.25), 40_000))
    )
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(DISPERSIONS[kind], rel=0.1, abs=1e-9)


def test_gaps_are_those_of_the_seed() -> None:
    def first(seed: int) -> list[float]:
        return list(itertools.islice(arrival_gaps("poisson", 5.0, random.Random(seed), 8, 0.5), 20))

    assert first(1) == first(1) != first(2)


def test_dispatch_keeps_to_what_was_drawn_where_it_is_late() -> None:
    """The first three are due at once; the others see a greenlet that keeps the thread busy."""
    stopping, due = Event(), []
    started_s = time.perf_counter()

    def spawn(due_s: float) -> None:
        due.append(due_s)
        if len(due) == 3:
            time.sleep(0.2)  # as a client that is short of CPU
        if len(due) == 6:
            stopping.set()

    dispatch(iter([0.0, 0.0, 0.0, 0.05, 0.05, 0.05, 0.05]), spawn, stopping)
    assert np.allclose(np.array(due) - due[0], [0, 0, 0, 0.05, 0.1, 0.15])
    assert 0.0 <= due[0] - started_s < 60.0


def test_dispatch_stops_while_it_waits() -> None:
    stopping = Event()
    dispatching = gevent.spawn(dispatch, iter([3600.0]), pytest.fail, stopping)
    gevent.sleep(0)
    stopping.set()
    dispatching.get(timeout=60)
