"""Requests that are turned away, or whose time is over: status, code and headers, and that nothing stays behind."""

import asyncio
import json

import openai
import pytest
from starlette.requests import Request

from engine.request import FinishReason
from serve_app.errors import Overload, OverloadedError, TimedOutError, TimeLimit
from serve_app.http.completions import CompletionRequest
from serve_app.http.tenant import SHARED, tenant_of
from serve_app.time_limits import TimeLimits
from tests.serve_app.http.fakes import LIMIT_S, FakeAdmitter, app_over, error_of, events_of, fetch, put_forward, says
from tests.serve_app.http.test_http_observer import Recorder

PATH = "/v1/completions"
CHAT = "/v1/chat/completions"
NEVER = 30.0  # seconds, of a test that would fail


def limited(admitter: FakeAdmitter, body: dict, recorder: Recorder | None = None, path: str = PATH, **limits: float):
    app = app_over(admitter, time_limits=TimeLimits(**limits), observer=recorder)
    return fetch(admitter, path, body, app=app)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_no_token_in_time(stream, n):
    admitter, recorder = FakeAdmitter([[NEVER, *says("late")]]), Recorder()
    response = limited(admitter, {"prompt": "x", "n": n, "stream": stream}, recorder, queue_timeout_s=0.05)
    error = error_of(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_timeout")
    assert "waited for 0.05 s" in error["message"]
    assert response.headers["retry-after"] == "7"  # what the admitter says, rounded up
    assert all(stream.freed for stream in admitter.streams)
    assert recorder.timed_out == [(TimeLimit.QUEUE, n)]
    assert recorder.reasons == {"error": n}


def test_the_queue_ends_with_the_first_token_of_any_choice():
    scripts = [[*says("a", end=None), lambda: put_forward(1000.0), *says("b")], [0.05, *says("later")]]
    response = limited(FakeAdmitter(scripts), {"prompt": "x", "n": 2}, queue_timeout_s=100.0)
    assert [choice["text"] for choice in response.json()["choices"]] == ["ab", "later"]


@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_that_takes_too_long(n):
    admitter, recorder = FakeAdmitter([[*says("ab", end=None), NEVER, *says("late")]]), Recorder()
    response = limited(admitter, {"prompt": "x", "n": n}, recorder, request_timeout_s=0.1)
    error = error_of(response, 504)
    assert (error["type"], error["code"]) == ("server_error", "request_timeout")
    assert response.headers["x-should-retry"] == "false"
    assert all(stream.freed for stream in admitter.streams)
    assert recorder.timed_out == [(TimeLimit.REQUEST, n)]
    assert recorder.reasons == {"error": n}


@pytest.mark.parametrize("path", [PATH, CHAT])
def test_a_stream_that_takes_too_long_ends_with_an_event(path):
    clock = [lambda: put_forward(500.0), *says("c", end=None), lambda: put_forward(1000.0)]
    admitter = FakeAdmitter([[*says("ab", end=None), *clock, NEVER, *says("late")]])
    body = {"prompt": "x"} if path == PATH else {"messages": [{"role": "user", "content": "x"}]}
    response = limited(admitter, body | {"stream": True}, path=path, request_timeout_s=1000.0, queue_timeout_s=100.0)
    assert response.status_code == 200
    *chunks, last = events_of(response)
    assert len(chunks) == 3
    assert last["error"]["code"] == "request_timeout"
    assert all(stream.freed for stream in admitter.streams)


def test_it_is_freed_though_nobody_reads():
    """A client that takes nothing from its connection."""
    admitter = FakeAdmitter([[*says("ab", end=None), NEVER]])
    app = app_over(admitter, time_limits=TimeLimits(request_timeout_s=0.05))

    async def run() -> None:
        blocked = asyncio.Event()
        inbox = [{"type": "http.request", "body": json.dumps({"prompt": "x", "stream": True}).encode()}]

        async def receive():
            return inbox.pop() if inbox else await asyncio.Event().wait()

        async def send(message):
            if message["type"] == "http.response.body":
                blocked.set()
                await asyncio.Event().wait()

        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": PATH, "raw_path": PATH.encode(),
            "query_string": b"", "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        task = asyncio.create_task(app(scope, receive, send))
        await asyncio.wait_for(blocked.wait(), LIMIT_S)
        async with asyncio.timeout(LIMIT_S):
            while not admitter.streams[0].num_aborts:
                await asyncio.sleep(0.01)
        assert admitter.streams[0].num_aborts == 1
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(run())


def test_no_timer_is_left_behind():
    admitter = FakeAdmitter()
    app = app_over(admitter, time_limits=TimeLimits(queue_timeout_s=100, request_timeout_s=200))

    async def run() -> None:
        import httpx

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            for stream in (False, True):
                assert (await client.post(PATH, json={"prompt": "x", "stream": stream})).status_code == 200
        loop = asyncio.get_running_loop()
        assert all(handle.cancelled() for handle in loop._scheduled)  # type: ignore[attr-defined]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Overload.QUEUE_FULL, "overloaded"),
        (Overload.ENGINE_FULL, "overloaded"),
        (Overload.KEY_LIMIT, "rate_limit_exceeded"),
    ],
)
def test_rejections_are_told_apart_and_counted(reason, code):
    admitter, recorder = FakeAdmitter(error=OverloadedError("full", 2.3, reason)), Recorder()
    response = limited(admitter, {"prompt": ["x", "y"], "n": 3}, recorder)
    error = error_of(response, 429)
    assert (error["type"], error["code"], response.headers["retry-after"]) == ("rate_limit_error", code, "3")
    assert recorder.rejected == [(reason, 6)]
    assert not recorder.ends


def test_a_time_out_at_admission_is_counted():
    admitter, recorder = FakeAdmitter(error=TimedOutError("waited", TimeLimit.QUEUE, 0.2)), Recorder()
    response = limited(admitter, {"prompt": "x", "n": 2}, recorder)
    assert error_of(response, 429)["code"] == "queue_timeout"
    assert response.headers["retry-after"] == "1"
    assert recorder.timed_out == [(TimeLimit.QUEUE, 2)]


def test_which_time_is_over():
    limits = TimeLimits(queue_timeout_s=5, request_timeout_s=60)
    assert (limits.next_timeout_s(has_begun=False), limits.next_timeout_s(has_begun=True)) == (5, 60)
    assert limits.error(has_begun=False, retry_after_s=3).limit is TimeLimit.QUEUE
    assert limits.error(has_begun=True, retry_after_s=3).limit is TimeLimit.REQUEST
    assert TimeLimits(queue_timeout_s=60, request_timeout_s=5).error(False, 3).limit is TimeLimit.REQUEST
    assert TimeLimits().next_timeout_s(has_begun=False) == float("inf")


def call_of(body: dict, headers: dict[str, str] | None = None, path: str = PATH):
    admitter = FakeAdmitter()
    assert fetch(admitter, path, body, headers=headers or {}).status_code == 200
    return admitter.calls[0]


def test_the_tenant_is_the_key_else_the_user_else_all_share_one():
    body = {"prompt": "x"}
    first, second = ({"authorization": f"Bearer key-{number}"} for number in (1, 2))
    tenants = [
        call_of(body, first).tenant,
        call_of(body, second).tenant,
        call_of(body | {"user": "u1"}).tenant,
        call_of(body | {"user": "u2"}).tenant,
        call_of(body | {"user": "Bearer key-1"}).tenant,  # a user may be called anything
        call_of(body).tenant,
    ]
    assert len(set(tenants)) == len(tenants)
    assert call_of(body | {"user": "u1"}, first).tenant == tenants[0]
    assert call_of(body | {"safety_identifier": "u1"}).tenant == tenants[2]
    assert call_of({"messages": [{"role": "user", "content": "x"}]}, first, CHAT).tenant == tenants[0]
    assert tenants[-1] == SHARED
    assert not any("key" in tenant or "u1" in tenant for tenant in tenants)


def test_an_empty_key_is_none():
    scope = {"type": "http", "headers": [(b"authorization", b"  ")]}
    assert tenant_of(Request(scope), CompletionRequest(prompt="x")) == SHARED


def test_the_openai_client_understands():
    import httpx

    admitter = FakeAdmitter(error=OverloadedError("full", 0.5, Overload.KEY_LIMIT))
    transport = httpx.ASGITransport(app=app_over(admitter))

    async def run() -> None:
        async with openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="k", max_retries=1, http_client=httpx.AsyncClient(transport=transport)
        ) as client:
            with pytest.raises(openai.RateLimitError) as caught:
                await client.completions.create(model="tiny/bytes", prompt="x")
            assert caught.value.code == "rate_limit_exceeded"
            assert len(admitter.calls) == 2  # it came back once
            admitter.error = TimedOutError("too long", TimeLimit.REQUEST)
            with pytest.raises(openai.InternalServerError) as late:
                await client.completions.create(model="tiny/bytes", prompt="x")
            assert late.value.status_code == 504
            assert len(admitter.calls) == 3  # and did not

    asyncio.run(run())


def test_finish_reasons_of_a_call_that_ends_in_time():
    admitter, recorder = FakeAdmitter(), Recorder()
    limited(admitter, {"prompt": "x"}, recorder, queue_timeout_s=5, request_timeout_s=5)
    assert recorder.reasons == {FinishReason.STOP.value: 1}
    assert not recorder.timed_out
