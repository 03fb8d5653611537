"""What Serve's controller calls, ten times a second, for each deployment that it scales.

A policy is called on the controller's event loop, and one that raises was seen to stop the scaling of the controller's
other applications. So these neither wait nor raise: where anything is wrong, the target stays what it is.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve_app.autoscaling.board import Board
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
    EngineLoad,
    IngressLoad,
)
from serve_app.autoscaling.need import EngineGoal, draft_need, engine_need, ingress_need, needed_to_keep_up
from serve_app.autoscaling.reports import ReportReader
from serve_app.autoscaling.target import Bounds, Memory, Pace, next_target

logger = logging.getLogger("ray.serve")

ENGINE_TARGET, UNPLACED = "engine target", "unplaced requests"  # notes on the board


@dataclass(frozen=True)
class _Demand:
    """For replicas. See next_target."""

    need: float
    is_known: bool
    reason: str  # in words
    kept: float = 0.0


class _Policy:
    """Serve makes one for each deployment, with the `policy_kwargs` of its AutoscalingPolicy."""

    def __init__(
        self,
        *,
        hold_s: float,
        pending_hold_s: float,
        margin: float,
        idle_s: float,
        stale_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace = Pace(hold_s, pending_hold_s, margin, idle_s)
        self._stale_s = stale_s
        self._clock = clock
        self._memory = Memory()
        self._has_failed = False

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """ctx: Serve's AutoscalingContext. What we remember stays in this object: what Serve would keep for us is no
        safer, and is copied for each call."""
        try:
            return self._decide(ctx), {}
        except Exception:
            if not self._has_failed:
                self._has_failed = True
                logger.exception("the autoscaling policy fails; it keeps the number of replicas")
            return ctx.target_num_replicas, {}

    def _decide(self, ctx: Any) -> int:
        now_s = self._clock()
        board = Board(ctx.app_name)
        demand = self._demand(ctx, board, now_s)
        bounds = Bounds(ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas)
        before = ctx.target_num_replicas
        target, self._memory = next_target(
            self._pace,
            self._memory,
            now_s,
            before,
            ctx.current_num_replicas,
            demand.need,
            demand.kept,
            bounds,
            is_known=demand.is_known,
        )
        if target != before:
            logger.info(f"{ctx.deployment_name}: {before} -> {target} replicas, for {demand.reason}")
        self._announce(board, target, now_s)
        return target

    def _demand(self, ctx: Any, board: Board, now_s: float) -> _Demand:
        raise NotImplementedError

    def _announce(self, board: Board, target: int, now_s: float) -> None:
        """For the other deployments' policies."""


class EnginePolicy(_Policy):
    """By the depth of the queue and how fast it drains."""

    def __init__(self, *, target_queue_depth: float, drain_s: float, **pace: Any) -> None:
        super().__init__(**pace)
        self._goal = EngineGoal(target_queue_depth, drain_s)
        names = (NUM_RUNNING, NUM_WAITING, KV_CACHE_USAGE, FINISHED_PER_S, CAPACITY_PER_S, OUTPUT_TOKENS_PER_S)
        self._reader = ReportReader(names, self._stale_s)

    def _demand(self, ctx: Any, board: Board, now_s: float) -> _Demand:
        reports = self._reader.read(ctx, now_s)
        unplaced = board.read(UNPLACED)
        if unplaced is not None and now_s - unplaced.written_s >= self._stale_s:
            unplaced = None
        capacities = [report[CAPACITY_PER_S] for report in reports.by_replica if report[CAPACITY_PER_S]]
        load = EngineLoad(
            num_running=reports.total(NUM_RUNNING),
            num_waiting=reports.total(NUM_WAITING) + (0.0 if unplaced is None else unplaced.value),
            kv_cache_usage=reports.total(KV_CACHE_USAGE),
            finished_per_s=reports.total(FINISHED_PER_S),
            capacity_per_s=sum(capacities) / len(capacities) if capacities else 0.0,
        )
        reason = (
            f"{load.num_running:g} requests running and {load.num_waiting:g} waiting; {len(reports.by_replica)} "
            f"replicas finish {load.finished_per_s:.3g}/s, of {load.capacity_per_s:.3g} that one can, at "
            f"{reports.total(OUTPUT_TOKENS_PER_S):,.0f} tokens/s, with {load.kv_cache_usage:.2f} KV caches in use"
        )
        is_known = reports.is_complete and unplaced is not None
        return _Demand(engine_need(load, self._goal), is_known, reason, needed_to_keep_up(load))

    def _announce(self, board: Board, target: int, now_s: float) -> None:
        board.write(ENGINE_TARGET, target, now_s)


class DraftPolicy(_Policy):
    """By the number of engine replicas."""

    def __init__(self, *, engines_per_draft: float, **pace: Any) -> None:
        super().__init__(**pace)
        self._engines_per_draft = engines_per_draft

    def _demand(self, ctx: Any, board: Board, now_s: float) -> _Demand:  # noqa: ARG002
        engines = board.read(ENGINE_TARGET)
        if engines is None:  # the controller has just started
            return _Demand(0.0, False, "an unknown number of engine replicas")
        need = draft_need(int(engines.value), self._engines_per_draft)
        return _Demand(need, True, f"{engines.value:g} engine replicas")


class IngressPolicy(_Policy):
    """By its own load. Also where the number is fixed: it tells the engines' policy what waits in the ingresses,
    which is all that is known of the queue while there is no engine."""

    def __init__(self, *, target_queue_depth: float, **pace: Any) -> None:
        super().__init__(**pace)
        self._target_queue_depth = target_queue_depth
        self._reader = ReportReader((NUM_ONGOING, NUM_UNPLACED, CPU_USAGE), self._stale_s)

    def _demand(self, ctx: Any, board: Board, now_s: float) -> _Demand:
        reports = self._reader.read(ctx, now_s)
        if reports.by_replica:
            unplaced, before = reports.total(NUM_UNPLACED), board.read(UNPLACED)
            if before is not None and not reports.is_complete:  # those of a replica that is silent still wait
                unplaced = max(unplaced, before.value)
            board.write(UNPLACED, unplaced, now_s)
        load = IngressLoad(reports.total(NUM_ONGOING), reports.total(CPU_USAGE))
        reason = f"{load.num_ongoing:g} requests and {load.cpu_usage:.2f} cores in use"
        return _Demand(ingress_need(load, self._target_queue_depth), reports.is_complete, reason)
