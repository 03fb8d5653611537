"""Ends a call whose time is over."""

import asyncio
from collections.abc import Callable

from serve_app.admission import GenerateCall


class CallTimer:
    """Calls `on_timeout` once, unless it is stopped before; its argument is whether the call had begun."""

    def __init__(self, call: GenerateCall, on_timeout: Callable[[bool], None]) -> None:
        self._call = call
        self._on_timeout = on_timeout
        self._handle: asyncio.TimerHandle | None = None
        self._has_begun = False
        self._set()

    def begin(self) -> None:
        """The call has its first token: it is queued no more."""
        if not self._has_begun:
            self.stop()
            self._has_begun = True
            self._set()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _set(self) -> None:
        seconds_left = self._call.seconds_left(self._has_begun)
        if seconds_left != float("inf"):
            self._handle = asyncio.get_running_loop().call_later(seconds_left, self._on_timeout, self._has_begun)
