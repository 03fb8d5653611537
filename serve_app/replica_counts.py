"""How many replicas a deployment may have, and how Serve is told so."""

import warnings
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from engine.errors import ConfigError

# Chosen with the simulator, see docs/autoscaling.md.
HOLD_S = 120.0  # a need counts for this long: replicas that it took stay
PENDING_HOLD_S = 10.0  # those that have not started yet are called off sooner
MARGIN = 0.5  # above what there is to do: one replica less makes the others slower, so that their requests stay longer
IDLE_S = 300.0  # without a request, before the last engine replica goes
DRAIN_S = 2.0  # requests that wait less than this, at the measured rate, bring no replica
# What one replica should have to do at most, unless an argument says otherwise. Requests of an engine, running and
# waiting: on a CPU 8 streams get four fifths of what 32 do; on a GPU a part of what it can run at once.
CPU_QUEUE_DEPTH = 8.0
GPU_QUEUE_DEPTH_PER_SEQ = 0.5
INGRESS_QUEUE_DEPTH = 256.0  # requests under way; where they cost more than usual, its CPU use decides
DRAFT_QUEUE_DEPTH = 4.0  # engines: a round of drafts takes a fraction of the target's step
# Reports: a replica sends one each interval, and Serve's controller takes some hundred a second without lagging.
REPORT_S = 0.2
_REPORTS_PER_S = 250.0
_LOOK_BACK_REPORTS = 2.5  # Serve wants its window longer than an interval; the policies use the newest value alone
_STALE_REPORTS = 15.0
_MIN_STALE_S = 5.0  # an event loop on a busy machine may be late by seconds


@dataclass(frozen=True)
class ReplicaCount:
    """Of one deployment: fixed, or between `fewest` and `most` by load."""

    fewest: int
    most: int
    target_queue_depth: float  # what one replica should have to do at most, in the deployment's own measure

    @property
    def is_fixed(self) -> bool:
        return self.fewest == self.most


def replica_count(arguments: BaseModel, deployment: str, default_depth: float) -> ReplicaCount:
    """From `<deployment>_replicas`, `_min_replicas`, `_max_replicas` and `_target_queue_depth`; the engine's last three
    have no prefix.

    Raises:
        ConfigError: they contradict each other.
    """
    prefix = "" if deployment == "engine" else f"{deployment}_"
    name = f"{deployment}_replicas"
    min_name, max_name, depth_name = (
        f"{prefix}{part}" for part in ("min_replicas", "max_replicas", "target_queue_depth")
    )
    count, fewest, most, depth = (getattr(arguments, each) for each in (name, min_name, max_name, depth_name))
    if fewest is None and most is None:
        fewest = most = count
    elif name in arguments.model_fields_set:
        given = max_name if fewest is None else min_name
        raise ConfigError(f"{name} fixes the number of replicas, and {given} lets it vary: give one of them")
    elif fewest is None:
        fewest = 1
    elif most is None:
        most = max(1, fewest)
    if fewest > most:
        raise ConfigError(f"{min_name} must be at most {max_name}, which is {most}, not {fewest}")
    if fewest == most and depth is not None:
        raise ConfigError(f"{depth_name} does nothing with a fixed number of replicas: set {max_name}")
    return ReplicaCount(fewest, most, default_depth if depth is None else depth)


def fixed_options(count: ReplicaCount) -> dict[str, Any]:
    """Options of serve.deployment for a deployment that nothing scales."""
    assert count.is_fixed
    return {"num_replicas": count.fewest}


def scaled_options(count: ReplicaCount, policy: str, **goal: float) -> dict[str, Any]:
    """Options of serve.deployment for one with a policy, a class of serve_app.autoscaling.

    Serve has delays of its own behind every policy, 30 s up and 600 s down; ours are in the policy, so its are 0.
    """
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    interval_s = max(REPORT_S, count.most / _REPORTS_PER_S)
    kwargs = {
        **goal,
        "hold_s": HOLD_S,
        "pending_hold_s": PENDING_HOLD_S,
        "margin": MARGIN,
        "idle_s": IDLE_S,
        "stale_s": max(_MIN_STALE_S, _STALE_REPORTS * interval_s),
    }
    with warnings.catch_warnings():
        # Deprecated in words, in favour of variables that Serve's processes would have to be started with.
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
        config = AutoscalingConfig(
            min_replicas=count.fewest,
            max_replicas=count.most,
            metrics_interval_s=interval_s,
            look_back_period_s=_LOOK_BACK_REPORTS * interval_s,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            downscale_to_zero_delay_s=0.0,
            # By the package, not the class: Serve pickles the module that the name begins with, and what is below it.
            policy=AutoscalingPolicy(policy_function=f"serve_app.autoscaling:{policy}", policy_kwargs=kwargs),
        )
    return {"autoscaling_config": config}
