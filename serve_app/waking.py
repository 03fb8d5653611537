"""Requests that arrive while no engine replica runs."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from ray.serve.handle import DeploymentHandle

from serve_app.background import spawn

POLL_S = 0.02
KNOCK_AFTER_S = 10.0  # a start that was asked for may take minutes: where a node has to join
KNOCK_S = 1.0  # until Serve has seen it


class Waker:
    """Keeps requests in the ingress until a replica runs.

    A call that waits in Serve's router wakes one replica, however many requests it carries: while there is none, Serve
    asks no policy. The policy of the engines hears from the ingress how many requests wait, and as long as they do so
    here, it decides. Should nothing come of that, a call that is soon taken back wakes one replica after all.
    """

    def __init__(self, handle: DeploymentHandle[object], running_replicas: Callable[[], tuple[str, ...]]) -> None:
        self._handle = handle
        self._running_replicas = running_replicas
        self._knocking: asyncio.Task[None] | None = None
        self._num_waiting = 0

    async def wait(self, is_over: Callable[[], bool]) -> None:
        """Until a replica runs, or `is_over` says that nobody waits any more."""
        self._num_waiting += 1
        if self._knocking is None or self._knocking.done():
            self._knocking = spawn(self._knock())
        try:
            while not self._running_replicas() and not is_over():
                await asyncio.sleep(POLL_S)
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self._knocking.cancel()

    async def _knock(self) -> None:
        while True:
            await asyncio.sleep(KNOCK_AFTER_S)
            with suppress(Exception):  # if the call fails, there is a replica that failed it
                await asyncio.wait_for(self._handle.status.remote(), KNOCK_S)
