"""A draft server that says what a test tells it to, and a proposer that is connected to it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from serve_app.draft_client import RemoteProposer
from serve_app.draft_messages import PROTOCOL, Drafts, Hello, Round, Welcome, decode_from_engine
from serve_app.draft_transport import Endpoint
from serve_app.messages import encode
from tests.serve_app.toy_drafter import VOCAB_SIZE, ScriptedProposer, make_request

LIMIT_S = 60.0  # for what a busy machine takes long for
ENDLESS_S = 3600.0  # of a limit that no test is to reach


def wait_until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not so after {limit_s:g} s"
        time.sleep(0.002)


def is_connected(proposer: RemoteProposer) -> bool:
    proposer.may_propose(make_request("nobody"))  # looks for a connection
    return proposer.stats().is_connected


class PutForwardClock:
    """The machine's clock, which a test may put forward. Stands in for the module `time`."""

    def __init__(self) -> None:
        self._skipped_s = 0.0

    def skip(self, seconds: float) -> None:
        self._skipped_s += seconds

    def perf_counter(self) -> float:
        return time.perf_counter() + self._skipped_s

    def monotonic(self) -> float:
        return time.monotonic() + self._skipped_s

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class WaitingClock:
    """Time passes only while somebody waits. Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += max(seconds, 50e-6)  # as a sleep of nothing takes


class SilentSocket:
    """In the place of a connection's: takes everything, and says nothing. Waiting for it takes time of the clock."""

    def __init__(self, clock: WaitingClock, replaced: zmq.Socket[bytes]) -> None:
        self._clock = clock
        self._replaced = replaced

    def send(self, data: bytes, flags: int) -> None:
        """Nobody reads it."""

    def recv(self, flags: int) -> bytes:  # noqa: ARG002
        raise zmq.Again

    def poll(self, timeout_ms: int) -> int:
        self._clock.now_s += timeout_ms / 1000
        return 0

    def close(self) -> None:
        self._replaced.close()


class CountingProposer(RemoteProposer):
    """Counts what it has taken in, so that a test can wait for it."""

    num_answers = 0

    @property
    def num_taken_in(self) -> int:
        return self.num_answers + self._malformed.count

    def _on_answer(self, message: Drafts) -> None:
        self.num_answers += 1
        super()._on_answer(message)


class ScriptedDraft:
    """A ROUTER socket of one peer."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = Endpoint(f"ipc://{directory}/draft")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.endpoint.address)
        self._peer = b""
        self._num_sent = 0  # but for welcomes

    @property
    def is_spoken_to(self) -> bool:
        return bool(self._socket.poll(0))

    def receive(self) -> Hello | Round:
        assert self._socket.poll(int(LIMIT_S * 1000)), "no message came"
        self._peer, data = self._socket.recv_multipart()
        return decode_from_engine(data)

    def receive_round(self) -> Round:
        message = self.receive()
        assert isinstance(message, Round)
        return message

    def welcome(self, vocab_size: int = VOCAB_SIZE, protocol: int = PROTOCOL) -> None:
        assert isinstance(self.receive(), Hello)
        self._socket.send_multipart([self._peer, encode(Welcome(protocol, "toy", "fp", vocab_size))])

    def send(self, message: Drafts) -> None:
        self.send_bytes(encode(message))

    def send_bytes(self, data: bytes) -> None:
        self._socket.send_multipart([self._peer, data])
        self._num_sent += 1

    def wait_until_heard(self, proposer: CountingProposer) -> None:
        """Until the proposer has taken in whatever was sent."""

        def is_heard() -> bool:
            proposer._poll(time.perf_counter())
            return proposer.num_taken_in == self._num_sent

        wait_until(is_heard)

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextmanager
def connected(
    directory: Path, fallback: ScriptedProposer, silence_limit_s: float = ENDLESS_S
) -> Iterator[tuple[ScriptedDraft, CountingProposer]]:
    """A draft that may take its time over each word, unless told otherwise."""
    draft = ScriptedDraft(directory)
    proposer = CountingProposer(
        lambda _: [draft.endpoint],
        fallback,
        vocab_size=VOCAB_SIZE,
        target_name="target",
        silence_limit_s=silence_limit_s,
    )

    def is_met() -> bool:
        if draft.is_spoken_to:  # once more, where the welcome came too late
            draft.welcome()
        return is_connected(proposer)

    try:
        wait_until(is_met)
        yield draft, proposer
    finally:
        proposer.close()
        draft.close()
