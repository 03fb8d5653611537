"""One server process: started, awaited, ended with all that it started."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.peers.peer import Launch

POLL_S = 0.2
SHOW_S = 5.0  # between two words on how long it takes
END_S = 45.0  # HAProxy drains slowly
TERM_S = 10.0
TAIL_LINES = 3
TAIL_CHARACTERS = 400


class ServerError(Exception):
    """It ended, or did not get ready in time. The message is one line with the end of its log."""


@dataclass(frozen=True)
class RunningServer:
    """start_s: from its command to the first answer."""

    pid: int
    start_s: float


@contextmanager
def running(
    launch: Launch,
    log: Path,
    is_ready: Callable[[], bool],
    deadline_s: float,
    waiting: Callable[[float], None] = lambda _: None,
) -> Iterator[RunningServer]:
    """A server that is ready, for the length of a `with` block. `waiting` is told now and then how long it took.

    Raises:
        ServerError: it ended, or was not ready `deadline_s` after its start.
    """
    started_s = time.monotonic()
    shown_s = 0.0
    environment = os.environ | dict(launch.environment)
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                launch.command,
                env=environment,
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ServerError(f"does not start: {error.strerror}: {launch.command[0]}") from None
        try:
            while not is_ready():
                past_s = time.monotonic() - started_s
                if process.poll() is not None:
                    raise ServerError(f"ended with status {process.returncode} before it was ready: {tail(log)}")
                if past_s > deadline_s:
                    raise ServerError(f"was not ready after {deadline_s:g} s: {tail(log)}")
                if past_s >= shown_s + SHOW_S:
                    waiting(past_s)
                    shown_s = past_s
                time.sleep(POLL_S)
            yield RunningServer(process.pid, time.monotonic() - started_s)
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks the server, then all that is left of what it started, in whatever sessions those are by then."""
    family = descendants(process.pid)
    for number, patience_s in ((signal.SIGINT, END_S), (signal.SIGTERM, TERM_S)):
        if process.poll() is None:
            family |= descendants(process.pid)
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for member in family:
            with suppress(psutil.NoSuchProcess):  # psutil knows a process that got the number of another one
                member.send_signal(number)
        psutil.wait_procs(family, timeout=TERM_S)
    process.wait()


def descendants(pid: int) -> set[psutil.Process]:
    """Of a process, and itself."""
    try:
        process = psutil.Process(pid)
        return {process, *process.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def tail(log: Path) -> str:
    """The last lines of a log in one, without the end of long ones."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-TAIL_LINES:])[-TAIL_CHARACTERS:] or "its log is empty"
