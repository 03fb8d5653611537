"""Arrivals: how many requests come in each step."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Rate = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # of the time in s, in parts of the peak
HOUR_S = 3600.0


class TraceName(StrEnum):
    POISSON = "poisson"
    BURSTS = "bursts"
    DAY = "day"
    FLASH_CROWD = "flash-crowd"


@dataclass(frozen=True)
class Trace:
    """`arrivals[i]` requests come between i * step_s and (i + 1) * step_s."""

    name: TraceName
    step_s: float
    arrivals: NDArray[np.int64]

    @property
    def duration_s(self) -> float:
        return len(self.arrivals) * self.step_s


@dataclass(frozen=True)
class _Kind:
    duration_s: float
    step_s: float
    rate: Rate


def _steady(time_s: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 + 0 * time_s


def _day(time_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Asleep at four, busy at eleven and, less so, at eight in the evening."""
    hour = time_s / HOUR_S
    busy = np.exp(-(((hour - 11) / 3.0) ** 2)) + 0.75 * np.exp(-(((hour - 20) / 2.2) ** 2))
    return 0.03 + 0.97 * busy / 1.02


def _flash(time_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """A twentieth, until within 20 s everybody comes, to leave over some minutes."""
    since_s = time_s - 600
    crowd = np.where(since_s < 0, 0.0, np.minimum(since_s / 20, 1.0) * np.exp(-np.maximum(since_s - 20, 0) / 300))
    return 0.05 + 0.95 * crowd


def _bursts(time_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nothing for long, then a second's worth of requests, then nothing."""
    return np.where((time_s % 400 >= 60) & (time_s % 400 < 61), 1.0, 0.0)


_KINDS = {
    TraceName.POISSON: _Kind(0.5 * HOUR_S, 0.1, _steady),
    TraceName.BURSTS: _Kind(HOUR_S, 0.1, _bursts),
    TraceName.DAY: _Kind(24 * HOUR_S, 0.5, _day),
    TraceName.FLASH_CROWD: _Kind(HOUR_S, 0.1, _flash),
}


def make_trace(name: TraceName, peak_per_s: float, seed: int) -> Trace:
    """peak_per_s: requests/s where the rate is highest. The same seed gives the same trace."""
    kind = _KINDS[name]
    time_s = (np.arange(round(kind.duration_s / kind.step_s)) + 0.5) * kind.step_s
    rng = np.random.default_rng([seed, list(TraceName).index(name)])
    return Trace(name, kind.step_s, rng.poisson(peak_per_s * kind.step_s * kind.rate(time_s)))
