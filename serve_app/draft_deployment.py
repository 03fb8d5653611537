"""The draft replica: a draft model in a process of its own, placed, watched and replaced by Serve.

Serve's handle is for finding the replica. Rounds go over sockets: a call of a handle takes a millisecond or two, and a
decode step of a target less.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import ray
from ray import serve

from engine.errors import SlipstreamError
from serve_app.draft_endpoints import DraftEndpoint
from serve_app.draft_mirrors import MirrorKeeper
from serve_app.draft_server import DraftServer, LoadedDraft
from serve_app.messages import encode

STOP_TIMEOUT_S = 10.0  # for the step under way


class Draft:
    """A Serve deployment. `load` makes the model, in the replica: it may take as long as the weights take to read."""

    def __init__(self, load: Callable[[], LoadedDraft]) -> None:
        self._replica_id: str = serve.get_replica_context().replica_id.unique_id
        self._node_id: str = ray.get_runtime_context().get_node_id()
        try:
            self._draft = load()
        except SlipstreamError as error:
            raise RuntimeError(f"slipstream: {error}") from None  # one line in Serve's status
        self._server = DraftServer(self._draft, MirrorKeeper(self._draft.drafter))
        self._server.start()

    async def endpoint(self, node_id: str, client_key: str | None = None) -> bytes:
        """A DraftEndpoint for an engine of node `node_id`; one of another node is let in with its public key."""
        listens_at = self._server.ipc if node_id == self._node_id else None
        if listens_at is None and client_key is not None:
            self._server.sockets.allow(client_key)
            listens_at = await asyncio.to_thread(self._server.sockets.listen_tcp, ray.util.get_node_ip_address())
        return encode(
            DraftEndpoint(
                self._replica_id,
                self._node_id,
                None if listens_at is None else listens_at.address,
                None if listens_at is None else listens_at.server_key,
                self._server.num_engines,
                self._draft.model_name,
                self._draft.drafter.vocab_size,
                self._draft.fingerprint,
            )
        )

    async def check_health(self) -> None:
        """Serve replaces the replica after repeated failures of this."""
        self._server.check_health()

    async def __del__(self) -> None:
        """Serve awaits this once the calls have ended. Engines notice at once, and look for another replica."""
        server = getattr(self, "_server", None)  # the constructor may have failed
        if server is not None:
            with suppress(TimeoutError):  # a step that never ends: Serve kills the process
                await asyncio.to_thread(server.shutdown, STOP_TIMEOUT_S)
