"""A request that another engine has begun goes on as it would have there, from every position."""

from pathlib import Path

import pytest

from engine.errors import InvalidRequest
from engine.llm_engine import LLMEngine
from engine.request import FinishReason, Request, RequestOutput, SamplingParams
from tests.speculative.oracle import Oracle
from tests.speculative.test_verification import make_engine
from tests.tiny_models import write_tiny_model

VOCAB_SIZE = 320
STOP_IDS = (7, 11, 30, 31, 32)
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, seed=0),
    "sampled": SamplingParams(temperature=0.8, top_p=0.95, top_k=60, min_p=0.01, max_tokens=40, seed=5),
    "penalties": SamplingParams(
        temperature=0.7,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        logit_bias={5: 3.0, 17: -4.0},
        max_tokens=40,
        seed=6,
    ),
    "greedy penalties": SamplingParams(temperature=0.0, frequency_penalty=1.5, max_tokens=40, seed=0),
    "min_tokens": SamplingParams(
        temperature=1.0,
        min_tokens=25,
        stop_token_ids=STOP_IDS,
        logit_bias=dict.fromkeys(STOP_IDS, 2.0),
        max_tokens=60,
        seed=7,
    ),
    "stop token": SamplingParams(temperature=1.0, stop_token_ids=STOP_IDS, max_tokens=60, seed=9),
    "logprobs": SamplingParams(temperature=0.9, logprobs=3, max_tokens=30, seed=10),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def make_request(kind: str, received: list[int] | None = None, name: str = "r") -> Request:
    prompt = [9, 200, 31, 5, 77, 140, 3, 60, 60, 12, 8]
    return Request(name, prompt, SAMPLINGS[kind], choice_index=1, output_token_ids=list(received or []))


def run(engine: LLMEngine, *requests: Request) -> dict[str, list[RequestOutput]]:
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check_integrity()
    return outputs


def seen(outputs: list[RequestOutput]) -> tuple[list[object], FinishReason | None, int | None]:
    """What a client sees: tokens with their log-probabilities, and why they end."""
    tokens = [
        entry for output in outputs for entry in zip(output.token_ids, output.logprobs or [None] * 99, strict=False)
    ]
    return list(tokens), outputs[-1].finish_reason, outputs[-1].stop_token_id


@pytest.fixture(scope="module")
def expected(path: Path) -> dict[str, list[RequestOutput]]:
    engine = make_engine(path)
    return {kind: run(engine, make_request(kind))["r"] for kind in SAMPLINGS}


def test_the_runs_end_in_all_ways(expected: dict[str, list[RequestOutput]]) -> None:
    assert seen(expected["stop token"])[2] in STOP_IDS
    assert seen(expected["min_tokens"])[2] in STOP_IDS
    assert 25 < len(seen(expected["min_tokens"])[0]) < 60
    assert seen(expected["greedy"])[1] is FinishReason.LENGTH
    assert all(len(seen(outputs)[0]) > 10 for outputs in expected.values())


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_from_every_position(path: Path, expected: dict[str, list[RequestOutput]], kind: str) -> None:
    tokens, *end = seen(expected[kind])
    ids = [token_id for token_id, _ in tokens]  # type: ignore[misc]
    resumed = [make_request(kind, ids[:count], str(count)) for count in range(len(ids))]
    together = run(make_engine(path), *resumed)  # one batch, with prefix hits among them
    alone = make_engine(path, num_blocks=12, max_prefill_chunk=7, max_model_len=80)
    for count, request in enumerate(resumed):
        assert seen(together[str(count)]) == (tokens[count:], *end)
        assert request.output_token_ids == ids
        if count % 4 == 1:  # in chunks, and in a small cache
            assert seen(run(alone, make_request(kind, ids[:count]))["r"]) == (tokens[count:], *end)


@pytest.mark.parametrize("kind", ["sampled", "penalties", "min_tokens", "logprobs"])
def test_with_drafts(path: Path, expected: dict[str, list[RequestOutput]], kind: str) -> None:
    tokens, *end = seen(expected[kind])
    ids = [token_id for token_id, _ in tokens]  # type: ignore[misc]
    counts = range(0, len(ids), 3)
    oracle = Oracle({str(count): ids for count in counts}, VOCAB_SIZE, 2, coin=0.3)
    engine = make_engine(path, proposer=oracle)
    outputs = run(engine, *(make_request(kind, ids[:count], str(count)) for count in counts))
    assert engine.stats().speculation is not None
    assert engine.stats().speculation.num_accepted_tokens > 20
    for count in counts:
        assert seen(outputs[str(count)]) == (tokens[count:], *end)


def test_prefix_hits_of_the_answer_are_none_of_the_prompt(path: Path, expected: dict[str, list[RequestOutput]]) -> None:
    engine = make_engine(path)
    ids = [token_id for token_id, _ in seen(expected["greedy"])[0]]  # type: ignore[misc]
    run(engine, make_request("greedy"))
    outputs = run(engine, make_request("greedy", ids[:30]))["r"]
    assert outputs[-1].num_cached_tokens == 11  # all of the prompt, while five blocks were found


def test_what_cannot_go_on_is_refused(path: Path) -> None:
    engine = make_engine(path)
    with pytest.raises(InvalidRequest, match="all 40 tokens"):
        engine.add(make_request("greedy", [5] * 40))
    with pytest.raises(InvalidRequest, match="token ids"):
        engine.add(make_request("greedy", [VOCAB_SIZE]))
    assert not engine.has_work
