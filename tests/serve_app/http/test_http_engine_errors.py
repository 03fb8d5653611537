"""Errors from behind the seam: a status before the first token, an error event after it, siblings always freed."""

import json
import logging

import pytest

from engine.errors import EngineDeadError, InvalidRequest
from engine.request import FinishReason, RequestOutput
from serve_app.errors import GenerationError, OverloadedError, UnavailableError
from tests.serve_app.http.fakes import FakeAdmitter, app_over, error_of, events_of, fetch, says

PATH = "/v1/completions"
SECRET = "the innards"
FAILED = RequestOutput("r", finish_reason=FinishReason.ERROR, error="NaN logits")
ENDINGS = [
    ([FAILED], "NaN logits", "generation_failed"),
    ([RequestOutput("r", finish_reason=FinishReason.ABORT)], "the engine aborted the request", "generation_failed"),
    ([GenerationError("the engine replica died")], "the engine replica died", "generation_failed"),
    ([UnavailableError("no engine left")], "no engine left", "unavailable"),
    ([], "the engine ended a stream before it was finished", "generation_failed"),
    ([RuntimeError(SECRET)], "internal error", "internal_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (InvalidRequest("token id 999 is out of range", "prompt"), 400, "prompt"),
        (OverloadedError("every queue is full", retry_after_s=2.3), 429, None),
        (UnavailableError("no engine is alive"), 503, None),
        (EngineDeadError("the engine has stopped"), 503, None),
        (GenerationError("out of memory"), 500, None),
    ],
)
def test_admission_errors_have_their_status(error, status, param, stream):
    response = fetch(FakeAdmitter(error=error), PATH, {"prompt": "x", "stream": stream})
    body = error_of(response, status)
    assert (body["message"], body["param"]) == (str(error), param)
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)


@pytest.mark.parametrize("stream", [False, True])
def test_the_unforeseen_is_logged_and_not_shown(stream, caplog):
    with caplog.at_level(logging.ERROR):
        response = fetch(FakeAdmitter(error=RuntimeError(SECRET)), PATH, {"prompt": "x", "stream": stream})
    body = error_of(response, 500)
    assert response.headers["x-request-id"] in body["message"]
    assert SECRET not in response.text
    assert SECRET in caplog.text
    assert response.headers["x-request-id"] in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("ending", "message", "code"), ENDINGS)
def test_before_the_first_token_it_is_a_status(ending, message, code, n, stream):
    admitter = FakeAdmitter([[*ending], [0.05, *says("never told")]])
    response = fetch(admitter, PATH, {"prompt": "x", "n": n, "stream": stream})
    error = error_of(response, 503 if code == "unavailable" else 500)
    assert message in error["message"]
    assert error["code"] == code
    assert all(s.num_aborts for s in admitter.streams[1:])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("ending", "message", "code"), ENDINGS)
def test_after_it_it_is_the_last_event(ending, message, code, n):
    admitter = FakeAdmitter([[*says("ab", end=None), *ending], [0.05, *says("never told")]])
    body = {"prompt": "x", "n": n, "stream": True, "stream_options": {"include_usage": True}}
    response = fetch(admitter, PATH, body)
    assert response.status_code == 200
    *chunks, last = events_of(response)
    assert [c["choices"][0]["text"] for c in chunks] == ["a", "b"]
    assert message in last["error"]["message"]
    assert last["error"]["code"] == code
    assert last["error"]["type"].endswith("error")
    assert SECRET not in response.text
    assert all(s.num_aborts for s in admitter.streams[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_one_failed_prompt_frees_its_siblings(stream):
    admitter = FakeAdmitter([says("fine"), [*says("b", end=None), FAILED], [5.0, *says("slow")]])
    response = fetch(admitter, PATH, {"prompt": ["a", "b", "c"], "stream": stream})
    assert "NaN logits" in response.text
    assert all(s.freed for s in admitter.streams[::2])


def test_an_error_that_quotes_the_client_is_clipped():
    error = error_of(fetch(FakeAdmitter(error=InvalidRequest("x" * 10_000)), PATH, {"prompt": "x"}), 400)
    assert len(error["message"]) == 500


def test_an_admitter_that_does_not_exist_yet_is_unavailable():
    from serve_app.http import build_http_app

    def no_model_yet():
        raise UnavailableError("the model is being loaded")

    app = build_http_app(no_model_yet, version="1")
    for path, body in [(PATH, {"prompt": "x"}), ("/ready", None), ("/v1/models", None)]:
        assert "being loaded" in error_of(fetch(FakeAdmitter(), path, body, app=app), 503)["message"]
    assert fetch(FakeAdmitter(), "/health", app=app).status_code == 200


@pytest.mark.parametrize(
    ("state", "status", "is_ready"),
    [("ready", 200, True), ("scaled_to_zero", 200, True), ("no heartbeat for 4.2 s", 503, False)],
)
def test_readiness(state, status, is_ready):
    response = fetch(FakeAdmitter(state=state), "/ready")
    assert response.status_code == status
    assert response.json() == {"ready": is_ready, "state": state}


def test_readiness_that_hangs_is_not_ready(monkeypatch):
    import asyncio

    class Hung(FakeAdmitter):
        async def readiness(self):
            await asyncio.sleep(60)

    monkeypatch.setattr("serve_app.http.status.READINESS_TIMEOUT_S", 0.05)
    response = fetch(Hung(), "/ready")
    assert response.status_code == 503
    assert response.json() == {"ready": False, "state": "no answer within 0.05 s"}


def test_status_endpoints():
    admitter = FakeAdmitter()
    assert fetch(admitter, "/health").json() == {"status": "alive"}
    assert fetch(admitter, "/version").json() == {"version": "1.2.3"}
    (model,) = fetch(admitter, "/v1/models").json()["data"]
    assert (model["id"], model["object"], model["owned_by"], model["max_model_len"]) == (
        admitter.model_name,
        "model",
        "slipstream",
        512,
    )
    assert fetch(admitter, f"/v1/models/{admitter.model_name}").json() == model
    assert error_of(fetch(admitter, "/v1/models/other"), 404)["code"] == "model_not_found"


def test_an_admitter_itself_will_do_where_no_getter_is_needed():
    from serve_app.http import build_http_app

    app = build_http_app(FakeAdmitter(), version="9")
    assert fetch(FakeAdmitter(), PATH, {"prompt": "x"}, app=app).json()["choices"][0]["text"] == "hello"


def test_a_stream_that_broke_does_not_break_the_next():
    admitter = FakeAdmitter([[*says("ab", end=None), RuntimeError(SECRET)]])
    app = app_over(admitter)
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    assert "internal_error" in fetch(admitter, PATH, body, app=app).text
    admitter.scripts = [says("well")]
    assert fetch(admitter, PATH, {"prompt": "x"}, app=app).json()["choices"][0]["text"] == "well"
