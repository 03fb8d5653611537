"""Runs of an engine that are timed."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from engine.llm_engine import LLMEngine
from engine.request import Request, SamplingParams


@dataclass(frozen=True)
class Measurement:
    """One batch size: `output_tokens_per_s` counts decoding only, from the step after the last prefill."""

    batch: int
    input_tokens: int
    output_tokens: int
    ttft_s: float
    step_time_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float


@dataclass(frozen=True)
class Throughput:
    """Requests that were all there at once: output tokens over the time until the last of them had ended."""

    requests: int
    max_num_seqs: int
    input_tokens: int
    output_tokens: int
    total_s: float
    output_tokens_per_s: float
    num_steps: int
    num_preemptions: int


def make_requests(
    engine: LLMEngine, count: int, input_tokens: int, sampling: SamplingParams, seed: int
) -> list[Request]:
    """Requests of random tokens."""
    draw = random.Random(seed)
    now = perf_counter()
    return [
        Request(f"{count}-{index}-{now}", draw.choices(range(engine.vocab_size), k=input_tokens), sampling)
        for index in range(count)
    ]


def measure(
    engine: LLMEngine, batch: int, input_tokens: int, output_tokens: int, sampling: SamplingParams
) -> Measurement:
    """Run `batch` requests of random tokens together and time every step."""
    requests = make_requests(engine, batch, input_tokens, sampling, seed=batch)
    started = perf_counter()
    for request in requests:
        engine.add(request)
    while any(not request.output_token_ids for request in requests):
        engine.step()
    ttft_s = perf_counter() - started
    prefilled = sum(len(request.output_token_ids) for request in requests)
    steps = []
    while engine.has_work:
        begun = perf_counter()
        engine.step()
        steps.append(perf_counter() - begun)
    produced = sum(len(request.output_token_ids) for request in requests)
    return Measurement(
        batch,
        input_tokens,
        output_tokens,
        ttft_s,
        median(steps),
        (produced - prefilled) / sum(steps),
        produced / (ttft_s + sum(steps)),
    )


def measure_throughput(
    engine: LLMEngine,
    num_requests: int,
    max_num_seqs: int,
    input_tokens: int,
    sampling: SamplingParams,
    on_end: Callable[[int], None],
) -> Throughput:
    """Submit all requests at once and run them to their end. `on_end(requests that ended in a step)`."""
    requests = make_requests(engine, num_requests, input_tokens, sampling, seed=num_requests)
    before = engine.stats()
    started = perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        if ended := sum(output.finish_reason is not None for output in engine.step()):
            on_end(ended)
    total_s = perf_counter() - started
    after = engine.stats()
    produced = sum(len(request.output_token_ids) for request in requests)
    return Throughput(
        num_requests,
        max_num_seqs,
        input_tokens,
        sampling.max_tokens,
        total_s,
        produced / total_s,
        after.num_steps - before.num_steps,
        after.num_preemptions - before.num_preemptions,
    )
