"""How many replicas a load needs, as a real number: 1.5 is one replica and half of another."""

from dataclasses import dataclass

from serve_app.autoscaling.load import EngineLoad, IngressLoad

KV_CACHE_TARGET = 0.9  # requests grow while they run; beyond this one soon loses its blocks to another
CAPACITY_TARGET = 0.85  # of the requests that a full engine finishes; towards 1, a queue forms and stays
CPU_TARGET = 0.7  # of a core: an ingress is one event loop, whose queue grows without bound towards 1


@dataclass(frozen=True)
class EngineGoal:
    """What one replica should have to do at most."""

    target_queue_depth: float  # requests, running and waiting
    drain_s: float  # waiting requests that are served within this are no reason for another replica


def engine_need(load: EngineLoad, goal: EngineGoal) -> float:
    """Never falls when more requests run or wait.

    Running requests need their places. One that waits needs a place at most: with one each, none would wait. It needs
    less where places become free soon: at the measured rate, a replica takes `capacity_per_s * drain_s` of the waiting
    in time. Without that, a backlog that has grown while a node joined would bring a replica for every few requests,
    and they would be idle a moment after they had come.
    """
    places = 1 / goal.target_queue_depth
    in_time = load.capacity_per_s * goal.drain_s
    of_waiting = min(places, 1 / in_time) if in_time > 0 else places
    by_requests = load.num_running * places + load.num_waiting * of_waiting
    return max(by_requests, load.kv_cache_usage / KV_CACHE_TARGET)


def needed_to_keep_up(load: EngineLoad) -> float:
    """Fewer could not finish as many requests as are finished now, where that has been measured.

    The requests that run do not tell: with long prompts and short answers, an engine does nearly as much with 16 as
    with 256, and what runs in ten idle ones may be too much for nine busy ones.
    """
    return load.finished_per_s / (CAPACITY_TARGET * load.capacity_per_s) if load.capacity_per_s > 0 else 0.0


def ingress_need(load: IngressLoad, target_queue_depth: float) -> float:
    """By requests under way, and by what they cost: many short answers can be dearer than as many long ones."""
    return max(load.num_ongoing / target_queue_depth, load.cpu_usage / CPU_TARGET)


def draft_need(num_engines: int, engines_per_draft: float) -> float:
    """Draft replicas follow the engines, those that are still to start included."""
    return num_engines / engines_per_draft
