"""What replicas report of themselves, by name, and what the policies make of it."""

from dataclasses import dataclass

# Names of the numbers that `record_autoscaling_stats` of an engine replica returns.
NUM_RUNNING = "num_requests_running"
NUM_WAITING = "num_requests_waiting"
KV_CACHE_USAGE = "kv_cache_usage"
STEP_TIME_S = "step_time_s"
OUTPUT_TOKENS_PER_S = "output_tokens_per_s"
FINISHED_PER_S = "finished_requests_per_s"  # lately
CAPACITY_PER_S = "capacity_requests_per_s"  # that it has finished while others waited; 0: not known
# Those of an ingress replica.
NUM_ONGOING = "num_requests_ongoing"
NUM_UNPLACED = "num_requests_unplaced"  # of the ongoing ones, those that no engine has taken yet
CPU_USAGE = "cpu_usage"  # of one core


@dataclass(frozen=True)
class EngineLoad:
    """Of all engine replicas together. A request is one choice of one prompt."""

    num_running: float = 0.0
    num_waiting: float = 0.0  # in engines, and in ingresses that no engine has taken them from
    kv_cache_usage: float = 0.0  # in replicas: two half full ones make 1
    finished_per_s: float = 0.0  # lately
    capacity_per_s: float = 0.0  # of one replica, as measured while requests waited; 0: not known


@dataclass(frozen=True)
class IngressLoad:
    """Of all ingress replicas together."""

    num_ongoing: float = 0.0
    cpu_usage: float = 0.0  # in cores
