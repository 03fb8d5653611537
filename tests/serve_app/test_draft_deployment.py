"""The draft deployment in a real Serve: found over its handle, replaced when it dies, reachable from other nodes."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import zmq
from ray import serve

from serve_app.app import DRAFT_DEPLOYMENT, ENGINE_DEPLOYMENT, bind, load_served_model
from serve_app.config import parse_config
from serve_app.draft_client import RemoteProposer
from serve_app.draft_endpoints import DraftEndpoint, DraftEndpoints, decode_endpoint
from serve_app.draft_link import Resolve
from serve_app.draft_messages import PROTOCOL, Hello
from serve_app.draft_server import LoadedDraft
from serve_app.draft_transport import Endpoint, KeyPair, connect
from serve_app.messages import decode_status, encode
from tests.serve_app.fake_engine import FakeEngine
from tests.serve_app.scripted_draft import is_connected, wait_until
from tests.serve_app.toy_drafter import VOCAB_SIZE, ScriptedProposer, ToyDrafter, continuation, make_request, order

APPLICATION = "drafting"
START_S = 60.0
pytestmark = pytest.mark.timeout(180)


def load_toy() -> LoadedDraft:
    return LoadedDraft(ToyDrafter(), "toy", "fp_toy")


def make_proposer(find_drafts: Resolve) -> RemoteProposer:
    return RemoteProposer(find_drafts, ScriptedProposer(), vocab_size=VOCAB_SIZE, target_name="target")


def load_drafting_engine(find_drafts: Resolve | None) -> FakeEngine:
    """An engine that has met its draft model, or none."""
    assert find_drafts is not None
    proposer = make_proposer(find_drafts)
    wait_until(lambda: is_connected(proposer), START_S)
    engine = FakeEngine()
    engine.fingerprint = "fp_that_has_met_its_draft"
    proposer.close()
    return engine


@pytest.fixture(scope="module")
def draft(serve_cluster: str, default_model_path: Path) -> Iterator[Any]:  # noqa: ARG001 - replicas find it in the cache
    """A handle of the draft deployment."""
    config = parse_config({"device": "cpu", "speculative": "remote", "draft_model": "toy"})
    application = bind(config, load_drafting_engine, partial(load_served_model, config), load_toy)
    serve.run(application, name=APPLICATION, route_prefix=f"/{APPLICATION}")
    yield serve.get_deployment_handle(DRAFT_DEPLOYMENT, APPLICATION)
    serve.delete(APPLICATION)


def this_node() -> str:
    return ray.get_runtime_context().get_node_id()


def drafts_right(proposer: RemoteProposer) -> bool:
    request = make_request(f"request {time.monotonic_ns()}")
    for _ in range(2):  # the first is not waited for
        [drafts] = proposer.propose([order(request)], 0.5)
        time.sleep(0.01)
    proposer.forget(request)
    return drafts == continuation([1, 2, 3], 3)


def test_an_engine_replica_finds_its_draft(draft: Any) -> None:  # noqa: ARG001
    engine = serve.get_deployment_handle(ENGINE_DEPLOYMENT, APPLICATION)
    status = decode_status(engine.status.remote().result(timeout_s=60))
    assert status.fingerprint == "fp_that_has_met_its_draft"


def test_an_engine_on_another_node_gets_an_encrypted_way(draft: Any) -> None:
    keys = KeyPair.make()
    assert keys is not None
    answer = decode_endpoint(draft.endpoint.remote("another node", keys.public).result(timeout_s=60))
    node_ip = ray.util.get_node_ip_address()
    assert answer.address is not None
    assert answer.address.startswith(f"tcp://{node_ip}:")
    assert (answer.node_id, answer.model_name, answer.vocab_size) == (this_node(), "toy", VOCAB_SIZE)
    with zmq.Context() as context:
        client = connect(context, Endpoint(answer.address, answer.server_key), keys)
        assert client.poll(60_000, zmq.POLLOUT)
        client.send(encode(Hello(PROTOCOL)))
        assert client.poll(60_000)
        client.close()
    without_key = decode_endpoint(draft.endpoint.remote("another node", None).result(timeout_s=60))
    assert without_key.address is None


def test_a_replica_that_dies_is_replaced_and_found_again(draft: Any) -> None:
    find_drafts = DraftEndpoints(serve.get_deployment_handle(DRAFT_DEPLOYMENT, APPLICATION), this_node())
    proposer = make_proposer(find_drafts)
    try:
        wait_until(lambda: is_connected(proposer), START_S)
        wait_until(lambda: drafts_right(proposer))
        first = decode_endpoint(draft.endpoint.remote(this_node()).result(timeout_s=60))
        assert first.address is not None
        assert first.address.startswith("ipc://")
        name = f"SERVE_REPLICA::{APPLICATION}#{DRAFT_DEPLOYMENT}#{first.replica_id}"
        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=False)
        wait_until(lambda: not drafts_right(proposer) and not proposer.stats().is_connected)
        wait_until(lambda: drafts_right(proposer), START_S)
        second = decode_endpoint(draft.endpoint.remote(this_node()).result(timeout_s=60))
        assert second.replica_id != first.replica_id
        assert proposer.stats().reconnects >= 1
    finally:
        proposer.close()


def test_the_own_node_and_idle_replicas_come_first() -> None:
    def answer(node_id: str, address: str | None, num_engines: int) -> DraftEndpoint:
        return DraftEndpoint("r", node_id, address, None, num_engines, "toy", VOCAB_SIZE, "fp")

    answers = [answer("b", "b0", 0), answer("a", "a3", 3), answer("c", None, 0), answer("a", "a1", 1)]
    assert [endpoint.address for endpoint in DraftEndpoints.in_order(answers, "a")] == ["a1", "a3", "b0"]
