"""Tasks that outlive the request in which they are started."""

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_running: set[asyncio.Task[Any]] = set()  # the event loop itself keeps only weak references


def spawn(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts a task outside the caller's Serve request.

    Handle calls made in a request's context are cancelled with that request, and they share its internal id, by
    which a router finds the call that it has placed: two at once would be mixed up.
    """
    task = asyncio.create_task(coroutine, context=contextvars.Context())
    _running.add(task)
    task.add_done_callback(_running.discard)
    return task
