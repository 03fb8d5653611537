"""How long a round takes from an engine to a draft server and back, without anything being computed.

Run with `python -m benchmarks.draft_hop`. Two processes of one machine; over tcp the messages are encrypted, as they
are between nodes. What is measured is one call of the proposer, for requests that all have to be waited for: making
the message, the server's carrying it out, and reading the answer are part of it.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from engine.request import Request, SamplingParams
from engine.speculative.proposer import DraftOrder
from serve_app.draft_client import RemoteProposer
from serve_app.draft_mirrors import MirrorKeeper
from serve_app.draft_server import DraftServer, LoadedDraft
from serve_app.draft_transport import Endpoint

VOCAB_SIZE = 49_152
NUM_DRAFT_TOKENS = 4
WAIT_S = 1.0
PATIENCE_S = 10.0


class InstantDrafter:
    """A Drafter whose drafts are all 0, and there at once."""

    vocab_size = VOCAB_SIZE
    has_work = False

    def __init__(self) -> None:
        self._num_accepted: dict[str, int] = {}

    def open(
        self,
        key: str,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        sampling: SamplingParams,  # noqa: ARG002
        choice_index: int,  # noqa: ARG002
    ) -> None:
        self._num_accepted[key] = len(prompt_token_ids) + len(output_token_ids)

    def accept(self, key: str, num_tokens: int, token_ids: Sequence[int]) -> bool:
        self._num_accepted[key] = num_tokens + len(token_ids)
        return True

    def order(self, key: str, num_draft_tokens: int) -> None:
        pass

    def drop(self, key: str) -> None:
        del self._num_accepted[key]

    def step(self) -> list[str]:
        return []

    def drafts(self, key: str) -> tuple[int, list[int]]:
        return self._num_accepted[key], [0] * NUM_DRAFT_TOKENS

    def check_integrity(self) -> None:
        """It holds nothing that could be lost."""


class NothingElse:
    """A fallback without proposals."""

    def may_propose(self, request: Request) -> bool:  # noqa: ARG002
        return False

    def propose(self, orders: Sequence[DraftOrder], wait_s: float) -> Sequence[Sequence[int]]:  # noqa: ARG002
        return [[] for _ in orders]

    def forget(self, request: Request) -> None:
        pass

    def close(self) -> None:
        pass


def serve() -> None:
    """The server's process. Says where it listens, is told a client's key, and ends with its input."""
    drafter = InstantDrafter()
    server = DraftServer(LoadedDraft(drafter, "instant", "none"), MirrorKeeper(drafter, runs_ahead=False))
    server.start()
    tcp = server.sockets.listen_tcp("127.0.0.1")
    assert tcp is not None, "this ZeroMQ was built without CURVE"
    print(server.ipc.address, tcp.address, tcp.server_key, flush=True)
    for line in sys.stdin:
        server.sockets.allow(line.strip())
        print("allowed", flush=True)
    server.shutdown()


@contextmanager
def server_process() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.draft_hop", "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()  # ends it, and its directory with it


def measure(proposer: RemoteProposer, num_requests: int, num_rounds: int) -> list[float]:
    """Seconds of each round, sorted."""
    requests = [Request(str(n), [1] * 100, SamplingParams(seed=n)) for n in range(num_requests)]
    orders = [DraftOrder(request, NUM_DRAFT_TOKENS) for request in requests]
    deadline_s = time.monotonic() + PATIENCE_S
    while not all(proposer.propose(orders, WAIT_S)):  # connects, and opens the mirrors
        if time.monotonic() > deadline_s:
            raise SystemExit("the draft server does not answer")
        time.sleep(0.01)
    times_s = []
    for _ in range(num_rounds):
        for request in requests:
            request.append_output(1)  # not what was drafted: the drafts at hand are of no use
        started_s = time.perf_counter()
        proposals = proposer.propose(orders, WAIT_S)
        times_s.append(time.perf_counter() - started_s)
        assert all(len(drafts) == NUM_DRAFT_TOKENS for drafts in proposals)
    for request in requests:
        proposer.forget(request)
    return sorted(times_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5000)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    print(f"{'transport':<12} {'requests':>8} {'p50 µs':>8} {'p99 µs':>8}")
    with server_process() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ipc_address, tcp_address, server_key = process.stdout.readline().split()
        endpoints = {"ipc": Endpoint(ipc_address), "tcp + CURVE": Endpoint(tcp_address, server_key)}
        for name, endpoint in endpoints.items():

            def resolve(client_key: str | None, endpoint: Endpoint = endpoint) -> list[Endpoint]:
                process.stdin.write(f"{client_key}\n")
                process.stdin.flush()
                process.stdout.readline()
                return [endpoint]

            proposer = RemoteProposer(resolve, NothingElse(), vocab_size=VOCAB_SIZE, target_name="benchmark")
            for num_requests in arguments.requests:
                times_s = measure(proposer, num_requests, arguments.rounds)
                p50, p99 = (1e6 * times_s[int(share * len(times_s))] for share in (0.5, 0.99))
                print(f"{name:<12} {num_requests:>8} {p50:>8.0f} {p99:>8.0f}")
            proposer.close()


if __name__ == "__main__":
    main()
