"""A chaos run: streams whose answers are known, while processes of the service are killed and stopped at random.

    python -m loadtest.chaos --duration 300 --streams 4 engine_replicas=2 ingress_replicas=2

Starts the service on this machine, on a Ray cluster of its own. Prints a summary as JSON; the exit code is 1 where a
client has seen anything but the right answer that it should not have seen.
"""

import asyncio
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from loadtest.chaos_clients import Broken, Clients, make_bodies, undisturbed
from loadtest.chaos_faults import KILL, STOP, Fault, Faults
from loadtest.cluster import CONTROLLER, Cluster, ServiceMetrics
from loadtest.command import app_arguments, write_down
from loadtest.memory import MemoryWatch, Trend

APPLICATION = "chaos"
EXCUSED_S = 20.0  # a connection may break so long after a fault of the ingress: it may have been stopped meanwhile
UNEXCUSED = "no fault of its ingress"
SETTLE_S = 120.0  # for the last answers, and for the replicas that are on their way back
SAMPLE_S = 2.0


@dataclass(frozen=True)
class ChaosOptions:
    """What a run does, and what it takes to pass."""

    duration_s: float = 60.0
    streams: int = 4
    max_tokens: int = 200
    bodies: int = 10
    kinds: tuple[str, ...] = ("engine", "ingress", CONTROLLER)
    actions: tuple[str, ...] = (KILL, STOP)
    pause_s: float = 3.0  # between faults, in the mean
    seed: int = 0
    min_faults: int = 1  # of each kind, of each action
    min_resumed: int = 1
    recovery_limit_s: float = 10.0
    calm_s: float = 0.0  # after the faults: what has lived through them goes on, and its memory is looked at
    warm_up_s: float = 120.0  # of that time; most of the processes are new


@dataclass
class Summary:
    """Of one run; `violations` is empty where it has passed."""

    duration_s: float
    completed: int
    wrong: list[str]
    hung: int
    error_events: list[str]
    broken: dict[str, int]  # connections, by the fault that was the cause
    healed: int
    unhealed: int
    faults: dict[str, int]
    resumed: dict[str, float]  # by reason
    stale_frames: float
    recovery_p50_s: float | None
    recovery_p99_s: float | None
    longest_pause_s: float
    load_average: float  # of the machine in the last 5 minutes
    left_over: str  # requests and blocks that are still held, and what is wrong with the books
    memory: dict[str, Trend]  # of each process, in the calm
    violations: list[str] = field(default_factory=list)


def run(options: ChaosOptions, app: str, arguments: dict[str, str]) -> Summary:
    """Starts the service, disturbs it, and says how it went."""
    cluster = Cluster(APPLICATION)
    cluster.start(app, arguments)
    counts = {kind: cluster.expected(kind) for kind in options.kinds}
    missing = [kind for kind, number in counts.items() if not number]
    if missing:
        raise SystemExit(f"chaos: the service has no {missing[0]}")
    assert cluster.wait_until_whole(counts, SETTLE_S), "the service did not come up"
    bodies = make_bodies(options.bodies, options.max_tokens, options.seed)
    answers = asyncio.run(undisturbed(cluster.url, bodies))
    clients = Clients(cluster.url, bodies, answers, options.seed)
    faults = Faults(cluster, counts, options.actions, options.pause_s, options.seed)
    metrics = ServiceMetrics()
    started_s = time.monotonic()
    is_whole, memory = asyncio.run(_disturb(options, counts, clients, faults, metrics))
    metrics.read()
    outcomes = clients.outcomes
    summary = Summary(
        duration_s=time.monotonic() - started_s,
        completed=outcomes.completed,
        wrong=outcomes.wrong,
        hung=outcomes.hung,
        error_events=outcomes.error_events,
        broken=dict(sorted(causes(outcomes.broken, faults.done).items())),
        healed=outcomes.healed,
        unhealed=outcomes.unhealed,
        faults=dict(sorted(faults.counts.items())),
        resumed=metrics.by("resumed_streams_total", "reason"),
        stale_frames=metrics.total("stale_frames_total"),
        recovery_p50_s=metrics.quantile("recovery_time_seconds", 0.5),
        recovery_p99_s=metrics.quantile("recovery_time_seconds", 0.99),
        longest_pause_s=max(outcomes.longest_pauses_s, default=0.0),
        load_average=os.getloadavg()[1],
        left_over=cluster.left_over() if is_whole else "the service is not whole again",
        memory=memory,
    )
    summary.violations = violations(summary, options)
    return summary


async def _disturb(
    options: ChaosOptions, counts: dict[str, int], clients: Clients, faults: Faults, metrics: ServiceMetrics
) -> tuple[bool, dict[str, Trend]]:
    """Whether the service is whole again when the faults are over; and how its memory then does."""
    striking = threading.Thread(target=faults.run, name="faults", daemon=True)
    running = asyncio.create_task(clients.run(options.streams))
    striking.start()
    await _sample(options.duration_s, running, metrics.read)
    late_s = time.monotonic() + options.duration_s  # a busy machine may take twice as long over its faults
    while _lacking(options, faults.counts) and time.monotonic() < late_s and not running.done():
        await _sample(SAMPLE_S, running, metrics.read)
    faults.stop()
    await asyncio.to_thread(striking.join)
    await asyncio.to_thread(faults.wake_all)
    is_whole = await asyncio.to_thread(faults.cluster.wait_until_whole, counts, SETTLE_S)
    watch = MemoryWatch(await asyncio.to_thread(faults.cluster.all_processes, options.kinds))
    await _sample(options.calm_s, running, watch.sample)
    clients.stopping = True
    await asyncio.wait_for(running, SETTLE_S)
    return is_whole and not watch.gone, watch.trends(options.warm_up_s)


async def _sample(duration_s: float, running: asyncio.Task[None], look: Callable[[], None]) -> None:
    deadline_s = time.monotonic() + duration_s
    while time.monotonic() < deadline_s and not running.done():
        await asyncio.sleep(SAMPLE_S)
        await asyncio.to_thread(look)


def _lacking(options: ChaosOptions, done: Mapping[str, int]) -> dict[str, int]:
    """Faults that are too few, and how many there were."""
    every = [f"{kind} {action}" for kind in options.kinds for action in options.actions]
    return {name: done.get(name, 0) for name in every if done.get(name, 0) < options.min_faults}


def causes(broken: Sequence[Broken], faults: Sequence[Fault]) -> Counter[str]:
    """Connections that broke, by the latest fault before of the ingress at their other end; of any ingress where that
    is not known."""
    found: Counter[str] = Counter()
    for each in broken:
        near = [
            fault.name
            for fault in faults
            if fault.kind == "ingress"
            and 0 <= each.at_s - fault.at_s < EXCUSED_S
            and (each.ingress is None or fault.actor.endswith(f"#{each.ingress}"))
        ]
        found[near[-1] if near else UNEXCUSED] += 1
    return found


def violations(summary: Summary, options: ChaosOptions) -> list[str]:
    """What must not be, one line each."""
    found = []
    if summary.wrong:
        found.append(f"{len(summary.wrong)} wrong answers, such as {summary.wrong[0]}")
    if summary.hung or summary.unhealed:
        found.append(f"{summary.hung} hung requests, {summary.unhealed} that no retry healed")
    if summary.error_events:
        found.append(f"{len(summary.error_events)} errors, such as {summary.error_events[0]}")
    if unexcused := summary.broken.get(UNEXCUSED, 0):
        found.append(f"{unexcused} broken connections without a fault of their ingress")
    for name, done in _lacking(options, summary.faults).items():
        found.append(f"only {done} of {options.min_faults}: {name}")
    if (resumed := sum(summary.resumed.values())) < options.min_resumed:
        found.append(f"only {resumed:g} streams were resumed")
    if summary.recovery_p99_s is not None and summary.recovery_p99_s > options.recovery_limit_s:
        found.append(f"99 % have recovered within {summary.recovery_p99_s:g} s")
    if summary.left_over:
        found.append(f"left over: {summary.left_over}")
    if options.calm_s and not summary.memory:
        found.append("too short a calm to say anything about memory")
    found += [f"{name} grows: {each}" for name, each in summary.memory.items() if each.surely_grows]
    return found


def main(
    arguments: Annotated[list[str] | None, typer.Argument(help="of the application: name=value …")] = None,
    duration: Annotated[float, typer.Option(help="seconds of faults")] = 60.0,
    streams: Annotated[int, typer.Option(help="clients at once")] = 4,
    max_tokens: Annotated[int, typer.Option(help="of each answer")] = 200,
    kinds: Annotated[
        str, typer.Option(help="what is hit: engine, draft, ingress, controller")
    ] = "engine,ingress,controller",
    actions: Annotated[str, typer.Option(help="kill, stop")] = "kill,stop",
    pause: Annotated[float, typer.Option(help="seconds between faults, in the mean")] = 3.0,
    seed: Annotated[int, typer.Option(help="of requests and faults")] = 0,
    min_faults: Annotated[int, typer.Option(help="of each kind and action, to pass")] = 1,
    min_resumed: Annotated[int, typer.Option(help="streams, to pass")] = 1,
    recovery_limit: Annotated[float, typer.Option(help="seconds: the 99th percentile, to pass")] = 10.0,
    calm: Annotated[float, typer.Option(help="seconds after the faults in which memory is looked at")] = 0.0,
    app: Annotated[str, typer.Option(help="module:builder, as for serve run")] = "serve_app:app",
    output: Annotated[Path | None, typer.Option(help="a file for the summary")] = None,
) -> None:
    """Disturb the service for a while, and compare every answer with the undisturbed one."""
    given = app_arguments(arguments)
    if 0 < calm <= ChaosOptions.warm_up_s:
        raise typer.BadParameter(
            f"--calm: memory settles in its first {ChaosOptions.warm_up_s:g} s; give more, or none"
        )
    options = ChaosOptions(
        duration_s=duration,
        streams=streams,
        max_tokens=max_tokens,
        kinds=tuple(kinds.split(",")),
        actions=tuple(actions.split(",")),
        pause_s=pause,
        seed=seed,
        min_faults=min_faults,
        min_resumed=min_resumed,
        recovery_limit_s=recovery_limit,
        calm_s=calm,
    )
    summary = run(options, app, {"engine_replicas": "2", "ingress_replicas": "2"} | given)
    write_down(summary, output)
    sys.exit(1 if summary.violations else 0)


if __name__ == "__main__":
    typer.run(main)
