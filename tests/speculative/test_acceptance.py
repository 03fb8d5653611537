"""The estimate of a request's acceptance: learns, forgets, and knows what a cut-off round does not show."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculative.acceptance import PRIOR_PROBABILITY, AcceptanceEstimate


def observe_rounds(
    estimate: AcceptanceEstimate, probability: float, num_rounds: int, num_draft_tokens: int, seed: int = 0
) -> float:
    """Rounds of a target that accepts with a fixed probability; the mean of the estimates after the first 50."""
    rng, seen = random.Random(seed), []
    for _ in range(num_rounds):
        num_accepted = 0
        while num_accepted < num_draft_tokens and rng.random() < probability:
            num_accepted += 1
        estimate.observe(num_draft_tokens, num_accepted)
        seen.append(estimate.probability)
    return sum(seen[50:]) / len(seen[50:])


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_it_converges_whatever_the_length_of_a_round(probability: float, num_draft_tokens: int) -> None:
    """Accepted of drafted would be far less than the probability where rounds are long: 0.12 at 0.5 and 8."""
    mean = observe_rounds(AcceptanceEstimate(), probability, 2000, num_draft_tokens)
    assert mean == pytest.approx(probability, abs=0.08)


def test_it_follows_a_change_within_twenty_rounds() -> None:
    estimate = AcceptanceEstimate()
    for _ in range(100):
        estimate.observe(4, 4)
    assert estimate.probability > 0.95
    for _ in range(20):
        estimate.observe(4, 0)
    assert estimate.probability < 0.4
    for _ in range(20):
        estimate.observe(4, 4)
    assert estimate.probability > 0.9


def test_it_goes_back_to_the_prior_without_drafts_slowly() -> None:
    for accepted in (0, 4):
        estimate = AcceptanceEstimate(prior=0.5)
        for _ in range(50):
            estimate.observe(4, accepted)
        learnt = abs(estimate.probability - 0.5)
        estimate.pass_over()
        assert 0.99 * learnt < abs(estimate.probability - 0.5) < learnt
        distances = []
        for _ in range(12):
            estimate.pass_over(64)
            distances.append(abs(estimate.probability - 0.5))
        assert distances == sorted(distances, reverse=True)
        assert distances[0] > 0.3 * learnt
        assert distances[-1] < 0.1 * learnt


def test_passing_over_many_tokens_is_passing_over_each() -> None:
    at_once, one_by_one = AcceptanceEstimate(), AcceptanceEstimate()
    for estimate in (at_once, one_by_one):
        estimate.observe(4, 1)
    at_once.pass_over(30)
    for _ in range(30):
        one_by_one.pass_over()
    assert at_once.probability == pytest.approx(one_by_one.probability, rel=1e-12)


def test_a_round_without_draft_tokens_tells_nothing() -> None:
    estimate = AcceptanceEstimate()
    estimate.observe(4, 1)
    before = estimate.probability
    estimate.observe(0, 0)
    assert estimate.probability == before


def test_the_failure_is_counted_once_and_only_if_there_was_one() -> None:
    whole, cut, cut_early = AcceptanceEstimate(), AcceptanceEstimate(), AcceptanceEstimate()
    whole.observe(2, 2)
    cut.observe(3, 2)
    cut_early.observe(8, 2)
    assert whole.probability > PRIOR_PROBABILITY
    assert cut.probability == cut_early.probability < whole.probability


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    prior=st.floats(0.001, 0.999),
    rounds=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 500)), max_size=60),
)
def test_it_is_always_a_probability_that_can_change(prior: float, rounds: list[tuple[int, int, int]]) -> None:
    estimate = AcceptanceEstimate(prior)
    for num_draft_tokens, num_accepted, num_passed_over in rounds:
        estimate.observe(num_draft_tokens, min(num_draft_tokens, num_accepted))
        assert 0.0 < estimate.probability < 1.0
        estimate.pass_over(num_passed_over)
        assert 0.0 < estimate.probability < 1.0


def test_impossible_rounds_and_priors_are_our_own_mistakes() -> None:
    with pytest.raises(AssertionError, match="5 of 4 accepted"):
        AcceptanceEstimate().observe(4, 5)
    for prior in (0.0, 1.0):
        with pytest.raises(AssertionError, match="leaves nothing to learn"):
            AcceptanceEstimate(prior)
