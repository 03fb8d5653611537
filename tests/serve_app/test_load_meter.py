import pytest

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
from serve_app.load_meter import CAPACITY_VALID_S, EngineMeter, IngressMeter, Rate


def test_requests_that_the_engine_has_not_seen_yet_wait() -> None:
    stats = EngineStats(num_requests_running=2, num_requests_waiting=1, num_blocks=10, num_blocks_in_use=5)
    report = EngineMeter().report(0.0, 64, 0, stats)
    assert (report[NUM_RUNNING], report[NUM_WAITING], report[KV_CACHE_USAGE]) == (2, 62, 0.5)
    late = EngineMeter().report(0.0, 1, 0, stats)  # they have ended since its last step
    assert (late[NUM_RUNNING], late[NUM_WAITING]) == (1, 0)


def test_rates() -> None:
    meter = EngineMeter()
    for second in range(60):  # 5 requests and 100 tokens a second, with others waiting
        stats = EngineStats(num_requests_running=8, step_time_s=0.01, output_tokens=100 * second)
        report = meter.report(float(second), 20, 5 * second, stats)
    assert report[FINISHED_PER_S] == pytest.approx(5)
    assert report[CAPACITY_PER_S] == pytest.approx(5)
    assert report[OUTPUT_TOKENS_PER_S] == pytest.approx(100)
    assert report[STEP_TIME_S] == 0.01
    for second in range(60, 120):  # one a second is all there is to do
        stats = EngineStats(num_requests_running=1, output_tokens=6000 + 20 * (second - 60))
        report = meter.report(float(second), 1, 295 + second - 60, stats)
    assert report[FINISHED_PER_S] == pytest.approx(1, rel=0.05)
    assert report[CAPACITY_PER_S] == pytest.approx(5)  # that says nothing about what it can do
    assert report[OUTPUT_TOKENS_PER_S] == pytest.approx(20)
    report = meter.report(60 + CAPACITY_VALID_S, 0, 355, EngineStats(output_tokens=7200))
    assert report[CAPACITY_PER_S] == 0


def test_a_rate_forgets() -> None:
    rate = Rate(memory_s=10)
    assert rate.per_s == 0
    rate.add(100, 1)
    assert rate.per_s == 100
    for _ in range(10):
        rate.add(0, 1)
    assert rate.per_s < 100 * 0.1


def test_an_ingress_reports_its_cpu() -> None:
    meter = IngressMeter()
    assert meter.report(3, 2) == {NUM_ONGOING: 3.0, NUM_UNPLACED: 2.0, CPU_USAGE: 0.0}
    sum(range(2_000_000))
    assert 0 < meter.report(0, 0)[CPU_USAGE] < 2
