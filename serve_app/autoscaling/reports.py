"""The reports of replicas, as Serve's controller has them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reports:
    """The newest numbers of each replica that has reported lately."""

    by_replica: tuple[Mapping[str, float], ...]
    is_complete: bool  # every running replica is among them

    def total(self, name: str) -> float:
        return sum(report[name] for report in self.by_replica)


class ReportReader:
    """Knows stale reports by their not changing: clocks of two machines may differ by more than a report's age."""

    def __init__(self, names: Sequence[str], stale_s: float) -> None:
        self._names = tuple(names)
        self._stale_s = stale_s
        self._seen: dict[Any, tuple[float, float]] = {}  # by replica: its newest timestamp, and when it was new here

    def read(self, ctx: Any, now_s: float) -> Reports:
        """ctx: Serve's AutoscalingContext. Its `raw_metrics` are series of (timestamp, value) by name and replica."""
        raw = ctx.raw_metrics or {}
        running = list(ctx.running_replicas)
        fresh = [report for replica in running if (report := self._report(raw, replica, now_s)) is not None]
        known = set(running)
        self._seen = {replica: seen for replica, seen in self._seen.items() if replica in known}
        return Reports(tuple(fresh), len(fresh) == len(running))

    def _report(self, raw: Mapping[str, Mapping[Any, Any]], replica: Any, now_s: float) -> Mapping[str, float] | None:
        report: dict[str, float] = {}
        stamp = 0.0
        for name in self._names:
            series = raw.get(name, {}).get(replica)
            if not series:
                return None
            value = float(series[-1].value)
            if not (math.isfinite(value) and value >= 0):
                return None
            report[name] = value
            stamp = series[-1].timestamp
        seen = self._seen.get(replica)
        if seen is None or seen[0] != stamp:
            self._seen[replica] = (stamp, now_s)
            return report
        return report if now_s - seen[1] < self._stale_s else None
