"""Two runs or more on one page: values, ratios to the first, and whether a difference is more than noise.

python -m loadtest.compare before.json after.json --output comparison.html
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from markupsafe import Markup

from loadtest.estimates import Estimate, Ratio, ratio
from loadtest.report import render
from loadtest.report_plots import distributions
from loadtest.results import Results, read_results, with_confidence
from loadtest.summary import LATENCIES, RATES

_STATISTICS = ("mean", "p50", "p95", "p99")
_SAME = ("workload", "seed", "endpoint", "model", "limits", "extra_body", "arrivals", "rate", "users", "think_time_s")
_OTHERS = ("concurrency.mean", "error_share", "prompt_tokens.mean", "output_tokens.mean")


@dataclass(frozen=True)
class Cell:
    """One value of one run. `verdict`: empty for the first run."""

    text: str
    ratio: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Row:
    name: str
    cells: list[Cell]


def compare(runs: Mapping[str, Results]) -> list[Row]:
    """A row for each value that a run has."""
    names = [f"{latency}.{statistic}" for latency in LATENCIES for statistic in _STATISTICS]
    rows = []
    for name in (*names, *RATES, *_OTHERS):
        estimates = [results.summary.values.get(name) for results in runs.values()]
        if any(estimate is not None for estimate in estimates):
            rows.append(Row(name, [_cell(name, estimate, estimates[0]) for estimate in estimates]))
    return rows


def differences(runs: Mapping[str, Results]) -> list[str]:
    """Settings that should be the same in a comparison, and are not."""
    found = []
    for name in _SAME:
        values = [results.settings.get(name) for results in runs.values()]
        if any(value != values[0] for value in values):
            found.append(f"{name}: " + ", ".join(f"{value} ({run})" for run, value in zip(runs, values, strict=True)))
    return found


def to_page(runs: Mapping[str, Results]) -> str:
    plots = [distributions(runs, latency) for latency in ("ttft_s", "itl_s", "e2e_latency_s")]
    return render(
        "comparison.html",
        runs=list(runs),
        rows=compare(runs),
        differences=differences(runs),
        plots=[Markup(plot) for plot in plots],
    )


def _cell(name: str, estimate: Estimate | None, base: Estimate | None) -> Cell:
    text = with_confidence(estimate)
    if estimate is base or estimate is None or base is None or (found := ratio(estimate, base)) is None:
        return Cell(text)
    interval = "" if found.low is None else f" ({found.low:.3g} to {found.high:.3g})"
    return Cell(text, f"×{found.value:.3g}{interval}", _verdict(name, found))


def _verdict(name: str, found: Ratio) -> str:
    if found.is_within_noise is None:
        return "noise unknown"
    if found.is_within_noise:
        return "within noise"
    if name.endswith("tokens.mean") or name == "concurrency.mean":
        return "differs"
    return "better" if (found.value > 1) == (name in RATES) else "worse"


def main(
    files: Annotated[list[Path], typer.Argument(help="JSON files of runs; the first is what others are compared to")],
    output: Annotated[Path, typer.Option(help="the HTML file to write")] = Path("comparison.html"),
) -> None:
    """Write a page, and print its table."""
    if len(files) < 2:
        raise typer.BadParameter("two files at least")
    try:
        found = [read_results(file) for file in files]
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    # Files of one name in different folders are told apart by the number.
    runs = {
        f"{number}: {file.stem}": results for number, (file, results) in enumerate(zip(files, found, strict=True), 1)
    }
    for row in compare(runs):
        cells = (f"{cell.text:<22}{cell.ratio:<26}{cell.verdict:<14}".rstrip() for cell in row.cells)
        print(f"{row.name:<22}" + "| ".join(cells))
    for difference in differences(runs):
        print(f"not the same: {difference}")
    output.write_text(to_page(runs), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
