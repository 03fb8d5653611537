"""Sockets between engines and draft servers: ipc on one node, tcp with CURVE (Bernstein; RFC 26 of ZeroMQ) across.

Who may talk to a draft server: on its node, whoever may enter its directory, that is its own user; from elsewhere,
the keys that were given to it over its Serve handle.
"""

import shutil
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq

from serve_app.draft_messages import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

MAX_QUEUED_MESSAGES = 1024  # of one connection, on either side
MAX_CLIENT_KEYS = 1024  # the latest count
_ZAP_DOMAIN = "draft"


@dataclass(frozen=True)
class KeyPair:
    """Of CURVE, in Z85 text (40 characters each)."""

    public: str
    secret: str

    @staticmethod
    def make() -> "KeyPair | None":
        """None where ZeroMQ was built without CURVE: then there is no way across nodes."""
        if not zmq.has("curve"):
            return None
        public, secret = zmq.curve_keypair()
        return KeyPair(public.decode(), secret.decode())


@dataclass(frozen=True)
class Endpoint:
    """Where a draft server listens; `server_key` is the public key of one that is reached by tcp."""

    address: str
    server_key: str | None = None


def connect(context: zmq.Context[zmq.Socket[bytes]], endpoint: Endpoint, keys: KeyPair | None) -> zmq.Socket[bytes]:
    """A socket on its way to a server. When that goes away the socket stays unconnected: sending then raises
    zmq.Again at once, instead of filling a queue for nobody.

    Raises:
        zmq.ZMQError: the address or a key is malformed.
    """
    socket = context.socket(zmq.DEALER)
    try:
        _set_limits(socket)
        socket.reconnect_ivl = -1
        socket.immediate = True  # until there is a connection, nothing can be sent
        if endpoint.server_key is not None:
            if keys is None:
                raise zmq.ZMQError(zmq.ENOTSUP, "this ZeroMQ knows no CURVE")
            socket.curve_serverkey = endpoint.server_key.encode()
            socket.curve_publickey = keys.public.encode()
            socket.curve_secretkey = keys.secret.encode()
        if "[" in endpoint.address:
            socket.ipv6 = True
        socket.connect(endpoint.address)
    except BaseException:
        socket.close()
        raise
    return socket


class ServerSockets:
    """What a draft server listens on. Any thread may call; the sockets themselves are for one thread."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._directory = tempfile.mkdtemp(prefix="slipstream-draft-")  # for our user only (0700)
        self._keys = KeyPair.make()
        self._client_keys: OrderedDict[str, None] = OrderedDict()
        self._authenticator: ThreadAuthenticator | None = None
        self._lock = threading.Lock()
        self._tcp: Endpoint | None = None
        self.ipc = Endpoint(f"ipc://{self._directory}/socket")
        self._new = [self._router()]
        self._new[0].bind(self.ipc.address)

    def take_new(self) -> list[zmq.Socket[bytes]]:
        """ROUTER sockets that have begun to listen since the last call; from now on they are the caller's thread's."""
        if not self._new:
            return []
        with self._lock:
            new, self._new = self._new, []
        return new

    def listen_tcp(self, node_ip: str) -> Endpoint | None:
        """Listen on a free port of this address of the node, from the first call on. None without CURVE."""
        if self._keys is None:
            return None
        with self._lock:
            if self._tcp is None:
                if self._authenticator is None:
                    self._authenticator = self._authenticate()
                router = self._router()
                router.curve_server = True
                router.curve_secretkey = self._keys.secret.encode()
                router.zap_domain = _ZAP_DOMAIN.encode()
                router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # should nobody check keys, nobody gets in
                host = node_ip
                if ":" in node_ip:
                    router.ipv6 = True
                    host = f"[{node_ip}]"
                router.bind(f"tcp://{host}:*")
                self._tcp = Endpoint(_bound_address(router), self._keys.public)
                self._new.append(router)
            return self._tcp

    def allow(self, client_key: str) -> None:
        """Let the owner of this public key connect by tcp."""
        with self._lock:
            self._client_keys[client_key] = None
            self._client_keys.move_to_end(client_key)
            while len(self._client_keys) > MAX_CLIENT_KEYS:
                self._client_keys.popitem(last=False)

    def close(self) -> None:
        """After the thread that had the sockets has closed them."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    def callback(self, domain: str, key: bytes) -> bool:
        """Of the authenticator: whether the owner of `key` may connect."""
        with self._lock:
            return domain == _ZAP_DOMAIN and key.decode("ascii") in self._client_keys

    def _authenticate(self) -> "ThreadAuthenticator":
        from zmq.auth.thread import ThreadAuthenticator  # only where there is a second node

        authenticator = ThreadAuthenticator(self._context)
        authenticator.start()
        authenticator.configure_curve_callback(_ZAP_DOMAIN, self)
        return authenticator

    def _router(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        _set_limits(socket)
        socket.router_mandatory = True  # sending to an engine that has gone raises
        return socket


def _bound_address(socket: zmq.Socket[bytes]) -> str:
    address = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(address, bytes)
    return address.decode().rstrip("\0")


def _set_limits(socket: zmq.Socket[bytes]) -> None:
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = MAX_QUEUED_MESSAGES
    socket.maxmsgsize = MAX_MESSAGE_BYTES
