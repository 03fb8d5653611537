"""Credit and aborts on their way to one engine replica: collected while a call is under way, then sent in one."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

from serve_app.background import spawn
from serve_app.messages import Control, encode
from serve_app.replica_registry import ReplicaGoneError

logger = logging.getLogger("ray.serve")

RETRY_PAUSE_S = 0.2
MAX_TRIES = 5


class ControlLink:
    """At most one control call to the replica at a time, so its cost does not grow with the number of groups."""

    def __init__(self, replica_id: str, send: Callable[[bytes, str], Awaitable[None]]) -> None:
        self._replica_id = replica_id
        self._send = send
        self._pending = Control({}, {})
        self._wake = asyncio.Event()
        self._task = spawn(self._run())

    def acknowledge(self, group_id: str, sequence: int) -> None:
        self._pending.acknowledged[group_id] = sequence
        self._wake.set()

    def abort(self, group_id: str, member: int) -> None:
        self._pending.aborted.setdefault(group_id, []).append(member)
        self._wake.set()

    def close(self) -> None:
        """Not waited for: a call under way to a replica that is dead may end when it likes."""
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            message, self._pending = self._pending, Control({}, {})
            await self._deliver(encode(message))

    async def _deliver(self, message: bytes) -> None:
        """Tries again when a call fails: a lost abort would leave a request running for nobody."""
        for attempt in range(MAX_TRIES):
            try:
                await self._send(message, self._replica_id)
                return
            except ReplicaGoneError:
                return  # and its requests with it
            except Exception as error:
                logger.warning(f"control message to engine replica {self._replica_id} failed: {error!r}")
                await asyncio.sleep(RETRY_PAUSE_S * (attempt + 1))


class ControlLinks:
    """One for each replica that has anything to be told."""

    def __init__(self, send: Callable[[bytes, str], Awaitable[None]]) -> None:
        self._send = send
        self._links: dict[str, ControlLink] = {}

    def to(self, replica_id: str) -> ControlLink:
        link = self._links.get(replica_id)
        if link is None:
            link = self._links[replica_id] = ControlLink(replica_id, self._send)
        return link

    def close_all_but(self, replica_ids: Collection[str | None]) -> None:
        for replica_id in self._links.keys() - set(replica_ids):
            self._links.pop(replica_id).close()
