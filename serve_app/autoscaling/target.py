"""From needs to a replica target: up at once, down slowly."""

import math
from dataclasses import dataclass

_NUM_SPANS = 30  # a need is remembered to a thirtieth of the time for which it counts
_ROUNDING = 1e-9  # 0.1 + 0.2 replicas are not one more than 0.3


@dataclass(frozen=True)
class Pace:
    """How slowly replicas go. A need is met at once; that is not a setting."""

    hold_s: float  # a need counts for this long after it was last seen
    pending_hold_s: float  # the same for replicas that are not up yet, which can be called off
    margin: float  # over the need, in parts of it, that stays when replicas go: noise below it moves nothing
    idle_s: float  # without any need, before the last replica goes


@dataclass(frozen=True)
class Memory:
    """Between two decisions."""

    needs: tuple[tuple[float, float], ...] = ()  # (when it stops counting, need); the first is the highest
    busy_s: float | None = None  # when there last was a need; None: not since we look


@dataclass(frozen=True)
class Bounds:
    """Fewest and most replicas."""

    fewest: int
    most: int

    def clip(self, count: int) -> int:
        return max(self.fewest, min(self.most, count))


def next_target(
    pace: Pace,
    memory: Memory,
    now_s: float,
    target: int,
    num_ready: int,
    need: float,
    kept: float,
    bounds: Bounds,
    *,
    is_known: bool = True,
) -> tuple[int, Memory]:
    """The target after `target`, and what to remember.

    num_ready: how many of the replicas run. need, kept: see serve_app.autoscaling.need; replicas come for the need, and
    go down to what must be kept at most. is_known: False where some of it may be missing, because a replica has not
    reported; then none goes. For a given past, a higher need never gives a lower target.
    """
    if memory.busy_s is None:  # the first decision, perhaps of a controller that has replaced another
        memory = Memory(_remember(pace, (), now_s, float(target)), now_s)
    busy_s = now_s if need > 0 or not is_known else memory.busy_s
    memory = Memory(_remember(pace, memory.needs, now_s, max(need, kept / (1 + pace.margin))), busy_s)
    enough = _round_up(need)
    if enough > target:
        return bounds.clip(enough), memory
    if not is_known:
        return bounds.clip(target), memory
    recent_s = now_s + pace.hold_s - pace.pending_hold_s  # what counts until then or longer is that recent
    recently = max((known for until_s, known in memory.needs if until_s > recent_s), default=0.0)
    fewest = max(
        min(_round_up(memory.needs[0][1] * (1 + pace.margin)), num_ready),
        _round_up(recently * (1 + pace.margin)),
    )
    assert busy_s is not None
    if fewest == 0 and now_s - busy_s < pace.idle_s:
        fewest = 1
    return bounds.clip(min(target, fewest)), memory


def _round_up(need: float) -> int:
    return math.ceil(need - _ROUNDING)


def _remember(
    pace: Pace, needs: tuple[tuple[float, float], ...], now_s: float, need: float
) -> tuple[tuple[float, float], ...]:
    """Drops what has stopped counting and what the new need covers. Needs of one span count until its end, as one."""
    span_s = max(pace.hold_s / _NUM_SPANS, 1e-3)
    until_s = (math.floor(now_s / span_s) + 1) * span_s + pace.hold_s
    kept = [known for known in needs if known[0] > now_s and known[1] > need]
    if kept and kept[-1][0] == until_s:  # the higher one of this span stands for both
        return tuple(kept)
    return (*kept, (until_s, need))
