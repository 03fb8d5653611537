"""Clients that ask for long answers and do not read them, beside some that do; and what that costs the service.

    python -m loadtest.slow_readers --readers 200

Starts the service on this machine, on a Ray cluster of its own. As many clients ask twice for the same: at first they
read all that comes, the second time they read only the first bytes and keep the connection. Prints a summary as JSON;
the exit code is 1 where unread answers take more memory than they are long, other clients are much slower beside them,
or something is left over once they have gone.
"""

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest.cluster import CONTROLLER, PROXY, Cluster
from loadtest.command import app_arguments, write_down
from loadtest.memory import MemoryWatch
from loadtest.raw_http import RawConnection

APPLICATION = "slow"
START_S, PHASE_S, ANSWER_S = 120.0, 300.0, 120.0
SAMPLE_S = 0.5
RECEIVE_BUFFER_BYTES = 4096  # which the kernel doubles
FIRST_BYTES = 256
NUM_OTHERS = 8
REPLICAS, RAYS_OWN = ("engine", "ingress"), (CONTROLLER, PROXY)
MAX_SLOWDOWN = 2.0  # of others, beside clients that do not read instead of clients that do
# Of memory over the length of an answer. A proxy keeps one as the pieces in which it came; these are Python's objects.
MAX_EXPANSION = 8.0
SPARE_BYTES = 32 * 2**20  # of a process, for everything else


@dataclass(frozen=True)
class SlowOptions:
    """What a run does. dropped_after_s: how long to wait for the service to drop who does not read; 0: not at all."""

    readers: int
    max_tokens: int
    dropped_after_s: float


@dataclass
class Phase:
    """The same requests from one kind of client."""

    duration_s: float  # until the engines were done with them
    others_s: list[float]  # how long answers of other clients took meanwhile
    grown_bytes: dict[str, int]  # of each process, from before to the highest


@dataclass
class SlowSummary:
    """Of one run; `violations` is empty where it has passed."""

    options: SlowOptions
    arguments: dict[str, str]
    load_average: float
    answer_bytes: int  # of one of the long answers, in the mean
    reading: Phase
    stalled: Phase
    num_dropped: int
    kept_bytes: dict[str, int]  # of each process, when all had left, over before
    left_over: str
    violations: list[str] = field(default_factory=list)


class SlowRun:
    """One run's clients, and what the service weighs meanwhile."""

    def __init__(self, cluster: Cluster, options: SlowOptions) -> None:
        self.cluster = cluster
        self.options = options
        self.url = f"{cluster.url}/completions"
        self.watch = MemoryWatch(cluster.all_processes(REPLICAS + RAYS_OWN))

    def body(self, number: int, max_tokens: int) -> dict[str, Any]:
        return {
            "prompt": f"tide {number}",
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "seed": number,
        }

    def resident(self) -> dict[str, int]:
        self.watch.sample()
        return {name: samples[-1][1] for name, samples in self.watch.samples.items() if samples}

    async def phase(self, work: Callable[[], Awaitable[Any]]) -> tuple[Phase, Any]:
        """`work`, and others beside it, until the engines are done."""
        before = highest = await asyncio.to_thread(self.resident)
        started_s = time.monotonic()
        working = asyncio.ensure_future(work())
        others = [asyncio.create_task(self.other(number, working)) for number in range(NUM_OTHERS)]
        while not working.done() or not all(other.done() for other in others):
            await asyncio.sleep(SAMPLE_S)
            now = await asyncio.to_thread(self.resident)
            highest = {name: max(size, highest[name]) for name, size in now.items()}
        durations = [seconds for other in others for seconds in await other]
        grown = {name: size - before[name] for name, size in highest.items()}
        return Phase(time.monotonic() - started_s, durations, grown), await working

    async def other(self, number: int, working: "asyncio.Future[Any]") -> list[float]:
        """Short answers, one after another."""
        durations: list[float] = []
        while not working.done() or not durations:
            started_s = time.monotonic()
            connection = await RawConnection.open(self.url)
            await connection.send(self.body(10_000 + number, 32))
            async with asyncio.timeout(ANSWER_S):
                assert b"data: [DONE]" in await connection.read_rest()
            await connection.close()
            durations.append(time.monotonic() - started_s)
        return durations

    async def read_all(self) -> int:
        """Bytes of all answers."""
        return sum(await asyncio.gather(*(self._read(number) for number in range(self.options.readers))))

    async def _read(self, number: int) -> int:
        connection = await RawConnection.open(self.url)
        await connection.send(self.body(number, self.options.max_tokens))
        content = await connection.read_rest()
        await connection.close()
        assert b"data: [DONE]" in content, content[-200:]
        return len(content)

    async def stall(self) -> list[RawConnection]:
        """Connections whose answers are under way, as far as the engines are concerned at their end."""
        connections = await asyncio.gather(*(self._stall(number) for number in range(self.options.readers)))
        deadline_s = time.monotonic() + PHASE_S
        idle = 0
        while idle < 3:  # the others' requests come and go
            assert time.monotonic() < deadline_s, "the engines do not come to an end"
            await asyncio.sleep(SAMPLE_S)
            idle = idle + 1 if await asyncio.to_thread(self.cluster.num_requests) <= NUM_OTHERS else 0
        return list(connections)

    async def _stall(self, number: int) -> RawConnection:
        connection = await RawConnection.open(self.url, RECEIVE_BUFFER_BYTES)
        await connection.send(self.body(number, self.options.max_tokens))
        head = await connection.read_head()
        assert head.status == 200, head
        await connection.reader.readexactly(FIRST_BYTES)
        connection.pause()
        return connection


def run(options: SlowOptions, app: str, arguments: dict[str, str]) -> SlowSummary:
    """Starts the service, and asks it for long answers twice."""
    cluster = Cluster(APPLICATION)
    cluster.start(app, arguments)
    assert cluster.wait_until_whole({kind: cluster.expected(kind) for kind in REPLICAS}, START_S), "it did not come up"
    return asyncio.run(_run(SlowRun(cluster, options), arguments))


async def _run(run: SlowRun, arguments: dict[str, str]) -> SlowSummary:
    options = run.options
    await run.read_all()  # whatever is done once
    reading, num_bytes = await run.phase(run.read_all)
    before = await asyncio.to_thread(run.resident)
    stalled, connections = await run.phase(run.stall)
    num_dropped = await _dropped(run)
    for connection in connections:
        await connection.close(with_reset=True)
    left_over = await asyncio.to_thread(run.cluster.left_over)
    after = await asyncio.to_thread(run.resident)
    summary = SlowSummary(
        options=options,
        arguments=arguments,
        load_average=os.getloadavg()[0],
        answer_bytes=num_bytes // options.readers,
        reading=reading,
        stalled=stalled,
        num_dropped=num_dropped,
        kept_bytes={name: size - before[name] for name, size in after.items()},
        left_over=left_over,
    )
    summary.violations = violations(summary)
    return summary


async def _dropped(run: SlowRun) -> int:
    """How many the service has given up within their time. The clients do not see it: that they have been left stands
    behind what they do not read."""
    deadline_s = time.monotonic() + run.options.dropped_after_s
    while (num_dropped := run.options.readers - run.cluster.num_connections()) < run.options.readers:
        if time.monotonic() > deadline_s:
            break
        await asyncio.sleep(SAMPLE_S)
    return num_dropped


def violations(summary: SlowSummary) -> list[str]:
    """What must not be, one line each."""
    found = []
    limit_bytes = summary.options.readers * MAX_EXPANSION * summary.answer_bytes + SPARE_BYTES
    for name, size in summary.stalled.grown_bytes.items():
        if size > limit_bytes:
            found.append(f"{name} grew by {size >> 20} MiB, and the answers are {summary.answer_bytes} bytes each")
    slowdown = statistics.median(summary.stalled.others_s) / statistics.median(summary.reading.others_s)
    if slowdown > MAX_SLOWDOWN:
        found.append(f"others took {slowdown:.1f} times as long as beside clients that read")
    if summary.options.dropped_after_s and summary.num_dropped < summary.options.readers:
        found.append(f"only {summary.num_dropped} of {summary.options.readers} were dropped")
    if summary.left_over:
        found.append(f"left over: {summary.left_over}")
    return found


def main(
    arguments: Annotated[list[str] | None, typer.Argument(help="of the application: name=value …")] = None,
    readers: Annotated[int, typer.Option(help="clients that do not read")] = 200,
    max_tokens: Annotated[int, typer.Option(help="of each of their answers")] = 1000,
    dropped_after: Annotated[float, typer.Option(help="seconds in which they must be dropped; 0: they need not")] = 0.0,
    app: Annotated[str, typer.Option(help="module:builder, as for serve run")] = "serve_app:app",
    output: Annotated[Path | None, typer.Option(help="a file for the summary")] = None,
) -> None:
    """Ask for long answers, and leave them unread."""
    given = app_arguments(arguments)
    summary = run(SlowOptions(readers, max_tokens, dropped_after), app, given)
    write_down(summary, output)
    sys.exit(1 if summary.violations else 0)


if __name__ == "__main__":
    typer.run(main)
