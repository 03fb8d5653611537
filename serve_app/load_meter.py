"""What replicas report of their load, for serve_app.autoscaling."""

import time

from engine.stats import EngineStats
from serve_app.autoscaling.load import (
    CAPACITY_PER_S,
    CPU_USAGE,
    FINISHED_PER_S,
    KV_CACHE_USAGE,
    NUM_ONGOING,
    NUM_RUNNING,
    NUM_UNPLACED,
    NUM_WAITING,
    OUTPUT_TOKENS_PER_S,
    STEP_TIME_S,
)

FINISHED_MEMORY_S = 10.0
CAPACITY_MEMORY_S = 10.0
CAPACITY_VALID_S = 600.0  # requests change, and with them what an engine can do
TOKENS_MEMORY_S = 2.0
CPU_MEMORY_S = 5.0


class Rate:
    """Of a counter. What it was counts for a third after `memory_s`."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._amount = 0.0
        self._time_s = 0.0

    def add(self, amount: float, time_s: float) -> None:
        keep = max(0.0, 1 - time_s / self._memory_s)
        self._amount = self._amount * keep + amount
        self._time_s = self._time_s * keep + time_s

    @property
    def per_s(self) -> float:
        return self._amount / self._time_s if self._time_s > 0 else 0.0


class Capacity:
    """How many requests an engine can finish: how many it does while others wait. At other times it does what there
    is to do, which says nothing."""

    def __init__(self) -> None:
        self._rate = Rate(CAPACITY_MEMORY_S)
        self._measured_s = -CAPACITY_VALID_S

    def add(self, now_s: float, num_finished: float, time_s: float, *, was_full: bool) -> None:
        if was_full:
            self._rate.add(num_finished, time_s)
            self._measured_s = now_s

    def per_s(self, now_s: float) -> float:
        """0: not known."""
        return self._rate.per_s if now_s - self._measured_s < CAPACITY_VALID_S else 0.0


class EngineMeter:
    """Of one engine replica."""

    def __init__(self) -> None:
        self._finished = Rate(FINISHED_MEMORY_S)
        self._tokens = Rate(TOKENS_MEMORY_S)
        self._capacity = Capacity()
        self._before: tuple[float, bool, int, int] | None = None  # when, was full?, finished requests, output tokens

    def report(self, now_s: float, num_ongoing: int, num_finished: int, stats: EngineStats) -> dict[str, float]:
        """num_ongoing, num_finished: requests that the replica has, or is done with. They are counted outside the
        engine, which learns of new ones between two steps."""
        num_running = min(stats.num_requests_running, num_ongoing)
        is_full = num_running < num_ongoing
        if self._before is not None:
            before_s, was_full, finished_before, tokens_before = self._before
            time_s, num_new = now_s - before_s, num_finished - finished_before
            self._finished.add(num_new, time_s)
            self._tokens.add(stats.output_tokens - tokens_before, time_s)
            self._capacity.add(now_s, num_new, time_s, was_full=was_full and is_full)
        self._before = (now_s, is_full, num_finished, stats.output_tokens)
        return {
            NUM_RUNNING: float(num_running),
            NUM_WAITING: float(num_ongoing - num_running),
            KV_CACHE_USAGE: stats.kv_cache_usage,
            STEP_TIME_S: stats.step_time_s,
            OUTPUT_TOKENS_PER_S: self._tokens.per_s,
            FINISHED_PER_S: self._finished.per_s,
            CAPACITY_PER_S: self._capacity.per_s(now_s),
        }


class IngressMeter:
    """Of one ingress replica."""

    def __init__(self) -> None:
        self._cpu = Rate(CPU_MEMORY_S)
        self._before: tuple[float, float] | None = None  # the wall's clock and the process's

    def report(self, num_ongoing: int, num_unplaced: int) -> dict[str, float]:
        now_s, cpu_s = time.monotonic(), time.process_time()
        if self._before is not None:
            self._cpu.add(cpu_s - self._before[1], now_s - self._before[0])
        self._before = (now_s, cpu_s)
        return {NUM_ONGOING: float(num_ongoing), NUM_UNPLACED: float(num_unplaced), CPU_USAGE: self._cpu.per_s}
