"""Replicas under a trace, step by step.

One queue in front of all replicas, first come, first served; streams spread evenly; lengths of answers are exponential,
so that a step's departures are a binomial draw. A replica that is taken away hands its streams to the others. Each of
these is kinder than the real service, and kind to every policy alike.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.autoscaling.service import Fleet, Replica
from benchmarks.autoscaling.traces import Trace
from serve_app.load_meter import FINISHED_MEMORY_S, Capacity, Rate

CONTROL_S = 0.3  # between decisions, and how old what they are made on is: reports and Serve's loop together
TAIL_S = 600.0  # after the last arrival: what is still to be done, and how long replicas stay
MAX_SAMPLES = 200_000  # requests whose times are looked at, evenly over all


@dataclass(frozen=True)
class View:
    """What a policy is shown."""

    now_s: float
    target: int
    num_ready: int
    num_running: int
    num_waiting: int
    finished_per_s: float  # of all replicas lately
    capacity_per_s: float  # of one replica while requests wait, as serve_app.load_meter has it; 0: not known


class Scaler(Protocol):
    """A policy, with its memory."""

    def target(self, view: View) -> int: ...


@dataclass(frozen=True)
class Objective:
    """What a request has to be served in to count as good."""

    queue_time_s: float = 1.0
    token_time_s: float = 0.05


@dataclass(frozen=True)
class Outcome:
    """Of one run. Arrays are by step, from the trace's start to TAIL_S after its end."""

    trace: Trace
    num_held: NDArray[np.int64]  # replicas that are paid for: ready or starting
    num_running: NDArray[np.int64]
    num_waiting: NDArray[np.int64]
    queue_times_s: NDArray[np.float64]  # of requests, evenly sampled; inf: not served
    token_times_s: NDArray[np.float64]  # of the same, where they began

    @property
    def gpu_hours(self) -> float:
        return float(self.num_held.sum()) * self.trace.step_s / 3600

    def good_part(self, objective: Objective) -> float:
        """Of all requests."""
        good = (self.queue_times_s <= objective.queue_time_s) & (self.token_times_s <= objective.token_time_s)
        return float(good.mean()) if len(good) else 1.0

    def goodput_per_s(self, objective: Objective) -> float:
        return self.good_part(objective) * float(self.trace.arrivals.sum()) / self.trace.duration_s

    def queue_time_s(self, percentile: float) -> float:
        if not len(self.queue_times_s):
            return 0.0
        return float(np.percentile(self.queue_times_s, percentile, method="inverted_cdf"))


class Cluster:
    """Ready and starting replicas, running and waiting requests."""

    def __init__(self, replica: Replica, fleet: Fleet, num_ready: int, rng: np.random.Generator) -> None:
        self._replica = replica
        self._fleet = fleet
        self._rng = rng
        self._ready_at_s: deque[float] = deque()  # of those that start
        self._finished = Rate(FINISHED_MEMORY_S)
        self._capacity = Capacity()
        self.num_ready = num_ready
        self.num_running = 0
        self.num_waiting = 0

    @property
    def num_held(self) -> int:
        return self.num_ready + len(self._ready_at_s)

    def resize(self, target: int, now_s: float) -> None:
        while self.num_held < target:
            ready_at_s = now_s + self._fleet.start_time_s(self.num_held + 1)
            self._ready_at_s.append(ready_at_s)
        surplus = self.num_held - target
        if surplus > 0:
            for _ in range(min(surplus, len(self._ready_at_s))):  # the last to come goes first
                self._ready_at_s.pop()
            # The last one ends what it has begun.
            self.num_ready = max(min(self.num_ready, target), 1 if self.num_running else 0)

    def step(self, now_s: float, step_s: float, num_arrivals: int) -> int:
        """Returns how many requests begin."""
        while self._ready_at_s and self._ready_at_s[0] <= now_s:
            self._ready_at_s.popleft()
            self.num_ready += 1
        self.num_waiting += num_arrivals
        if not self.num_ready:
            return 0
        num_left = 0
        if self.num_running:
            leaving_per_s = self._replica.finished_per_s(self.num_running / self.num_ready) * self.num_ready
            part = -math.expm1(-leaving_per_s / self.num_running * step_s)
            num_left = int(self._rng.binomial(self.num_running, part))
        self._finished.add(num_left, step_s)
        self._capacity.add(now_s, num_left / self.num_ready, step_s, was_full=self.num_waiting > num_arrivals)
        self.num_running -= num_left
        places = self.num_ready * self._replica.max_num_seqs - self.num_running
        num_begun = max(0, min(self.num_waiting, places))
        self.num_running += num_begun
        self.num_waiting -= num_begun
        return num_begun

    def view(self, now_s: float) -> View:
        rates = (self._finished.per_s, self._capacity.per_s(now_s))
        return View(now_s, self.num_held, self.num_ready, self.num_running, self.num_waiting, *rates)

    def token_time_s(self) -> float:
        return self._replica.token_time_s(self.num_running / self.num_ready) if self.num_ready else 0.0


def simulate(trace: Trace, replica: Replica, fleet: Fleet, scaler: Scaler, num_ready: int, seed: int = 0) -> Outcome:
    """Starts with `num_ready` replicas."""
    arrivals = np.concatenate([trace.arrivals, np.zeros(round(TAIL_S / trace.step_s), np.int64)])
    cluster = Cluster(replica, fleet, num_ready, np.random.default_rng(seed))
    control_steps = max(1, round(CONTROL_S / trace.step_s))
    held, running, waiting, begun, token_times_s = [], [], [], [], []
    for step, num_arrivals in enumerate(arrivals.tolist()):
        now_s = step * trace.step_s
        if step % control_steps == 0:  # before what this step brings: a decision is about the past
            cluster.resize(scaler.target(cluster.view(now_s)), now_s)
        begun.append(cluster.step(now_s, trace.step_s, num_arrivals))
        held.append(cluster.num_held)
        running.append(cluster.num_running)
        waiting.append(cluster.num_waiting)
        token_times_s.append(cluster.token_time_s())
    queue_times_s, token_samples_s = _times_of_requests(
        arrivals, np.array(begun), np.array(token_times_s), trace.step_s
    )
    return Outcome(trace, np.array(held), np.array(running), np.array(waiting), queue_times_s, token_samples_s)


def _times_of_requests(
    arrivals: NDArray[np.int64], begun: NDArray[np.int64], token_times_s: NDArray[np.float64], step_s: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of sampled requests, from counts: the k-th to come is the k-th to begin."""
    total = int(arrivals.sum())
    kth = np.unique(np.linspace(1, total, min(total, MAX_SAMPLES)).round().astype(np.int64)) if total else arrivals[:0]
    came = np.searchsorted(np.cumsum(arrivals), kth)
    began = np.searchsorted(np.cumsum(begun), kth)
    is_served = began < len(begun)
    queue_times_s = np.where(is_served, (began - came) * step_s, np.inf)
    return queue_times_s, token_times_s[np.minimum(began, len(begun) - 1)]
