"""Resident memory of the service's processes over time, and whether it grows."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import psutil

LIMIT_BYTES_PER_MIN = 2**20
NUM_MEANS = 20  # that a line is laid through: neighbouring samples depend on each other, means of many hardly do
_STUDENT_T = 2.101  # 97.5 % of Student's distribution with NUM_MEANS - 2 degrees of freedom

Sample = tuple[float, int]  # seconds since the watch began, bytes


@dataclass(frozen=True)
class Trend:
    """A line through the resident memory of one process, by least squares."""

    slope_bytes_per_min: float
    margin_bytes_per_min: float  # half of the slope's 95 % confidence interval
    first_bytes: int
    last_bytes: int
    peak_bytes: int

    @property
    def is_flat(self) -> bool:
        return self.slope_bytes_per_min <= LIMIT_BYTES_PER_MIN

    @property
    def surely_grows(self) -> bool:
        """Where the time was too short to tell growth from one step up, as an allocator makes it, this is False."""
        return self.slope_bytes_per_min - self.margin_bytes_per_min > LIMIT_BYTES_PER_MIN

    def __str__(self) -> str:
        slope, margin = self.slope_bytes_per_min / 2**20, self.margin_bytes_per_min / 2**20
        return f"{slope:+.2f} ± {margin:.2f} MiB a minute, {self.first_bytes >> 20} to {self.last_bytes >> 20} MiB"


def trend(samples: Sequence[Sample]) -> Trend | None:
    """None: there are too few samples to say."""
    if len(samples) < 2 * NUM_MEANS:
        return None
    edges = np.linspace(0, len(samples), NUM_MEANS + 1).astype(int)
    table = np.array(samples, dtype=float)
    minutes, sizes = np.array([table[start:end].mean(axis=0) for start, end in pairwise(edges)]).T
    minutes = (minutes - minutes.mean()) / 60
    square = float((minutes**2).sum())
    slope = float((minutes * (sizes - sizes.mean())).sum()) / square
    residual = float(((sizes - sizes.mean() - slope * minutes) ** 2).sum()) / (NUM_MEANS - 2)
    measured = [size for _, size in samples]
    return Trend(slope, _STUDENT_T * (residual / square) ** 0.5, measured[0], measured[-1], max(measured))


class MemoryWatch:
    """Of processes that are to live as long as it looks at them. Those that end are in `gone`."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        """pids: of each process, by a name."""
        self._started_s = time.monotonic()
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self.samples: dict[str, list[Sample]] = {name: [] for name in pids}
        self.gone: set[str] = set()

    def sample(self) -> None:
        for name, process in self._processes.items():
            try:
                resident_bytes = process.memory_info().rss
            except psutil.NoSuchProcess:
                self.gone.add(name)
            else:
                self.samples[name].append((time.monotonic() - self._started_s, resident_bytes))

    def trends(self, warm_up_s: float) -> dict[str, Trend]:
        """Of those with enough samples after the warm-up."""
        found = {}
        for name, samples in self.samples.items():
            of_name = trend([sample for sample in samples if sample[0] >= warm_up_s])
            if of_name is not None:
                found[name] = of_name
        return found

    def num_fds(self) -> dict[str, int]:
        """Open files and sockets of each process that is still there."""
        return {name: process.num_fds() for name, process in self._processes.items() if name not in self.gone}
