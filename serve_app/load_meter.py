"""What replicas report of their load, for serve_app.autoscaling."""

import time

from engine.stats import EngineStats
from serve_app.autoscaling.load import (
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

MEMORY_S = 10.0  # of work, after which what a rate was counts for a third of what it is


class Rate:
    """Of a counter, over the time that counts. Old times fade."""

    def __init__(self, memory_s: float = MEMORY_S) -> None:
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


class EngineMeter:
    """Of one engine replica. Rates are of the time in which it had work: an idle engine is no slow one."""

    def __init__(self) -> None:
        self._finished = Rate()
        self._tokens = Rate()
        self._before: tuple[float, bool, int, int] | None = None  # when, had work?, finished requests, output tokens

    def report(self, now_s: float, num_ongoing: int, num_finished: int, stats: EngineStats) -> dict[str, float]:
        """num_ongoing, num_finished: requests that the replica has, or is done with. They are counted outside the
        engine, which learns of new ones between two steps."""
        if self._before is not None:
            before_s, had_work, finished, tokens = self._before
            if had_work or num_finished > finished:
                self._finished.add(num_finished - finished, now_s - before_s)
                self._tokens.add(stats.output_tokens - tokens, now_s - before_s)
        self._before = (now_s, num_ongoing > 0, num_finished, stats.output_tokens)
        num_running = min(stats.num_requests_running, num_ongoing)
        return {
            NUM_RUNNING: float(num_running),
            NUM_WAITING: float(num_ongoing - num_running),
            KV_CACHE_USAGE: stats.kv_cache_usage,
            STEP_TIME_S: stats.step_time_s,
            OUTPUT_TOKENS_PER_S: self._tokens.per_s if num_ongoing else 0.0,
            FINISHED_PER_S: self._finished.per_s,
        }


class IngressMeter:
    """Of one ingress replica."""

    def __init__(self) -> None:
        self._cpu = Rate()
        self._before: tuple[float, float] | None = None  # the wall's clock and the process's

    def report(self, num_ongoing: int, num_unplaced: int) -> dict[str, float]:
        now_s, cpu_s = time.monotonic(), time.process_time()
        if self._before is not None:
            self._cpu.add(cpu_s - self._before[1], now_s - self._before[0])
        self._before = (now_s, cpu_s)
        return {NUM_ONGOING: float(num_ongoing), NUM_UNPLACED: float(num_unplaced), CPU_USAGE: self._cpu.per_s}
