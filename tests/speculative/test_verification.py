"""Whatever is proposed, the output is that of decoding without drafts."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import CacheConfig, DType, EngineConfig, SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.request import FinishReason, Request, RequestOutput, SamplingParams
from engine.speculative.proposer import Proposer
from engine.speculative.speculation import Speculation
from tests.speculative.oracle import Oracle, RandomProposer
from tests.tiny_models import write_tiny_model

VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def make_engine(path: Path, num_blocks: int = 400, proposer: Proposer | None = None, **limits: int) -> LLMEngine:
    config = EngineConfig(
        dtype=DType.FLOAT32,
        cache=CacheConfig(num_blocks=num_blocks, block_size=8),
        scheduler=SchedulerConfig(**{"max_model_len": 200, "max_draft_tokens": 100} | limits),
        num_threads=1,
    )
    engine = LLMEngine.from_path(path, config)
    if proposer is not None:
        engine._speculation = Speculation(proposer, 4, 100, always=True)
    return engine


def make_requests() -> list[Request]:
    """Greedy and sampled; penalties, bias, masks, log-probabilities; stops in all places; three that share a prefix."""
    variants = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
        {"temperature": 0.9, "frequency_penalty": 1.5, "presence_penalty": -0.5, "logit_bias": {5: 3.0, 17: -4.0}},
        {"temperature": 0.7, "logprobs": 3, "min_tokens": 12},
        {"temperature": 0.0, "logprobs": 0, "min_tokens": 9},
    ]
    requests = []
    for index in range(21):
        sampling = SamplingParams(
            **variants[index % 7], seed=index, max_tokens=3 + 2 * index, stop_token_ids=(7, 11, 30, 31, 32)
        )
        prompt = (
            [9] * 20 + [index] if index % 7 == 1 else [(5 + index * index * k) % VOCAB_SIZE for k in range(1 + index)]
        )
        requests.append(Request(str(index), prompt, sampling))
    return requests


def counts(of: Request | RequestOutput) -> tuple[int, int, int]:
    return of.num_cached_tokens, of.num_drafted_tokens, of.num_accepted_tokens


def run(engine: LLMEngine, requests: list[Request]) -> dict[str, list[object]]:
    """Everything that clients see, by request."""
    for request in requests:
        engine.add(request)
    by_id = {request.request_id: request for request in requests}
    seen: dict[str, list[object]] = {request_id: [] for request_id in by_id}
    while engine.has_work:
        for output in engine.step():
            request = by_id[output.request_id]
            assert counts(output) == counts(request)  # whether the step verified drafts of it or not
            assert request.num_accepted_tokens <= len(request.output_token_ids)
            places = output.logprobs or [None] * len(output.token_ids)
            seen[output.request_id] += zip(output.token_ids, places, strict=True)
            if output.finish_reason is not None:
                seen[output.request_id] += [output.finish_reason, output.stop_token_id]
        engine.check_integrity()
    assert engine.stats().num_blocks_in_use == 0
    return seen


@pytest.fixture(scope="module")
def expected(path: Path) -> dict[str, list[object]]:
    return run(make_engine(path), make_requests())


@pytest.fixture(scope="module")
def outputs(path: Path) -> dict[str, list[int]]:
    return {request.request_id: request.output_token_ids for request in make_engine(path).generate(make_requests())}


def test_the_requests_end_in_all_ways(expected: dict[str, list[object]], outputs: dict[str, list[int]]) -> None:
    assert {seen[-2] for seen in expected.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert sum(map(len, outputs.values())) > 250


@pytest.mark.parametrize("limits", [{}, {"num_blocks": 30}, {"max_prefill_chunk": 9, "max_num_seqs": 5}])
@pytest.mark.parametrize("num_right", [None, 0, 1, 2, 3])
def test_an_oracle_that_is_right_until_some_place(
    path: Path,
    expected: dict[str, list[object]],
    outputs: dict[str, list[int]],
    num_right: int | None,
    limits: dict[str, int],
) -> None:
    oracle = Oracle(outputs, VOCAB_SIZE, num_right, coin=0.3)
    engine = make_engine(path, proposer=oracle, **limits)
    requests = make_requests()
    assert run(engine, requests) == expected
    drafted = sum(request.num_drafted_tokens for request in requests)
    accepted = sum(request.num_accepted_tokens for request in requests)
    assert drafted >= (0.4 if limits else 0.9) * oracle.num_proposed
    assert accepted >= 0.15 * (num_right or 0) * drafted
    assert accepted < drafted or num_right is None
    if num_right is None and not limits:
        assert accepted == drafted > 150
        assert engine.stats().num_steps < 25  # 45 tokens at most, five a step
    assert sorted(oracle.forgotten) == sorted(outputs)
    assert engine._speculation is not None
    assert not engine._speculation._estimates, "requests that have ended are remembered"


def test_random_drafts(path: Path, expected: dict[str, list[object]]) -> None:
    proposer = RandomProposer({}, VOCAB_SIZE)
    assert run(make_engine(path, proposer=proposer), make_requests()) == expected
    assert proposer.num_proposed > 500


def test_the_last_output_of_an_aborted_request_has_its_counts(path: Path, outputs: dict[str, list[int]]) -> None:
    engine = make_engine(path, proposer=Oracle(outputs, VOCAB_SIZE, num_right=2))
    request = make_requests()[20]
    engine.add(request)
    while not request.num_accepted_tokens:
        engine.step()
    aborted = engine.abort(request.request_id)
    assert aborted is not None
    assert counts(aborted) == counts(request)


def test_accepted_blocks_are_found_again_and_rejected_tokens_are_not(path: Path, outputs: dict[str, list[int]]) -> None:
    """The prefix cache holds what was accepted, with the KV that decoding would have left."""
    engine = make_engine(path, proposer=Oracle(outputs, VOCAB_SIZE, num_right=2))
    requests = make_requests()
    engine.generate(requests)
    plain = make_engine(path)
    for request in requests:
        prompt = request.prompt_token_ids + request.output_token_ids
        follower = Request(f"after {request.request_id}", prompt, SamplingParams(temperature=0.0, max_tokens=5))
        alone = Request(follower.request_id, prompt, replace(follower.sampling))
        engine._speculation = None
        engine.generate([follower])
        plain.generate([alone])
        assert follower.output_token_ids == alone.output_token_ids
        # The step that ends a request may have accepted four more, and one is chosen without KV.
        assert follower.num_cached_tokens >= (len(prompt) - 5) // 8 * 8
