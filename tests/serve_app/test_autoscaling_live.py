"""Autoscaling, live, in the real deployments: replicas of an engine without a model come and go with requests."""

import asyncio
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from ray import serve

from serve_app import replica_counts
from serve_app.app import bind, load_served_model
from serve_app.config import parse_config
from tests.serve_app.fake_engine import FakeEngine

APPLICATION = "scaling"
NUM_REQUESTS = 64
pytestmark = pytest.mark.timeout(300)
LIMIT_S = 120.0  # a second as a rule, more on a busy machine


def load_slow_engine(_find_drafts: object) -> FakeEngine:
    """50 tokens/s for each request."""
    return FakeEngine(step_s=0.02)


@pytest.fixture
def url(serve_cluster: str, default_model_path: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:  # noqa: ARG001
    """At first without an engine replica; those that nobody needs go after two seconds."""
    for name, seconds in (("HOLD_S", 2.0), ("PENDING_HOLD_S", 2.0), ("IDLE_S", 2.0)):
        monkeypatch.setattr(replica_counts, name, seconds)
    arguments = {"min_replicas": 0, "max_replicas": 3, "target_queue_depth": 20, "engine_num_cpus": 0.1}
    config = parse_config({"device": "cpu", "ingress_num_cpus": 0.1, **arguments})
    serve.run(
        bind(config, load_slow_engine, lambda: load_served_model(config)),
        name=APPLICATION,
        route_prefix=f"/{APPLICATION}",
    )
    yield f"{serve_cluster}/{APPLICATION}"
    serve.delete(APPLICATION)


def num_engines() -> int:
    """Running ones and those that are starting, but not those that are going."""
    states = serve.status().applications[APPLICATION].deployments["engine"].replica_states
    return states.get("RUNNING", 0) + states.get("STARTING", 0)


async def wait_for(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < limit_s, f"not so after {limit_s:g} s"
        await asyncio.sleep(0.05)


def test_a_burst_brings_replicas_from_zero_and_they_go_again(url: str) -> None:
    """64 requests that arrive together are a batch or two for Serve, and count as 64."""

    async def run() -> None:
        assert num_engines() == 0
        assert httpx.get(f"{url}/ready", timeout=60).json()["state"] == "scaled_to_zero"
        body = {"model": "smollm2-135m", "prompt": [5, 1], "max_tokens": 300}
        async with httpx.AsyncClient(timeout=200) as client:
            sent = [client.post(f"{url}/v1/completions", json=body) for _ in range(NUM_REQUESTS)]
            burst = asyncio.gather(*sent)
            await wait_for(lambda: num_engines() == 3)
            answers = await burst
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {300}
        await wait_for(lambda: num_engines() == 0)

    asyncio.run(run())
