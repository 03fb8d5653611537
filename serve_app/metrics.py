"""Metrics of the service, through Ray, whose agent on each node exports them for Prometheus.

Suffixes are vLLM's where they mean the same. Ray puts `ray_` before each name and `_total` behind a counter's.
docs/metrics.md lists them all.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ray.serve import metrics

from engine.request import FinishReason
from engine.stats import EngineStats, RemoteStats, SpeculationStats
from serve_app.errors import Overload, TimeLimit
from serve_app.failover import Loss
from serve_app.placement import Placement

logger = logging.getLogger("ray.serve")

PREFIX = "slipstream_"
REPORT_S = 1.0  # Ray drops a gauge that has not been set for two of its export intervals, which are 1 s or more
_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # bucket limits of a decade


class MetricKind(StrEnum):
    """In Prometheus' words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class MetricSpec:
    """A metric, as it is described to Ray. `name` is without the prefix."""

    kind: MetricKind
    name: str
    description: str
    boundaries: tuple[float, ...] = ()  # of a histogram's buckets
    tag_keys: tuple[str, ...] = ()


def seconds_buckets(first_exponent: int, num_decades: int) -> tuple[float, ...]:
    """From 10 ** first_exponent seconds on. Fine enough for `_sum`, in which Ray counts a value as its bucket's middle:
    the mean of values that differ is right to a few per cent."""
    return tuple(
        float(f"{step}e{first_exponent + decade}") for decade in range(num_decades) for step in _STEPS
    )  # as text: 7e-4, not 0.0006999999


class Metric:
    """One metric of Ray's, made when it is first recorded. What goes wrong is logged once and goes no further: no
    answer and no heartbeat fails for the sake of a number."""

    def __init__(self, spec: MetricSpec) -> None:
        self.spec = spec
        self._record: Callable[..., None] | None = None
        self._has_failed = False

    def record(self, value: float, tags: Mapping[str, str] | None = None) -> bool:
        """Counters grow by the value (above 0), gauges are set to it, histograms count it. False: it is lost."""
        try:
            if self._record is None:
                self._record = self._make()
            self._record(value, None if tags is None else dict(tags))
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                logger.warning(f"the metric {self.spec.name} is not reported: {error!r}")
            return False
        return True

    def _make(self) -> Callable[..., None]:
        spec = self.spec
        options: dict[str, Any] = {"description": spec.description, "tag_keys": spec.tag_keys}
        match spec.kind:
            case MetricKind.COUNTER:
                return metrics.Counter(PREFIX + spec.name, **options).inc
            case MetricKind.GAUGE:
                return metrics.Gauge(PREFIX + spec.name, **options).set
            case MetricKind.HISTOGRAM:
                options["boundaries"] = list(spec.boundaries)
                return metrics.Histogram(PREFIX + spec.name, **options).observe


Read = Callable[[EngineStats], float | None]  # None: there is no such thing in this engine


def _counter(name: str, description: str, read: Read) -> tuple[MetricSpec, Read]:
    return MetricSpec(MetricKind.COUNTER, name, description), read


def _gauge(name: str, description: str, read: Read) -> tuple[MetricSpec, Read]:
    return MetricSpec(MetricKind.GAUGE, name, description), read


def _of_speculation(read: Callable[[SpeculationStats], float]) -> Read:
    return lambda stats: None if stats.speculation is None else read(stats.speculation)


def _of_remote(read: Callable[[RemoteStats], float | None]) -> Read:
    return lambda stats: None if (spec := stats.speculation) is None or spec.remote is None else read(spec.remote)


ENGINE_METRICS = (
    _gauge("num_requests_running", "Requests that hold KV blocks.", lambda s: s.num_requests_running),
    _gauge("num_requests_waiting", "Requests that wait for KV blocks or a place.", lambda s: s.num_requests_waiting),
    _gauge("kv_cache_usage_perc", "Part of the KV blocks that requests hold; 1 is all.", lambda s: s.kv_cache_usage),
    _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_cache_queries),
    _counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda s: s.prefix_cache_hits),
    _counter("num_preemptions", "Requests that lost their KV blocks to others.", lambda s: s.num_preemptions),
    _counter("prompt_tokens", "Prompt tokens of the requests taken.", lambda s: s.prompt_tokens),
    _counter("generation_tokens", "Tokens generated.", lambda s: s.output_tokens),
    _counter("spec_decode_num_drafts", "Verifications of a request's drafts.", _of_speculation(lambda s: s.num_rounds)),
    _counter("spec_decode_num_draft_tokens", "Draft tokens verified.", _of_speculation(lambda s: s.num_drafted_tokens)),
    _counter(
        "spec_decode_num_accepted_tokens",
        "Draft tokens that the target model chose too.",
        _of_speculation(lambda s: s.num_accepted_tokens),
    ),
    _gauge(
        "spec_decode_acceptance_rate",
        "Accepted of all draft tokens since the engine's start.",
        _of_speculation(lambda s: s.acceptance_rate),
    ),
    _gauge(
        "spec_decode_mean_acceptance_length",
        "Tokens that a verification brought, in the mean since the engine's start.",
        _of_speculation(lambda s: s.mean_acceptance_length),
    ),
    _counter(
        "spec_decode_num_missed_rounds",
        "Times that the engine waited for the draft process in vain.",
        _of_remote(lambda r: r.missed_rounds),
    ),
    _counter(
        "spec_decode_num_garbage",
        "Messages of the draft process that could not be meant.",
        _of_remote(lambda r: r.garbage),
    ),
    _counter(
        "spec_decode_reconnects", "Connections to a draft process after the first.", _of_remote(lambda r: r.reconnects)
    ),
    _gauge(
        "spec_decode_draft_connected",
        "1 with a draft process, else 0; as of the last engine step.",
        _of_remote(lambda r: float(r.is_connected)),
    ),
    _gauge(
        "spec_decode_hop_latency_seconds",
        "Moving average from asking the draft process to its answer, of rounds that were waited for.",
        _of_remote(lambda r: r.hop_latency_s or None),  # 0: none has been waited for yet
    ),
)


class EngineMetrics:
    """Of one engine replica. For one thread, and not the engine's."""

    def __init__(self) -> None:
        self._metrics = [(Metric(spec), read) for spec, read in ENGINE_METRICS]
        self._counted: dict[str, float] = {}  # of each counter, as far as it has been reported

    def report(self, stats: EngineStats) -> None:
        """Call it every REPORT_S. Never raises."""
        for metric, read in self._metrics:
            value = read(stats)
            if value is None:
                continue
            if metric.spec.kind is MetricKind.GAUGE:
                metric.record(value)
            else:
                self._count(metric, value)

    def _count(self, metric: Metric, value: float) -> None:
        counted = self._counted.get(metric.spec.name, 0)
        if value < counted:  # an engine that counts from the start again
            counted = 0
        if value == counted or metric.record(value - counted):
            self._counted[metric.spec.name] = value


TIME_TO_FIRST_TOKEN = MetricSpec(
    MetricKind.HISTOGRAM,
    "time_to_first_token_seconds",
    "From when the ingress has read a request to when it has its first token.",
    seconds_buckets(-3, 5),
)
INTER_TOKEN_LATENCY = MetricSpec(
    MetricKind.HISTOGRAM,
    "inter_token_latency_seconds",
    "From one output of a request to the next, as the ingress hands them on; an output has one token or more.",
    seconds_buckets(-4, 5),
)
E2E_REQUEST_LATENCY = MetricSpec(
    MetricKind.HISTOGRAM,
    "e2e_request_latency_seconds",
    "From when the ingress has read a request to when it has its last token; only of those that came to their end.",
    seconds_buckets(-2, 5),
)
REQUEST_SUCCESS = MetricSpec(
    MetricKind.COUNTER, "request_success", "Requests that have ended, by why.", tag_keys=("finish_reason",)
)
REQUEST_REJECTED = MetricSpec(
    MetricKind.COUNTER, "request_rejected", "Requests that were turned away, by why.", tag_keys=("reason",)
)
REQUEST_TIMED_OUT = MetricSpec(
    MetricKind.COUNTER, "request_timed_out", "Requests whose time was over, by which.", tag_keys=("limit",)
)
STREAM_ATTEMPTS = MetricSpec(
    MetricKind.COUNTER, "stream_attempts", "Requests sent to an engine replica, those sent again among them."
)
RESUMED_STREAMS = MetricSpec(
    MetricKind.COUNTER,
    "resumed_streams",
    "Requests that have lost their engine replica and go on elsewhere, by why.",
    tag_keys=("reason",),
)
RECOVERY_TIME = MetricSpec(
    MetricKind.HISTOGRAM,
    "recovery_time_seconds",
    "From the last frame of an engine replica that was lost to a request's next token.",
    seconds_buckets(-2, 4),
)
STALE_FRAMES = MetricSpec(MetricKind.COUNTER, "stale_frames", "Frames of earlier attempts, which were dropped.")
ROUTED_REQUESTS = MetricSpec(
    MetricKind.COUNTER,
    "prefix_routed_requests",
    "Requests that were given an engine replica, by what decided.",
    tag_keys=("choice",),
)
ROUTED_TOKENS = MetricSpec(
    MetricKind.COUNTER,
    "prefix_routed_tokens",
    "Prompt tokens that the engine replicas chosen were thought to have in their caches.",
)
MOVED_REQUESTS = MetricSpec(
    MetricKind.COUNTER, "moved_requests", "Requests that left an engine replica's queue for a replica without one."
)
INGRESS_METRICS = (
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    E2E_REQUEST_LATENCY,
    REQUEST_SUCCESS,
    REQUEST_REJECTED,
    REQUEST_TIMED_OUT,
    STREAM_ATTEMPTS,
    RESUMED_STREAMS,
    RECOVERY_TIME,
    STALE_FRAMES,
    ROUTED_REQUESTS,
    ROUTED_TOKENS,
    MOVED_REQUESTS,
)


class IngressMetrics:
    """The AnswerObserver, the FailoverObserver and the PlacementObserver of one ingress replica."""

    def __init__(self) -> None:
        self._attempts = Metric(STREAM_ATTEMPTS)
        self._resumed = Metric(RESUMED_STREAMS)
        self._recovery = Metric(RECOVERY_TIME)
        self._stale = Metric(STALE_FRAMES)
        self._routed = Metric(ROUTED_REQUESTS)
        self._routed_tokens = Metric(ROUTED_TOKENS)
        self._moved = Metric(MOVED_REQUESTS)
        self._first_token = Metric(TIME_TO_FIRST_TOKEN)
        self._inter_token = Metric(INTER_TOKEN_LATENCY)
        self._whole = Metric(E2E_REQUEST_LATENCY)
        self._success = Metric(REQUEST_SUCCESS)
        self._rejected = Metric(REQUEST_REJECTED)
        self._timed_out = Metric(REQUEST_TIMED_OUT)

    def on_first_token(self, seconds: float) -> None:
        self._first_token.record(seconds)

    def on_later_tokens(self, seconds: float) -> None:
        self._inter_token.record(seconds)

    def on_attempt(self, num_streams: int) -> None:
        self._attempts.record(num_streams)

    def on_lost(self, loss: Loss, num_streams: int) -> None:
        self._resumed.record(num_streams, {"reason": loss.value})

    def on_recovered(self, seconds: float) -> None:
        self._recovery.record(seconds)

    def on_stale_frame(self) -> None:
        self._stale.record(1)

    def on_placed(self, placement: Placement, num_streams: int) -> None:
        self._routed.record(num_streams, {"choice": placement.choice.value})
        if placement.num_held_tokens:
            self._routed_tokens.record(placement.num_held_tokens * num_streams)

    def on_moved(self, num_streams: int) -> None:
        self._moved.record(num_streams)

    def on_end(self, reason: FinishReason, seconds: float) -> None:
        self._success.record(1, {"finish_reason": reason.value})
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._whole.record(seconds)

    def on_rejected(self, reason: Overload, num_choices: int) -> None:
        self._rejected.record(num_choices, {"reason": reason.value})

    def on_timed_out(self, limit: TimeLimit, num_choices: int) -> None:
        self._timed_out.record(num_choices, {"limit": limit.value})
