"""From records of requests to what is reported: latencies, rates, errors, of the time of measurement alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from loadtest.estimates import Estimate
from loadtest.request_record import UNFINISHED, RequestRecord
from loadtest.slo import Objectives

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft_s", "itl_s", "tpot_s", "e2e_latency_s", "queue_time_s", "send_delay_s")
RATES = ("requests_per_s", "output_tokens_per_s", "goodput")
NAMES = (  # all that a summary may have
    *(f"{latency}.{statistic}" for latency in LATENCIES for statistic in ("mean", *(f"p{p}" for p in PERCENTILES))),
    *RATES,
    *("concurrency.mean", "error_share", "prompt_tokens.mean", "output_tokens.mean"),
)
Samples = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Summary:
    """`values` by name: `ttft_s.p95`, `goodput`. Latencies are of answered requests that were sent in the time.

    Rates count what happened in it, whenever the request was sent: answers and chunks that came.
    """

    started_s: float
    duration_s: float
    values: dict[str, Estimate]
    errors: dict[str, int]  # by kind, of requests sent in the time
    num_requests: int  # sent in the time
    num_unfinished: int  # of those, still under way when the run had ended
    share_with_usage: float  # of the answers: tokens counted by the server

    def plain(self) -> dict[str, float]:
        """Values alone."""
        return {name: estimate.value for name, estimate in self.values.items()}


def summarise(
    records: Sequence[RequestRecord], start_s: float, end_s: float, repeats: int, objectives: Objectives
) -> Summary:
    """The time from `start_s` to `end_s` is measured as a whole, and cut into `repeats` parts for the confidence."""
    whole = _values(records, start_s, end_s, objectives)
    edges = np.linspace(start_s, end_s, repeats + 1)
    parts = [_values(records, float(low), float(high), objectives) for low, high in pairwise(edges)]
    sent = [record for record in records if start_s <= record.sent_s < end_s]
    answered = [record for record in sent if record.is_answered]
    return Summary(
        started_s=start_s,
        duration_s=end_s - start_s,
        values={name: Estimate(v, tuple(part[name] for part in parts if name in part)) for name, v in whole.items()},
        errors=dict(Counter(r.error for r in sent if r.error and r.error != UNFINISHED).most_common()),
        num_requests=len(sent),
        num_unfinished=sum(record.error == UNFINISHED for record in sent),
        share_with_usage=sum(record.is_usage for record in answered) / max(1, len(answered)),
    )


def samples_of(records: Sequence[RequestRecord]) -> Samples:
    """All that is known of each latency, of the answered requests among `records`."""
    answered = [record for record in records if record.is_answered]
    lists: dict[str, list[float | None]] = {
        "ttft_s": [record.ttft_s for record in answered],
        "itl_s": [gap for record in answered for gap in record.itl_s],
        "tpot_s": [record.tpot_s for record in answered],
        "e2e_latency_s": [record.e2e_latency_s for record in answered],
        "queue_time_s": [record.queue_time_s for record in answered],
        "send_delay_s": [record.send_delay_s or None for record in records],  # a closed loop has none
    }
    return {name: np.array([v for v in values if v is not None], np.float64) for name, values in lists.items()}


def _values(records: Sequence[RequestRecord], start_s: float, end_s: float, objectives: Objectives) -> dict[str, float]:
    sent = [record for record in records if start_s <= record.sent_s < end_s]
    answered = [record for record in sent if record.is_answered]
    values: dict[str, float] = {}
    for name, samples in samples_of(sent).items():
        if samples.size:
            values[f"{name}.mean"] = float(samples.mean())
            values |= {f"{name}.p{p}": float(np.percentile(samples, p)) for p in PERCENTILES}
    if answered:
        values["output_tokens.mean"] = float(np.mean([record.output_tokens for record in answered]))
    if known := [record.prompt_tokens for record in answered if record.prompt_tokens is not None]:
        values["prompt_tokens.mean"] = float(np.mean(known))
    ended = [record for record in records if start_s <= record.ended_s < end_s and record.error != UNFINISHED]
    duration_s = end_s - start_s
    values["requests_per_s"] = sum(record.is_answered for record in ended) / duration_s
    values["goodput"] = sum(objectives.are_met(record) for record in ended) / duration_s
    values["output_tokens_per_s"] = _tokens_between(records, start_s, end_s) / duration_s
    values["concurrency.mean"] = _busy_s(records, start_s, end_s) / duration_s
    if ended:
        values["error_share"] = sum(not record.is_answered for record in ended) / len(ended)
    return values


def _tokens_between(records: Sequence[RequestRecord], start_s: float, end_s: float) -> float:
    """A chunk counts where it came, for its part of the answer's tokens: which chunk had how many is not known."""
    total = 0.0
    for record in records:
        if record.chunk_s and record.sent_s < end_s and record.ended_s >= start_s:
            at_s = record.sent_s + np.array(record.chunk_s)
            total += record.output_tokens * float(np.mean((at_s >= start_s) & (at_s < end_s)))
    return total


def _busy_s(records: Sequence[RequestRecord], start_s: float, end_s: float) -> float:
    """Seconds of requests under way, together."""
    return sum(max(0.0, min(record.ended_s, end_s) - max(record.sent_s, start_s)) for record in records)
