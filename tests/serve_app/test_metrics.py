"""What is reported to Ray, with stand-ins for Ray's metrics. That Ray exports it is in test_service.py."""

import asyncio
import logging
import time
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

from engine.request import FinishReason, SamplingParams
from engine.stats import EngineStats, RemoteStats, SpeculationStats
from serve_app import engine_deployment, metrics
from serve_app.engine_deployment import Engine
from serve_app.errors import Overload, TimeLimit
from serve_app.failover import Loss
from serve_app.messages import Heartbeat, Opening, Submission, SubmittedPrompt, decode_frame, encode
from serve_app.metrics import EngineMetrics, IngressMetrics, seconds_buckets
from serve_app.placement import Choice, Placement
from tests.serve_app.fake_engine import IS_SILENT, FakeEngine


class FakeRay:
    """Ray's metrics as far as we use them: refuses what Ray refuses, and fails where it is told to."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)  # of each metric, as it was recorded
        self.failing: set[str] = set()  # metrics that raise

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kinds = {"Counter": self._kind("inc", 0.0), "Gauge": self._kind("set"), "Histogram": self._kind("observe")}
        monkeypatch.setattr(metrics, "metrics", SimpleNamespace(**kinds))

    def _kind(self, method: str, above: float = -float("inf")) -> Any:
        def make(name: str, *, description: str, tag_keys: tuple[str, ...], boundaries: Any = None) -> Any:
            assert description
            assert (boundaries is not None) == (method == "observe")
            short = name.removeprefix("slipstream_")
            assert short != name

            def record(value: float, tags: dict[str, str] | None) -> None:
                if short in self.failing:
                    raise RuntimeError("no metrics today")
                if value <= above:
                    raise ValueError(f"value must be >0, got {value}")
                assert tuple(tags or ()) == tag_keys
                self.values[" ".join((short, *(tags or {}).values()))].append(value)

            return SimpleNamespace(**{method: record})

        return make


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    fake.install(monkeypatch)
    return fake


FULL = EngineStats(
    num_requests_running=3,
    num_requests_waiting=2,
    num_blocks=10,
    num_blocks_in_use=4,
    num_preemptions=1,
    prefix_cache_queries=50,
    prefix_cache_hits=20,
    prompt_tokens=60,
    output_tokens=70,
    speculation=SpeculationStats(
        num_rounds=8,
        num_drafted_tokens=20,
        num_accepted_tokens=15,
        remote=RemoteStats(missed_rounds=3, garbage=5, reconnects=2, hop_latency_s=0.25, is_connected=True),
    ),
)


def test_everything_is_reported(ray: FakeRay) -> None:
    EngineMetrics().report(FULL)
    assert ray.values == {
        "num_requests_running": [3],
        "num_requests_waiting": [2],
        "kv_cache_usage_perc": [0.4],
        "prefix_cache_queries": [50],
        "prefix_cache_hits": [20],
        "num_preemptions": [1],
        "prompt_tokens": [60],
        "generation_tokens": [70],
        "spec_decode_num_drafts": [8],
        "spec_decode_num_draft_tokens": [20],
        "spec_decode_num_accepted_tokens": [15],
        "spec_decode_acceptance_rate": [0.75],
        "spec_decode_mean_acceptance_length": [1 + 15 / 8],
        "spec_decode_num_missed_rounds": [3],
        "spec_decode_num_garbage": [5],
        "spec_decode_reconnects": [2],
        "spec_decode_draft_connected": [1.0],
        "spec_decode_hop_latency_seconds": [0.25],
    }


def test_counters_grow_by_what_is_new_and_gauges_are_set_each_time(ray: FakeRay) -> None:
    reporter = EngineMetrics()
    for output_tokens in (0, 5, 5, 12):
        reporter.report(EngineStats(output_tokens=output_tokens, num_requests_running=2))
    assert ray.values["generation_tokens"] == [5, 7]
    assert ray.values["num_requests_running"] == [2] * 4  # Ray drops a gauge that is not set again


def test_an_engine_that_counts_anew_is_added(ray: FakeRay) -> None:
    reporter = EngineMetrics()
    for output_tokens in (100, 30, 40, 0, 0, 1):
        reporter.report(EngineStats(output_tokens=output_tokens))
    assert ray.values["generation_tokens"] == [100, 30, 10, 1]


@pytest.mark.parametrize(
    ("speculation", "num_spec_decode"),
    [
        (None, 0),
        (SpeculationStats(1, 1, 1), 5),
        (SpeculationStats(1, 1, 1, RemoteStats(missed_rounds=1)), 7),  # neither an answer nor trouble yet
    ],
)
def test_what_an_engine_does_not_have_is_not_reported(
    ray: FakeRay, speculation: SpeculationStats | None, num_spec_decode: int
) -> None:
    EngineMetrics().report(EngineStats(speculation=speculation))
    names = [name for name in ray.values if name.startswith("spec_decode_")]
    assert len(names) == num_spec_decode
    assert "spec_decode_hop_latency_seconds" not in names
    assert ray.values.get("spec_decode_draft_connected", [0.0]) == [0.0]


def test_a_metric_that_raises_costs_itself_alone(ray: FakeRay, caplog: pytest.LogCaptureFixture) -> None:
    reporter = EngineMetrics()
    ray.failing = {"num_requests_running", "generation_tokens"}
    with caplog.at_level(logging.WARNING):
        for output_tokens in (4, 6):
            reporter.report(EngineStats(output_tokens=output_tokens, num_requests_running=1))
    assert sorted(record.message.split()[2] for record in caplog.records) == sorted(ray.failing)  # once each
    assert ray.values["num_requests_waiting"] == [0, 0]
    ray.failing = set()
    reporter.report(EngineStats(output_tokens=7))
    assert ray.values["generation_tokens"] == [7]  # nothing is lost


def test_a_metric_that_cannot_be_made_costs_itself_alone(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("'replica' tag is reserved")

    monkeypatch.setattr(metrics.metrics, "Gauge", refuse)
    EngineMetrics().report(FULL)
    assert "num_requests_running" not in ray.values
    assert ray.values["generation_tokens"] == [70]


def test_ingress_metrics(ray: FakeRay) -> None:
    observer = IngressMetrics()
    observer.on_first_token(0.5)
    observer.on_later_tokens(0.01)
    for reason in FinishReason:
        observer.on_end(reason, 2.0)
    observer.on_rejected(Overload.KEY_LIMIT, 3)
    observer.on_timed_out(TimeLimit.QUEUE, 2)
    observer.on_attempt(8)
    observer.on_lost(Loss.SILENT, 3)
    observer.on_lost(Loss.LEFT, 1)
    observer.on_recovered(1.5)
    observer.on_stale_frame()
    observer.on_placed(Placement("a", Choice.LOAD, 32), 2)
    observer.on_placed(Placement("a", Choice.NEW, 0), 1)
    observer.on_moved(5)
    assert ray.values == {
        "time_to_first_token_seconds": [0.5],
        "inter_token_latency_seconds": [0.01],
        "e2e_request_latency_seconds": [2.0, 2.0],  # of those that came to their end
        "request_success stop": [1],
        "request_success length": [1],
        "request_success abort": [1],
        "request_success error": [1],
        "request_rejected key_limit": [3],
        "request_timed_out queue": [2],
        "stream_attempts": [8],
        "resumed_streams silent": [3],
        "resumed_streams left": [1],
        "recovery_time_seconds": [1.5],
        "stale_frames": [1],
        "prefix_routed_requests load": [2],
        "prefix_routed_requests new": [1],
        "prefix_routed_tokens": [64],
        "moved_requests": [5],
    }
    ray.failing = {"time_to_first_token_seconds"}
    observer.on_first_token(0.5)  # an answer does not fail for it


def test_buckets_ascend_from_the_first() -> None:
    buckets = seconds_buckets(-4, 5)
    assert buckets[:7] == (0.0001, 0.00015, 0.0002, 0.0003, 0.0005, 0.0007, 0.001)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == 7.0


def test_the_ticker_reports_and_goes_on(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first health check on, every REPORT_S at most, whatever Ray's metrics do; heartbeats go on."""
    stop = Engine.__del__
    monkeypatch.delattr(Engine, "__del__")  # Serve awaits it; without Serve, Python would call it again
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="replica"))
    monkeypatch.setattr(engine_deployment.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(engine_deployment, "HEARTBEAT_S", 0.005)
    monkeypatch.setattr(engine_deployment, "REPORT_S", 0.03)
    ray.failing = {"num_requests_running", "prompt_tokens"}
    reports = ray.values["kv_cache_usage_perc"]

    async def run() -> None:
        engine = Engine(lambda _: FakeEngine())  # type: ignore[arg-type, return-value]
        started_s = time.monotonic()
        await engine.check_health()
        await until(lambda: len(reports) >= 3)
        prompt = SubmittedPrompt([IS_SILENT, 1], SamplingParams(seed=1), [("silent", 0)])
        frames = engine.generate(encode(Submission("group", 0, [prompt])))
        assert isinstance(decode_frame(await anext(frames)), Opening)
        for _ in range(3):
            assert isinstance(decode_frame(await asyncio.wait_for(anext(frames), 30)), Heartbeat)
        await until(lambda: len(reports) >= 6)
        assert len(reports) <= (time.monotonic() - started_s) / 0.03 + 1
        await frames.aclose()  # type: ignore[attr-defined]
        await stop(engine)

    asyncio.run(run())
    assert "num_requests_running" not in ray.values


async def until(condition: Any, limit_s: float = 30.0) -> None:
    deadline_s = asyncio.get_running_loop().time() + limit_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline_s, f"not so after {limit_s:g} s"
        await asyncio.sleep(0.005)
