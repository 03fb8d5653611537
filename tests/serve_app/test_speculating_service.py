"""The whole service with a draft deployment, live: the answers are those of the service without one."""

import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import ray
from ray import serve

from engine.stats import SpeculationStats
from serve_app import app
from serve_app.app import DRAFT_DEPLOYMENT
from serve_app.draft_endpoints import decode_endpoint
from tests.conftest import SERVICE_ARGUMENTS, Service

APPLICATION = "speculating"
PROMPT = "Count: one two three four five one two three four five one two"
ARGUMENTS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.95, "seed": 3},
    {"temperature": 0, "frequency_penalty": 0.6, "logprobs": 2},
]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def speculating(service: Service) -> Iterator[Service]:
    """The default model with the draft model that ships for it."""
    arguments = {"speculative": "remote", "num_draft_tokens": 3}
    serve.run(app(SERVICE_ARGUMENTS | arguments), name=APPLICATION, route_prefix=f"/{APPLICATION}")
    yield Service(f"{service.url}/{APPLICATION}", APPLICATION)
    serve.delete(APPLICATION)


def client_of(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=150)


def answer(service: Service, arguments: dict[str, Any]) -> openai.types.Completion:
    return client_of(service).completions.create(model="smollm2-135m", prompt=PROMPT, max_tokens=24, **arguments)


def speculation(service: Service) -> SpeculationStats:
    stats = service.stats().speculation
    assert stats is not None
    return stats


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_answers_are_those_without_drafts(service: Service, speculating: Service, arguments: dict[str, Any]) -> None:
    before = speculation(speculating)
    expected, actual = answer(service, arguments), answer(speculating, arguments)
    assert actual.choices == expected.choices
    assert actual.system_fingerprint == expected.system_fingerprint
    details = actual.usage.completion_tokens_details
    after = speculation(speculating)
    assert details.accepted_prediction_tokens == after.num_accepted_tokens - before.num_accepted_tokens
    num_drafted = after.num_drafted_tokens - before.num_drafted_tokens  # none where they do not pay
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens == num_drafted


def test_a_draft_replica_that_is_killed_stops_nobody(service: Service, speculating: Service) -> None:
    arguments = {"temperature": 0, "max_tokens": 60, "prompt": PROMPT, "model": "smollm2-135m", "stream": True}
    expected = "".join(chunk.choices[0].text for chunk in client_of(service).completions.create(**arguments))
    draft = serve.get_deployment_handle(DRAFT_DEPLOYMENT, APPLICATION)
    node = ray.get_runtime_context().get_node_id()
    replica = decode_endpoint(draft.endpoint.remote(node).result(timeout_s=60)).replica_id
    deadline_s = time.monotonic() + 150
    while (remote := speculation(speculating).remote) is None or not remote.remote_proposals:
        assert time.monotonic() < deadline_s, "the draft model has proposed nothing"
        answer(speculating, ARGUMENTS[1])
    text = ""
    for place, chunk in enumerate(client_of(speculating).completions.create(**arguments)):
        text += chunk.choices[0].text
        if place == 3:
            name = f"SERVE_REPLICA::{APPLICATION}#{DRAFT_DEPLOYMENT}#{replica}"
            ray.kill(ray.get_actor(name, namespace="serve"), no_restart=False)
    assert text == expected
