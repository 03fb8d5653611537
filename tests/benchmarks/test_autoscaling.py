"""The simulator of autoscaling: small cases by hand, and what must hold of every run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.autoscaling.__main__ import cli
from benchmarks.autoscaling.cluster import TAIL_S, Objective, Outcome, View, simulate
from benchmarks.autoscaling.comparison import ORACLE, OURS, Comparison, Result, Setting, serve_scaler
from benchmarks.autoscaling.scalers import Oracle, PlannedScaler
from benchmarks.autoscaling.service import CURVES, TINYLLAMA_H100, CurveName, Fleet, Replica, ServiceCurve, Workload
from benchmarks.autoscaling.traces import Trace, TraceName, make_trace
from serve_app.autoscaling.target import Bounds

# A stream takes 10 s, however many there are, and there are two at most.
SLOW = ServiceCurve("slow", (1, 2), (1, 2), 0.0, 2, 2.0)
TEN_TOKENS = Workload(0, 10)


def trace_of(*arrivals: int, step_s: float = 1.0) -> Trace:
    return Trace(TraceName.POISSON, step_s, np.array(arrivals))


def run(trace: Trace, plan: list[int], fleet: Fleet, num_ready: int) -> Outcome:
    return simulate(trace, Replica(SLOW, TEN_TOKENS), fleet, PlannedScaler(np.array(plan), trace.step_s), num_ready)


def test_a_replica_does_what_was_measured() -> None:
    replica = Replica(TINYLLAMA_H100, Workload(0, 256))
    assert replica.finished_per_s(64) * 256 == pytest.approx(46_914)
    assert replica.finished_per_s(48) * 256 == pytest.approx((26_457 + 46_914) / 2)
    assert replica.finished_per_s(1000) == replica.finished_per_s(256)
    assert replica.token_time_s(1) == pytest.approx(1 / 1_110)
    assert replica.streams_within(1 / 1_110) == 1
    whole = Replica(TINYLLAMA_H100, Workload(512, 256))
    assert whole.capacity_per_s * 256 == pytest.approx(39_154, rel=0.04)  # measured with prompts, elsewhere


def test_what_finds_a_place_does_not_wait() -> None:
    outcome = run(trace_of(2, 0, 0), [1], Fleet(1), 1)
    assert outcome.queue_times_s.tolist() == [0, 0]
    assert outcome.good_part(Objective(0, token_time_s=1)) == 1
    assert outcome.good_part(Objective(0, token_time_s=0.9)) == 0


def test_what_comes_before_a_replica_waits_for_its_start() -> None:
    outcome = run(trace_of(2, 0, 0), [1], Fleet(num_nodes=1, start_s=8), 0)
    assert outcome.queue_times_s.tolist() == [8, 8]
    assert outcome.num_held.tolist() == [1] * (3 + round(TAIL_S))  # paid for from when it was asked for
    far = run(trace_of(2, 0, 0), [1], Fleet(num_nodes=0, start_s=8, join_s=120), 0)
    assert far.queue_times_s.tolist() == [128, 128]


def test_what_is_never_served_is_not_good() -> None:
    outcome = run(trace_of(3), [0], Fleet(0), 0)
    assert outcome.queue_times_s.tolist() == [math.inf] * 3
    assert outcome.goodput_per_s(Objective()) == 0
    assert outcome.gpu_hours == 0


def test_requests_begin_in_the_order_in_which_they_came() -> None:
    outcome = run(trace_of(2, 0, 2, 0, 0), [1], Fleet(1), 1)
    assert outcome.queue_times_s[:2].tolist() == [0, 0]
    assert outcome.queue_times_s[2] <= outcome.queue_times_s[3]
    assert outcome.num_running.max() == 2
    assert outcome.num_waiting[2] == 2


def test_a_replica_that_is_called_off_costs_nothing_more() -> None:
    outcome = run(trace_of(0, 0, 0), [3, 1], Fleet(3), 0)
    assert outcome.num_held[0] == 3
    assert outcome.num_held[1:].tolist() == [1] * (len(outcome.num_held) - 1)


def test_the_last_replica_ends_what_it_has_begun() -> None:
    outcome = run(trace_of(2, 0, 0), [1, 0], Fleet(1), 1)
    assert not outcome.num_running[-1]
    assert outcome.num_held[0] == 1
    assert not outcome.num_held[-1]
    assert all(outcome.num_held[outcome.num_running > 0])


def test_departures_are_those_of_the_curve() -> None:
    """A thousand replicas with two streams of 10 s each: 200 requests/s."""
    outcome = run(trace_of(2000, *[200] * 199), [1000], Fleet(1000), 1000)
    assert outcome.num_running[50:200].mean() == pytest.approx(2000, rel=0.05)


def test_little_s_law() -> None:
    """Streams are the arrivals of a second times how long they stay."""
    comparison = Comparison(setting(8, nodes=8))
    trace = comparison.trace(TraceName.POISSON)
    outcome = next(iter(comparison.against_others(trace))).outcome
    late = slice(len(trace.arrivals) // 2, len(trace.arrivals))
    streams = outcome.num_running[late].mean() / outcome.num_held[late].mean()
    stay_s = streams / Replica(TINYLLAMA_H100, Workload(512, 256)).finished_per_s(streams)
    arrivals_per_s = trace.arrivals[late].mean() / trace.step_s
    assert outcome.num_running[late].mean() == pytest.approx(arrivals_per_s * stay_s, rel=0.1)


@pytest.mark.parametrize("name", TraceName)
def test_the_same_seed_gives_the_same_trace(name: TraceName) -> None:
    one, same, other = (make_trace(name, 50, seed).arrivals for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert one.sum() > 0


def setting(max_replicas: int, nodes: int, curve: CurveName = CurveName.TINYLLAMA_H100) -> Setting:
    depth = CURVES[curve].target_queue_depth
    return Setting(CURVES[curve], Workload(512, 256), Fleet(nodes), max_replicas, 0.8, Objective(), depth, seed=0)


@pytest.fixture(scope="module")
def results() -> list[Result]:
    """Without the day, which takes ten seconds."""
    comparison = Comparison(setting(16, nodes=4))
    names = [name for name in TraceName if name is not TraceName.DAY]
    return [result for name in names for result in comparison.against_others(comparison.trace(name))]


def test_nobody_beats_the_oracle(results: list[Result]) -> None:
    oracles = {result.trace: result.outcome for result in results if result.policy == ORACLE}
    for result in results:
        oracle, outcome, objective = oracles[result.trace], result.outcome, result.objective
        assert oracle.good_part(objective) >= outcome.good_part(objective) - 0.001
        assert oracle.queue_time_s(99) <= max(outcome.queue_time_s(99), objective.queue_time_s)
        if outcome.good_part(objective) >= oracle.good_part(objective) - 0.001:
            assert oracle.gpu_hours <= outcome.gpu_hours


def test_ours_is_no_worse_than_serves(results: list[Result]) -> None:
    """Where both need not start from nothing: Serve's default keeps the replicas of the burst before."""
    for name in (TraceName.POISSON, TraceName.FLASH_CROWD):
        own, *others, _ = (result for result in results if result.trace == name)
        assert own.policy == OURS
        for other in others:
            assert own.outcome.good_part(own.objective) >= other.outcome.good_part(own.objective)
            assert own.outcome.gpu_hours < other.outcome.gpu_hours


def test_an_oracle_is_ready_in_time() -> None:
    trace = trace_of(*[0] * 300, 20, *[0] * 100)
    outcome = Oracle(Objective(1, token_time_s=1)).run(
        trace, Replica(SLOW, TEN_TOKENS), Fleet(num_nodes=4), Bounds(0, 50), seed=0
    )
    assert outcome.queue_time_s(100) == 0
    assert outcome.num_held[:160].max() == 0  # and not earlier than that takes: 128 s for those that need a node
    assert outcome.num_held[300] == 10


def test_serves_policy_waits_for_its_delays() -> None:
    scaler = serve_scaler(10, Bounds(1, 50), has_delays=True)
    targets = []
    target = 1
    for step in range(200):
        target = scaler.target(View(step * 1.0, target, target, 0, 100, 0.0, 0.0))
        targets.append(target)
    assert targets[29] == 1
    assert targets[31] == 10
    eager = serve_scaler(10, Bounds(1, 50), has_delays=False)
    assert eager.target(View(0.0, 1, 1, 0, 100, 0.0, 0.0)) == 10


def test_serves_policy_wakes_one() -> None:
    scaler = serve_scaler(10, Bounds(0, 50), has_delays=True)
    assert scaler.target(View(0.0, 0, 0, 0, 0, 0.0, 0.0)) == 0
    assert scaler.target(View(1.0, 0, 0, 0, 100, 0.0, 0.0)) == 1


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    command = ["--trace", "bursts", "--max-replicas", "1000", "--nodes", "500", "--json", str(path)]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    for word in ("bursts", "queue depth", "Serve, no delays", "oracle", "at most 1000 replicas"):
        assert word in result.output
    rows = json.loads(path.read_text())["results"]
    assert [row["policy"] for row in rows] == ["queue depth", "Serve", "Serve, no delays", "oracle"]
    assert rows[-1]["good_part"] == 1
    assert CliRunner().invoke(cli, ["--max-replicas", "1001"]).exit_code == 2


def test_the_plot(tmp_path: Path, results: list[Result]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.autoscaling.plot import plot

    path = tmp_path / "plot.svg"
    plot(results, path)
    assert path.read_text().count("in time") == len(results)
