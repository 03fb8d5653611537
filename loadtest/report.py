"""A run's page: one file, with its plots, for any browser and without a network.

python -m loadtest.report run.json run.html
"""

from pathlib import Path
from typing import Annotated

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from loadtest.report_plots import distributions, latency_over_time, lengths, measured_records, throughput_over_time
from loadtest.results import Results, read_results, table_rows, with_confidence
from loadtest.summary import RATES, samples_of

_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "pages"), autoescape=True, undefined=StrictUndefined
)


def render(page: str, **values: object) -> str:
    """One of the files in pages/."""
    return _PAGES.get_template(page).render(**values)


def to_html(results: Results) -> str:
    heads, rows = table_rows(results.summary)
    names = (*RATES, "concurrency.mean", "error_share", "prompt_tokens.mean", "output_tokens.mean")
    plots = [
        distributions({"": results}, "ttft_s"),
        distributions({"": results}, "itl_s"),
        latency_over_time(results),
        throughput_over_time(results),
        lengths(results),
    ]
    return render(
        "report.html",
        results=results,
        heads=heads,
        rows=rows,
        rates=[(name, with_confidence(results.summary.values.get(name))) for name in names],
        workloads=_by_workload(results),
        plots=[Markup(plot) for plot in plots],
    )


def write_report(results: Results, prefix: str) -> None:
    """`prefix`.json and `prefix`.html; makes their folder."""
    folder = Path(prefix).parent
    folder.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.json").write_bytes(results.to_json())
    Path(f"{prefix}.html").write_text(to_html(results), encoding="utf-8")


def _by_workload(results: Results) -> list[tuple[str, int, str, str]]:
    """Name, answers, and the medians of ttft_s and tpot_s."""
    measured = measured_records(results)
    found = []
    for name in sorted({record.workload for record in measured}):
        samples = samples_of([record for record in measured if record.workload == name])
        medians = [
            f"{float(sorted(samples[latency])[len(samples[latency]) // 2]):.4g}" if samples[latency].size else "–"
            for latency in ("ttft_s", "tpot_s")
        ]
        found.append((name, int(samples["ttft_s"].size), medians[0], medians[1]))
    return found


def main(
    results: Annotated[Path, typer.Argument(help="a run's JSON file")],
    page: Annotated[Path, typer.Argument(help="the HTML file to write")],
) -> None:
    """Write the page of a run again."""
    try:
        page.write_text(to_html(read_results(results)), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    typer.run(main)
