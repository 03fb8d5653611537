"""A soak: more than the service can do, for long, and a look at its memory.

    python -m loadtest.soak --minutes 30 --output soak.json --plot soak.png max_num_seqs=16 max_queued_requests=64

Starts the service on this machine, on a Ray cluster of its own. Prints a summary as JSON; the exit code is 1 where the
memory of a replica grows, an answer is wrong, a request fails that should not, or something is left over.
"""

import asyncio
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from loadtest.chaos_clients import make_bodies, undisturbed
from loadtest.cluster import CONTROLLER, PROXY, Cluster, ServiceMetrics, is_replica
from loadtest.command import app_arguments, write_down
from loadtest.memory import MemoryWatch, Sample, Trend
from loadtest.plot import plot_memory
from loadtest.traffic import Traffic, TrafficCounts

APPLICATION = "soak"
START_S = 120.0
SETTLE_S = 240.0  # for the last answers
SAMPLE_S = 5.0
NUM_KNOWN = 10
REPLICAS, RAYS_OWN = ("engine", "draft", "ingress"), (CONTROLLER, PROXY)


@dataclass(frozen=True)
class SoakOptions:
    """What a run does. Memory counts from the end of the warm-up on."""

    duration_s: float
    warm_up_s: float
    clients: int
    max_tokens: int
    seed: int


@dataclass
class SoakSummary:
    """Of one run; `violations` is empty where it has passed."""

    options: SoakOptions
    arguments: dict[str, str]
    num_cores: int
    load_average: float  # of the machine in the last 15 minutes
    requests: dict[str, int]  # by what became of them
    generated_tokens: float
    wrong: int
    errors: list[str]
    left_over: str
    gone: list[str]  # processes that did not live through it
    open_files: dict[str, tuple[int, int]]  # after the warm-up, and at the end when nobody asked for anything
    memory: dict[str, Trend]
    violations: list[str] = field(default_factory=list)


def run(
    options: SoakOptions, app: str, arguments: dict[str, str], progress: Progress
) -> tuple[SoakSummary, dict[str, list[Sample]]]:
    """Starts the service and loads it. With the summary come the memory samples of each process."""
    cluster = Cluster(APPLICATION)
    cluster.start(app, arguments)
    counts = {kind: cluster.expected(kind) for kind in REPLICAS}
    assert cluster.wait_until_whole(counts, START_S), "the service did not come up"
    bodies = make_bodies(NUM_KNOWN, min(60, options.max_tokens), options.seed)
    answers = asyncio.run(undisturbed(cluster.url, bodies))
    traffic = Traffic(cluster.url, list(zip(bodies, answers, strict=True)), options.seed, max_tokens=options.max_tokens)
    watch = MemoryWatch(cluster.all_processes(REPLICAS + RAYS_OWN))
    metrics = ServiceMetrics()
    files_before = asyncio.run(_load(options, traffic, watch, metrics, progress))
    left_over = cluster.left_over()
    files_after = watch.num_fds()
    summary = SoakSummary(
        options=options,
        arguments=arguments,
        num_cores=os.cpu_count() or 0,
        load_average=os.getloadavg()[2],
        requests=dict(sorted(traffic.counts.by_outcome.items())),
        generated_tokens=metrics.total("generation_tokens_total"),
        wrong=traffic.counts.wrong,
        errors=traffic.counts.errors,
        left_over=left_over,
        gone=sorted(watch.gone),
        open_files={name: (files_before.get(name, 0), number) for name, number in files_after.items()},
        memory=watch.trends(options.warm_up_s),
    )
    summary.violations = violations(summary)
    return summary, watch.samples


async def _load(
    options: SoakOptions, traffic: Traffic, watch: MemoryWatch, metrics: ServiceMetrics, progress: Progress
) -> dict[str, int]:
    """Returns the numbers of open files when the warm-up was over."""
    task = progress.add_task("soak", total=options.duration_s, state="")
    running = asyncio.create_task(traffic.run(options.clients))
    started_s = time.monotonic()
    files: dict[str, int] = {}
    while (elapsed_s := time.monotonic() - started_s) < options.duration_s and not running.done():
        await asyncio.sleep(SAMPLE_S)
        await asyncio.to_thread(watch.sample)
        await asyncio.to_thread(metrics.read)
        if not files and elapsed_s >= options.warm_up_s:
            files = watch.num_fds()
        progress.update(task, completed=elapsed_s, state=_state(traffic.counts, watch))
    traffic.stopping = True
    await asyncio.wait_for(running, SETTLE_S)
    return files


def _state(counts: TrafficCounts, watch: MemoryWatch) -> str:
    total_bytes = sum(samples[-1][1] for samples in watch.samples.values() if samples)
    return f"{counts.by_outcome.total()} requests, {total_bytes >> 20} MiB, {len(counts.errors)} errors"


def violations(summary: SoakSummary) -> list[str]:
    """What must not be, one line each. Ray's own processes are measured, and not ours to judge."""
    found = []
    if not summary.requests.get("turned away"):
        found.append("nobody was turned away: the service was not saturated")
    if summary.wrong:
        found.append(f"{summary.wrong} wrong answers")
    if summary.errors:
        found.append(f"{summary.requests.get('failed', 0)} requests failed, such as with {summary.errors[0]}")
    if summary.left_over:
        found.append(f"left over: {summary.left_over}")
    if summary.gone:
        found.append(f"ended meanwhile: {', '.join(summary.gone)}")
    ours = {name: each for name, each in summary.memory.items() if is_replica(name)}
    if not ours:
        found.append("too short a time to say anything about memory")
    found += [f"{name} grows: {each}" for name, each in ours.items() if not each.is_flat]
    return found


def main(
    arguments: Annotated[list[str] | None, typer.Argument(help="of the application: name=value …")] = None,
    minutes: Annotated[float, typer.Option(help="of load")] = 30.0,
    warm_up: Annotated[float, typer.Option(help="minutes of these, at the beginning, that do not count")] = 5.0,
    clients: Annotated[int, typer.Option(help="at once; more than the service takes")] = 150,
    max_tokens: Annotated[int, typer.Option(help="of the longest answers")] = 200,
    seed: Annotated[int, typer.Option(help="of the requests")] = 0,
    app: Annotated[str, typer.Option(help="module:builder, as for serve run")] = "serve_app:app",
    output: Annotated[Path | None, typer.Option(help="a file for the summary")] = None,
    plot: Annotated[Path | None, typer.Option(help="a file for a plot of memory over time: .png, .svg")] = None,
) -> None:
    """Ask a service for more than it can do, and watch its memory."""
    given = {"max_num_seqs": "16", "max_waiting_requests": "32", "max_queued_requests": "32"}
    given |= app_arguments(arguments)
    options = SoakOptions(60 * minutes, 60 * warm_up, clients, max_tokens, seed)
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns) as progress:
        summary, samples = run(options, app, given, progress)
    write_down(summary, output)
    if plot is not None:
        plot_memory(samples, options.warm_up_s, plot)
    sys.exit(1 if summary.violations else 0)


if __name__ == "__main__":
    typer.run(main)
