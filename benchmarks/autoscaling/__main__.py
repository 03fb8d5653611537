"""`python -m benchmarks.autoscaling`: queue time, goodput and GPU-hours of autoscaling policies, simulated."""

import json
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.autoscaling.cluster import Objective
from benchmarks.autoscaling.comparison import Comparison, Result, Setting, as_json, table_of
from benchmarks.autoscaling.plot import plot
from benchmarks.autoscaling.service import CURVES, CurveName, Fleet, Workload
from benchmarks.autoscaling.traces import TraceName

MAX_REPLICAS = 1000
POLICIES, NUMBERS = 4, 28  # runs for each trace, for the bar

errors = Console(stderr=True)


cli = typer.Typer(add_completion=False)


@cli.command()
def main(
    traces: Annotated[list[TraceName] | None, typer.Option("--trace", help="May be repeated; all if left out.")] = None,
    curve: Annotated[CurveName, typer.Option(help="What a replica does.")] = CurveName.TINYLLAMA_H100,
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Tokens of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option("--output", min=1, help="Tokens of an answer, in the mean.")] = 256,
    max_replicas: Annotated[int, typer.Option(min=1, max=MAX_REPLICAS)] = 32,
    nodes: Annotated[int, typer.Option(min=0, help="Nodes that need not join first, one replica each.")] = 8,
    start_s: Annotated[float, typer.Option(min=0, help="Of a replica, where there is a node.")] = 8.0,
    join_s: Annotated[float, typer.Option(min=0, help="Of a node.")] = 120.0,
    load: Annotated[float, typer.Option(min=0.01, help="Highest rate, in parts of what all replicas can do.")] = 0.8,
    queue_time_s: Annotated[float, typer.Option(min=0, help="A good request waits no longer.")] = 1.0,
    token_time_s: Annotated[float, typer.Option(min=0, help="Its tokens come no further apart.")] = 0.05,
    target_queue_depth: Annotated[float | None, typer.Option(min=1, help="The service's default if left out.")] = None,
    seed: int = 0,
    numbers: Annotated[bool, typer.Option(help="Compare settings of our policy, not policies.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw the replicas here (.svg, .png).")] = None,
) -> None:
    """Simulate arrivals against measured service curves and start-up times."""
    warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
    setting = Setting(
        CURVES[curve],
        Workload(input_tokens, output_tokens),
        Fleet(nodes, start_s, join_s),
        max_replicas,
        load,
        Objective(queue_time_s, token_time_s),
        target_queue_depth or CURVES[curve].target_queue_depth,
        seed,
    )
    results = _run(Comparison(setting), traces or list(TraceName), numbers)
    title = f"{setting.curve.name}, {input_tokens} tokens in, {output_tokens} out, at most {max_replicas} replicas"
    Console(width=None if Console().is_terminal else 150).print(table_of(results, title))
    if json_path is not None:
        json_path.write_text(json.dumps(as_json(setting, results), indent=1) + "\n")
    if plot_path is not None:
        plot(results, plot_path)


def _run(comparison: Comparison, names: list[TraceName], numbers: bool) -> list[Result]:
    results: list[Result] = []
    with Progress(console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task("simulating", total=len(names) * (NUMBERS if numbers else POLICIES))
        for name in names:
            trace = comparison.trace(name)
            runs = comparison.with_other_numbers(trace) if numbers else comparison.against_others(trace)
            for result in runs:
                results.append(result)
                bar.advance(task)
            if numbers:
                results.append(comparison.oracle(trace))
                bar.advance(task)
    return results


if __name__ == "__main__":
    cli()
