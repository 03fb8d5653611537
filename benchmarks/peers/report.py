"""What came of it: rows for the JSON file, a table in Markdown."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.peers.agreement import Agreement
from benchmarks.peers.quiet import QUIET_PERCENT
from benchmarks.peers.rounds import Outcome
from benchmarks.peers.workload import Sample

FIGURES = ("output_tokens_per_s", "ttft_p50_s", "tpot_p50_s", "itl_p99_s")
SPEED_HEADS = (
    *("peer", "numbers", "streams", "output tokens/s (rounds)"),
    *("TTFT p50 ms", "TPOT p50 ms", "ITL p99 ms", "tokens an answer"),
)
PEER_HEADS = ("peer", "numbers", "version", "ready after s", "first answers as")
Row = dict[str, Any]


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """One for each subject and level: of each figure the median over the rounds, and all rounds beside it."""
    return [
        {
            "peer": outcome.subject.peer.name,
            "format": outcome.number_format,
            "requests_at_once": streams,
            **{name: median(_all(samples, name)) for name in FIGURES},
            "repeats": {name: _all(samples, name) for name in (*FIGURES, "tokens_per_answer", "prompt_tokens")}
            | {"others_percent": outcome.others_percent[streams]}
            | {"tokens_counted_by": "server" if all(sample.is_usage for sample in samples) else "chunks"},
        }
        for outcome in outcomes
        for streams, samples in outcome.samples.items()
    ]


def peer_rows(outcomes: Sequence[Outcome], agreements: Mapping[str, Agreement]) -> list[Row]:
    """What each subject is, without figures that a comparison of runs would know."""
    rows = []
    for outcome in outcomes:
        row: Row = {"subject": outcome.title, "versions": outcome.versions}
        row |= {name: text for name in ("skipped", "failed") if (text := getattr(outcome, name))}
        if outcome.start_s:
            row["starts"] = outcome.start_s
        if outcome.answers is not None:
            row |= {"answers": list(outcome.answers.texts), "prompt_tokens": list(outcome.answers.prompt_tokens)}
        if (agreement := agreements.get(outcome.title)) is not None:
            row["agreement"] = {
                "with": agreement.title,
                "equal_answers": agreement.num_equal,
                "answers": agreement.num_answers,
                "mean_equal_tokens": agreement.mean_tokens,
                "mean_tokens": agreement.mean_of,
            }
        rows.append(row)
    return rows


def markdown(outcomes: Sequence[Outcome], agreements: Mapping[str, Agreement]) -> str:
    """Speeds, then what each peer is, then who is missing."""
    lines = [
        _cells(SPEED_HEADS),
        _cells(["---"] * len(SPEED_HEADS)),
    ]
    levels = sorted({streams for outcome in outcomes for streams in outcome.samples})
    for streams in levels:
        for outcome in outcomes:
            if samples := outcome.samples.get(streams):
                lines.append(_cells(_speed_cells(outcome, streams, samples)))
    lines += ["", _cells(PEER_HEADS), _cells(["---"] * len(PEER_HEADS))]
    for outcome in outcomes:
        if outcome.start_s:
            agreement = agreements.get(outcome.title)
            alike = "" if agreement is None else f"{agreement.title}: {agreement}"
            start = f"{median(outcome.start_s):.1f}"
            name = outcome.subject.peer.name
            lines.append(_cells([name, outcome.number_format, outcome.versions, start, alike]))
    lines += ["", *(f"skipped: {o.subject.peer.name}: {o.skipped}" for o in outcomes if o.skipped)]
    lines += [f"failed: {outcome.title}: {outcome.failed}" for outcome in outcomes if outcome.failed]
    return "\n".join(lines).rstrip()


def doubts(outcomes: Sequence[Outcome]) -> list[str]:
    """What keeps the figures from being comparable, one line each."""
    found = []
    disturbed = [
        f"{outcome.title} at {streams} streams ({', '.join(f'{percent:.0f}' for percent in percents)} %)"
        for outcome in outcomes
        for streams, percents in outcome.others_percent.items()
        if median(percents) > QUIET_PERCENT
    ]
    if disturbed:
        found.append(f"others used the machine meanwhile, in most rounds: {'; '.join(disturbed)}")
    known = {outcome.title: outcome.answers.prompt_tokens for outcome in outcomes if outcome.answers is not None}
    if len(set(known.values())) > 1:
        counts = "; ".join(f"{title}: {', '.join(map(str, tokens))}" for title, tokens in known.items())
        found.append(f"the same questions were not as many tokens for all: {counts}")
    lengths = {
        outcome.title: fmean(sample.tokens_per_answer for samples in outcome.samples.values() for sample in samples)
        for outcome in outcomes
        if outcome.samples
    }
    longest = max(lengths.values(), default=0.0)
    if short := [f"{title} {length:.0f}" for title, length in lengths.items() if length < 0.99 * longest]:
        found.append(f"answers were shorter than {longest:.0f} tokens, so their start counts more: {', '.join(short)}")
    return found


def _speed_cells(outcome: Outcome, streams: int, samples: Sequence[Sample]) -> list[str]:
    speeds = _all(samples, "output_tokens_per_s")
    times = [f"{median(_all(samples, name)) * 1000:.0f}" for name in ("ttft_p50_s", "tpot_p50_s", "itl_p99_s")]
    times[1] = f"{median(_all(samples, 'tpot_p50_s')) * 1000:.1f}"
    spread = f"{median(speeds):.1f} ({min(speeds):.1f}–{max(speeds):.1f})"
    counted = "" if all(sample.is_usage for sample in samples) else " (chunks)"
    tokens = f"{fmean(_all(samples, 'tokens_per_answer')):.0f}{counted}"
    return [outcome.subject.peer.name, outcome.number_format, str(streams), spread, *times, tokens]


def _all(samples: Sequence[Sample], name: str) -> list[Any]:
    return [getattr(sample, name) for sample in samples]


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
