"""What an ingress does when engine replicas die, hang, drain and come back; the replicas are scripted."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from engine.request import FinishReason, RequestOutput, SamplingParams
from serve_app import engine_client
from serve_app.engine_client import EngineClient
from serve_app.errors import Overload, OverloadedError, UnavailableError
from serve_app.failover import MAX_FRUITLESS, FailoverPolicy, Loss
from serve_app.group import Group, PlacedPrompt
from serve_app.messages import Refusal, SubmittedPrompt
from serve_app.replica_registry import ReplicaGoneError
from serve_app.token_stream import RequestStream
from tests.serve_app import chaos_app
from tests.serve_app.fake_replicas import FakeReplicas, until, within

SILENCE_S = 0.3
ENDLESS_S = 3600.0
SAMPLING = SamplingParams(seed=7, max_tokens=50, min_tokens=3, frequency_penalty=0.5)
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "HOUSEKEEPING_S", 0.02)
    monkeypatch.setattr(engine_client, "SILENCE_LIMIT_S", ENDLESS_S)  # a busy machine is silent too


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """From now on, silence is noticed after so many seconds; at first after SILENCE_S."""

    def notice_after(seconds: float) -> None:
        monkeypatch.setattr(engine_client, "SILENCE_LIMIT_S", seconds)

    notice_after(SILENCE_S)
    return notice_after


NoticeAfter = Callable[[float], None]
Test = Callable[[EngineClient, FakeReplicas], Awaitable[None]]


def run(test: Test, *running: str, policy: FailoverPolicy | None = None) -> None:
    async def main() -> None:
        replicas = FakeReplicas(*running)
        client = EngineClient(replicas, "ingress", policy, replicas.told)  # type: ignore[arg-type]
        try:
            await within(test(client, replicas), 100)
        finally:
            await client.close()

    asyncio.run(main())


def placed(*names: str) -> PlacedPrompt:
    streams = [RequestStream(name, lambda: None) for name in names]
    return PlacedPrompt(SubmittedPrompt([1, 2], SAMPLING, [(n, i) for i, n in enumerate(names)], 4), streams)


async def read(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


def ids(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def test_a_failed_call_goes_on_elsewhere_from_what_was_received() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        [opening] = client.submit([item])
        first = await replicas.call(0)
        assert first.submission.prompts[0].outputs == []
        first.open()
        assert (await within(opening)).replica_id == first.replica_id
        first.say(10, 11, num_cached_tokens=5, num_drafted_tokens=4, num_accepted_tokens=1)
        first.fail(RuntimeError("the actor died"))

        second = await replicas.call(1)
        assert {first.replica_id, second.replica_id} == {"a", "b"}
        sent = second.submission
        [prompt] = sent.prompts
        assert (sent.attempt, sent.fingerprint) == (1, "fp")
        assert (prompt.token_ids, prompt.sampling, prompt.priority) == ([1, 2], SAMPLING, 4)
        assert (prompt.choices, prompt.outputs) == ([("r#1", 0)], [[10, 11]])
        assert prompt.waited_s > 0
        second.open()
        second.say(12, num_cached_tokens=16, num_drafted_tokens=2)
        second.say(13, reason=FinishReason.STOP, stop_token_id=13, num_drafted_tokens=3, num_accepted_tokens=2)
        outputs = await within(read(item.streams[0]))
        assert ids(outputs) == [10, 11, 12, 13]
        last = outputs[-1]
        assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, 13)
        # As if nothing had happened: prefix hits are those of the first engine, drafts those of both.
        assert (last.num_cached_tokens, last.num_drafted_tokens, last.num_accepted_tokens) == (5, 7, 3)
        assert (replicas.told.num_attempts, replicas.told.losses, replicas.told.num_stale) == (2, [(Loss.FAILED, 1)], 0)
        assert len(replicas.told.recoveries_s) == 1
        assert item.streams[0].fingerprints == ["fp"]

    run(test, "a", "b")


def test_choices_that_have_ended_stay_behind() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item, other = placed("r", "s", "t"), placed("u")
        client.submit([item])
        client.submit([other])
        (await replicas.call(1)).open()
        first = replicas.calls[0]
        first.open()
        first.say(10, member=0, reason=FinishReason.LENGTH)
        first.say(20, member=2)
        await until(lambda: item.streams[2].token_ids)
        item.streams[1].abort()
        first.fail()
        second = await replicas.call(2)
        [prompt] = second.submission.prompts
        assert (prompt.choices, prompt.outputs) == ([("t#1", 2)], [[20]])
        second.open()
        second.say(21, reason=FinishReason.LENGTH)
        assert ids(await within(read(item.streams[2]))) == [20, 21]
        assert ids(await within(read(item.streams[0]))) == [10]
        assert replicas.told.losses == [(Loss.FAILED, 1)]
        assert other.streams[0].attempt == 0

    run(test, "a", "b")


def test_an_engine_that_dies_in_a_living_replica() -> None:
    """Its requests end with ABORT, tokens among them."""

    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        first = await replicas.call(0)
        first.open()
        first.say(10, reason=FinishReason.ABORT, error="the device is gone")
        second = await replicas.call(1)
        assert second.submission.prompts[0].outputs == [[10]]
        second.open()
        second.say(11, reason=FinishReason.LENGTH)
        assert ids(await within(read(item.streams[0]))) == [10, 11]

    run(test, "a", "b")


def test_a_request_of_its_own_fault_is_not_sent_again() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        first = await replicas.call(0)
        first.open()
        first.say(reason=FinishReason.ERROR, error="the logits are not numbers")
        first.fail()
        [output] = await within(read(item.streams[0]))
        assert (output.finish_reason, output.error) == (FinishReason.ERROR, "the logits are not numbers")
        await asyncio.sleep(0.1)
        assert len(replicas.calls) == 1

    run(test, "a", "b")


def test_a_silent_replica_is_left_and_what_it_says_later_is_dropped(silence: NoticeAfter) -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        first = await replicas.call(0)
        first.is_deaf = True  # it is stopped
        first.open()
        first.say(10)
        started_s = time.monotonic()
        second = await replicas.call(1)
        silence(ENDLESS_S)
        assert time.monotonic() - started_s > SILENCE_S * 0.8
        assert second.replica_id != first.replica_id
        assert first.is_cancelled
        second.open()
        second.say(11)
        await until(lambda: len(item.streams[0].token_ids) == 2)
        first.say(11, 12)  # it goes on, and has not heard yet that it need not
        first.say(13, reason=FinishReason.LENGTH)
        first.fail()
        second.say(12, reason=FinishReason.LENGTH)
        assert ids(await within(read(item.streams[0]))) == [10, 11, 12]
        assert (replicas.told.losses, replicas.told.num_stale) == ([(Loss.SILENT, 1)], 2)
        assert replicas.told.recoveries_s[0] > SILENCE_S * 0.8
        # Until it has answered that it is well, it gets nothing.
        for number in range(2, 6):
            client.submit([placed(f"n{number}")])
            assert (await replicas.call(number)).replica_id == second.replica_id
        assert first.replica_id is not None
        replicas.fingerprints[first.replica_id] = "fp"
        await until(lambda: not client._book._suspects)
        client.submit([placed("busier is the other")])
        assert (await replicas.call(6)).replica_id == first.replica_id

    run(test, "a", "b")


@pytest.mark.usefixtures("silence")
def test_heartbeats_keep_a_queued_request_where_it_is() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        client.submit([placed("r")])
        call = await replicas.call(0)
        call.open()
        for _ in range(20):
            await asyncio.sleep(SILENCE_S / 10)
            call.beat()
        assert len(replicas.calls) == 1

    run(test, "a", "b")


def test_a_replica_that_never_opens_a_group(silence: NoticeAfter) -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        [opening] = client.submit([item])
        first = await replicas.call(0)
        first.is_deaf = True
        second = await replicas.call(1)
        silence(ENDLESS_S)
        assert second.submission.attempt == 1
        second.open()
        assert (await within(opening)).replica_id == second.replica_id != first.replica_id
        first.open()  # too late
        first.say(99)
        second.say(10, reason=FinishReason.LENGTH)
        assert ids(await within(read(item.streams[0]))) == [10]

    run(test, "a", "b")


@pytest.mark.usefixtures("silence")
def test_an_ingress_that_was_stopped_blames_nobody() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        client.submit([placed("r")])
        call = await replicas.call(0)
        call.open()
        await asyncio.sleep(0.05)
        for _ in range(3):
            time.sleep(2 * SILENCE_S)  # the whole process stands still
            call.beat()
            await asyncio.sleep(0.05)
        assert len(replicas.calls) == 1

    run(test, "a", "b")


def test_a_draining_replica_is_left_for_one_that_is_known_to_fit() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        first = await replicas.call(0)
        first.open()
        first.say(10)
        replicas.run()  # it leaves, and nobody is there yet
        for _ in range(3):
            await asyncio.sleep(0.05)
            first.beat()
        assert len(replicas.calls) == 1
        first.say(11)
        replicas.run("b")  # of which nothing is known
        for _ in range(3):
            await asyncio.sleep(0.05)
            first.beat()
        assert len(replicas.calls) == 1
        replicas.fingerprints["b"] = "fp"
        second = await replicas.call(1)
        assert (second.replica_id, second.submission.prompts[0].outputs) == ("b", [[10, 11]])
        assert first.is_cancelled
        second.open()
        second.say(12, reason=FinishReason.LENGTH)
        assert ids(await within(read(item.streams[0]))) == [10, 11, 12]
        assert replicas.told.losses == [(Loss.LEFT, 1)]

    run(test, "a")


def test_a_draining_replica_is_not_left_for_another_model() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        first = await replicas.call(0)
        first.open()
        first.say(10)
        replicas.run("b")
        replicas.fingerprints["b"] = "another"
        for _ in range(5):
            await asyncio.sleep(0.05)
            first.beat()
        assert len(replicas.calls) == 1
        first.say(11, reason=FinishReason.LENGTH)
        assert ids(await within(read(item.streams[0]))) == [10, 11]

    run(test, "a")


def test_the_end_of_an_answer_is_acknowledged_at_once() -> None:
    """The replica's call ends with that."""

    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        client._housekeeping.cancel()  # which acknowledges too, but later
        item = placed("r")
        client.submit([item])
        call = await replicas.call(0)
        call.open()
        call.say(10)
        call.say(11, reason=FinishReason.LENGTH)
        assert ids(await within(read(item.streams[0]))) == [10, 11]
        await until(lambda: replicas.acknowledged == {call.submission.group_id: 2})
        assert not call.is_cancelled

    run(test, "a")


def test_a_draining_replica_which_hears_no_acknowledgement_has_its_ended_call_cancelled() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        call = await replicas.call(0)
        call.open()
        replicas.run()
        call.say(10, reason=FinishReason.LENGTH)
        assert ids(await within(read(item.streams[0]))) == [10]
        await until(lambda: call.is_cancelled)
        assert replicas.told.losses == []

    run(test, "a")


def test_a_full_replica_sends_what_is_new_elsewhere_and_the_client_away_where_all_are() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        [opening] = client.submit([item])
        for number in range(2):
            call = await replicas.call(number)
            assert call.replica_id is not None
            call.send(Refusal("full", call.replica_id, is_full=True))
        with pytest.raises(OverloadedError) as caught:
            await within(opening)
        assert caught.value.reason is Overload.ENGINE_FULL
        assert {call.replica_id for call in replicas.calls} == {"a", "b"}
        assert replicas.told.losses == []

        client.submit([again := placed("again")])  # neither is shunned for it
        third = await replicas.call(2)
        third.open()
        third.say(10, reason=FinishReason.STOP)
        *_, last = await within(read(again.streams[0]))
        assert last.finish_reason is FinishReason.STOP

    run(test, "a", "b")


def test_failover_across_fingerprints_is_refused() -> None:
    """By the replica, where the ingress does not know; and the stream ends when no other comes in time."""

    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        first = await replicas.call(0)
        first.open()
        first.say(10)
        await until(lambda: item.streams[0].token_ids)
        replicas.run("b")
        first.fail()
        second = await replicas.call(1)
        assert second.submission.fingerprint == "fp"
        second.send(Refusal("the engine is another", "b", "another"))
        second.fail()
        client._policy = FailoverPolicy(timeout_s=0.5)
        output, last = await within(read(item.streams[0]))
        assert output.token_ids == (10,)
        assert last.finish_reason is FinishReason.ERROR
        assert "within 0.5 s" in str(last.error)
        assert len(replicas.calls) == 2  # it was not asked again
        fresh = placed("fresh")  # which has no token of another engine yet
        client.submit([fresh])
        third = await replicas.call(2)
        assert (third.replica_id, third.submission.fingerprint) == ("b", "")

    run(test, "a")


def test_one_of_the_same_fingerprint_is_waited_for() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        first = await replicas.call(0)
        first.open()
        first.say(10)
        await until(lambda: item.streams[0].token_ids)
        replicas.run("b")
        first.fail()
        second = await replicas.call(1)
        second.send(Refusal("the engine is another", "b", "another"))
        await asyncio.sleep(0.2)
        replicas.run("b", "c")
        third = await replicas.call(2)
        assert (third.replica_id, third.submission.attempt) == ("c", 1)
        third.open()
        third.say(11, reason=FinishReason.LENGTH)
        assert ids(await within(read(item.streams[0]))) == [10, 11]

    run(test, "a")


def test_failover_across_fingerprints_where_allowed_is_told() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item, untouched = placed("r"), placed("s")
        client.submit([item, untouched])
        first = await replicas.call(0)
        first.open()
        first.say(10)
        await until(lambda: item.streams[0].token_ids)
        replicas.run("b")
        first.fail()
        second = await replicas.call(1)
        assert second.submission.fingerprint == ""
        second.open(fingerprint="another")
        second.say(11, reason=FinishReason.LENGTH)
        assert ids(await within(read(item.streams[0]))) == [10, 11]
        assert item.streams[0].fingerprints == ["fp", "another"]
        assert untouched.streams[0].fingerprints == ["another"]  # it has nothing of the first

    run(test, "a", policy=FailoverPolicy(across_fingerprints=True))


def test_without_any_replica_requests_wait_for_one_and_no_longer_than_the_timeout() -> None:
    """Nothing is called meanwhile: see serve_app.waking."""

    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        items = placed("r"), placed("s")
        client.submit(items)
        for item, call in zip(items, [await replicas.call(0)] * 2, strict=True):
            call.open()
            call.say(10, member=0 if item is items[0] else 1)
        await until(lambda: all(item.streams[0].token_ids for item in items))
        replicas.run()
        replicas.calls[0].fail()
        items[1].streams[0].abort()
        *_, last = await within(read(items[0].streams[0]))
        assert last.finish_reason is FinishReason.ERROR

        fresh = placed("fresh")  # has lost nothing: how long it may wait is not for the failover to say
        [opening] = client.submit([fresh])
        await asyncio.sleep(0.6)
        assert not opening.done()
        assert client.num_unfinished == 1
        assert len(replicas.calls) == 1
        replicas.run("b")
        second = await replicas.call(1)
        assert (second.replica_id, len(second.request_ids)) == ("b", 1)
        second.open()
        assert (await within(opening)).replica_id == "b"

    run(test, "a", policy=FailoverPolicy(timeout_s=0.4))


def test_the_only_replica_is_stopped_and_goes_on(silence: NoticeAfter) -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        first = await replicas.call(0)
        first.is_deaf = True
        first.open()
        first.say(10)
        await until(lambda: replicas.told.losses)
        silence(ENDLESS_S)
        await asyncio.sleep(0.2)
        assert len(replicas.calls) == 1  # nobody to send it to
        first.say(11)
        replicas.fingerprints["a"] = "fp"
        second = await replicas.call(1)
        assert second.request_ids == ["r#1"]  # the engine still has `r`
        assert second.submission.prompts[0].outputs == [[10]]
        second.open()
        second.say(11, reason=FinishReason.LENGTH)
        assert ids(await within(read(item.streams[0]))) == [10, 11]

    run(test, "a")


@pytest.mark.usefixtures("silence")
def test_a_client_that_leaves_while_its_request_waits() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        first = await replicas.call(0)
        first.open()
        first.is_deaf = True
        await until(lambda: replicas.told.losses)
        item.streams[0].abort()
        replicas.fingerprints["a"] = "fp"
        await asyncio.sleep(0.2)
        assert len(replicas.calls) == 1
        assert [output.finish_reason for output in await within(read(item.streams[0]))] == [FinishReason.ABORT]

    run(test, "a")


def test_a_request_that_kills_every_engine_is_given_up() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        number = 0
        for number in range(2):  # each brings a token: that is no fault of the request
            call = await replicas.call(number)
            call.open()
            call.say(10 + number)
            call.fail()
            replicas.run(f"after {number}")
        for number in range(2, 3 + MAX_FRUITLESS):
            call = await replicas.call(number)
            call.open()
            replicas.run(f"after {number}")
            call.fail()
        *_, last = await within(read(item.streams[0]))
        assert last.finish_reason is FinishReason.ERROR
        assert "replicas were lost" in str(last.error)
        assert item.streams[0].token_ids == [10, 11]
        await asyncio.sleep(0.1)
        assert len(replicas.calls) == number + 1

    run(test, "a")


def test_a_call_that_was_sent_nowhere_is_no_attempt() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        [opening] = client.submit([item])
        first = await replicas.call(0)
        replicas.run("b")
        first.fail(ReplicaGoneError("a"))
        second = await replicas.call(1)
        assert (second.replica_id, second.submission.attempt) == ("b", 0)
        second.send(Refusal("the engine has stopped", "b"))
        replicas.run("b", "c")
        third = await replicas.call(2)
        assert (third.replica_id, third.submission.attempt) == ("c", 0)
        third.open()
        await within(opening)
        assert replicas.told.losses == []

    run(test, "a")


def test_what_is_aborted_before_it_could_be_sent_is_not_sent() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        item.streams[0].abort()
        await asyncio.sleep(0.1)
        assert not replicas.calls

    run(test, "a")


def outcome_of_a_stop(silence: NoticeAfter) -> tuple[list[int], str | None]:
    """Ids and error of an answer whose first replica is stopped and then goes on, about something else."""
    outcome: list[tuple[list[int], str | None]] = []

    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        client.submit([item])
        first = await replicas.call(0)
        first.is_deaf = True
        first.open()
        first.say(10)
        await until(lambda: len(replicas.calls) > 1 or item.streams[0].finished)
        silence(ENDLESS_S)
        if len(replicas.calls) > 1:
            second = replicas.calls[1]
            second.open()
            second.say(11)
            await until(lambda: len(item.streams[0].token_ids) == 2)
            first.say(99)
            await asyncio.sleep(0.05)
            second.say(12, reason=FinishReason.LENGTH)
        outputs = await within(read(item.streams[0]))
        outcome.append((ids(outputs), outputs[-1].error))

    run(test, "a", "b")
    return outcome[0]


@pytest.mark.parametrize(
    ("take_out", "expected"),
    [
        (lambda: None, ([10, 11, 12], None)),
        (chaos_app.take_out_cancelling, ([10, 11, 12], None)),
        (chaos_app.take_out_fencing, ([10, 11, 99, 12], None)),
        (chaos_app.take_out_resumption, ([10], "lost")),
    ],
)
def test_what_the_chaos_run_would_see_without_a_part(
    monkeypatch: pytest.MonkeyPatch,
    silence: NoticeAfter,
    take_out: Callable[[], None],
    expected: tuple[list[int], str | None],
) -> None:
    """It compares answers, and counts errors: without fencing or without resumption it must fail."""
    for owner, name in ((Group, "close"), (RequestStream, "receive"), (PlacedPrompt, "lose")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # what is taken out comes back
    take_out()
    assert outcome_of_a_stop(silence) == expected


def test_whoever_waits_for_an_opening_is_told_of_an_abort_before_it() -> None:
    """Without a replica; and where the call is refused after the abort."""

    async def test(client: EngineClient, replicas: FakeReplicas) -> None:
        item = placed("r")
        [opening] = client.submit([item])
        item.streams[0].abort()
        with pytest.raises(UnavailableError, match="aborted"):
            await within(opening)

        replicas.run("a", "b")
        aborted, other = placed("s"), placed("t")
        openings = client.submit([aborted, other])
        calls = [await replicas.call(number) for number in range(2)]
        aborted.streams[0].abort()
        with pytest.raises(UnavailableError, match="aborted"):
            await within(openings[0])
        [left] = [call for call in calls if call.request_ids == ["t"]]
        left.open()
        assert (await within(openings[1])).replica_id == left.replica_id

        replicas.run("a")
        both = placed("u"), placed("v")
        openings = client.submit(both)
        call = await replicas.call(2)
        both[0].streams[0].abort()
        replicas.run("a", "b")
        call.send(Refusal("it is full", "a", is_full=True))
        with pytest.raises(UnavailableError, match="aborted"):
            await within(openings[0])
        last = await replicas.call(3)
        assert (last.replica_id, last.request_ids) == ("b", ["v"])
        last.open()
        await within(openings[1])

    run(test)
