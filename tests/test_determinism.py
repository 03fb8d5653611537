"""The contract: a token depends on weights, number format, prompt and sampling parameters, and on nothing else."""

import random
from pathlib import Path
from typing import Any

import pytest

from engine.config import CacheConfig, Device, DType, EngineConfig, KVCacheDType, Quantization, SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.request import Request, SamplingParams
from tests.tiny_models import write_tiny_model

NUM_REQUESTS = 32
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "logprobs": 2}
PENALISED = {
    "temperature": 0.7,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "logit_bias": {7: 3.0, 11: -100.0},
}
PLAIN = {"temperature": 1.0}


Formats = tuple[Device, DType, Quantization, KVCacheDType]
Model = tuple[Path, Formats]

PLAIN_FORMATS = (Quantization.NONE, KVCacheDType.AUTO)
QUANTISED_FORMATS = [
    (DType.BFLOAT16, Quantization.INT8, KVCacheDType.AUTO),
    (DType.BFLOAT16, Quantization.W8A8, KVCacheDType.INT8),
]
CPU: list[Formats] = [
    *((Device.CPU, dtype, *PLAIN_FORMATS) for dtype in (DType.FLOAT32, DType.BFLOAT16)),
    *((Device.CPU, *formats) for formats in QUANTISED_FORMATS),
]
CUDA: list[Formats] = [
    *((Device.CUDA, dtype, *PLAIN_FORMATS) for dtype in (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16)),
    *((Device.CUDA, *formats) for formats in QUANTISED_FORMATS),
]


@pytest.fixture(
    scope="module",
    params=[*CPU, *(pytest.param(each, marks=pytest.mark.gpu) for each in CUDA)],
    ids=lambda each: "-".join(each),
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024), request.param


def make_engine(model: Model, num_blocks: int = 700, prefix_caching: bool = True, **scheduling: Any) -> LLMEngine:
    path, (device, dtype, quantization, kv_cache_dtype) = model
    cache = CacheConfig(16, num_blocks, enable_prefix_caching=prefix_caching, dtype=kv_cache_dtype)
    scheduler = SchedulerConfig(**{"max_num_seqs": 64, "max_model_len": 1024} | scheduling)
    return LLMEngine.from_path(
        path,
        EngineConfig(
            device=device, dtype=dtype, quantization=quantization, cache=cache, scheduler=scheduler, num_threads=1
        ),
    )


def make_requests(**changes: Any) -> list[Request]:
    """Prompts of 1 to 300 tokens, some sharing a prefix, with every kind of sampling."""
    draw = random.Random(5)
    shared = [draw.randrange(320) for _ in range(100)]
    requests = []
    for index in range(NUM_REQUESTS):
        prompt = [draw.randrange(320) for _ in range(draw.choice((1, 5, 40, 290)))]
        if index % 3 == 0:
            prompt = shared + prompt[:60]
        kind = (GREEDY, SAMPLED, PENALISED, PLAIN)[index % 4]
        sampling = SamplingParams(**{"seed": index, "max_tokens": 40, "ignore_eos": True} | kind | changes)
        requests.append(Request(str(index), prompt, sampling, choice_index=index % 2))
    return requests


def outputs(requests: list[Request]) -> list[list[int]]:
    return [request.output_token_ids for request in requests]


@pytest.fixture(scope="module")
def alone(model: Model) -> list[list[int]]:
    """Every request's tokens, each request by itself, one whole prefill, no prefix cache."""
    engine = make_engine(model, prefix_caching=False)
    return outputs([engine.generate([request])[0] for request in make_requests()])


def test_requests_differ(alone: list[list[int]]) -> None:
    """The comparison would prove nothing if the model said the same to everyone."""
    assert len({tuple(tokens) for tokens in alone}) == NUM_REQUESTS
    assert all(len(set(tokens)) > 5 for tokens in alone[1::4])


def test_in_a_batch(model: Model, alone: list[list[int]]) -> None:
    assert outputs(make_engine(model, prefix_caching=False).generate(make_requests())) == alone


@pytest.mark.parametrize("budget", [1, 13, 64, 500])
def test_chunked_prefill(model: Model, alone: list[list[int]], budget: int) -> None:
    engine = make_engine(model, prefix_caching=False, token_budget=max(budget, 8), max_prefill_chunk=budget)
    assert outputs(engine.generate(make_requests())) == alone


def test_prefix_hit(model: Model, alone: list[list[int]]) -> None:
    engine = make_engine(model)
    engine.generate(make_requests())
    again = engine.generate(make_requests())
    assert sum(request.num_cached_tokens for request in again) > 1000
    assert outputs(again) == alone


def test_preemption(model: Model, alone: list[list[int]]) -> None:
    engine = make_engine(model, num_blocks=66)
    requests = engine.generate(make_requests())
    assert engine.stats().num_preemptions >= 3
    assert outputs(requests) == alone
    engine.check_integrity()
    assert engine.stats().num_blocks_in_use == 0


def test_preemption_without_prefix_cache(model: Model, alone: list[list[int]]) -> None:
    engine = make_engine(model, num_blocks=66, prefix_caching=False, max_prefill_chunk=50)
    assert outputs(engine.generate(make_requests())) == alone
    assert engine.stats().num_preemptions >= 3


def test_neighbours_come_and_go(model: Model, alone: list[list[int]]) -> None:
    """Requests that arrive at random times, beside others that are aborted midway."""
    engine = make_engine(model, token_budget=48)
    draw = random.Random(6)
    waiting = make_requests()
    done = list(waiting)
    noise = [Request(f"noise{i}", [i + 3] * 30, SamplingParams(seed=i, max_tokens=1000)) for i in range(10)]
    while waiting or engine.has_work:
        for queue in (waiting, noise):
            if queue and draw.random() < 0.3:
                engine.add(queue.pop())
        if draw.random() < 0.1:
            engine.abort(f"noise{draw.randrange(10)}")
        engine.step()
        engine.check_integrity()
    assert outputs(done) == alone


def test_logprobs_are_the_same_bits(model: Model) -> None:
    """Logprobs show the logits themselves, where a change too small to move a token would still be seen."""

    def logprobs(engine: LLMEngine, together: bool) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {str(index): [] for index in range(NUM_REQUESTS)}
        requests = make_requests(logprobs=5)
        for group in [requests] if together else [[request] for request in requests]:
            for request in group:
                engine.add(request)
            while engine.has_work:
                for output in engine.step():
                    for entry in output.logprobs:
                        found[output.request_id] += [entry.logprob, *(value for _, value in entry.top)]
        return found

    alone = logprobs(make_engine(model, prefix_caching=False), together=False)
    assert logprobs(make_engine(model, num_blocks=66, max_prefill_chunk=21), together=True) == alone
    assert all(len(values) == 40 * 6 for values in alone.values())


def test_seed_choice_and_position_change_the_tokens(model: Model) -> None:
    engine = make_engine(model)
    sampling = {"max_tokens": 30, "ignore_eos": True}
    variants = [
        Request(f"{seed}-{choice}", [5, 6, 7], SamplingParams(seed=seed, **sampling), choice_index=choice)
        for seed in (1, 2, 1 << 40)
        for choice in (0, 1)
    ]
    engine.generate(variants)
    assert len({tuple(request.output_token_ids) for request in variants}) == len(variants)
