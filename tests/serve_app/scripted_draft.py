"""A draft server that says what a test tells it to, and a proposer that is connected to it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from serve_app.draft_client import RemoteProposer
from serve_app.draft_messages import PROTOCOL, FromDraft, Hello, Round, Welcome, decode_from_engine
from serve_app.draft_transport import Endpoint
from serve_app.messages import encode
from tests.serve_app.toy_drafter import VOCAB_SIZE, ScriptedProposer, make_request


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not so after {limit_s:g} s"
        time.sleep(0.002)


def is_connected(proposer: RemoteProposer) -> bool:
    proposer.may_propose(make_request("nobody"))  # looks for a connection
    return proposer.stats().is_connected


class ScriptedDraft:
    """A ROUTER socket of one peer."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = Endpoint(f"ipc://{directory}/draft")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.endpoint.address)
        self._peer = b""

    def receive(self) -> Hello | Round:
        assert self._socket.poll(10_000), "no message came"
        self._peer, data = self._socket.recv_multipart()
        return decode_from_engine(data)

    def receive_round(self) -> Round:
        message = self.receive()
        assert isinstance(message, Round)
        return message

    def welcome(self, vocab_size: int = VOCAB_SIZE, protocol: int = PROTOCOL) -> None:
        assert isinstance(self.receive(), Hello)
        self.send(Welcome(protocol, "toy", "fp", vocab_size))

    def send(self, message: FromDraft) -> None:
        self.send_bytes(encode(message))

    def send_bytes(self, *frames: bytes) -> None:
        self._socket.send_multipart([self._peer, *frames])

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextmanager
def connected(directory: Path, fallback: ScriptedProposer) -> Iterator[tuple[ScriptedDraft, RemoteProposer]]:
    draft = ScriptedDraft(directory)
    proposer = RemoteProposer(lambda _: [draft.endpoint], fallback, vocab_size=VOCAB_SIZE, target_name="target")
    try:
        draft.welcome()
        wait_until(lambda: is_connected(proposer))
        yield draft, proposer
    finally:
        proposer.close()
        draft.close()
