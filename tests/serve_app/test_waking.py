"""Requests that wait while no engine replica runs."""

import asyncio
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from serve_app import waking
from serve_app.waking import Waker


class Knocked:
    """A handle whose calls wait for a replica for ever, as they do in Serve's router."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.num_cancelled = 0
        self.status = SimpleNamespace(remote=self._call)

    def _call(self) -> Awaitable[None]:
        self.num_calls += 1
        return self._wait()

    async def _wait(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.num_cancelled += 1


def test_waits_for_a_replica_and_calls_none_meanwhile() -> None:
    async def run() -> None:
        handle, replicas = Knocked(), []
        waker = Waker(cast(Any, handle), lambda: tuple(replicas))
        waiting = [asyncio.create_task(waker.wait(lambda: False)) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        replicas.append("a")
        await asyncio.wait_for(asyncio.gather(*waiting), 30)
        assert handle.num_calls == 0

    asyncio.run(run())


def test_gives_up_when_nobody_waits_any_more() -> None:
    async def run() -> None:
        gone: list[int] = []
        waker = Waker(cast(Any, Knocked()), lambda: ())
        waiting = asyncio.create_task(waker.wait(lambda: bool(gone)))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        gone.append(1)
        await asyncio.wait_for(waiting, 30)

    asyncio.run(run())


def test_knocks_when_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waking, "KNOCK_AFTER_S", 0.05)
    monkeypatch.setattr(waking, "KNOCK_S", 0.05)

    async def run() -> None:
        handle, replicas = Knocked(), []
        waker = Waker(cast(Any, handle), lambda: tuple(replicas))
        waiting = [asyncio.create_task(waker.wait(lambda: False)) for _ in range(3)]
        while handle.num_cancelled < 2:  # each call is taken back, for while one waits no policy is asked
            await asyncio.sleep(0.01)
        replicas.append("a")
        await asyncio.wait_for(asyncio.gather(*waiting), 30)
        await asyncio.sleep(0.1)
        num_calls = handle.num_calls
        assert handle.num_cancelled == num_calls
        await asyncio.sleep(0.2)
        assert handle.num_calls == num_calls

    asyncio.run(asyncio.wait_for(run(), 60))
