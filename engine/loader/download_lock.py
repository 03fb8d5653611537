"""One process of a node downloads, the others wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from engine.errors import ModelError
from engine.loader.progress import Progress

_MAX_WAIT_S = 6 * 3600.0  # the largest model over a slow line; a holder that dies frees the lock at once


@contextmanager
def download_lock(file: Path, what: str, progress: Progress) -> Iterator[None]:
    """Hold the lock at `file`, whose directory is made, for the length of a `with` block.

    Raises:
        ModelError: the directory cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress.note(f"Waiting for another process that downloads {what}")
            lock.acquire(timeout=_MAX_WAIT_S, poll_interval=0.2)
    except Timeout:
        raise ModelError(f"{file}: another process has held this lock for hours; end it and start again") from None
    except OSError as error:
        raise ModelError(f"{file.parent}: the cache cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
