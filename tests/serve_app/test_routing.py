"""Where an ingress sends prompts, and what it moves; the replicas are scripted."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from engine.request import FinishReason, RequestOutput, SamplingParams
from serve_app import engine_client, replica_book
from serve_app.engine_client import EngineClient
from serve_app.failover import Loss
from serve_app.group import PlacedPrompt
from serve_app.messages import Refusal, SubmittedPrompt
from serve_app.placement import Choice, Placement, PlacementRule
from serve_app.queued_prompts import queues_of
from serve_app.rebalancing import MAX_MOVES
from serve_app.token_stream import RequestStream
from tests.serve_app.fake_replicas import FakeCall, FakeReplicas, until, within

BLOCK = 16
HEAD = list(range(1000, 1064))  # four blocks
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "HOUSEKEEPING_S", 0.02)
    for module, name in ((engine_client, "SILENCE_LIMIT_S"), (replica_book, "LOAD_EXPIRY_S")):
        monkeypatch.setattr(module, name, 3600.0)  # the replicas here speak once, and the machine may be busy then


class Heard:
    """A PlacementObserver."""

    def __init__(self) -> None:
        self.placements: list[tuple[Placement, int]] = []
        self.num_moved = 0

    def on_placed(self, placement: Placement, num_streams: int) -> None:
        self.placements.append((placement, num_streams))

    def on_moved(self, num_streams: int) -> None:
        self.num_moved += num_streams


Test = Callable[[EngineClient, FakeReplicas, Heard], Awaitable[None]]


def run(test: Test, *running: str, rule: PlacementRule | None = PlacementRule(BLOCK, home_requests=0)) -> None:  # noqa: B008
    async def main() -> None:
        replicas, heard = FakeReplicas(*running), Heard()
        client = EngineClient(replicas, "ingress", None, replicas.told, rule, heard)  # type: ignore[arg-type]
        try:
            await within(test(client, replicas, heard), 100)
        finally:
            await client.close()

    asyncio.run(main())


def placed(name: str, prompt: list[int], n: int = 1) -> PlacedPrompt:
    names = [f"{name}.{index}" for index in range(n)]
    streams = [RequestStream(each, lambda: None) for each in names]
    sampling = SamplingParams(seed=7, max_tokens=50)
    return PlacedPrompt(SubmittedPrompt(prompt, sampling, list(zip(names, range(n), strict=True))), streams)


async def read(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


async def ask(client: EngineClient, replicas: FakeReplicas, prompt: list[int]) -> FakeCall:
    number = len(replicas.calls)
    client.submit([placed(f"r{number}", prompt)])
    call = await replicas.call(number)
    call.open()
    return call


async def answered(client: EngineClient, replicas: FakeReplicas, prompt: list[int], *tokens: int) -> str:
    """The replica that was asked."""
    call = await ask(client, replicas, prompt)
    call.load = (0, 0)
    call.say(*tokens, reason=FinishReason.LENGTH)
    call.fail()
    await until(lambda: client.num_unfinished == 0)
    assert call.replica_id is not None
    return call.replica_id


def test_a_conversation_returns_to_the_replica_that_has_it() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas, heard: Heard) -> None:
        conversations = [[number, *HEAD[1:]] for number in range(12)]
        homes = []
        for prompt in conversations:
            answer = range(2000, 2041)
            homes.append(await answered(client, replicas, prompt, *answer))
            prompt += [*answer, 1, 2, 3]
        assert set(homes) == {"a", "b"}
        heard.placements.clear()
        for prompt, home in zip(conversations, homes, strict=True):
            assert await answered(client, replicas, prompt, 9) == home
        # 64 tokens and 41 of the answer, the last of which was not computed: 6 blocks.
        assert {placement.num_held_tokens for placement, _ in heard.placements} == {6 * BLOCK}
        assert {placement.choice for placement, _ in heard.placements} == {Choice.PREFIX}

    run(test, "a", "b")


def test_a_flood_of_one_beginning_spills_over() -> None:
    """64 tokens are worth half a request, and are soon in both."""

    async def test(client: EngineClient, replicas: FakeReplicas, heard: Heard) -> None:
        first = await ask(client, replicas, [*HEAD, 0])
        members = [placed(f"m{number}", [*HEAD, number]) for number in range(20)]
        client.submit(members)
        await until(lambda: len(replicas.calls) == 3)
        sizes = {call.replica_id: len(call.request_ids) for call in replicas.calls[1:]}
        assert sizes[first.replica_id] in (9, 10)
        assert sum(sizes.values()) == 20
        assert {placement.choice for placement, _ in heard.placements} == {Choice.NEW, Choice.LOAD, Choice.PREFIX}

    run(test, "a", "b")


def test_a_long_beginning_is_worth_waiting_for_a_while() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas, heard: Heard) -> None:
        document = list(range(5000, 5000 + 40 * BLOCK))  # worth five requests
        home = (await ask(client, replicas, [*document, 0])).replica_id
        calls = [await ask(client, replicas, [*document, number]) for number in range(1, 9)]
        assert [call.replica_id for call in calls[:5]] == [home] * 5
        assert {call.replica_id for call in calls} == {"a", "b"}
        assert [(placement.choice, num) for placement, num in heard.placements[:2]] == [
            (Choice.NEW, 1),
            (Choice.PREFIX, 1),
        ]

    run(test, "a", "b")


def test_a_replica_that_is_lost_full_or_gone_is_not_asked_whatever_it_has() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas, _heard: Heard) -> None:
        document = list(range(5000, 5000 + 40 * BLOCK))
        home = await answered(client, replicas, document, 7)
        other = "b" if home == "a" else "a"
        assert await answered(client, replicas, document, 7) == home
        number = len(replicas.calls)
        client.submit([placed("full", document)])
        call = await replicas.call(number)
        assert call.replica_id == home
        call.send(Refusal("full", home, is_full=True))
        call.fail()
        assert (await replicas.call(number + 1)).replica_id == other

        call = await ask(client, replicas, [*document, 1])
        assert call.replica_id == home
        call.fail(RuntimeError("the actor died"))
        assert (await replicas.call(number + 3)).replica_id == other
        assert (await ask(client, replicas, document)).replica_id == other  # the home is suspected
        replicas.fingerprints[home] = "fp"
        await until(lambda: not client._book._suspects)
        prefixes = client._book.prefixes
        assert prefixes is not None
        assert client._book._num_held_tokens(home, prefixes.chain(document)) > 0
        replicas.run(other, "c")  # should it come back, it is another process, with an empty cache
        await until(lambda: client._book._num_held_tokens(home, prefixes.chain(document)) == 0)

    run(test, "a", "b")


def test_without_a_rule_beginnings_do_not_count() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas, heard: Heard) -> None:
        document = list(range(5000, 5000 + 40 * BLOCK))
        first = await ask(client, replicas, document)
        second = await ask(client, replicas, document)
        assert {first.replica_id, second.replica_id} == {"a", "b"}
        assert heard.placements == []

    run(test, "a", "b", rule=None)


NUM, SEATS = 64, 8


def answer_of(prompt: SubmittedPrompt) -> int:
    return 10_000 + prompt.token_ids[-1]


async def burst(client: EngineClient, replicas: FakeReplicas) -> tuple[list[PlacedPrompt], FakeCall]:
    """64 requests wait for a replica, and the first that comes gets them all."""
    items = [placed(f"r{number}", [5, number]) for number in range(NUM)]
    client.submit(items)
    await asyncio.sleep(0.05)
    replicas.run("a")
    first = await replicas.call(0)
    assert len(first.request_ids) == NUM
    first.load = (NUM, NUM - SEATS)
    first.open()
    for member in range(SEATS):
        first.say(answer_of(first.submission.prompts[member]), member=member)
    return items, first


@pytest.mark.parametrize("rule", [None, PlacementRule(BLOCK)])
def test_a_queue_is_shared_with_the_replica_that_comes_next(rule: PlacementRule | None) -> None:
    async def test(client: EngineClient, replicas: FakeReplicas, heard: Heard) -> None:
        items, first = await burst(client, replicas)
        await asyncio.sleep(0.1)
        assert len(replicas.calls) == 1  # there is nowhere to go
        replicas.run("a", "b")
        second = await replicas.call(1)
        num_moved = len(second.request_ids)
        assert second.replica_id == "b"
        assert abs((NUM - num_moved) - num_moved) <= 4
        moved = [prompt.token_ids[-1] for prompt in second.submission.prompts]
        assert min(moved) >= NUM - num_moved  # the latest
        assert (second.submission.attempt, second.submission.fingerprint) == (1, "")
        assert all(prompt.waited_s > 0.1 and not prompt.outputs for prompt in second.submission.prompts)
        await until(lambda: len(replicas.aborted) == num_moved)
        assert replicas.aborted == [("a", first.submission.group_id, member) for member in sorted(moved, reverse=True)]
        first.load = (NUM - num_moved, NUM - num_moved - SEATS)
        # The first has begun some of them all the same, before it heard: void.
        for member in range(SEATS, NUM):
            first.say(answer_of(first.submission.prompts[member]), member=member)
        second.open()
        for member, prompt in enumerate(second.submission.prompts):
            second.say(answer_of(prompt), member=member)
        for call in (first, second):
            for member in range(len(call.request_ids)):
                call.say(7, member=member, reason=FinishReason.LENGTH)
        for item in items:
            outputs = await within(read(item.streams[0]))
            assert [token for output in outputs for token in output.token_ids] == [answer_of(item.prompt), 7]
            assert [output.finish_reason for output in outputs if output.finish_reason] == [FinishReason.LENGTH]
        assert heard.num_moved == num_moved
        assert (replicas.told.losses, replicas.told.num_stale) == ([], 0)
        assert client.num_unfinished == 0
        assert client._book._own["a"] == client._book._own["b"] == 0

    run(test, rule=rule)


def test_what_has_begun_stays_and_a_client_that_leaves_after_a_move_is_heard() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas, _heard: Heard) -> None:
        items, first = await burst(client, replicas)
        waiting = range(50, 54)  # an engine is fair to tenants: these are not the latest
        for member in {*range(NUM)} - {*waiting}:
            first.say(1, member=member)
        first.load = (NUM, 4)
        first.beat()
        replicas.run("a", "b")
        second = await replicas.call(1)
        assert [prompt.token_ids[-1] for prompt in second.submission.prompts] == [*reversed(waiting)]
        second.open()
        await until(lambda: len(replicas.aborted) == 4)
        items[52].streams[0].abort()
        await until(lambda: len(replicas.aborted) == 5)
        assert replicas.aborted[-1] == ("b", second.submission.group_id, 1)
        # The replica that they came from is lost, which is nothing to them.
        first.fail(RuntimeError("the actor died"))
        await replicas.call(2)
        assert replicas.told.losses == [(Loss.FAILED, NUM - 4)]
        assert items[53].attempt == items[0].attempt == 1

    run(test)


def test_a_whole_group_moves_and_its_call_ends() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas, heard: Heard) -> None:
        items = [placed(f"r{number}", [5, number], n=2) for number in range(4)]
        for item in items:
            client.submit([item])
        for number in range(4):
            call = await replicas.call(number)
            call.load = (8, 6)
            call.open()
            call.beat()
        replicas.run("a", "b")
        await until(lambda: heard.num_moved)
        second = await replicas.call(4)
        assert second.request_ids == ["r3.0#1", "r3.1#1", "r2.0#1", "r2.1#1"]
        assert [call.is_cancelled for call in replicas.calls[:4]] == [False, False, True, True]
        assert replicas.aborted == []  # which the end of the call does
        assert (client._book._own["a"], client._book._own["b"]) == (4, 4)

    run(test, "a")


def test_a_request_moves_only_so_often() -> None:
    async def test(client: EngineClient, replicas: FakeReplicas, _heard: Heard) -> None:
        items = [placed(f"r{number}", [5, number]) for number in range(3)]
        client.submit(items)
        (await replicas.call(0)).open()
        groups = list(client._groups.values())
        await until(lambda: groups[0].is_open)
        items[0].num_moves = MAX_MOVES
        queued = queues_of(groups, 100)["a"]
        assert [(each.item, each.num_requests) for each in queued] == [((groups[0], item), 1) for item in items[1:]]

    run(test, "a")
