"""Filters, penalties and draws against transformers' own and against plain formulations."""

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import Request, SamplingParams
from engine.sampling.sampler import SHORTLIST, Sampler, adjust_logits, filter_tokens, token_logprobs


def make_request(output: list[int] | None = None, prompt: list[int] | None = None, **sampling: Any) -> Request:
    request = Request("r", prompt or [1, 2, 3], SamplingParams(**{"seed": 1, "max_tokens": 100} | sampling))
    for token in output or []:
        request.append_output(token)
    return request


def random_row(seed: int, vocab_size: int = 5000, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def naive_filter(row: torch.Tensor, top_k: int, top_p: float, min_p: float) -> list[int]:
    """The definition, token by token, in Python's floats."""
    order = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))
    if top_k:
        order = order[:top_k]
    weights = torch.exp(row[order].double() - row[order[0]]).tolist()
    total, reached = sum(weights), 0.0
    if top_p < 1.0:
        for count, weight in enumerate(weights, 1):
            reached += weight
            if reached >= top_p * total:
                order, weights = order[:count], weights[:count]
                break
    return [token for token, weight in zip(order, weights, strict=True) if weight >= min_p]


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.sampled_from([1, 7, 200, SHORTLIST * 2, SHORTLIST * 2 + 1, 5000]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 4.0]),
    rounded=st.booleans(),
    top_k=st.sampled_from([0, 1, 3, 50, SHORTLIST - 1, SHORTLIST, SHORTLIST + 1, 3000, 9999]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_filters_follow_their_definition(
    seed: int, vocab_size: int, scale: float, rounded: bool, top_k: int, top_p: float, min_p: float
) -> None:
    row = random_row(seed, vocab_size, scale)
    if rounded:  # many ties
        row = row.round()
    values, ids = filter_tokens(row, top_k, top_p, min_p)
    expected = naive_filter(row, top_k, top_p, min_p)
    # Sums may round differently just at the border of top-p.
    assert ids.tolist()[: len(expected) - 1] == expected[: len(ids)][: len(expected) - 1]
    assert abs(len(ids) - len(expected)) <= (1 if top_p < 1.0 else 0)
    assert torch.equal(values, row[ids])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ((40, 1.0, 0.0), [transformers.TopKLogitsWarper(40)]),
        ((0, 0.9, 0.0), [transformers.TopPLogitsWarper(0.9)]),
        ((0, 1.0, 0.05), [transformers.MinPLogitsWarper(0.05)]),
        ((300, 0.8, 0.0), [transformers.TopKLogitsWarper(300), transformers.TopPLogitsWarper(0.8)]),
    ],
)
def test_filters_agree_with_transformers(ours: tuple[int, float, float], theirs: list[Any]) -> None:
    for seed in range(10):
        row = random_row(seed)
        scores = row[None].clone()
        for warper in theirs:
            scores = warper(None, scores)
        kept = set(torch.isfinite(scores[0]).nonzero().flatten().tolist())
        assert set(filter_tokens(row, *ours)[1].tolist()) == kept


def test_repetition_penalty_agrees_with_transformers() -> None:
    request = make_request(output=[5, 5, 9], prompt=[1, 2, 9], repetition_penalty=1.7)
    row = random_row(0, 50)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 9, 5, 5, 9]]), row[None].clone())
    assert torch.equal(adjust_logits(row, request, frozenset()), expected[0])


def test_bias_and_penalties_in_order() -> None:
    request = make_request(
        output=[5, 5, 9], logit_bias={5: 2.0, 40: -100.0}, presence_penalty=0.5, frequency_penalty=0.25
    )
    row = random_row(0, 50)
    before = row.clone()
    expected = row.clone()
    expected[5] += 2.0 - 2 * 0.25 - 0.5
    expected[40] -= 100.0
    expected[9] -= 0.25 + 0.5
    assert torch.allclose(adjust_logits(row, request, frozenset()), expected)
    assert torch.equal(row, before)


def test_min_tokens_masks_what_would_stop() -> None:
    row = torch.zeros(10)
    row[4] = 5.0
    sampler = Sampler(eos_token_ids=[4])
    early = make_request(output=[1], min_tokens=2, temperature=0.0, stop_token_ids=(0,))
    late = make_request(output=[1, 1], min_tokens=2, temperature=0.0)
    assert [token.token_id for token in sampler.sample(row.expand(2, -1), [early, late])] == [1, 4]


def test_greedy_takes_the_first_of_equals() -> None:
    row = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert Sampler([]).sample(row[None], [make_request(temperature=0.0)])[0].token_id == 1


def test_draws_follow_the_distribution() -> None:
    row = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.2, -3.0, 1.4])
    probabilities = torch.softmax(row / 0.8, -1)
    draws: Counter[int] = Counter()
    requests = [make_request(temperature=0.8, seed=seed) for seed in range(4000)]
    for token in Sampler([]).sample(row.expand(len(requests), -1), requests):
        draws[token.token_id] += 1
    statistic = sum((draws[i] - 4000 * p) ** 2 / (4000 * p) for i, p in enumerate(probabilities.tolist()))
    assert statistic < 24.3  # chi-square, 7 degrees of freedom, p = 0.001; the seeds are fixed


def test_filtered_draw_is_the_unfiltered_one_where_both_may_choose() -> None:
    """The noise belongs to the token id: a filter that keeps the winner does not change it."""
    row = random_row(3, 5000, 1.0)
    sampler = Sampler([])
    agreements = 0
    for seed in range(50):
        free = sampler.sample(row[None], [make_request(seed=seed)])[0].token_id
        filtered = sampler.sample(row[None], [make_request(seed=seed, top_k=2500)])[0].token_id
        kept = set(filter_tokens(row, 2500, 1.0, 0.0)[1].tolist())
        if free in kept:
            agreements += 1
            assert filtered == free
        assert filtered in kept
    assert agreements > 25


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_fails_alone(poison: float) -> None:
    logits = torch.stack([random_row(1, 100), random_row(2, 100), random_row(3, 100)])
    clean = Sampler([]).sample(logits, [make_request()] * 3)
    logits[1, 37] = poison
    tokens = Sampler([]).sample(logits, [make_request()] * 3)
    assert tokens[1].error is not None
    assert (tokens[0], tokens[2]) == (clean[0], clean[2])


def test_logprobs_come_from_the_raw_logits() -> None:
    row = random_row(4, 300)
    request = make_request(logprobs=5, logit_bias={7: 100.0}, temperature=0.3, top_k=1)
    token = Sampler([]).sample(row[None], [request])[0]
    expected = torch.log_softmax(row.double(), -1)
    assert token.token_id == 7
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    top = torch.topk(expected, 5)
    assert [token_id for token_id, _ in token.logprobs.top] == top.indices.tolist()
    assert [value for _, value in token.logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert token_logprobs(row, 3, 0).top == ()
