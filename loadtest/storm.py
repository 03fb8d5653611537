"""A storm: a thousand clients that leave at random moments, several times over; and what is left of them.

    python -m loadtest.storm --clients 1000 --rounds 4 max_queued_requests=256

Starts the service on this machine, on a Ray cluster of its own. Prints a summary as JSON; the exit code is 1 where a
client that stayed did not get its answer, or requests, blocks, tasks, files or memory are left over.
"""

import asyncio
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from loadtest.chaos_clients import make_bodies, undisturbed
from loadtest.cluster import CONTROLLER, PROXY, Cluster, is_replica
from loadtest.command import app_arguments, write_down
from loadtest.memory import MemoryWatch
from loadtest.storm_clients import StormClients, make_plans

APPLICATION = "storm"
START_S = 120.0
REPLICAS, RAYS_OWN = ("engine", "draft", "ingress"), (CONTROLLER, PROXY)
# What may be left: of Ray's own, of caches, and of memory in pieces too small to be given back.
MAX_TASKS, MAX_FILES, MAX_OBJECTS = 10, 10, 100
MAX_BYTES_PER_CLIENT, SPARE_BYTES = 1024, 8 * 2**20


@dataclass(frozen=True)
class StormOptions:
    """What a run does."""

    clients: int
    rounds: int  # the first one warms up
    spread_s: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Footprint:
    """Of one process when nobody asks for anything."""

    resident_bytes: int
    num_files: int
    num_tasks: int  # of asyncio
    num_objects: int  # of our classes


@dataclass
class StormSummary:
    """Of one run; `violations` is empty where it has passed."""

    options: StormOptions
    arguments: dict[str, str]
    load_average: float  # of the machine in the last 5 minutes
    outcomes: dict[str, int]
    errors: list[str]
    left_over: str
    wrong: int  # answers afterwards that were others before
    gone: list[str]  # processes that did not live through it
    footprints: dict[str, list[Footprint]]  # of each process after each round
    violations: list[str] = field(default_factory=list)


def run(options: StormOptions, app: str, arguments: dict[str, str]) -> StormSummary:
    """Starts the service, and lets the storms pass."""
    cluster = Cluster(APPLICATION)
    cluster.start(app, arguments)
    assert cluster.wait_until_whole({kind: cluster.expected(kind) for kind in REPLICAS}, START_S), "it did not come up"
    bodies = make_bodies(5, min(50, options.max_tokens), options.seed)
    before = asyncio.run(undisturbed(cluster.url, bodies))
    clients = StormClients(cluster.url)
    watch = MemoryWatch(cluster.all_processes(REPLICAS + RAYS_OWN))
    footprints: dict[str, list[Footprint]] = {}
    left_over, after = "", before
    for number in range(options.rounds):
        plans = make_plans(options.clients, options.spread_s, options.max_tokens, options.seed + number)
        asyncio.run(clients.run(plans))
        left_over = left_over or cluster.left_over()
        # Serve keeps the last batch of admissions until the next one: let it be a small one.
        after = asyncio.run(undisturbed(cluster.url, bodies))
        for name, footprint in _footprints(cluster, watch).items():
            footprints.setdefault(name, []).append(footprint)
    summary = StormSummary(
        options=options,
        arguments=arguments,
        load_average=os.getloadavg()[1],
        outcomes=dict(sorted(clients.by_outcome.items())),
        errors=clients.errors[:20],
        left_over=left_over,
        wrong=sum(one != other for one, other in zip(before, after, strict=True)),
        gone=sorted(watch.gone),
        footprints=footprints,
    )
    summary.violations = violations(summary)
    return summary


def _footprints(cluster: Cluster, watch: MemoryWatch) -> dict[str, Footprint]:
    objects: dict[str, int] = {}
    tasks: dict[str, int] = {}
    for kind in REPLICAS + RAYS_OWN:
        objects |= cluster.num_objects(kind)
        tasks |= cluster.num_tasks(kind)
    watch.sample()
    return {
        name: Footprint(watch.samples[name][-1][1], number, tasks.get(name, 0), objects.get(name, 0))
        for name, number in watch.num_fds().items()
    }


def violations(summary: StormSummary) -> list[str]:
    """What must not be, one line each. Ray's own processes are measured, and not ours to judge."""
    found = []
    if summary.errors:
        found.append(f"{len(summary.errors)} clients were failed, such as {summary.errors[0]}")
    if summary.left_over:
        found.append(f"left over: {summary.left_over}")
    if summary.wrong:
        found.append(f"{summary.wrong} answers differ from those before")
    if summary.gone:
        found.append(f"ended meanwhile: {', '.join(summary.gone)}")
    num_clients = summary.options.clients * (summary.options.rounds - 1)
    for name, rounds in summary.footprints.items():
        if not is_replica(name) or len(rounds) < 2:
            continue
        first, last = rounds[0], rounds[-1]
        for what, limit in (("num_tasks", MAX_TASKS), ("num_files", MAX_FILES), ("num_objects", MAX_OBJECTS)):
            was, now = getattr(first, what), getattr(last, what)
            if now - was > limit:
                found.append(f"{name} has {now} {what[4:]}, and had {was}")
        grown_bytes = last.resident_bytes - first.resident_bytes
        if grown_bytes > MAX_BYTES_PER_CLIENT * num_clients + SPARE_BYTES:
            found.append(f"{name} has grown by {grown_bytes / 2**20:.1f} MiB in {num_clients} clients")
    return found


def main(
    arguments: Annotated[list[str] | None, typer.Argument(help="of the application: name=value …")] = None,
    clients: Annotated[int, typer.Option(help="of each round")] = 1000,
    rounds: Annotated[int, typer.Option(help="of which the first warms up")] = 4,
    spread: Annotated[float, typer.Option(help="seconds within which the clients of a round come")] = 10.0,
    max_tokens: Annotated[int, typer.Option(help="of the longest answers")] = 60,
    seed: Annotated[int, typer.Option(help="of the clients")] = 0,
    app: Annotated[str, typer.Option(help="module:builder, as for serve run")] = "serve_app:app",
    output: Annotated[Path | None, typer.Option(help="a file for the summary")] = None,
) -> None:
    """Let clients come and leave at random, and look at what is left."""
    given = app_arguments(arguments)
    summary = run(StormOptions(clients, rounds, spread, max_tokens, seed), app, given)
    write_down(summary, output)
    sys.exit(1 if summary.violations else 0)


if __name__ == "__main__":
    typer.run(main)
