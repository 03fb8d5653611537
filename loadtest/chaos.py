"""A chaos run: streams whose answers are known, while processes of the service are killed and stopped at random.

    python -m loadtest.chaos --duration 300 --streams 4 engine_replicas=2 ingress_replicas=2

Starts the service on this machine, on a Ray cluster of its own. Prints a summary as JSON; the exit code is 1 where a
client has seen anything but the right answer that it should not have seen.
"""

import asyncio
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from loadtest.chaos_clients import Answer, Clients, ask, make_bodies
from loadtest.chaos_cluster import CONTROLLER, Cluster, ServiceMetrics
from loadtest.chaos_faults import KILL, STOP, Faults

APPLICATION = "chaos"
EXCUSED_S = 20.0  # a connection may break so long after a fault of the ingress: it may have been stopped meanwhile
SETTLE_S = 120.0  # for the last answers, and for the replicas that are on their way back
SAMPLE_S = 2.0
WARM_UP_S = 60.0  # memory is not looked at before that
MEMORY_LIMIT_BYTES_PER_S = 2**20 / 60


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


@dataclass
class Summary:
    """Of one run; `violations` is empty where it has passed."""

    duration_s: float
    completed: int
    wrong: list[str]
    hung: int
    error_events: list[str]
    broken: int
    unexcused: int  # of those: no fault of an ingress was near
    healed: int
    unhealed: int
    faults: dict[str, int]
    resumed: dict[str, float]  # by reason
    stale_frames: float
    recovery_p50_s: float | None
    recovery_p99_s: float | None
    longest_pause_s: float
    left_over: str  # requests and blocks that the engines still hold
    memory_slopes_bytes_per_s: dict[str, float]
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
    answers = asyncio.run(_undisturbed(cluster.url, bodies))
    clients = Clients(cluster.url, bodies, answers, options.seed)
    faults = Faults(cluster, counts, options.actions, options.pause_s, options.seed)
    metrics, memory = ServiceMetrics(), _Memory(cluster, options.kinds)
    started_s = time.monotonic()
    asyncio.run(_disturb(options, clients, faults, metrics, memory))
    is_whole = cluster.wait_until_whole(counts, SETTLE_S)
    metrics.read()
    outcomes = clients.outcomes
    summary = Summary(
        duration_s=time.monotonic() - started_s,
        completed=outcomes.completed,
        wrong=outcomes.wrong,
        hung=outcomes.hung,
        error_events=outcomes.error_events,
        broken=len(outcomes.broken_s),
        unexcused=sum(not _is_excused(at_s, faults.log.at_s) for at_s in outcomes.broken_s),
        healed=outcomes.healed,
        unhealed=outcomes.unhealed,
        faults=dict(sorted(faults.log.counts.items())),
        resumed=metrics.by("resumed_streams_total", "reason"),
        stale_frames=metrics.total("stale_frames_total"),
        recovery_p50_s=metrics.quantile("recovery_time_seconds", 0.5),
        recovery_p99_s=metrics.quantile("recovery_time_seconds", 0.99),
        longest_pause_s=max(outcomes.longest_pauses_s, default=0.0),
        left_over=_left_over(cluster) if is_whole else "the service is not whole again",
        memory_slopes_bytes_per_s=memory.slopes(),
    )
    summary.violations = violations(summary, options)
    return summary


async def _undisturbed(url: str, bodies: list[dict[str, Any]]) -> list[Answer]:
    async with httpx.AsyncClient(timeout=120) as client:
        return [(await ask(client, url, body))[0] for body in bodies]


async def _disturb(
    options: ChaosOptions, clients: Clients, faults: Faults, metrics: ServiceMetrics, memory: "_Memory"
) -> None:
    striking = threading.Thread(target=faults.run, name="faults", daemon=True)
    running = asyncio.create_task(clients.run(options.streams))
    striking.start()
    deadline_s = time.monotonic() + options.duration_s
    while time.monotonic() < deadline_s and not running.done():
        await asyncio.sleep(SAMPLE_S)
        await asyncio.to_thread(metrics.read)
        await asyncio.to_thread(memory.sample)
    faults.stop()
    await asyncio.to_thread(striking.join)
    await asyncio.to_thread(faults.wake_all)
    clients.stopping = True
    await asyncio.wait_for(running, SETTLE_S)


def _is_excused(broken_s: float, faults: list[tuple[str, float]]) -> bool:
    return any(name.startswith("ingress") and 0 <= broken_s - at_s < EXCUSED_S for name, at_s in faults)


def _left_over(cluster: Cluster) -> str:
    deadline_s = time.monotonic() + 40.0  # an engine whose ingress was killed notices after 30 s
    while True:
        states = cluster.engine_states()
        if not any(state.num_requests or state.num_blocks_in_use for state in states):
            return ""
        if time.monotonic() > deadline_s:
            return str(states)
        time.sleep(1.0)


class _Memory:
    """Resident memory of the processes that live through the run."""

    def __init__(self, cluster: Cluster, kinds: tuple[str, ...]) -> None:
        self._cluster = cluster
        self._kinds = kinds
        self._started_s = time.monotonic()
        self._samples: dict[str, list[tuple[float, int]]] = {}

    def sample(self) -> None:
        now_s = time.monotonic()
        if now_s - self._started_s < WARM_UP_S:
            return
        for kind in self._kinds:
            for name, pid in self._cluster.processes(kind).items():
                try:
                    resident_bytes = psutil.Process(pid).memory_info().rss
                except psutil.NoSuchProcess:
                    continue
                self._samples.setdefault(name, []).append((now_s, resident_bytes))

    def slopes(self) -> dict[str, float]:
        """Bytes a second, by least squares, of those that were seen for two minutes."""
        return {
            name: _slope(samples) for name, samples in self._samples.items() if samples[-1][0] - samples[0][0] > 120.0
        }


def _slope(samples: list[tuple[float, int]]) -> float:
    mean_s = sum(at_s for at_s, _ in samples) / len(samples)
    mean_bytes = sum(size for _, size in samples) / len(samples)
    square = sum((at_s - mean_s) ** 2 for at_s, _ in samples)
    return sum((at_s - mean_s) * (size - mean_bytes) for at_s, size in samples) / square


def violations(summary: Summary, options: ChaosOptions) -> list[str]:
    """What must not be, one line each."""
    found = []
    if summary.wrong:
        found.append(f"{len(summary.wrong)} wrong answers, such as {summary.wrong[0]}")
    if summary.hung or summary.unhealed:
        found.append(f"{summary.hung} hung requests, {summary.unhealed} that no retry healed")
    if summary.error_events:
        found.append(f"{len(summary.error_events)} errors, such as {summary.error_events[0]}")
    if summary.unexcused:
        found.append(f"{summary.unexcused} broken connections without a fault of their ingress")
    for kind in options.kinds:
        for action in options.actions:
            if (done := summary.faults.get(f"{kind} {action}", 0)) < options.min_faults:
                found.append(f"only {done} of {options.min_faults}: {kind} {action}")
    if (resumed := sum(summary.resumed.values())) < options.min_resumed:
        found.append(f"only {resumed:g} streams were resumed")
    if summary.recovery_p99_s is not None and summary.recovery_p99_s > options.recovery_limit_s:
        found.append(f"99 % have recovered within {summary.recovery_p99_s:g} s")
    if summary.left_over:
        found.append(f"left over: {summary.left_over}")
    for name, slope in summary.memory_slopes_bytes_per_s.items():
        if slope > MEMORY_LIMIT_BYTES_PER_S:
            found.append(f"{name} grows by {slope * 60 / 2**20:.1f} MiB a minute")
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
    app: Annotated[str, typer.Option(help="module:builder, as for serve run")] = "serve_app:app",
    output: Annotated[Path | None, typer.Option(help="a file for the summary")] = None,
) -> None:
    """Disturb the service for a while, and compare every answer with the undisturbed one."""
    given = dict(argument.partition("=")[::2] for argument in arguments or [])
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
    )
    summary = run(options, app, {"engine_replicas": "2", "ingress_replicas": "2"} | given)
    text = json.dumps(asdict(summary), indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")
    sys.exit(1 if summary.violations else 0)


if __name__ == "__main__":
    typer.run(main)
