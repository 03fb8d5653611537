"""Failures of engines and behaviour of clients, over the real deployments with a scripted engine in two replicas."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from engine.request import FinishReason, RequestOutput, SamplingParams
from engine.stats import EngineStats
from serve_app.app import bind, load_served_model
from serve_app.config import parse_config
from serve_app.engine_client import EngineClient
from serve_app.failover import Loss
from serve_app.group import PlacedPrompt
from serve_app.messages import Frame, Opening, Refusal, Submission, SubmittedPrompt, decode_frame, encode
from serve_app.placement import PlacementRule
from serve_app.replica_registry import ReplicaGoneError
from serve_app.token_stream import RequestStream
from tests.serve_app.fake_engine import CRASHES, DIES, FAILS, IS_FAST, IS_SILENT, answer, load_fake_engine
from tests.serve_app.fake_replicas import Told
from tests.serve_app.held_requests import held_request

APPLICATION = "scripted"
MAX_QUEUED = 8
pytestmark = pytest.mark.timeout(300)


def deploy(step_s: float = 0.002) -> None:
    config = parse_config({"device": "cpu", "engine_replicas": 2, "max_queued_requests": MAX_QUEUED})
    application = bind(config, partial(load_fake_engine, step_s=step_s), partial(load_served_model, config))
    serve.run(application, name=APPLICATION, route_prefix=f"/{APPLICATION}")


@pytest.fixture(scope="module")
def url(serve_cluster: str, default_model_path: Path) -> Iterator[str]:  # noqa: ARG001 - replicas find it in the cache
    deploy()
    yield f"{serve_cluster}/{APPLICATION}/v1/completions"
    if APPLICATION in serve.status().applications:
        serve.delete(APPLICATION)


def body(*first_tokens: int, max_tokens: int = 20, **fields: Any) -> dict[str, Any]:
    """A completion request of prompts of two tokens each."""
    prompts = [[token, 100 + place] for place, token in enumerate(first_tokens)]
    return {"model": "smollm2-135m", "prompt": prompts, "max_tokens": max_tokens, **fields}


def all_stats() -> list[EngineStats]:
    return serve.get_deployment_handle("engine", APPLICATION).broadcast("stats").results(timeout_s=60)


def engine_actors() -> set[str]:
    """Names of those that live."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {each["name"] for each in actors if each["name"].startswith(f"SERVE_REPLICA::{APPLICATION}#engine#")}


def num_running() -> int:
    return sum(stats.num_requests_running for stats in all_stats())


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {limit_s:g} s"
        time.sleep(0.02)


def with_client(test: Callable[[EngineClient], Coroutine[Any, Any, None]], rule: PlacementRule | None = None) -> None:
    """Runs `test` with an engine client in this process, beside the ingress's own."""

    async def run() -> None:
        handle = serve.get_deployment_handle("engine", APPLICATION)
        client = EngineClient(handle, f"test{time.monotonic_ns()}", rule=rule)
        try:
            await asyncio.wait_for(test(client), 150)
        finally:
            await client.close()

    asyncio.run(run())


async def replicas_known(client: EngineClient, count: int) -> tuple[str, ...]:
    """The router hears of the replicas a moment after the handle is made."""
    while len(client.running_replicas()) < count:
        await asyncio.sleep(0.02)
    return client.running_replicas()


def placed(client: EngineClient, prompt: list[int], max_tokens: int) -> PlacedPrompt:
    name = client.unique_request_id("r")
    sampling = SamplingParams(seed=1, max_tokens=max_tokens)
    return PlacedPrompt(SubmittedPrompt(prompt, sampling, [(name, 0)]), [RequestStream(name, lambda: None)])


async def read_all(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize("shared", [[], [5] * 64], ids=["nothing in common", "one beginning"])
def test_one_member_of_eight_is_cancelled_and_only_it_stops(url: str, shared: list[int]) -> None:  # noqa: ARG001
    async def test(client: EngineClient) -> None:
        await replicas_known(client, 2)
        prompts = [[*shared, 5, place] for place in range(8)]
        members = [placed(client, prompt, 40_000 if place == 3 else 400) for place, prompt in enumerate(prompts)]
        openings = await asyncio.gather(*client.submit(members))
        assert len({opening.replica_id for opening in openings}) == 2  # spread over both
        await anext(members[3].streams[0])
        members[3].streams[0].abort()
        outputs = await asyncio.gather(*(read_all(member.streams[0]) for member in members))
        assert outputs[3][-1].finish_reason is FinishReason.ABORT
        assert len(tokens_of(outputs[3])) < 40_000
        for place in {*range(8)} - {3}:
            assert tokens_of(outputs[place]) == answer(prompts[place], 400)

    with_client(test, PlacementRule(block_size=16))
    wait_until(lambda: num_running() == 0)


def test_aborted_member_is_freed_while_its_siblings_run(url: str) -> None:  # noqa: ARG001
    async def test(client: EngineClient) -> None:
        members = [placed(client, [IS_SILENT, 1], 10) for _ in range(3)]
        await asyncio.gather(*client.submit(members))
        members[0].streams[0].abort()
        await asyncio.to_thread(wait_until, lambda: num_running() == 2)
        members[1].streams[0].abort()
        members[2].streams[0].abort()
        await asyncio.to_thread(wait_until, lambda: num_running() == 0)

    with_client(test)


def test_abort_before_the_group_has_opened(url: str) -> None:  # noqa: ARG001
    async def test(client: EngineClient) -> None:
        members = [placed(client, [5, 5], 40_000) for _ in range(4)]
        openings = client.submit(members)
        for member in members[:3]:
            member.streams[0].abort()
        await asyncio.wait(openings)
        await openings[3]
        await asyncio.to_thread(wait_until, lambda: num_running() == 1)
        members[3].streams[0].abort()
        await asyncio.to_thread(wait_until, lambda: num_running() == 0)

    with_client(test)


def test_outputs_merge_while_the_reader_is_away(url: str) -> None:  # noqa: ARG001
    async def test(client: EngineClient) -> None:
        member = placed(client, [5, 5], 300)
        client.submit([member])
        stream = member.streams[0]
        while not stream.finished:
            await asyncio.sleep(0.05)
        outputs = await read_all(stream)
        assert len(outputs) == 1
        assert tokens_of(outputs) == answer([5, 5], 300)

    with_client(test)


def test_fast_engine_loses_no_token_for_want_of_credit(url: str) -> None:  # noqa: ARG001
    async def test(client: EngineClient) -> None:
        members = [placed(client, [5, place], 400) for place in range(32)]
        for member in members:
            client.submit([member])  # a group each
        outputs = await asyncio.gather(*(read_all(member.streams[0]) for member in members))
        for place, output in enumerate(outputs):
            assert tokens_of(output) == answer([5, place], 400)

    with_client(test)


def test_call_to_a_replica_that_has_left_fails_at_once(url: str) -> None:  # noqa: ARG001
    handle = serve.get_deployment_handle("engine", APPLICATION)

    async def test(client: EngineClient) -> None:
        await replicas_known(client, 2)
        with pytest.raises(ReplicaGoneError, match="nobody"):
            await asyncio.wait_for(handle.stats.remote(replica_id="nobody"), 60)
        for replica_id in client.running_replicas():  # and named calls reach whom they name
            status = await handle.status.remote(replica_id=replica_id)
            assert replica_id.encode() in status

    with_client(test)


def test_a_replica_refuses_to_continue_the_answer_of_another_kind(url: str) -> None:  # noqa: ARG001
    prompt = SubmittedPrompt([5, 5], SamplingParams(seed=1), [("continued#1", 0)], outputs=[[7]])
    handle = serve.get_deployment_handle("engine", APPLICATION).options(method_name="generate", stream=True)

    def first_frame(fingerprint: str) -> Frame:
        call = handle.remote(encode(Submission("group", 1, [prompt], fingerprint)))
        frame = decode_frame(next(iter(call)))
        call.cancel()
        return frame

    refusal = first_frame("fp_other")
    assert isinstance(refusal, Refusal)
    assert (refusal.fingerprint, "fp_other" in refusal.reason) == ("fp_fake", True)
    opening = first_frame("fp_fake")
    assert isinstance(opening, Opening)
    assert opening.attempt == 1


def test_failed_request_leaves_its_siblings_alone(url: str) -> None:
    with ThreadPoolExecutor() as pool:
        failing = pool.submit(httpx.post, url, json=body(FAILS), timeout=120)
        other = pool.submit(httpx.post, url, json=body(5, max_tokens=300), timeout=120)
    assert failing.result().status_code == 500
    assert "logits" in failing.result().json()["error"]["message"]
    assert other.result().json()["usage"]["completion_tokens"] == 300


def test_failed_stream_ends_with_an_error_event(url: str) -> None:
    with httpx.stream("POST", url, json=body(FAILS, stream=True), timeout=120) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.status_code == 200
    assert any('"error"' in line and "logits" in line for line in lines)


def test_fuller_queue_than_allowed_is_429(url: str) -> None:
    with held_request(url, body(*[IS_SILENT] * MAX_QUEUED)):
        wait_until(lambda: num_running() == MAX_QUEUED)
        refused = httpx.post(url, json=body(IS_FAST), timeout=120)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
    wait_until(lambda: num_running() == 0)
    assert httpx.post(url, json=body(IS_FAST), timeout=120).status_code == 200


def test_more_choices_than_the_queue_holds_is_the_clients_mistake(url: str) -> None:
    assert httpx.post(url, json=body(5, n=MAX_QUEUED + 1), timeout=120).status_code == 400


@pytest.mark.parametrize("fault", [CRASHES, DIES])
def test_a_stream_outlives_its_engine_which_is_replaced(url: str, fault: int) -> None:
    """CRASHES ends the engine's thread, DIES the whole process."""
    before = engine_actors()

    async def test(client: EngineClient) -> None:
        await replicas_known(client, 2)
        broken, beside = placed(client, [fault, 100], 300), placed(client, [5, 100], 300)
        client.submit([broken])
        client.submit([beside])
        for member, prompt in ((broken, [fault, 100]), (beside, [5, 100])):
            outputs = await read_all(member.streams[0])
            assert tokens_of(outputs) == answer(prompt, 300)
            assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert broken.attempt == 1

    with_client(test)
    for _ in range(6):  # the other replica serves meanwhile
        assert httpx.post(url, json=body(IS_FAST), timeout=120).status_code == 200

    def is_replaced() -> bool:
        deployment = serve.status().applications[APPLICATION].deployments["engine"]
        are_well = deployment.status == "HEALTHY" and deployment.replica_states == {"RUNNING": 2}
        return are_well and len(before & engine_actors()) == 1

    wait_until(is_replaced, 150)
    assert httpx.post(url, json=body(IS_FAST), timeout=120).status_code == 200


def test_streams_move_from_replicas_that_are_updated(url: str) -> None:  # noqa: ARG001
    """Nobody waits for the ends of streams that take longer than a drain may."""

    async def test(client: EngineClient) -> None:
        told = client._observer = Told()
        await replicas_known(client, 2)
        before = set(client.running_replicas())
        prompts = [[5, place] for place in range(4)]
        members = [placed(client, prompt, 100_000) for prompt in prompts]
        client.submit(members)
        begun = [await anext(member.streams[0]) for member in members]
        await asyncio.to_thread(deploy, 0.001)
        assert not before & set(client.running_replicas())
        moved = sum(num_streams for loss, num_streams in told.losses if loss is Loss.LEFT)
        assert moved >= len(members)
        # None was killed, as Serve does with what has not ended after 30 s.
        assert len(told.losses) == sum(loss is Loss.LEFT for loss, _ in told.losses)
        for member, prompt, first in zip(members, prompts, begun, strict=True):
            member.streams[0].abort()
            tokens = tokens_of([first, *await read_all(member.streams[0])])
            assert tokens == answer(prompt, len(tokens))

    with_client(test)
    wait_until(lambda: num_running() == 0)


def test_running_stream_ends_well_when_the_application_is_deleted(url: str) -> None:
    """The last test of this module: a drain lets streams finish."""
    stream = body(5, max_tokens=900, stream=True)
    with ThreadPoolExecutor() as pool, httpx.stream("POST", url, json=stream, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        deletion = pool.submit(serve.delete, APPLICATION)
        rest = [line for line in lines if line]
        deletion.result()
    assert rest[-1] == "data: [DONE]"
    assert '"length"' in rest[-2]
