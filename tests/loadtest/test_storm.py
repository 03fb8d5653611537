"""A hundred clients that leave, and some that hardly read, before the whole service with a tiny model."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray import serve

from loadtest.chaos_clients import make_bodies, undisturbed
from loadtest.cluster import Cluster
from loadtest.slow_readers import Phase, SlowOptions, SlowRun, SlowSummary
from loadtest.slow_readers import violations as slow_violations
from loadtest.storm import Footprint, StormOptions, StormSummary, violations
from loadtest.storm_clients import Moment, StormClients, make_plans
from tests.serve_app import chaos_app

APPLICATION = "storm"
NUM_CLIENTS, SPREAD_S = 96, 2.0
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster(serve_cluster: str, default_model_path: Path) -> Iterator[Cluster]:  # noqa: ARG001 - its tokenizer
    arguments = {"max_num_seqs": "16", "max_queued_requests": "128"}
    serve.run(chaos_app.app(arguments), name=APPLICATION, route_prefix=f"/{APPLICATION}")
    yield Cluster(APPLICATION, f"{serve_cluster}/{APPLICATION}/v1")
    serve.delete(APPLICATION)


def held(cluster: Cluster) -> dict[str, int]:
    """Tasks of ingresses, and objects of our classes, by process."""
    objects = {name: number for kind in ("engine", "ingress") for name, number in cluster.num_objects(kind).items()}
    return objects | {f"tasks of {name}": number for name, number in cluster.num_tasks("ingress").items()}


def test_nothing_is_left_of_clients_that_leave(cluster: Cluster) -> None:
    bodies = make_bodies(3, 30, seed=1)
    before = asyncio.run(undisturbed(cluster.url, bodies))
    clients = StormClients(cluster.url)
    held_before = held(cluster)  # Serve keeps the last batch of admissions, which here and below is one request
    asyncio.run(clients.run(make_plans(NUM_CLIENTS, SPREAD_S, max_tokens=30, seed=1)))
    assert clients.errors == []
    assert clients.by_outcome.total() == NUM_CLIENTS
    assert {f"left {moment}" for moment in Moment} <= clients.by_outcome.keys()
    assert cluster.left_over() == ""
    assert asyncio.run(undisturbed(cluster.url, bodies)) == before
    for name, number in held(cluster).items():
        assert number <= held_before[name] + 10, name


def test_clients_that_do_not_read_slow_nobody_and_leave_nothing(cluster: Cluster) -> None:
    async def run() -> tuple[Phase, int]:
        slow = SlowRun(cluster, SlowOptions(readers=10, max_tokens=300, dropped_after_s=0))
        stalled, connections = await slow.phase(slow.stall)  # with eight beside them, who get whole answers
        for connection in connections:
            await connection.close(with_reset=True)
        return stalled, len(connections)

    stalled, num_connections = asyncio.run(run())
    assert num_connections == 10
    assert len(stalled.others_s) >= 8
    assert max(stalled.others_s) < 60
    assert cluster.left_over() == ""


def test_plans_are_the_same_each_time_and_of_every_kind() -> None:
    plans = make_plans(600, 5.0, 50, seed=3)
    assert plans == make_plans(600, 5.0, 50, seed=3) != make_plans(600, 5.0, 50, seed=4)
    assert set(Counter(plan.moment for plan in plans).values()) == {100}
    assert {plan.endpoint for plan in plans} == {"completions", "chat/completions"}
    for seen in ({plan.body["stream"] for plan in plans}, {plan.with_reset for plan in plans}):
        assert seen == {True, False}
    assert max(plan.body.get("n", 1) for plan in plans) == 8
    assert all(0 <= plan.starts_s <= 5 for plan in plans)


REPLICA = "SERVE_REPLICA::storm#ingress#x"
LIGHT = Footprint(300 << 20, 70, 20, 40)
GOOD = StormSummary(
    options=StormOptions(1000, 3, 10.0, 60, 0),
    arguments={},
    load_average=1.0,
    outcomes={},
    errors=[],
    left_over="",
    wrong=0,
    gone=[],
    footprints={REPLICA: [LIGHT, LIGHT, LIGHT], "proxy": [LIGHT, replace(LIGHT, num_files=900)]},
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"errors": ["reset"]}, "1 clients were failed, such as reset"),
        ({"left_over": "a block"}, "left over: a block"),
        ({"wrong": 2}, "2 answers differ"),
        ({"gone": [REPLICA]}, "ended meanwhile"),
        ({"footprints": {REPLICA: [LIGHT, replace(LIGHT, num_tasks=31)]}}, "has 31 tasks, and had 20"),
        ({"footprints": {REPLICA: [LIGHT, replace(LIGHT, num_files=81)]}}, "has 81 files, and had 70"),
        ({"footprints": {REPLICA: [LIGHT, replace(LIGHT, num_objects=141)]}}, "has 141 objects, and had 40"),
        ({"footprints": {REPLICA: [LIGHT, replace(LIGHT, resident_bytes=310 << 20)]}}, "has grown by 10.0 MiB in 2000"),
    ],
)
def test_what_a_storm_must_not_leave(change: dict[str, object], said: str) -> None:
    assert violations(GOOD) == []
    [line] = violations(replace(GOOD, **change))  # type: ignore[arg-type]
    assert said in line


READ = SlowSummary(
    options=SlowOptions(readers=100, max_tokens=1000, dropped_after_s=5.0),
    arguments={},
    load_average=1.0,
    answer_bytes=100_000,
    reading=Phase(10.0, [1.0, 1.2], {}),
    stalled=Phase(10.0, [1.1, 1.5], {"proxy": 80 << 20}),
    num_dropped=100,
    kept_bytes={},
    left_over="",
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stalled": Phase(10.0, [1.0], {"proxy": 109 << 20})}, "proxy grew by 109 MiB"),
        ({"stalled": Phase(10.0, [2.3, 2.5], {})}, "others took 2.2 times as long"),
        ({"num_dropped": 99}, "only 99 of 100 were dropped"),
        ({"left_over": "a request"}, "left over: a request"),
    ],
)
def test_what_slow_readers_must_not_do(change: dict[str, object], said: str) -> None:
    assert slow_violations(READ) == []
    [line] = slow_violations(replace(READ, **change))  # type: ignore[arg-type]
    assert said in line
