from hypothesis import given
from hypothesis import strategies as st

from serve_app.autoscaling.target import Bounds, Memory, Pace, next_target

PACE = Pace(hold_s=60, pending_hold_s=10, margin=0.5, idle_s=300)
BOUNDS = Bounds(0, 100)
needs = st.floats(0, 200)
paces = st.builds(Pace, st.floats(0, 600), st.floats(0, 600), st.floats(0, 2), st.floats(0, 600))


class Scaled:
    """A deployment whose replicas start within the step in which they are asked for, or never."""

    def __init__(self, target: int, pace: Pace = PACE, bounds: Bounds = BOUNDS, *, they_start: bool = True) -> None:
        self.target = self.num_ready = target
        self.now_s = 1000.0
        self._pace, self._bounds, self._they_start = pace, bounds, they_start
        self._memory = Memory()

    def step(self, need: float, time_s: float = 0.1, kept: float = 0.0, *, is_known: bool = True) -> int:
        self.now_s += time_s
        self.target, self._memory = next_target(
            self._pace,
            self._memory,
            self.now_s,
            self.target,
            self.num_ready,
            need,
            kept,
            self._bounds,
            is_known=is_known,
        )
        self.num_ready = self.target if self._they_start else min(self.num_ready, self.target)
        return self.target

    def steps(self, need: float, duration_s: float) -> int:
        for _ in range(round(duration_s)):
            self.step(need, 1.0)
        return self.target

    @property
    def num_remembered(self) -> int:
        return len(self._memory.needs)


def test_up_at_once() -> None:
    scaled = Scaled(1)
    assert scaled.step(1.0) == 1
    assert scaled.step(3.2) == 4
    assert Scaled(0).step(64 / 16) == 4


def test_down_when_a_need_has_not_been_seen_for_long() -> None:
    scaled = Scaled(10)
    assert scaled.steps(2, 55) == 10
    assert scaled.steps(2, 10) == 3  # with half of what is needed as margin
    assert scaled.step(5) == 5
    assert scaled.steps(2, 55) == 5
    assert scaled.steps(2, 10) == 3


def test_replicas_that_are_not_up_are_called_off_sooner() -> None:
    scaled = Scaled(1, they_start=False)
    assert scaled.step(8) == 8
    assert scaled.steps(0.5, 7) == 8
    assert scaled.steps(0.5, 6) == 1


def test_to_zero_after_idleness_and_back_at_once() -> None:
    scaled = Scaled(2)
    assert scaled.step(1.5) == 2
    assert scaled.steps(0, 295) == 1
    assert scaled.steps(0, 10) == 0
    assert scaled.step(0.01) == 1


def test_unknown_load_takes_nothing_away() -> None:
    scaled = Scaled(3)
    for _ in range(1000):
        assert scaled.step(0, 1.0, is_known=False) == 3
    assert scaled.step(4.5, is_known=False) == 5  # but what is known may bring some


def test_what_is_needed_to_keep_up_stays() -> None:
    scaled = Scaled(10)
    for _ in range(1000):
        scaled.step(1, 1.0, kept=6.5)
    assert scaled.target == 7
    assert scaled.step(1, kept=50) == 7  # it brings none


def test_bounds() -> None:
    scaled = Scaled(3, bounds=Bounds(2, 5))
    assert scaled.step(50) == 5
    assert scaled.steps(0, 2000) == 2
    assert next_target(PACE, Memory(), 0, 0, 0, 0, 0, Bounds(2, 5))[0] == 2


def test_another_controller_goes_on_from_the_target() -> None:
    """It remembers nothing, and waits as long as if it had just seen the need."""
    scaled = Scaled(8)
    assert scaled.steps(1, 55) == 8


@given(st.lists(needs, max_size=60), needs, needs, paces, st.integers(0, 100))
def test_more_need_never_lowers_the_target(past: list[float], need: float, more: float, pace: Pace, start: int) -> None:
    one, other = Scaled(start, pace), Scaled(start, pace)
    for each in past:
        assert one.step(each, 5) == other.step(each, 5)
    assert one.step(need, 5) <= other.step(need + more, 5)


@given(st.lists(st.tuples(needs, needs, st.floats(0, 100), st.booleans()), max_size=60), paces, st.integers(0, 100))
def test_always_bounded_and_enough(steps: list[tuple[float, float, float, bool]], pace: Pace, start: int) -> None:
    scaled = Scaled(start, pace, Bounds(1, 50))
    for need, kept, time_s, is_known in steps:
        target = scaled.step(need, time_s, kept, is_known=is_known)
        assert 1 <= target <= 50
        assert target >= min(50, need - 1e-6)
        assert scaled.num_remembered <= 40


@given(st.floats(0.1, 60), st.lists(st.floats(0, 1), min_size=1, max_size=300))
def test_noise_within_the_margin_moves_nothing(base: float, noise: list[float]) -> None:
    """Once the highest has been seen."""
    highest = base * (1 + PACE.margin)
    scaled = Scaled(0)
    target = scaled.step(highest)
    for part in noise:
        assert scaled.step(base + part * (highest - base) * 0.999, 20) == target


@given(st.lists(needs, min_size=1, max_size=200))
def test_no_replica_goes_within_the_hold(steps: list[float]) -> None:
    """So a target falls at most once in that time for each rise."""
    scaled = Scaled(0)
    seen: list[tuple[float, float]] = []
    for need in steps:
        target = scaled.step(need, 7)
        seen.append((scaled.now_s, need))
        held = max(each for time_s, each in seen if time_s > scaled.now_s - PACE.hold_s)
        assert target >= min(100, held) - 1e-6
