"""Measured times of steps: what is known, what is guessed between and beyond, and what a bad measurement does."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculative.step_times import MAX_AGE, MAX_OBSERVATIONS, MIN_OBSERVATIONS, StepTimes, bucket_of

MANY_ROWS = np.arange(1, 3000)


def observe(times: StepTimes, num_rows: int, seconds: float, count: int = MIN_OBSERVATIONS) -> None:
    for _ in range(count):
        times.observe(num_rows, seconds)


def test_buckets() -> None:
    buckets = [range(1, 2), range(2, 3), range(3, 4), range(4, 5), range(5, 9), range(9, 17), range(17, 33)]
    for bucket, rows in enumerate(buckets):
        assert {bucket_of(num_rows) for num_rows in rows} == {bucket}
    assert bucket_of(2048) + 1 == bucket_of(2049)


def test_nothing_is_known_before_a_few_steps() -> None:
    times = StepTimes()
    for _ in range(MIN_OBSERVATIONS):
        assert times(1) is None
        assert times.of_each(MANY_ROWS) is None
        times.observe(1, 0.5)
    assert times(1) == 0.5


def test_lines_between_what_is_known_and_cheap_outside() -> None:
    times = StepTimes()
    observe(times, 4, 1.0)
    observe(times, 32, 8.0)
    observe(times, 64, 9.0)
    assert times(4) == 1.0
    assert times(18) == pytest.approx(4.5)
    assert times(48) == pytest.approx(8.5)
    assert times(2) == pytest.approx(0.5)  # its share of the fewest known
    assert times(65) == times(4096) == 9.0  # as the most known
    np.testing.assert_allclose(times.of_each(np.array([4, 18, 4096])), [1.0, 4.5, 9.0])


def test_padded_steps_cost_what_they_are_padded_to() -> None:
    times = StepTimes((1, 8, 16))
    observe(times, 1, 1.0)
    observe(times, 3, 2.0)
    observe(times, 12, 4.0)
    observe(times, 20, 5.0)  # larger than any size
    assert [times(num_rows) for num_rows in (1, 2, 5, 8, 9, 16, 20)] == [1.0, 2.0, 2.0, 2.0, 4.0, 4.0, 5.0]
    assert times(18) == pytest.approx(4.5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    observed=st.lists(st.tuples(st.integers(1, 2500), st.floats(1e-6, 100.0), st.integers(1, 5)), max_size=40),
    sizes=st.sampled_from([(), (1, 8, 16, 32, 64, 128)]),
)
def test_more_rows_never_count_as_faster(observed: list[tuple[int, float, int]], sizes: tuple[int, ...]) -> None:
    times = StepTimes(sizes)
    for num_rows, seconds, count in observed:
        observe(times, num_rows, seconds, count)
    seconds_of = times.of_each(MANY_ROWS)
    assert (seconds_of is None) == (times(1) is None)
    if seconds_of is not None:
        assert (np.diff(seconds_of) >= 0).all()
        assert (seconds_of > 0).all()
        assert times(17) == seconds_of[16]


@pytest.mark.parametrize("seed", range(5))
def test_outliers_do_not_count(seed: int) -> None:
    """One step in ten takes fifty times as long, as does the first of each kind; the others vary by 5 %."""
    rng, times = random.Random(seed), StepTimes()
    for turn in range(200):
        for num_rows in (1, 2, 4, 8, 16, 64):
            seconds = (1e-3 + 1e-5 * num_rows) * rng.uniform(1.0, 1.05)
            is_outlier = turn == 0 or (turn >= MIN_OBSERVATIONS and rng.random() < 0.1)
            times.observe(num_rows, 50 * seconds if is_outlier else seconds)
            if turn >= MIN_OBSERVATIONS:
                assert times(num_rows) == pytest.approx(1e-3 + 1e-5 * num_rows, rel=0.06)


def test_a_lasting_change_is_followed() -> None:
    times = StepTimes()
    observe(times, 8, 1.0, 100)
    observe(times, 8, 3.0, MAX_OBSERVATIONS)
    assert times(8) == 3.0
    observe(times, 8, 2.0, MAX_OBSERVATIONS)
    assert times(8) == 2.0


def test_a_larger_step_that_was_faster_corrects_a_smaller_one() -> None:
    times = StepTimes()
    observe(times, 8, 5.0)
    observe(times, 64, 2.0)
    assert times(8) == times(64) == 2.0


def test_what_was_not_seen_for_long_is_tried_again() -> None:
    times = StepTimes()
    observe(times, 64, 50.0)
    observe(times, 1, 1.0, MAX_AGE)
    assert times(64) == 50.0
    times.observe(1, 1.0)
    assert times(64) == 1.0
    observe(times, 64, 2.0, MIN_OBSERVATIONS - 1)
    assert times(64) == 1.0, "what was forgotten counts again"
    times.observe(64, 2.0)
    assert times(64) == 2.0
