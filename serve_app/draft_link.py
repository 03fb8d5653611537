"""Finds a draft server and shakes hands with it, in a thread that may take its time."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq

from engine.speculative.vocabulary import vocabulary_mismatch
from serve_app.draft_messages import PROTOCOL, Hello, MalformedCount, MalformedError, Welcome, decode_from_draft
from serve_app.draft_transport import Endpoint, KeyPair, connect
from serve_app.messages import encode

logger = logging.getLogger("ray.serve")

CONNECT_S = 1.0  # ZeroMQ does not say that nobody listens
HANDSHAKE_S = 3.0  # a server that is in a long step answers after it
MIN_RETRY_S = 0.1
MAX_RETRY_S = 5.0
MAX_COMPLAINTS = 8  # in the log, until there is a connection
_LOOK_MS = 50  # how often a handshake looks whether it is still wanted
_CLOSE_S = 1.0  # the thread may be in a call that takes longer; then it is left to end by itself

Resolve = Callable[[str | None], Sequence[Endpoint]]
"""Where draft servers listen, the best first. Its argument is the caller's public key, to be let in by tcp (None
without CURVE). It may take seconds, and raise."""


@dataclass(frozen=True)
class Connection:
    """A socket whose other side has said who it is."""

    socket: zmq.Socket[bytes]
    address: str
    welcome: Welcome


class DraftLink:
    """Keeps at most one connection ready. Its thread resolves, connects and checks; whoever takes the connection owns
    it, and says so when it is lost."""

    def __init__(self, resolve: Resolve, *, vocab_size: int, target_name: str) -> None:
        self._resolve = resolve
        self._vocab_size = vocab_size
        self._target_name = target_name
        self._keys = KeyPair.make()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._changed = threading.Condition()
        self._wanted = True
        self._ready: Connection | None = None
        self._closing = False
        self._complaints: set[str] = set()
        self._malformed = MalformedCount("a draft server")
        self._thread = threading.Thread(target=self._run, name="draft-link", daemon=True)
        self._thread.start()

    def take(self) -> Connection | None:
        """The connection that has been made, once. Returns at once."""
        if self._ready is None:  # the usual answer, without the lock
            return None
        with self._changed:
            connection, self._ready = self._ready, None
            return connection

    def reconnect(self) -> None:
        """The connection is lost, and closed by its owner: make another one. Returns at once."""
        with self._changed:
            self._wanted = True
            self._changed.notify()

    def close(self) -> None:
        """After the owner of a connection has closed it."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_S)
        if not self._thread.is_alive():
            if self._ready is not None:
                self._ready.socket.close()
            self._context.term()

    def _run(self) -> None:
        pause_s = MIN_RETRY_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closing)
                if self._closing:
                    return
            connection = self._try_all()
            with self._changed:
                if connection is not None:
                    self._ready, self._wanted = connection, False
                    pause_s = MIN_RETRY_S
                elif not self._closing:
                    self._changed.wait_for(lambda: self._closing, pause_s)
                    pause_s = min(2 * pause_s, MAX_RETRY_S)

    def _try_all(self) -> Connection | None:
        try:
            endpoints = self._resolve(None if self._keys is None else self._keys.public)
        except Exception as error:  # whatever the resolver meets out there
            self._complain(f"no draft server can be found: {error!r}")
            return None
        for endpoint in endpoints:
            try:
                connection = self._shake_hands(endpoint)
            except zmq.ZMQError as error:
                self._complain(f"the draft server at {endpoint.address} cannot be reached: {error}")
                continue
            if connection is not None:
                self._complaints.clear()
                return connection
        return None

    def _shake_hands(self, endpoint: Endpoint) -> Connection | None:
        socket = connect(self._context, endpoint, self._keys)
        welcome = None
        try:
            welcome = self._ask(socket)
        finally:
            if welcome is None:
                socket.close()
        if welcome is None:
            self._complain(f"the draft server at {endpoint.address} does not answer")
            return None
        refusal = self._refusal(welcome)
        if refusal is not None:
            socket.close()
            self._complain(refusal)
            return None
        return Connection(socket, endpoint.address, welcome)

    def _ask(self, socket: zmq.Socket[bytes]) -> Welcome | None:
        if not self._wait_for(socket, zmq.POLLOUT, CONNECT_S):
            return None
        socket.send(encode(Hello(PROTOCOL)), zmq.NOBLOCK)
        if not self._wait_for(socket, zmq.POLLIN, HANDSHAKE_S):
            return None
        try:
            message = decode_from_draft(socket.recv(zmq.NOBLOCK))
        except MalformedError as error:
            self._malformed.add(error)
            return None
        return message if isinstance(message, Welcome) else None

    def _wait_for(self, socket: zmq.Socket[bytes], event: int, limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s and not self._closing:
            if socket.poll(_LOOK_MS, event):
                return True
        return False

    def _refusal(self, welcome: Welcome) -> str | None:
        """Why there will be no drafts from there."""
        if welcome.protocol != PROTOCOL:
            return f"the draft server speaks version {welcome.protocol} of the protocol, this engine {PROTOCOL}"
        return vocabulary_mismatch(welcome.model_name, welcome.vocab_size, self._target_name, self._vocab_size)

    def _complain(self, text: str) -> None:
        """One line when something is new since the last connection, not one for each try."""
        if text not in self._complaints and len(self._complaints) < MAX_COMPLAINTS and not self._closing:
            self._complaints.add(text)
            logger.warning(f"speculation goes on without a draft model: {text}")
