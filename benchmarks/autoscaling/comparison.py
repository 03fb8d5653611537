"""Which policies run on which traces, and what of it is printed and kept."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from ray.serve.config import AutoscalingConfig
from rich.table import Table

from benchmarks.autoscaling.cluster import CONTROL_S, Objective, Outcome, Scaler, simulate
from benchmarks.autoscaling.scalers import Oracle, QueueDepthScaler, ServeScaler
from benchmarks.autoscaling.service import Fleet, Replica, ServiceCurve, Workload
from benchmarks.autoscaling.traces import Trace, TraceName, make_trace
from serve_app.autoscaling.need import EngineGoal
from serve_app.autoscaling.target import Bounds, Pace
from serve_app.replica_counts import DRAIN_S, HOLD_S, IDLE_S, MARGIN, PENDING_HOLD_S

OURS, SERVE, EAGER_SERVE, ORACLE = "queue depth", "Serve", "Serve, no delays", "oracle"


@dataclass(frozen=True)
class Setting:
    """What is compared, and on what."""

    curve: ServiceCurve
    workload: Workload
    fleet: Fleet
    max_replicas: int
    load: float  # the traces' highest rate, in parts of what all replicas can do
    objective: Objective
    target_queue_depth: float  # of ours, and as ongoing requests of Serve's
    seed: int

    @property
    def bounds(self) -> Bounds:
        return Bounds(0, self.max_replicas)


@dataclass(frozen=True)
class Policy:
    """The numbers that ours has."""

    target_queue_depth: float
    drain_s: float = DRAIN_S
    hold_s: float = HOLD_S
    pending_hold_s: float = PENDING_HOLD_S
    margin: float = MARGIN
    idle_s: float = IDLE_S

    def scaler(self, bounds: Bounds) -> QueueDepthScaler:
        pace = Pace(self.hold_s, self.pending_hold_s, self.margin, self.idle_s)
        return QueueDepthScaler(EngineGoal(self.target_queue_depth, self.drain_s), pace, bounds)


@dataclass(frozen=True)
class Result:
    """Of one policy on one trace."""

    trace: TraceName
    policy: str
    outcome: Outcome
    objective: Objective

    def summary(self) -> dict[str, Any]:
        outcome = self.outcome
        queue_times = {f"queue_time_p{p:g}_s": outcome.queue_time_s(p) for p in (50, 99, 100)}
        return {
            "trace": self.trace,
            "policy": self.policy,
            **{name: value if math.isfinite(value) else None for name, value in queue_times.items()},
            "goodput_per_s": outcome.goodput_per_s(self.objective),
            "good_part": outcome.good_part(self.objective),
            "gpu_hours": outcome.gpu_hours,
            "most_replicas": int(outcome.num_held.max()),
        }


def serve_scaler(depth: float, bounds: Bounds, *, has_delays: bool) -> ServeScaler:
    """Serve's policy with `target_ongoing_requests` of `depth`: as it comes, or with the delays that ours has."""
    eager: dict[str, Any] = {
        "upscale_delay_s": 0.0,
        "downscale_delay_s": HOLD_S,
        "downscale_to_zero_delay_s": IDLE_S,
        "metrics_interval_s": CONTROL_S,
        "look_back_period_s": 2.5 * CONTROL_S,
    }
    return ServeScaler(
        AutoscalingConfig(
            min_replicas=bounds.fewest,
            max_replicas=bounds.most,
            target_ongoing_requests=depth,
            **({} if has_delays else eager),
        )
    )


class Comparison:
    """Runs one after another; the same setting gives the same results."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._replica = Replica(setting.curve, setting.workload)

    def trace(self, name: TraceName) -> Trace:
        setting = self._setting
        return make_trace(name, setting.load * setting.max_replicas * self._replica.capacity_per_s, setting.seed)

    def against_others(self, trace: Trace) -> Iterator[Result]:
        bounds, depth = self._setting.bounds, self._setting.target_queue_depth
        yield self._run(trace, OURS, Policy(depth).scaler(bounds))
        yield self._run(trace, SERVE, serve_scaler(depth, bounds, has_delays=True))
        yield self._run(trace, EAGER_SERVE, serve_scaler(depth, bounds, has_delays=False))
        yield self.oracle(trace)

    def with_other_numbers(self, trace: Trace) -> Iterator[Result]:
        """Ours, with one or two of its numbers changed at a time."""
        own = Policy(self._setting.target_queue_depth)
        depths = [own.target_queue_depth * part for part in (0.5, 0.75, 1.0, 1.5)]
        margins = sorted({0.1, 0.3, 0.5, own.margin})
        changes: list[dict[str, float]] = [
            {"target_queue_depth": depth, "margin": margin} for depth, margin in product(depths, margins)
        ]
        changes += [{"drain_s": drain_s} for drain_s in (0.0, 1.0, 5.0, 10.0)]
        changes += [{"hold_s": hold_s} for hold_s in (30.0, 60.0, 300.0, 600.0)]
        changes += [{"pending_hold_s": pending_hold_s} for pending_hold_s in (2.0, 30.0, own.hold_s)]
        for change in changes:
            name = ", ".join(f"{name}={value:g}" for name, value in change.items())
            yield self._run(trace, name, replace(own, **change).scaler(self._setting.bounds))

    def oracle(self, trace: Trace) -> Result:
        setting = self._setting
        outcome = Oracle(setting.objective).run(trace, self._replica, setting.fleet, setting.bounds, setting.seed)
        return Result(trace.name, ORACLE, outcome, setting.objective)

    def _run(self, trace: Trace, name: str, scaler: Scaler) -> Result:
        setting = self._setting
        outcome = simulate(trace, self._replica, setting.fleet, scaler, self._first_replicas(trace), setting.seed)
        return Result(trace.name, name, outcome, setting.objective)

    def _first_replicas(self, trace: Trace) -> int:
        """Those that the first minute needs: a trace begins in the middle of things."""
        first = trace.arrivals[: round(60 / trace.step_s)]
        per_s = float(first.mean()) / trace.step_s
        return self._setting.bounds.clip(math.ceil(per_s / (0.7 * self._replica.capacity_per_s)))


def table_of(results: list[Result], title: str) -> Table:
    table = Table("trace", "policy", title=title)
    for column in ("queue time p50", "p99", "highest", "goodput/s", "in time", "GPU-hours", "to the oracle's", "most"):
        table.add_column(column, justify="right")
    oracles = {result.trace: result.outcome.gpu_hours for result in results if result.policy == ORACLE}
    before = ""
    for result in results:
        row = result.summary()
        times = (row["queue_time_p50_s"], row["queue_time_p99_s"], row["queue_time_p100_s"])
        oracle = oracles.get(result.trace)
        if before not in ("", result.trace):
            table.add_section()
        table.add_row(
            result.trace if result.trace != before else "",
            result.policy,
            *("never" if time_s is None else f"{time_s:.1f} s" for time_s in times),
            f"{row['goodput_per_s']:,.1f}",
            f"{row['good_part']:.1%}",
            f"{row['gpu_hours']:,.2f}",
            f"{row['gpu_hours'] / oracle:.2f}" if oracle else "",
            str(row["most_replicas"]),
        )
        before = result.trace
    return table


def as_json(setting: Setting, results: list[Result]) -> dict[str, Any]:
    return {"setting": asdict(setting), "results": [result.summary() for result in results]}
