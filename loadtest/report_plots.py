"""Plots of one run or several, as SVG to be put into a page."""

import io
from collections.abc import Mapping, Sequence
from itertools import chain

import matplotlib as mpl

mpl.use("svg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.request_record import RequestRecord
from loadtest.results import Results
from loadtest.summary import samples_of

_SIZE_IN = (6.0, 3.4)
_MAX_POINTS = 2000  # of a curve: a page of millions of points would not open
_MIN_BINS, _MAX_BINS = 8, 100


def measured_records(results: Results) -> list[RequestRecord]:
    """Those sent in the measured time."""
    start_s = results.summary.started_s
    end_s = start_s + results.summary.duration_s
    return [record for record in results.records if start_s <= record.sent_s < end_s]


def distributions(runs: Mapping[str, Results], latency: str) -> str:
    """What part of all values of a latency is below each time; one curve a run."""
    figure, axes = plt.subplots(figsize=_SIZE_IN)
    for name, results in runs.items():
        values = np.sort(samples_of(measured_records(results))[latency])
        if values.size:
            shares = np.linspace(0, 1, min(_MAX_POINTS, values.size))
            axes.plot(np.quantile(values, shares, method="inverted_cdf"), shares, label=name, drawstyle="steps-post")
    axes.set(title=f"{latency}: distribution", xlabel="seconds", ylabel="share of values", ylim=(0, 1.02))
    if len(runs) > 1:
        axes.legend(fontsize=8)
    return _svg(figure, axes)


def latency_over_time(results: Results) -> str:
    """Each answer by the time it was sent; warm-up included, the measured time is shaded."""
    figure, axes = plt.subplots(figsize=_SIZE_IN)
    origin_s = _origin_s(results)
    answered = [record for record in results.records if record.is_answered]
    at_s = [record.sent_s - origin_s for record in answered]
    axes.scatter(at_s, [record.ttft_s or 0.0 for record in answered], s=5, label="ttft_s")
    axes.scatter(at_s, [record.e2e_latency_s for record in answered], s=5, label="e2e_latency_s")
    failed = [record.sent_s - origin_s for record in results.records if not record.is_answered]
    axes.scatter(failed, [0.0] * len(failed), s=14, marker="x", color="red", label=f"not answered: {len(failed)}")
    _shade(axes, results, origin_s)
    axes.set(title="latency by the time of sending", xlabel="seconds since the start", ylabel="seconds")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return _svg(figure, axes)


def throughput_over_time(results: Results) -> str:
    """Tokens a second as they came, and requests under way."""
    figure, axes = plt.subplots(figsize=_SIZE_IN)
    origin_s = _origin_s(results)
    at_s = list(chain.from_iterable([r.sent_s - origin_s + s for s in r.chunk_s] for r in results.records))
    weights = list(
        chain.from_iterable([r.output_tokens / len(r.chunk_s)] * len(r.chunk_s) for r in results.records if r.chunk_s)
    )
    end_s = max((record.ended_s - origin_s for record in results.records), default=1.0)
    num_bins = min(_MAX_BINS, max(_MIN_BINS, int(end_s)))  # a second each, where that makes a curve
    edges = np.linspace(0, max(end_s, 1e-3), num_bins + 1)
    counts, _ = np.histogram(at_s, bins=edges, weights=weights)
    axes.stairs(counts / np.diff(edges), edges, label="output tokens/s")
    under_way = [sum(r.sent_s - origin_s <= t < r.ended_s - origin_s for r in results.records) for t in edges]
    right = axes.twinx()
    right.plot(edges, under_way, color="tab:orange", linewidth=1, label="requests under way")
    right.set(ylabel="requests under way")
    right.set_ylim(bottom=0)
    _shade(axes, results, origin_s)
    axes.set_title("throughput", loc="left")
    axes.set(xlabel="seconds since the start", ylabel="output tokens/s")
    axes.set_ylim(bottom=0)
    figure.legend(fontsize=7, loc="upper right", ncols=3)
    return _svg(figure, axes)


def lengths(results: Results) -> str:
    """Of prompts and answers, as the server counts them."""
    figure, axes = plt.subplots(figsize=_SIZE_IN)
    answered = [record for record in measured_records(results) if record.is_answered]
    series: Sequence[tuple[str, list[int]]] = (
        ("prompt", [record.prompt_tokens for record in answered if record.prompt_tokens is not None]),
        ("answer", [record.output_tokens for record in answered]),
    )
    for name, values in series:
        if values:
            axes.hist(values, bins=40, histtype="step", label=f"{name}: mean {np.mean(values):.0f}")
    axes.set(title="lengths", xlabel="tokens", ylabel="requests")
    if answered:
        axes.legend(fontsize=8)
    return _svg(figure, axes)


def _origin_s(results: Results) -> float:
    return min((record.sent_s for record in results.records), default=results.summary.started_s)


def _shade(axes: Axes, results: Results, origin_s: float) -> None:
    start_s = results.summary.started_s - origin_s
    axes.axvspan(start_s, start_s + results.summary.duration_s, color="tab:green", alpha=0.07, label="measured")


def _svg(figure: Figure, axes: Axes) -> str:
    axes.grid(alpha=0.3)
    figure.tight_layout()
    title = axes.get_title() or axes.get_title("left")
    with io.StringIO() as text:
        figure.savefig(text, format="svg", transparent=True)  # the page's own background, light or dark
        plt.close(figure)
        whole = text.getvalue()
    # Without the XML head, which has no place in a page.
    return whole[whole.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
