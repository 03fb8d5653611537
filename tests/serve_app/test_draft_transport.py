"""Who may talk to a draft server across nodes."""

import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
import zmq

from serve_app.draft_client import RemoteProposer
from serve_app.draft_messages import MAX_MESSAGE_BYTES, PROTOCOL, Hello
from serve_app.draft_mirrors import MirrorKeeper
from serve_app.draft_server import DraftServer, LoadedDraft
from serve_app.draft_transport import MAX_CLIENT_KEYS, Endpoint, KeyPair, ServerSockets, connect
from serve_app.messages import encode
from tests.serve_app.scripted_draft import is_connected, wait_until
from tests.serve_app.toy_drafter import VOCAB_SIZE, ScriptedProposer, ToyDrafter, continuation, make_request, order

Context = zmq.Context[zmq.Socket[bytes]]
REFUSED_MS = 400  # how long a refused connection is given to be accepted after all
LIMIT_MS = 60_000  # for one that is accepted, on a busy machine


@pytest.fixture(scope="module")
def server() -> Iterator[DraftServer]:
    drafter = ToyDrafter()
    server = DraftServer(LoadedDraft(drafter, "toy", "fp"), MirrorKeeper(drafter))
    server.start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def tcp(server: DraftServer) -> Endpoint:
    endpoint = server.sockets.listen_tcp("127.0.0.1")
    assert endpoint is not None
    return endpoint


@pytest.fixture
def context() -> Iterator[Context]:
    context: Context = zmq.Context()
    yield context
    context.destroy(linger=0)


def keys() -> KeyPair:
    made = KeyPair.make()
    assert made is not None
    return made


def is_answered(context: Context, endpoint: Endpoint, client_keys: KeyPair | None, limit_ms: int = REFUSED_MS) -> bool:
    client = connect(context, endpoint, client_keys)
    if not client.poll(limit_ms, zmq.POLLOUT):
        return False
    client.send(encode(Hello(PROTOCOL)))
    return bool(client.poll(limit_ms))


def test_a_key_that_was_given_to_the_server_is_let_in(server: DraftServer, tcp: Endpoint, context: Context) -> None:
    client_keys = keys()
    server.sockets.allow(client_keys.public)
    assert is_answered(context, tcp, client_keys, LIMIT_MS)


def test_unknown_peers_get_nothing(server: DraftServer, tcp: Endpoint, context: Context) -> None:
    known = keys()
    server.sockets.allow(known.public)
    assert not is_answered(context, tcp, keys()), "any key was let in"
    assert not is_answered(context, replace(tcp, server_key=keys().public), known), "a false server key was not noticed"
    assert not is_answered(context, Endpoint(tcp.address), None), "a peer without CURVE was let in"
    stolen = KeyPair(known.public, keys().secret)
    assert not is_answered(context, tcp, stolen), "a public key alone was enough"
    assert is_answered(context, tcp, known, LIMIT_MS)


def test_tcp_is_one_port_of_the_nodes_address_only(server: DraftServer, tcp: Endpoint) -> None:
    assert server.sockets.listen_tcp("127.0.0.1") == tcp
    address, port = tcp.address.removeprefix("tcp://").split(":")
    assert address == "127.0.0.1"
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.2", int(port)))


def test_a_proposer_by_tcp(server: DraftServer, tcp: Endpoint) -> None:
    def resolve(client_key: str | None) -> list[Endpoint]:
        assert client_key is not None
        server.sockets.allow(client_key)
        return [tcp]

    proposer = RemoteProposer(resolve, ScriptedProposer(), vocab_size=VOCAB_SIZE, target_name="target")
    wait_until(lambda: is_connected(proposer))
    request = make_request()
    wait_until(lambda: proposer.propose([order(request)], 0.05) == [continuation([1, 2, 3], 3)])
    proposer.close()


def test_old_keys_make_room_for_new_ones() -> None:
    sockets = ServerSockets()
    for number in range(MAX_CLIENT_KEYS + 1):
        sockets.allow(f"key {number}")
    assert not sockets.callback("draft", b"key 0")
    assert sockets.callback("draft", b"key 1")
    assert not sockets.callback("other", b"key 1")
    sockets.close()


def test_a_message_that_is_too_large_ends_the_connection(server: DraftServer, context: Context) -> None:
    client = connect(context, server.ipc, None)
    assert client.poll(LIMIT_MS, zmq.POLLOUT)
    client.send(bytes(MAX_MESSAGE_BYTES + 1))
    wait_until(lambda: not client.poll(0, zmq.POLLOUT))
    server.check_health()
