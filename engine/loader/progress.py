"""How a download tells people how far it is: a bar on a terminal, a few lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

Advance = Callable[[int, int | None], None]  # (bytes so far, bytes in all or None: as first stated)


class Progress(Protocol):
    """Where downloads report to."""

    def note(self, message: str) -> None:
        """Say one line."""
        ...

    def task(self, description: str, total_bytes: int | None) -> AbstractContextManager[Advance]:
        """A download, for the length of a `with` block; call what it gives with the bytes so far."""
        ...


class TerminalProgress:
    """A bar on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)

    def note(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False)

    @contextmanager
    def task(self, description: str, total_bytes: int | None) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._console) as bar:
            task_id = bar.add_task(description, total=total_bytes)

            def advance(done_bytes: int, new_total_bytes: int | None) -> None:
                bar.update(task_id, completed=done_bytes)
                if new_total_bytes is not None:
                    bar.update(task_id, total=new_total_bytes)

            yield advance


class PlainProgress:
    """Lines for a log: one at the start, one at the end, and one every `interval_s` between."""

    def __init__(self, write: Callable[[str], None], interval_s: float = 10.0) -> None:
        self._write = write
        self._interval_s = interval_s

    def note(self, message: str) -> None:
        self._write(message)

    @contextmanager
    def task(self, description: str, total_bytes: int | None) -> Iterator[Advance]:
        self._write(f"{description}{f' ({_megabytes(total_bytes)})' if total_bytes else ''}")
        started_s = spoken_s = time.monotonic()

        def advance(done_bytes: int, new_total_bytes: int | None) -> None:
            nonlocal spoken_s
            if time.monotonic() - spoken_s >= self._interval_s:
                spoken_s = time.monotonic()
                total = new_total_bytes or total_bytes
                self._write(f"{description}: {_megabytes(done_bytes)}{f' of {_megabytes(total)}' if total else ''}")

        yield advance
        self._write(f"{description}: done in {time.monotonic() - started_s:.1f} s")


def progress_on(stream: TextIO | None = None) -> Progress:
    """A bar if `stream` (None: standard error) is a terminal, else lines."""
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        return TerminalProgress(stream)
    return PlainProgress(lambda line: print(line, file=stream, flush=True))


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
