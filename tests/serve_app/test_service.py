"""The whole service, live: Serve, HTTP, admission, engine and the default model on the CPU."""

import asyncio
import re
import time
from collections.abc import Callable

import httpx
import openai
import pytest
import ray

from tests.conftest import Service

MODEL = "smollm2-135m"
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=150)


def async_client(service: Service) -> openai.AsyncOpenAI:
    """For one event loop, so for one test."""
    return openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=150)


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {limit_s:g} s"
        time.sleep(0.02)


def is_idle(service: Service) -> bool:
    stats = service.stats()
    return not (stats.num_requests_running or stats.num_requests_waiting or stats.num_blocks_in_use)


def test_chat_answers_with_sense(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    completion = client.chat.completions.create(model=MODEL, messages=question, max_tokens=16, temperature=0)
    assert "Paris" in completion.choices[0].message.content
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_every_answer_has_one_request_id_and_names_its_replica(service: Service) -> None:
    for headers in ({}, {"x-request-id": "my-own-id"}):
        answer = httpx.get(f"{service.url}/v1/models", headers=headers, timeout=60)
        (request_id,) = answer.headers.get_list("x-request-id")
        assert request_id == headers.get("x-request-id", request_id)
        (replica,) = answer.headers.get_list("x-slipstream-replica")
        assert replica


def test_streamed_text_equals_unstreamed(client: openai.OpenAI) -> None:
    arguments = {"model": MODEL, "prompt": "The moon is", "max_tokens": 12, "seed": 7, "temperature": 0.8}
    whole = client.completions.create(**arguments).choices[0].text
    chunks = list(client.completions.create(**arguments, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert len(chunks) > 1
    assert chunks[-1].choices[0].finish_reason == "length"


async def stream_text(client: openai.AsyncOpenAI, prompt: str, max_tokens: int, seed: int) -> str:
    chunks = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=max_tokens, seed=seed, temperature=1.0, stream=True
    )
    return "".join([chunk.choices[0].text async for chunk in chunks])


def test_concurrent_streams_equal_lone_ones(service: Service) -> None:
    async def run() -> None:
        async with async_client(service) as client:
            calls = [(client, f"Number {n} comes after", 8, n) for n in range(8)]
            together = await asyncio.gather(*(stream_text(*call) for call in calls))
            assert together[:2] == [await stream_text(*call) for call in calls[:2]]
            assert len(set(together)) == len(calls)

    asyncio.run(run())


def test_list_of_prompts_with_choices(client: openai.OpenAI) -> None:
    prompts = ["One, two,", "Red, green,"]
    arguments = {"model": MODEL, "max_tokens": 6, "seed": 5, "temperature": 1.0}
    batch = client.completions.create(**arguments, prompt=prompts, n=2)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    for place, prompt in enumerate(prompts):
        lone = client.completions.create(**arguments, prompt=prompt)
        assert batch.choices[2 * place].text == lone.choices[0].text
        assert batch.choices[2 * place + 1].text != lone.choices[0].text  # another choice, other noise


def test_assigned_seed_reproduces(client: openai.OpenAI) -> None:
    arguments = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 1.0}
    first = client.completions.create(**arguments)
    again = client.completions.create(**arguments, seed=first.seed)
    assert again.choices[0].text == first.choices[0].text


def test_stop_string_frees_the_request(client: openai.OpenAI, service: Service) -> None:
    completion = client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4, 5,", max_tokens=400, temperature=0, stop=[" 8"]
    )
    assert completion.choices[0].finish_reason == "stop"
    assert " 8" not in completion.choices[0].text
    wait_until(lambda: is_idle(service))


def test_streaming_client_that_leaves_frees_its_blocks(service: Service) -> None:
    body = {"model": MODEL, "prompt": "Tell me everything.", "max_tokens": 450, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=150) as response:
        next(response.iter_lines())
        assert service.stats().num_blocks_in_use > 0
    wait_until(lambda: is_idle(service))


def test_waiting_client_that_leaves_frees_its_blocks(service: Service) -> None:
    """A request that does not stream, with several prompts and choices."""
    body = {"model": MODEL, "prompt": ["Tell me", "And you"], "n": 2, "max_tokens": 450, "ignore_eos": True}

    async def run() -> None:
        async with httpx.AsyncClient(timeout=150) as http:
            asking = asyncio.create_task(http.post(f"{service.url}/v1/completions", json=body))
            await asyncio.to_thread(wait_until, lambda: service.stats().num_requests_running == 4)
            assert not asking.done()
            asking.cancel()
            await asyncio.wait({asking})

    asyncio.run(run())
    wait_until(lambda: is_idle(service))


def test_prompt_past_the_context_says_both_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=list(range(100, 700)), max_tokens=4)
    assert "512" in caught.value.message
    assert "600" in caught.value.message
    assert caught.value.param == "prompt"


def test_chat_past_the_context_names_messages(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 600}])
    assert caught.value.param == "messages"


def test_huge_prompt_is_refused(client: openai.OpenAI) -> None:
    """By its beginning: see test_prompt_encoding.py."""
    with pytest.raises(openai.BadRequestError, match="more than"):
        client.completions.create(model=MODEL, prompt="a longer story " * 500_000)


def test_max_tokens_past_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=510)
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize("field", [{"prompt": [1, 2, 49152]}, {"prompt": "a", "logit_bias": {"49152": 1}}])
def test_token_id_out_of_range(client: openai.OpenAI, field: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError, match="49151"):
        client.completions.create(model=MODEL, max_tokens=4, **field)


def test_no_max_tokens_means_the_rest_of_the_context(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "word " * 465}], extra_body={"ignore_eos": True}
    )
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.total_tokens == 512


BAD_BODIES = [
    b'{"model": "smollm2-135m", "prompt": ',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"model": "smollm2-135m", "prompt": [1, 99999999]}',
    b'{"model": "smollm2-135m", "prompt": "a", "max_tokens": -1}',
    b'{"model": "smollm2-135m", "prompt": "a", "temperature": 1e999}',
    b'{"model": "smollm2-135m", "prompt": "\\ud800"}',
    b'{"model": "smollm2-135m", "prompt": "' + b"x y " * 20_000 + b'"}',
    b'{"model": "gpt-9", "prompt": "a"}',
]


def test_bad_requests_disturb_no_stream(service: Service) -> None:
    async def barrage(http: httpx.AsyncClient) -> list[int]:
        url, headers = f"{service.url}/v1/completions", {"content-type": "application/json"}
        sent = [http.post(url, content=body, headers=headers) for body in BAD_BODIES * 4]
        return [response.status_code for response in await asyncio.gather(*sent)]

    async def run() -> None:
        async with async_client(service) as client, httpx.AsyncClient(timeout=150) as http:
            undisturbed = await stream_text(client, "A long story:", 60, 11)
            disturbed, statuses = await asyncio.gather(stream_text(client, "A long story:", 60, 11), barrage(http))
            assert disturbed == undisturbed
            assert set(statuses) == {400, 404}

    asyncio.run(run())


def test_ready_and_models(service: Service, client: openai.OpenAI) -> None:
    response = httpx.get(f"{service.url}/ready", timeout=60)
    assert (response.status_code, response.json()["state"]) == (200, "ready")
    assert httpx.get(f"{service.url}/health", timeout=60).status_code == 200
    assert [model.id for model in client.models.list()] == [MODEL]


def exported_metrics() -> dict[str, float]:
    """What Ray's agent exports of this application, by name and finish_reason, summed over replicas."""
    [node] = ray.nodes()
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=60).text
    values: dict[str, float] = {}
    for name, labels, value in re.findall(r"^(ray_slipstream_\w+){(.*)} (\S+)$", text, re.MULTILINE):
        reason = re.search(r'finish_reason="(\w+)"', labels)
        if 'application="default"' not in labels:
            continue
        key = f"{name} {reason[1]}" if reason else name
        values[key] = values.get(key, 0.0) + float(value)
    return values


def test_metrics_are_exported(service: Service, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="One, two,", max_tokens=4, extra_body={"ignore_eos": True})
    before = exported_metrics()
    wait_until(lambda: "ray_slipstream_request_success_total length" in exported_metrics())
    client.completions.create(model=MODEL, prompt="One, two,", max_tokens=7, extra_body={"ignore_eos": True})
    tokens = "ray_slipstream_generation_tokens_total"
    wait_until(lambda: exported_metrics().get(tokens, 0.0) >= before.get(tokens, 0.0) + 7)
    values = exported_metrics()
    assert 0.0 <= values["ray_slipstream_kv_cache_usage_perc"] < 0.1
    assert values[tokens] <= service.stats().output_tokens
    assert values["ray_slipstream_time_to_first_token_seconds_count"] >= 1
    assert values["ray_slipstream_prompt_tokens_total"] >= 5
    assert not any("spec_decode_hop_latency" in name for name in values)  # drafts come from the text alone


def test_nothing_is_left_over(service: Service) -> None:
    """After all of the above."""
    wait_until(lambda: is_idle(service))
