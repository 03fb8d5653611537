"""Where requests go, over the real deployments: two engines of a tiny model, and scripted ones that come from zero."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from engine.stats import EngineStats
from serve_app.app import bind, load_served_model
from serve_app.config import parse_config
from serve_app.replica_book import LOAD_EXPIRY_S
from serve_app.replica_registry import running_replicas
from tests.serve_app.seated_engine import SEATS, load_seated_engine
from tests.serve_app.slow_engine import load_slow_engine
from tests.tiny_models import write_tiny_model

ROUTED, WOKEN = "routed", "woken"
NUM_CONVERSATIONS = 16
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def url(
    serve_cluster: str,
    default_model_path: Path,  # noqa: ARG001 - replicas find it in the cache
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A tiny model, behind the default model's tokenizer, which is not needed for prompts of ids."""
    path = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    config = parse_config({"device": "cpu", "engine_replicas": 2})
    application = bind(config, partial(load_slow_engine, path), partial(load_served_model, config))
    serve.run(application, name=ROUTED, route_prefix=f"/{ROUTED}")
    yield f"{serve_cluster}/{ROUTED}/v1/completions"
    serve.delete(ROUTED)


def stats_of(application: str) -> dict[str, EngineStats]:
    """By replica."""
    handle = serve.get_deployment_handle("engine", application)
    handle.stats.remote().result(timeout_s=60)  # the router has heard of the replicas then
    return {
        replica_id: handle.stats.remote(replica_id=replica_id).result(timeout_s=60)
        for replica_id in running_replicas(application, "engine")
    }


def wait_until(condition: Callable[[], bool], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {limit_s:g} s"
        time.sleep(0.05)


def is_idle(application: str) -> bool:
    return not any(stats.num_requests_running + stats.num_requests_waiting for stats in stats_of(application).values())


async def post(client: httpx.AsyncClient, url: str, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    response = await client.post(url, json={"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def cached_tokens(response: dict[str, Any]) -> int:
    number: int = response["usage"]["prompt_tokens_details"]["cached_tokens"]
    return number


def test_the_second_turn_of_a_conversation_finds_its_blocks(url: str) -> None:
    """All of them: with a coin for each, one in 65,536 runs would pass."""
    wait_until(lambda: len(stats_of(ROUTED)) == 2)
    conversations = [[number, *range(2, 49)] for number in range(NUM_CONVERSATIONS)]  # three blocks, none in common

    async def run() -> None:
        async with httpx.AsyncClient(timeout=200) as client:
            first = await asyncio.gather(*(post(client, url, prompt, 4) for prompt in conversations))
            assert [cached_tokens(response) for response in first] == [0] * NUM_CONVERSATIONS
            found = await asyncio.to_thread(stats_of, ROUTED)
            used = [stats.prompt_tokens for stats in found.values()]
            assert min(used) > 0, "one replica has them all"
            await asyncio.sleep(LOAD_EXPIRY_S)  # what late frames say of the load is forgotten
            for prompt in conversations:  # one after another: nothing but what they have speaks for a replica
                assert cached_tokens(await post(client, url, [*prompt, 7, 8, 9], 4)) == 48

    asyncio.run(run())


def test_a_flood_of_one_beginning_spills_over_to_the_other_replica(url: str) -> None:
    wait_until(lambda: is_idle(ROUTED))
    before = {replica_id: stats.prompt_tokens for replica_id, stats in stats_of(ROUTED).items()}
    system = [200 + place % 50 for place in range(160)]  # ten blocks: worth a bit more than one request

    async def run() -> None:
        async with httpx.AsyncClient(timeout=200) as client:
            await post(client, url, [*system, 1], 1)
            responses = await asyncio.gather(*(post(client, url, [*system, 2, number], 40) for number in range(24)))
        found = Counter(cached_tokens(response) for response in responses)
        assert found[160] >= 22  # all but those that brought it to the other replica

    asyncio.run(run())
    shares = [stats.prompt_tokens - before[replica_id] for replica_id, stats in stats_of(ROUTED).items()]
    assert min(shares) > sum(shares) / 4


@pytest.fixture
def may_begin(tmp_path: Path) -> Path:
    return tmp_path / "may begin"


@pytest.fixture
def woken_url(serve_cluster: str, default_model_path: Path, may_begin: Path) -> Iterator[str]:  # noqa: ARG001
    """At first without an engine replica."""
    arguments = {"min_replicas": 0, "max_replicas": 2, "target_queue_depth": 16, "engine_num_cpus": 0.1}
    config = parse_config({"device": "cpu", "ingress_num_cpus": 0.1, "max_num_seqs": SEATS, **arguments})
    application = bind(config, partial(load_seated_engine, may_begin), partial(load_served_model, config))
    serve.run(application, name=WOKEN, route_prefix=f"/{WOKEN}")
    yield f"{serve_cluster}/{WOKEN}/v1/completions"
    serve.delete(WOKEN)


def test_a_burst_from_zero_is_shared_by_all_replicas_that_come(woken_url: str, may_begin: Path) -> None:
    """The first that is up gets every request that waited; the next, however late, takes a part of its queue."""

    def is_shared() -> bool:
        queues = [stats.num_requests_running + stats.num_requests_waiting for stats in stats_of(WOKEN).values()]
        return len(queues) == 2 and min(queues) > 64 / 4

    async def run() -> None:
        async with httpx.AsyncClient(timeout=200, limits=httpx.Limits(max_connections=None)) as client:
            burst = asyncio.gather(*(post(client, woken_url, [5, number], 30) for number in range(64)))
            await asyncio.to_thread(wait_until, is_shared)
            may_begin.touch()
            for response in await burst:
                assert response["usage"]["completion_tokens"] == 30

    asyncio.run(run())
    steps = [stats.num_steps for stats in stats_of(WOKEN).values()]
    assert min(steps) > max(steps) / 4, steps
