"""The number of draft tokens: the best there is, none where none pays, and no slower than none in a closed loop."""

import random
from collections.abc import Callable
from itertools import product
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculative.acceptance import AcceptanceEstimate
from engine.speculative.policy import MIN_GAIN, choose_num_draft_tokens
from engine.speculative.step_times import StepTimes

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
StepSeconds = Callable[[Ints], Floats]
DraftingSeconds = Callable[[int, Ints], Floats]


def flat(rows: Ints) -> Floats:
    return np.full(len(rows), 1e-3)


def linear(rows: Ints) -> Floats:
    return 1e-3 * rows


def affine(rows: Ints) -> Floats:
    return 1e-3 + 2e-5 * rows


def stairs(rows: Ints) -> Floats:
    """Padded to powers of two from 8 on."""
    sizes = np.maximum(8, 2 ** np.ceil(np.log2(rows)))
    return np.where(rows == 1, 1e-3, 1.05e-3 + 1e-6 * sizes)


def rate(
    num_draft_tokens: tuple[int, ...],
    acceptance: list[float],
    step_s: StepSeconds,
    drafting_s: DraftingSeconds | None,
) -> float:
    """Expected tokens a second."""
    kept = sum(a**depth for a, count in zip(acceptance, num_draft_tokens, strict=True) for depth in range(count + 1))
    seconds = float(step_s(np.array([len(acceptance) + sum(num_draft_tokens)]))[0])
    if drafting_s is not None and any(num_draft_tokens):
        num_drafted = sum(count > 0 for count in num_draft_tokens)
        seconds += float(drafting_s(max(num_draft_tokens), np.array([num_drafted]))[0])
    return kept / seconds


step_tables = st.lists(st.floats(0.0, 1.0), min_size=12, max_size=12).map(lambda steps: np.cumsum([1.0, *steps]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    acceptance=st.lists(st.floats(0.0, 0.99), min_size=1, max_size=3),
    limit=st.integers(0, 3),
    row_limit=st.integers(1, 12),
    table=step_tables,
    drafting=st.one_of(st.none(), st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0))),
)
def test_no_choice_is_better(
    acceptance: list[float], limit: int, row_limit: int, table: Floats, drafting: tuple[float, float] | None
) -> None:
    """Against every choice there is: times of steps are any that do not decrease, of drafting any start and slope."""

    def step_s(rows: Ints) -> Floats:
        return table[rows]

    def drafting_s(max_depth: int, num_drafted: Ints) -> Floats:
        assert drafting is not None
        return np.full(len(num_drafted), drafting[0] + drafting[1] * max_depth)

    drafts = None if drafting is None else drafting_s
    chosen = tuple(choose_num_draft_tokens(acceptance, limit, row_limit, step_s, drafts))
    num_requests = len(acceptance)
    assert len(chosen) == num_requests
    assert all(0 <= count <= limit for count in chosen)
    assert not any(chosen) or num_requests + sum(chosen) <= row_limit
    plain = rate((0,) * num_requests, acceptance, step_s, drafts)
    best = max(
        rate(counts, acceptance, step_s, drafts)
        for counts in product(range(limit + 1), repeat=num_requests)
        if not any(counts) or num_requests + sum(counts) <= row_limit
    )
    if any(chosen):
        assert rate(chosen, acceptance, step_s, drafts) == pytest.approx(best, rel=1e-9)
        assert best > MIN_GAIN * plain * (1 - 1e-9)
    else:
        assert best <= MIN_GAIN * plain * (1 + 1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(acceptance=st.lists(st.floats(0.0, 0.99), min_size=1, max_size=6), slope=st.floats(0.0, 0.3))
def test_drafting_that_takes_longer_for_more_requests_never_costs_speed(acceptance: list[float], slope: float) -> None:
    def drafting_s(max_depth: int, num_drafted: Ints) -> Floats:
        return 1e-3 * slope * max_depth * num_drafted

    chosen = tuple(choose_num_draft_tokens(acceptance, 4, 64, affine, drafting_s))
    if any(chosen):
        plain = rate((0,) * len(acceptance), acceptance, affine, None)
        assert rate(chosen, acceptance, affine, drafting_s) > MIN_GAIN * plain * (1 - 1e-9)


@pytest.mark.parametrize("step_s", [flat, affine, linear, stairs])
def test_higher_acceptance_never_gets_fewer_when_alone(step_s: StepSeconds) -> None:
    def drafting_s(max_depth: int, num_drafted: Ints) -> Floats:
        return 1e-4 * max_depth * np.ones(len(num_drafted))

    for drafts in (None, drafting_s):
        counts = [choose_num_draft_tokens([a], 8, 64, step_s, drafts)[0] for a in np.linspace(0.0, 0.99, 100)]
        assert counts == sorted(counts)
        assert counts[0] == 0
        assert (counts[-1] > 0) == (step_s is not linear)


def test_the_likelier_request_gets_no_fewer() -> None:
    rng = random.Random(0)
    for _ in range(50):
        acceptance = sorted(rng.uniform(0.0, 0.99) for _ in range(20))
        counts = choose_num_draft_tokens(acceptance, 8, rng.randrange(20, 200), affine, None)
        assert counts == sorted(counts)


def test_none_where_rows_cost_what_they_bring_and_all_where_they_cost_nothing() -> None:
    for num_requests in (1, 7, 256):
        acceptance = [0.9] * num_requests
        assert choose_num_draft_tokens(acceptance, 8, 4096, linear, None) == [0] * num_requests
        assert choose_num_draft_tokens(acceptance, 8, 4096, flat, None) == [8] * num_requests
        assert choose_num_draft_tokens([0.0] * num_requests, 8, 4096, flat, None) == [0] * num_requests


def test_a_small_gain_is_not_worth_it() -> None:
    assert choose_num_draft_tokens([MIN_GAIN - 1 - 1e-6], 1, 64, flat, None) == [0]
    assert choose_num_draft_tokens([MIN_GAIN - 1 + 1e-6], 1, 64, flat, None) == [1]


def test_the_most_promising_get_the_rows_there_are() -> None:
    assert choose_num_draft_tokens([0.5, 0.9, 0.0, 0.6], 4, 8, flat, None) == [0, 4, 0, 0]
    assert choose_num_draft_tokens([0.5, 0.9, 0.0, 0.6], 2, 8, flat, None) == [1, 2, 0, 1]
    for row_limit in (0, 3, 4):
        assert choose_num_draft_tokens([0.9] * 4, 4, row_limit, flat, None) == [0] * 4


def test_nothing_without_requests_limit_or_known_times() -> None:
    assert choose_num_draft_tokens([], 4, 64, flat, None) == []
    assert choose_num_draft_tokens([0.9], 0, 64, flat, None) == [0]
    assert choose_num_draft_tokens([0.9], 4, 64, StepTimes().of_each, None) == [0]


def closed_loop(
    probabilities: list[float], step_s: StepSeconds, padded_sizes: tuple[int, ...], num_steps: int
) -> tuple[float, float]:
    """Tokens a second over those without drafts: of the policy that learns everything by its own steps, in which one
    in a hundred takes far too long, and of the same policy with the truth."""
    rng, times = random.Random(0), StepTimes(padded_sizes)
    estimates = [AcceptanceEstimate() for _ in probabilities]
    num_requests, num_tokens, seconds = len(probabilities), 0, 0.0
    for step in range(num_steps):
        counts = choose_num_draft_tokens([e.probability for e in estimates], 4, 2048, times.of_each, None)
        num_rows = num_requests + sum(counts)
        step_seconds = float(step_s(np.array([num_rows]))[0]) * rng.uniform(0.98, 1.02)
        seconds += step_seconds
        times.observe(num_rows, step_seconds * (50 if step == 0 or rng.random() < 0.01 else 1))
        for estimate, count, probability in zip(estimates, counts, probabilities, strict=True):
            num_accepted = 0
            while num_accepted < count and rng.random() < probability:
                num_accepted += 1
            num_tokens += 1 + num_accepted
            if count:
                estimate.observe(count, num_accepted)
            else:
                estimate.pass_over()
    plain = rate((0,) * num_requests, probabilities, step_s, None)
    best = tuple(choose_num_draft_tokens(probabilities, 4, 2048, step_s, None))
    return num_tokens / seconds / plain, rate(best, probabilities, step_s, None) / plain


@pytest.mark.parametrize("num_requests", [1, 9, 100])
@pytest.mark.parametrize("probabilities", [(0.15,), (0.9,), (0.1, 0.9, 0.4)])
@pytest.mark.parametrize("step_s", [flat, affine, linear, stairs])
def test_what_it_learns_is_close_to_the_best_and_never_costs_speed(
    step_s: StepSeconds, probabilities: tuple[float, ...], num_requests: int
) -> None:
    everyone = [probabilities[place % len(probabilities)] for place in range(num_requests)]
    padded_sizes = (1, *(2**power for power in range(3, 12))) if step_s is stairs else ()
    learnt, best = closed_loop(everyone, step_s, padded_sizes, num_steps=800)
    assert learnt > 0.97
    assert learnt > 0.9 * best


def test_it_is_fast_enough_to_ask_in_each_step() -> None:
    """An order of magnitude above what it takes: 20 µs where nothing can pay, 0.25 ms where drafting takes time."""
    rng = random.Random(0)
    acceptance = [rng.uniform(0.05, 0.95) for _ in range(256)]

    def drafting_s(max_depth: int, num_drafted: Ints) -> Floats:
        return 1e-6 * max_depth * num_drafted

    for step_s, limit_s in ((linear, 1e-3), (affine, 5e-3)):
        taken = []
        for _ in range(20):
            started = perf_counter()
            choose_num_draft_tokens(acceptance, 8, 2304, step_s, drafting_s)
            taken.append(perf_counter() - started)
        assert min(taken) < limit_s
