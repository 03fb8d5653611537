"""The thread that drafts for the engines connected to it."""

import logging
import threading
import time
from dataclasses import dataclass

import zmq

from engine.speculative.drafter import Drafter
from serve_app.draft_messages import (
    PROTOCOL,
    Drafts,
    Hello,
    MalformedCount,
    MalformedError,
    Welcome,
    decode_from_engine,
)
from serve_app.draft_mirrors import MirrorKeeper, Peer
from serve_app.draft_transport import Endpoint, ServerSockets
from serve_app.errors import DraftDeadError
from serve_app.messages import encode

logger = logging.getLogger("ray.serve")

IDLE_POLL_MS = 100  # a message wakes the thread at once; new sockets and the end of it are seen this late
UPKEEP_S = 0.5  # between signs of life
STALL_LIMIT_S = 60.0  # as of an engine: a long prompt on a slow CPU takes seconds
MAX_MESSAGES_AT_ONCE = 256  # then the drafter has a step


@dataclass(frozen=True)
class LoadedDraft:
    """A draft model that is ready. `fingerprint` names its weights."""

    drafter: Drafter
    model_name: str
    fingerprint: str


class DraftServer:
    """Answers engines from a thread of its own, which alone touches the drafter.

    `start`, `shutdown`, `check_health` and what `sockets` offers may be called from any thread.
    """

    def __init__(self, draft: LoadedDraft, keeper: MirrorKeeper, stall_limit_s: float = STALL_LIMIT_S) -> None:
        """keeper: of the same drafter."""
        self.sockets = ServerSockets()
        self._malformed = MalformedCount("an engine")
        self._keeper = keeper
        self._welcome = encode(Welcome(PROTOCOL, draft.model_name, draft.fingerprint, draft.drafter.vocab_size))
        self._stall_limit_s = stall_limit_s
        self._stopping = False
        self._failure: BaseException | None = None
        self._last_progress_s = time.monotonic()
        self._last_upkeep_s = self._last_progress_s
        self._is_checked = False  # since the last round
        self._routers: list[zmq.Socket[bytes]] = []
        self._thread = threading.Thread(target=self._run, name="draft", daemon=True)

    @property
    def ipc(self) -> Endpoint:
        return self.sockets.ipc

    @property
    def num_malformed(self) -> int:
        return self._malformed.count

    @property
    def num_engines(self) -> int:
        return self._keeper.num_engines

    @property
    def num_mirrors(self) -> int:
        return self._keeper.num_mirrors

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._last_progress_s = time.monotonic()
        self._thread.start()

    def shutdown(self, timeout_s: float = 10.0) -> None:
        """Stop after the step under way.

        Raises:
            TimeoutError: the thread did not stop in time; its sockets are left to the end of the process.
        """
        self._stopping = True
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"the draft thread did not stop within {timeout_s:g} s")
        self.sockets.close()

    def check_health(self) -> None:
        """Return if the thread makes progress; it does even without anything to draft.

        Raises:
            DraftDeadError: it has ended, or has not come round for `stall_limit_s`.
        """
        if not self._thread.is_alive():
            raise DraftDeadError(f"the draft thread has ended: {self._failure or 'it was shut down'}")
        stalled_s = time.monotonic() - self._last_progress_s
        if stalled_s > self._stall_limit_s:
            raise DraftDeadError(f"the draft has made no step for {stalled_s:.0f} s")

    def _run(self) -> None:
        poller = zmq.Poller()
        try:
            while not self._stopping:
                for router in self.sockets.take_new():
                    self._routers.append(router)
                    poller.register(router, zmq.POLLIN)
                if not self._keeper.has_work:
                    poller.poll(IDLE_POLL_MS)
                self._receive()
                self._keeper.work()
                for peer, message in self._keeper.replies():
                    self._send(peer, message)
                self._last_progress_s = time.monotonic()
                if self._last_progress_s - self._last_upkeep_s >= UPKEEP_S:
                    self._last_upkeep_s = self._last_progress_s
                    self._keep_up()
        except BaseException as error:  # a broken invariant, or the device: Serve replaces the replica
            logger.exception("the draft thread ends")
            self._failure = error
        finally:
            for router in self._routers:
                router.close()  # engines notice at once

    def _receive(self) -> None:
        for place, router in enumerate(self._routers):
            for _ in range(MAX_MESSAGES_AT_ONCE):
                try:
                    frames = router.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                try:
                    self._on_message((place, frames[0]), frames[1:])
                except MalformedError as error:
                    self._malformed.add(error)

    def _on_message(self, peer: Peer, frames: list[bytes]) -> None:
        if len(frames) != 1:
            raise MalformedError(f"{len(frames)} frames instead of one")
        match decode_from_engine(frames[0]):
            case Hello():  # of any version: the engine's side decides
                self._send_bytes(peer, self._welcome)
            case message:
                self._is_checked = False
                self._keeper.apply(peer, message)

    def _send(self, peer: Peer, message: Drafts) -> None:
        self._send_bytes(peer, encode(message))

    def _send_bytes(self, peer: Peer, data: bytes) -> None:
        place, identity = peer
        try:
            self._routers[place].send_multipart((identity, data), zmq.NOBLOCK)
        except zmq.Again:
            pass  # an engine that has not read a thousand messages wants no more
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._keeper.forget(peer)

    def _keep_up(self) -> None:
        self._keeper.expire()
        if not self._is_checked and not self._keeper.has_work:
            self._keeper.check_integrity()
            self._is_checked = True
        for peer, message in self._keeper.signs_of_life():
            self._send(peer, message)
