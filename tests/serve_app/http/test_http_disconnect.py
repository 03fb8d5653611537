"""A client that goes away frees everything it had in the engine, at whatever point it leaves."""

import asyncio

import pytest

from tests.serve_app.http.fakes import LIMIT_S, FakeAdmitter, app_over, leave, left_over, says

SLOW = [0.01, *says("a", end=None), 60.0, *says("never read")]
BODY = {"prompt": ["p", "q"], "n": 2}


def body_chunks(sent):
    return [m["body"] for m in sent if m["type"] == "http.response.body" and m["body"]]


def run(admitter, body, when):
    """The messages sent, and how many tasks were left behind."""

    async def main():
        before = asyncio.all_tasks()
        sent = await leave(app_over(admitter), "/v1/completions", body, when)
        return sent, await left_over(before)  # an admission that outlives its client is the one task that may

    return asyncio.run(main())


@pytest.mark.parametrize("n", [1, 2])
def test_stream_is_aborted_while_no_token_is_due(n):
    admitter = FakeAdmitter([SLOW])
    sent, left = run(admitter, {"prompt": "p", "n": n, "stream": True}, lambda sent: len(body_chunks(sent)) == n)
    assert sent[0]["status"] == 200
    assert len(body_chunks(sent)) == n
    assert all(s.num_aborts for s in admitter.streams)
    assert not left


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("scripts", [[[60.0]], [SLOW, [60.0]]])
def test_client_leaves_before_the_answer(scripts, stream):
    admitter = FakeAdmitter(scripts if not stream else [[60.0]])
    sent, left = run(admitter, BODY | {"stream": stream}, lambda _: len(admitter.streams) == 4)
    assert sent[0]["status"] == 499
    assert not body_chunks(sent)
    assert all(s.num_aborts for s in admitter.streams)
    assert not left


@pytest.mark.parametrize("stream", [False, True])
def test_client_leaves_during_admission(stream):
    """The admission, which others share, goes on; what it gives this client is given back."""
    admitter = FakeAdmitter([SLOW], admit_delay_s=0.05)
    sent, left = run(admitter, BODY | {"stream": stream}, lambda _: len(admitter.calls) == 1)
    assert sent[0]["status"] == 499
    assert len(admitter.streams) == 4
    assert all(s.num_aborts for s in admitter.streams)
    assert not left


def test_failed_admission_of_a_client_that_left_is_no_warning(caplog):
    admitter = FakeAdmitter(error=RuntimeError("x"), admit_delay_s=0.05)
    run(admitter, BODY, lambda _: len(admitter.calls) == 1)
    assert "never retrieved" not in caplog.text


def test_finished_streams_are_not_aborted():
    admitter = FakeAdmitter([says("ab")])
    sent, left = run(admitter, BODY | {"stream": True}, lambda sent: sent and not sent[-1].get("more_body", True))
    assert b"".join(body_chunks(sent)).endswith(b"data: [DONE]\n\n")
    assert [s.num_aborts for s in admitter.streams] == [0] * 4
    assert not left


@pytest.mark.parametrize("n", [1, 2])
def test_server_that_fails_the_send_counts_as_a_client_that_left(n):
    admitter = FakeAdmitter([SLOW])

    async def main():
        inbox = [{"type": "http.request", "body": b'{"prompt": "p", "stream": true, "n": %d}' % n}]

        async def receive():
            if not inbox:
                await asyncio.sleep(60)
            return inbox.pop()

        async def send(message):
            if message["type"] == "http.response.body":
                raise OSError("broken pipe")

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": [],
            "root_path": "", "scheme": "http", "server": ("s", 80),
        }  # fmt: skip
        await asyncio.wait_for(app_over(admitter)(scope, receive, send), LIMIT_S)
        return await left_over({asyncio.current_task()})

    assert not asyncio.run(main())
    assert all(s.num_aborts for s in admitter.streams)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05])
def test_handler_that_is_cancelled_frees_everything(stream, delay_s):
    """A server may also cancel the handler: during admission, before or after the first token."""
    admitter = FakeAdmitter([SLOW], admit_delay_s=0.01)

    async def main():
        serving = asyncio.ensure_future(
            leave(app_over(admitter), "/v1/completions", BODY | {"stream": stream}, lambda _: False)
        )
        while not admitter.calls:
            await asyncio.sleep(0)
        await asyncio.sleep(delay_s)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        return await left_over({asyncio.current_task()})

    assert not asyncio.run(main())
    assert len(admitter.streams) == 4
    assert all(s.num_aborts for s in admitter.streams)


def test_one_client_leaves_and_the_other_is_served():
    gone, stays = FakeAdmitter([SLOW]), FakeAdmitter([[0.05, *says("served")]])

    async def main():
        return await asyncio.gather(
            leave(app_over(gone), "/v1/completions", BODY, lambda _: len(gone.streams) == 4),
            leave(app_over(stays), "/v1/completions", BODY, lambda sent: len(sent) == 2),
        )

    _, answered = asyncio.run(main())
    assert answered[0]["status"] == 200
    assert not any(s.num_aborts for s in stays.streams)
