"""The policies that are compared: ours, Serve's own, and one that knows what is coming."""

import math
from collections import deque
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray
from ray.serve import autoscaling_policy
from ray.serve.config import AutoscalingConfig

from benchmarks.autoscaling.cluster import Objective, Outcome, View, simulate
from benchmarks.autoscaling.service import Fleet, Replica
from benchmarks.autoscaling.traces import Trace
from serve_app.autoscaling.load import EngineLoad
from serve_app.autoscaling.need import EngineGoal, engine_need, needed_to_keep_up
from serve_app.autoscaling.target import Bounds, Memory, Pace, next_target


class QueueDepthScaler:
    """Ours: what serve_app.autoscaling.EnginePolicy decides, without Serve around it."""

    def __init__(self, goal: EngineGoal, pace: Pace, bounds: Bounds) -> None:
        self._goal = goal
        self._pace = pace
        self._bounds = bounds
        self._memory = Memory()

    def target(self, view: View) -> int:
        load = EngineLoad(
            view.num_running,
            view.num_waiting,
            finished_per_s=view.finished_per_s,
            capacity_per_s=view.capacity_per_s,
        )
        needs = (engine_need(load, self._goal), needed_to_keep_up(load))
        target, self._memory = next_target(
            self._pace, self._memory, view.now_s, view.target, view.num_ready, *needs, self._bounds
        )
        return target


class ServeScaler:
    """Serve's own: ongoing requests over `target_ongoing_requests`, the mean of a window, with its delays. The code is
    Serve's; of it we leave out the clock. It is told of requests, where in the service it would see groups of them."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self._config = config
        self._state: dict[str, object] = {}
        self._window: deque[tuple[float, int]] = deque()
        self._total = 0
        self._reported = 0.0
        self._report_due_s = 0.0

    def target(self, view: View) -> int:
        config = self._config
        ctx = SimpleNamespace(
            config=config,
            current_num_replicas=view.num_ready,
            target_num_replicas=view.target,
            total_num_requests=self._num_ongoing(view),
        )
        target = autoscaling_policy._get_cold_start_scale_up_replicas(ctx)
        if target is None:
            desired, _ = autoscaling_policy._core_replica_queue_length_policy(ctx)
            desired = autoscaling_policy._apply_scaling_factors(desired, view.num_ready, config)
            target, self._state = autoscaling_policy._apply_delay_logic(
                desired, view.target, config, self._state, _now=view.now_s
            )
        return max(config.min_replicas, min(config.max_replicas, target))

    def _num_ongoing(self, view: View) -> float:
        num_ongoing = view.num_running + view.num_waiting
        self._window.append((view.now_s, num_ongoing))
        self._total += num_ongoing
        while self._window[0][0] <= view.now_s - self._config.look_back_period_s:
            self._total -= self._window.popleft()[1]
        wakes = not view.num_ready and view.num_waiting > 0  # then Serve's routers report at once
        if view.now_s >= self._report_due_s or wakes:
            self._report_due_s = view.now_s + self._config.metrics_interval_s
            self._reported = max(self._total / len(self._window), 1.0 if wakes else 0.0)
        return self._reported


class PlannedScaler:
    """So many replicas at each step."""

    def __init__(self, plan: NDArray[np.int64], step_s: float) -> None:
        self._plan = plan.tolist()
        self._step_s = step_s

    def target(self, view: View) -> int:
        return self._plan[min(round(view.now_s / self._step_s), len(self._plan) - 1)]


@dataclass(frozen=True)
class Oracle:
    """Knows the arrivals, and starts replicas before they are needed.

    It tries how thriftily that can be done, and takes the cheapest of the plans that serve as many requests in time as
    the best of them, but for `tolerance`.
    """

    objective: Objective
    tolerance: float = 0.001
    slacks: tuple[float, ...] = (0.0, 0.75)  # parts of the objective's queue time, over which arrivals are spread
    fillings: tuple[float, ...] = (1.0, 0.85, 0.7, 0.5)  # of the streams with which tokens still come in time

    def run(self, trace: Trace, replica: Replica, fleet: Fleet, bounds: Bounds, seed: int) -> Outcome:
        outcomes = []
        for slack, filling in product(self.slacks, self.fillings):
            need = self._need(trace, replica, slack * self.objective.queue_time_s, filling)
            plan = _held(np.minimum(need, bounds.most), fleet, bounds, trace.step_s)
            scaler = PlannedScaler(plan, trace.step_s)
            outcomes.append(simulate(trace, replica, fleet, scaler, int(plan[0]), seed))
        good = [outcome.good_part(self.objective) for outcome in outcomes]
        fit = [each for each, part in zip(outcomes, good, strict=True) if part >= max(good) - self.tolerance]
        return min(fit, key=lambda each: each.gpu_hours)

    def _need(self, trace: Trace, replica: Replica, slack_s: float, filling: float) -> NDArray[np.int64]:
        """Replicas at each step, were they all full to that part, so that nobody waited."""
        spread = max(1, round(slack_s / trace.step_s))
        arrivals = np.convolve(trace.arrivals, np.full(spread, 1 / spread))
        streams = filling * replica.streams_within(self.objective.token_time_s)
        staying = math.exp(-replica.finished_per_s(streams) / streams * trace.step_s)
        present, num_present = np.empty(len(arrivals)), 0.0
        for step, num_arrivals in enumerate(arrivals.tolist()):
            num_present = num_present * staying + num_arrivals
            present[step] = num_present
        return np.ceil(present / streams - 0.01).astype(np.int64)  # what is left of a request that has ended is none


def _held(need: NDArray[np.int64], fleet: Fleet, bounds: Bounds, step_s: float) -> NDArray[np.int64]:
    """Replicas that are ready when they are needed, and stay where they would soon have to start again."""
    num_near, far_s = fleet.num_nodes, fleet.start_time_s(bounds.most)
    near = _highest_of_future(np.minimum(need, num_near), math.ceil(fleet.start_time_s(1) / step_s) + 1)
    far = _highest_of_future(np.where(need > num_near, need, 0), math.ceil(far_s / step_s) + 1)
    return np.append(np.maximum(np.maximum(near, far), bounds.fewest), bounds.fewest)


def _highest_of_future(values: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """At each place, the highest of it and the `length` that follow."""
    highest, covered = values.copy(), 1
    while covered <= length:
        shift = min(covered, length + 1 - covered)
        highest[:-shift] = np.maximum(highest[:-shift], highest[shift:])
        covered += shift
    return highest
