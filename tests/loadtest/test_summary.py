"""Numbers of a run from records made by hand."""

import math
import random

import pytest

from loadtest.estimates import Estimate, ratio, student_t
from loadtest.request_record import UNFINISHED, RequestRecord
from loadtest.slo import parse_assertions, parse_objectives
from loadtest.summary import NAMES, Summary, summarise


def answer(sent_s: float, ttft_s: float = 1.0, gap_s: float = 0.5, chunks: int = 3, **changes: object) -> RequestRecord:
    chunk_s = [ttft_s + gap_s * number for number in range(chunks)]
    record = RequestRecord("short_chat", due_s=sent_s, sent_s=sent_s, chunk_s=chunk_s, e2e_latency_s=chunk_s[-1])
    record.output_tokens, record.prompt_tokens, record.is_usage = chunks, 7, True
    for name, value in changes.items():
        setattr(record, name, value)
    return record


def failure(sent_s: float, error: str, after_s: float = 0.1) -> RequestRecord:
    return RequestRecord("short_chat", due_s=sent_s, sent_s=sent_s, e2e_latency_s=after_s, error=error)


def of(records: list[RequestRecord], objectives: str = "", repeats: int = 2) -> Summary:
    return summarise(records, 100.0, 110.0, repeats, parse_objectives(objectives))


def test_latencies_are_of_what_was_sent_in_the_time() -> None:
    warm_up, late = answer(99.0, ttft_s=90.0), answer(110.0, ttft_s=80.0)
    values = of([warm_up, answer(101.0, ttft_s=1.0), answer(109.5, ttft_s=2.0), late]).plain()
    assert values["ttft_s.mean"] == 1.5
    assert values["itl_s.p50"] == 0.5
    assert values["tpot_s.mean"] == 0.5
    assert values["e2e_latency_s.mean"] == 2.5


def test_names_are_those_that_may_be_asserted() -> None:
    values = of([answer(101.0, queue_time_s=0.1, due_s=100.9)]).plain()
    assert set(values) == set(NAMES)


def test_rates_are_of_what_happened_in_the_time() -> None:
    """Two were sent before and end inside, the last has one of its three chunks inside."""
    values = of([answer(98.5), answer(99.0), answer(103.0), answer(108.9)]).plain()
    assert values["requests_per_s"] == pytest.approx(3 / 10)
    # Of the first, the chunks at 100.0 and 100.5; of the second, all; of the last, the one at 109.9.
    assert values["output_tokens_per_s"] == pytest.approx((2 + 3 + 3 + 1) / 10)
    assert values["concurrency.mean"] == pytest.approx((0.5 + 1.0 + 2.0 + 1.1) / 10)


def test_tokens_of_large_chunks_count() -> None:
    values = of([answer(103.0, output_tokens=30)]).plain()
    assert values["output_tokens_per_s"] == pytest.approx(3.0)
    assert values["tpot_s.mean"] == pytest.approx(1.0 / 29)


def test_goodput_needs_every_objective() -> None:
    records = [
        answer(101.0, ttft_s=0.5, gap_s=0.1),
        answer(102.0, ttft_s=0.5, gap_s=0.9),
        answer(103.0, ttft_s=3.0, gap_s=0.1),
        failure(104.0, "timeout"),
    ]
    assert of(records).values["goodput"].value == pytest.approx(0.3)
    assert of(records, "ttft_s=1,tpot_s=0.2").values["goodput"].value == pytest.approx(0.1)
    assert of(records, "ttft_s=1").values["goodput"].value == pytest.approx(0.2)
    assert of(records, "max_itl_s=0.5,e2e_latency_s=1").values["goodput"].value == pytest.approx(0.1)


def test_errors_by_kind_and_unfinished_apart() -> None:
    records = [answer(101.0), failure(102.0, "timeout"), failure(103.0, "timeout"), failure(104.0, UNFINISHED, 9.0)]
    summary = of(records)
    assert summary.errors == {"timeout": 2}
    assert (summary.num_requests, summary.num_unfinished) == (4, 1)
    assert summary.plain()["error_share"] == pytest.approx(2 / 3)
    assert "queue_time_s.mean" not in summary.values
    assert of([answer(101.0, queue_time_s=0.25)]).plain()["queue_time_s.p95"] == 0.25


def test_repeats_give_the_interval() -> None:
    summary = of([answer(101.0, ttft_s=1.0), answer(106.0, ttft_s=3.0)])
    estimate = summary.values["ttft_s.mean"]
    assert estimate.repeats == (1.0, 3.0)
    assert estimate.half_width == pytest.approx(12.706 * 1.0)  # standard error of 1 and 3: 1
    assert Estimate(1.0, (1.0,)).half_width is None


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        repeats = tuple(draw.gauss(10, 2) for _ in range(4))
        estimate = Estimate(sum(repeats) / 4, repeats)
        held += abs(estimate.value - 10) <= estimate.half_width  # type: ignore[operator]
    assert held / 2000 == pytest.approx(0.95, abs=0.02)  # four standard errors


def test_ratios_and_noise() -> None:
    base = Estimate(1.0, (0.98, 1.0, 1.02))
    faster = ratio(Estimate(0.5, (0.49, 0.5, 0.51)), base)
    same = ratio(Estimate(1.01, (0.99, 1.01, 1.03)), base)
    assert faster is not None
    assert same is not None
    assert faster.value == 0.5
    assert faster.is_within_noise is False
    assert faster.low < 0.5 < faster.high < 1  # type: ignore[operator]
    assert same.is_within_noise is True
    unknown = ratio(Estimate(0.5, (0.5,)), base)
    assert unknown is not None
    assert unknown.is_within_noise is None
    assert ratio(Estimate(0.0), base) is None


def test_noise_is_called_so_as_often_as_it_should_be() -> None:
    draw = random.Random(1)

    def run() -> Estimate:
        repeats = tuple(draw.gauss(10, 0.5) for _ in range(3))
        return Estimate(sum(repeats) / 3, repeats)

    within = sum(bool(found and found.is_within_noise) for found in (ratio(run(), run()) for _ in range(2000)))
    assert 0.93 <= within / 2000 <= 0.995  # Welch's interval, with whole degrees of freedom, is wider than needed


def test_student_t_is_between_its_neighbours() -> None:
    assert student_t(0.5) == math.inf
    assert student_t(2) == student_t(2.9) == 4.303
    assert student_t(500) == 2.042


def test_assertions() -> None:
    first, second = parse_assertions("ttft_s.p95<0.5, goodput >= 2")
    assert first.violation({"ttft_s.p95": 0.4}) == ""
    assert "0.6" in first.violation({"ttft_s.p95": 0.6})
    assert "not measured" in second.violation({})
    assert second.violation({"goodput": 2.0}) == ""
    for wrong in ("ttft_s.p95", "ttft_s=3", "ttft_s.p95<soon"):
        with pytest.raises(ValueError, match="not an assertion"):
            parse_assertions(wrong)
    for wrong in ("ttft=1", "ttft_s=soon"):
        with pytest.raises(ValueError, match=r"no objective|not seconds"):
            parse_objectives(wrong)
