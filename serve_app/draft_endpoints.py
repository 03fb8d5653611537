"""Where the draft replicas listen, asked of Serve."""

import logging
import random

import msgspec
from ray.serve.handle import DeploymentHandle

from serve_app.draft_transport import Endpoint

logger = logging.getLogger("ray.serve")

NUM_ASKED = 2  # replicas, of which the one with fewer engines is taken
ANSWER_TIMEOUT_S = 5.0  # a replica that hangs answers nobody


class DraftEndpoint(msgspec.Struct, array_like=True):
    """A draft replica's answer to an engine: how to reach it from there, and whom one would meet."""

    replica_id: str
    node_id: str
    address: str | None  # None: another node, and no CURVE to get there
    server_key: str | None  # with tcp
    num_engines: int
    model_name: str
    vocab_size: int
    fingerprint: str


decode_endpoint = msgspec.msgpack.Decoder(DraftEndpoint).decode


class DraftEndpoints:
    """Resolves for the link of one engine replica, in the link's thread."""

    def __init__(self, handle: DeploymentHandle[object], node_id: str) -> None:
        # A router with an event loop of its own: the usual one may run on the replica's, which other threads must not
        # touch. Replicas of this node come first.
        if not handle.is_initialized:
            handle._init(_run_router_in_separate_loop=True, _prefer_local_routing=True)
        self._ask = handle.options(method_name="endpoint")
        self._node_id = node_id

    def __call__(self, client_key: str | None) -> list[Endpoint]:
        """See serve_app.draft_link.Resolve. Replicas of this node come first, then those with fewer engines.

        Raises:
            RuntimeError: none has answered with an address.
        """
        asked = [self._ask.remote(self._node_id, client_key) for _ in range(NUM_ASKED)]
        answers: dict[str, DraftEndpoint] = {}
        failure: Exception | None = None
        for response in asked:
            try:
                answer = decode_endpoint(response.result(timeout_s=ANSWER_TIMEOUT_S))
                answers[answer.replica_id] = answer
            except Exception as error:  # it has gone, hangs or is starting
                response.cancel()
                failure = error
        endpoints = self.in_order(list(answers.values()), self._node_id)
        if not endpoints:
            raise RuntimeError(f"no draft replica can be reached: {failure or 'ZeroMQ was built without CURVE'}")
        return endpoints

    @staticmethod
    def in_order(answers: list[DraftEndpoint], node_id: str) -> list[Endpoint]:
        random.shuffle(answers)  # among equals
        answers.sort(key=lambda answer: (answer.node_id != node_id, answer.num_engines))
        return [Endpoint(answer.address, answer.server_key) for answer in answers if answer.address is not None]
