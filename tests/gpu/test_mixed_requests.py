"""Hundreds of requests of every kind, arriving and leaving as they like, say what each of them says alone."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine.config import CacheConfig, Device, DType, EngineConfig, KVCacheDType, Quantization, SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.request import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprobs
from engine.runner.graph_forward import GraphForward
from tests.gpu.contract import CARD_MODEL
from tests.tiny_models import write_tiny_model

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.01},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0.0, "frequency_penalty": 1.5, "repetition_penalty": 1.1},
    {"temperature": 1.1, "min_p": 0.02, "logit_bias": {7: 3.0, 11: -100.0, 13: 9.0}},
]
ABORT_EVERY = 13  # requests
HOST_EVERY = 50  # requests with more biases than the device has room for: the host chooses their tokens
NUM_BIASES = 1100


@dataclass(frozen=True)
class Scale:
    """How much is tested: everything on the device, a little with the reference decoder of the CPU."""

    device: Device
    dtype: DType
    quantization: Quantization
    cache_dtype: KVCacheDType
    model: Mapping[str, Any]
    num_requests: int
    longest_prompt: int
    longest_output: int
    max_num_seqs: int
    token_budget: int


def card(quantization: Quantization, cache_dtype: KVCacheDType) -> Scale:
    return Scale(Device.CUDA, DType.BFLOAT16, quantization, cache_dtype, CARD_MODEL, 200, 300, 60, 128, 512)


SCALES = [
    Scale(
        Device.CPU,
        DType.FLOAT32,
        Quantization.NONE,
        KVCacheDType.AUTO,
        {"vocab_size": 2048, "num_hidden_layers": 1},
        num_requests=52,
        longest_prompt=60,
        longest_output=8,
        max_num_seqs=16,
        token_budget=128,
    ),
    pytest.param(card(Quantization.NONE, KVCacheDType.AUTO), marks=pytest.mark.gpu),
    pytest.param(card(Quantization.W8A8, KVCacheDType.INT8), marks=pytest.mark.gpu),
]


@dataclass
class Outcome:
    """What a client has received of a request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None

    def add(self, output: RequestOutput) -> None:
        assert self.finish_reason is None, "an output after the last"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.finish_reason, self.stop_token_id, self.error = output.finish_reason, output.stop_token_id, output.error


Outcomes = dict[str, Outcome]


def make_engine(path: Path, scale: Scale, prefix_caching: bool, max_draft_tokens: int = 0) -> LLMEngine:
    longest = scale.longest_prompt + scale.longest_output
    blocks = 2 * scale.max_num_seqs * (1 + longest // 16)  # some of them for the prefixes of those who have left
    config = EngineConfig(
        device=scale.device,
        dtype=scale.dtype,
        quantization=scale.quantization,
        cache=CacheConfig(16, blocks, enable_prefix_caching=prefix_caching, dtype=scale.cache_dtype),
        scheduler=SchedulerConfig(
            max_num_seqs=scale.max_num_seqs,
            token_budget=scale.token_budget,
            max_model_len=longest + 1,
            max_draft_tokens=max_draft_tokens,
        ),
        num_threads=1,
        warm_up=False,
    )
    return LLMEngine.from_path(path, config)


def is_aborted(index: int) -> bool:
    return index % ABORT_EVERY == 5


def make_requests(scale: Scale) -> list[Request]:
    """Prompts and answers of every length, some prompts beginning alike."""
    draw = random.Random(7)
    vocab = scale.model["vocab_size"]
    shared = [[draw.randrange(vocab) for _ in range(scale.longest_prompt // part)] for part in (2, 3, 5)]
    requests = []
    for index in range(scale.num_requests):
        length = draw.randrange(1, scale.longest_prompt + 1)
        prompt = [draw.randrange(vocab) for _ in range(length)]
        if index % 4 == 1:
            prompt = (draw.choice(shared) + prompt)[: max(length, 2)]
        sampling: dict[str, Any] = {"seed": index, "max_tokens": draw.randrange(1, scale.longest_output + 1)}
        sampling |= KINDS[index % len(KINDS)]
        if index % 3 < 2:
            sampling["logprobs"] = draw.choice((0, 1, 5, 20))
        if index % 5 < 2:
            sampling["stop_token_ids"] = tuple(draw.sample(range(vocab), vocab // scale.longest_output))
            sampling["min_tokens"] = draw.randrange(0, 1 + sampling["max_tokens"] // 2)
        if index % HOST_EVERY == HOST_EVERY - 1:
            sampling["logit_bias"] = {token: draw.uniform(-2, 2) for token in range(NUM_BIASES)}
        if is_aborted(index):
            sampling |= {"max_tokens": scale.longest_output, "stop_token_ids": (), "ignore_eos": True}
        requests.append(Request(str(index), prompt, SamplingParams(**sampling), choice_index=index % 2))
    return requests


def run(engine: LLMEngine, outcomes: Outcomes, each_step: Callable[[], bool]) -> None:
    """Step until `each_step`, called before each, returns False and nothing is left to do."""
    while each_step() or engine.has_work:
        for output in engine.step():
            outcomes[output.request_id].add(output)
        engine.check_integrity()


def run_alone(engine: LLMEngine, requests: Sequence[Request]) -> Outcomes:
    outcomes: Outcomes = {}
    for request in requests:
        outcomes[request.request_id] = Outcome()
        engine.add(request)
        run(engine, outcomes, lambda: False)
    return outcomes


def run_mixed(engine: LLMEngine, requests: Sequence[Request], seed: int) -> tuple[Outcomes, int]:
    """They arrive in another order, now and then in crowds. Returns also the most that ran at once."""
    draw = random.Random(seed)
    waiting = draw.sample(requests, len(requests))
    outcomes: Outcomes = {}
    last_token = {
        request.request_id: draw.randrange(1, request.sampling.max_tokens // 2)
        for index, request in enumerate(requests)
        if is_aborted(index)
    }
    peak = 0

    def arrive_and_leave() -> bool:
        nonlocal peak
        for _ in range(draw.choice((0, 0, 0, 1, 3, 25))):
            if waiting:
                request = waiting.pop()
                outcomes[request.request_id] = Outcome()
                engine.add(request)
        for name, count in list(last_token.items()):
            if name in outcomes and len(outcomes[name].token_ids) >= count:
                del last_token[name]
                output = engine.abort(name)
                assert output is not None
                outcomes[name].add(output)
        peak = max(peak, engine.stats().num_requests_running)
        return bool(waiting)

    run(engine, outcomes, arrive_and_leave)
    assert not last_token
    return outcomes, peak


def compare(scale: Scale, mixed: Outcomes, alone: Outcomes) -> None:
    assert len(mixed) == len(alone) == scale.num_requests
    num_tokens = num_logprobs = num_stopped = 0
    for index in range(scale.num_requests):
        actual, expected = mixed[str(index)], alone[str(index)]
        if is_aborted(index):
            count = len(actual.token_ids)
            assert actual.finish_reason is FinishReason.ABORT
            assert 0 < count < len(expected.token_ids)
            expected = Outcome(expected.token_ids[:count], expected.logprobs[:count], FinishReason.ABORT)
        assert actual == expected, f"request {index} says something else than alone"
        assert actual.error is None
        num_tokens += len(actual.token_ids)
        num_logprobs += sum(1 + len(each.top) for each in actual.logprobs)
        num_stopped += actual.finish_reason is FinishReason.STOP
    assert num_tokens > scale.num_requests * scale.longest_output / 5
    assert num_logprobs > num_tokens
    assert num_stopped > scale.num_requests / 20


def assert_replayed(engine: LLMEngine, num_rows: int) -> None:
    """But for the first step of each bucket, all steps were replays of graphs, some of them of so many rows."""
    forward = engine._runner.forward
    assert isinstance(forward, GraphForward)
    buckets = list(forward._buckets._made.values())
    assert num_rows in {bucket.layout.num_rows for bucket in buckets if bucket.graph is not None}
    assert forward._num_steps > 5 * len(buckets)


@pytest.mark.parametrize(
    "scale", SCALES, ids=lambda scale: f"{scale.device}-{scale.dtype}-{scale.quantization}-{scale.cache_dtype}"
)
def test_mixed_requests(scale: Scale, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, **scale.model)
    lone_engine = make_engine(path, scale, prefix_caching=False)
    alone = run_alone(lone_engine, make_requests(scale))
    assert len({tuple(outcome.token_ids) for outcome in alone.values()}) > 0.9 * scale.num_requests
    engine = make_engine(path, scale, prefix_caching=True)
    num_hits = 0
    for seed in (1, 2):  # the second crowd finds its prompts in the cache, those of long ago excepted
        requests = make_requests(scale)
        mixed, peak = run_mixed(engine, requests, seed)
        assert peak >= scale.max_num_seqs / 2
        compare(scale, mixed, alone)
        hits = engine.stats().prefix_cache_hits
        assert hits > num_hits
        num_hits = hits
        assert engine.stats().num_blocks_in_use == 0
    if scale.device is Device.CUDA:
        assert_replayed(lone_engine, 1)
        assert_replayed(engine, scale.max_num_seqs)
