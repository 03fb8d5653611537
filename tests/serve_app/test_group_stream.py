import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from engine.request import FinishReason, RequestOutput, SamplingParams
from serve_app import group_stream
from serve_app.frame_pace import MAX_PAUSE_S, FramePace
from serve_app.group_stream import GroupStream, Occupancy, Outbox, requests_of, until_cancelled
from serve_app.messages import FRAME_WINDOW, Heartbeat, Submission, SubmittedPrompt, TokenFrame, decode_frame

Test = Callable[[GroupStream, "Reader"], Awaitable[None]]


class Reader:
    """Takes frames without ever waiting longer than the loop needs to settle."""

    def __init__(self, group: GroupStream) -> None:
        self.group = group
        self.frames: list[TokenFrame | Heartbeat] = []
        self.ended = False
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for data in self.group.frames():
            frame = decode_frame(data)
            assert isinstance(frame, TokenFrame | Heartbeat)
            self.frames.append(frame)
        self.ended = True

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    def tokens(self, member: int) -> list[int]:
        frames = [frame for frame in self.frames if isinstance(frame, TokenFrame)]
        outputs = [output for frame in frames for output in frame.outputs if output.member == member]
        return [id_ for output in outputs for id_ in output.token_ids]


def run(test: Test, members: int = 2) -> None:
    async def main() -> None:
        group = GroupStream([f"r{member}" for member in range(members)], Occupancy(lambda: 1), FramePace(0.0, 0.0))
        reader = Reader(group)
        try:
            await test(group, reader)
        finally:
            reader.task.cancel()

    asyncio.run(main())


def output(member: int, token: int, reason: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(f"r{member}", (token,), finish_reason=reason)


def test_requests_of_a_submission() -> None:
    sampling = SamplingParams(seed=1)
    prompts = [
        SubmittedPrompt([1, 2], sampling, [("a", 0), ("b", 1)], priority=2),
        SubmittedPrompt([3], sampling, [("c", 0)]),
    ]
    requests = requests_of(Submission("g", 0, prompts))
    assert [(r.request_id, r.prompt_token_ids, r.choice_index, r.priority) for r in requests] == [
        ("a", [1, 2], 0, 2),
        ("b", [1, 2], 1, 2),
        ("c", [3], 0, 0),
    ]


def test_a_later_attempt_goes_on_where_the_last_one_ended() -> None:
    sampling = SamplingParams(seed=1)
    prompts = [
        SubmittedPrompt([1, 2], sampling, [("a#1", 0), ("b#1", 1)], outputs=[[8, 9], []], waited_s=100.0),
        SubmittedPrompt([3], sampling, [("c#1", 0)]),
    ]
    begun, untouched, new = requests_of(Submission("g", 1, prompts))
    assert [r.output_token_ids for r in (begun, untouched, new)] == [[8, 9], [], []]
    assert (begun.num_prompt_tokens, begun.num_tokens) == (2, 4)
    assert new.arrival_s - begun.arrival_s == 100.0  # it has its turn before those that came later


def test_one_frame_for_all_outputs_of_a_step() -> None:
    async def test(group: GroupStream, reader: Reader) -> None:
        group.add([output(0, 10), output(1, 20)])
        await reader.settle()
        [frame] = reader.frames
        assert isinstance(frame, TokenFrame)
        assert [(member.member, member.token_ids) for member in frame.outputs] == [(0, [10]), (1, [20])]
        assert (frame.sequence, frame.num_requests, frame.num_waiting) == (1, 2, 1)

    run(test)


def test_ends_when_the_last_output_of_its_last_member_was_read() -> None:
    async def test(group: GroupStream, reader: Reader) -> None:
        group.add([output(0, 10, FinishReason.STOP)])
        await reader.settle()
        group.acknowledge(1)
        await reader.settle()
        assert not reader.ended
        assert group.unfinished_ids == ["r1"]
        group.add([output(1, 20, FinishReason.LENGTH)])
        await reader.settle()
        assert reader.tokens(1) == [20]
        assert group.unfinished_ids == []
        assert not reader.ended
        group.acknowledge(2)
        await reader.settle()
        assert reader.ended

    run(test)


def test_until_then_it_sends_signs_of_life() -> None:
    """They have the reader acknowledge once more, should the first time have been in vain."""

    async def test(group: GroupStream, reader: Reader) -> None:
        group.add([output(0, 10, FinishReason.STOP)])
        await reader.settle()
        group.tick()
        group.tick()
        await reader.settle()
        assert reader.frames[-1] == Heartbeat(2, 0, 0)
        assert not reader.ended
        group.acknowledge(1)  # which was sent before the reader had the other
        await reader.settle()
        assert reader.ended

    run(test, members=1)


def test_a_reader_that_hangs_at_the_end_loses_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(group: GroupStream, reader: Reader) -> None:
        group.add([output(0, 10, FinishReason.STOP)])
        await reader.settle()
        monkeypatch.setattr(group_stream, "LAST_LEASE_S", -1.0)
        group.tick()
        await reader.settle()
        assert reader.task.cancelled()

    run(test, members=1)


def test_a_call_that_was_refused_ends_only_by_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        ending = asyncio.create_task(until_cancelled())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not ending.done()
        ending.cancel()
        await asyncio.wait([ending])
        assert ending.cancelled()
        monkeypatch.setattr(group_stream, "LAST_LEASE_S", 0.0)
        with pytest.raises(asyncio.CancelledError):
            await until_cancelled()

    asyncio.run(main())


def test_without_credit_outputs_merge() -> None:
    async def test(group: GroupStream, reader: Reader) -> None:
        for token in range(3 * FRAME_WINDOW):
            group.add([output(0, token)])
            await reader.settle()
        assert len(reader.frames) == FRAME_WINDOW
        group.acknowledge(FRAME_WINDOW)
        await reader.settle()
        assert len(reader.frames) == FRAME_WINDOW + 1
        assert reader.tokens(0) == list(range(3 * FRAME_WINDOW))

    run(test)


def test_without_credit_tokens_still_flow_at_the_heartbeats_pace() -> None:
    """A replica that is drained hears no acknowledgements."""

    async def test(group: GroupStream, reader: Reader) -> None:
        for token in range(FRAME_WINDOW + 5):
            group.add([output(0, token)])
            await reader.settle()
        group.tick()  # a frame was sent since the last one
        await reader.settle()
        assert len(reader.frames) == FRAME_WINDOW
        group.tick()
        await reader.settle()
        assert len(reader.frames) == FRAME_WINDOW + 1
        assert reader.tokens(0) == list(range(FRAME_WINDOW + 5))

    run(test)


def test_tokens_gather_until_a_frame_is_due() -> None:
    """But for the first and the last of a request, which nobody is to wait for."""

    async def main() -> None:
        pace = FramePace(frame_s=0.05, chunk_s=0.0)
        group = GroupStream(["r0", "r1"], Occupancy(lambda: 2), pace)
        reader = Reader(group)
        try:
            for token in range(4):
                group.add([output(0, token)])
                await reader.settle()
            assert len(reader.frames) == 1
            group.add([output(1, 100)])
            await reader.settle()
            assert (reader.tokens(0), reader.tokens(1)) == ([0, 1, 2, 3], [100])
            assert len(reader.frames) == 2
            group.add([output(0, 4), output(1, 101)])
            group.add([output(0, 5), output(1, 102)])
            await reader.settle()
            assert len(reader.frames) == 2
            while len(reader.frames) == 2:  # its time comes, though nothing more does
                await asyncio.sleep(0.001)
            assert (reader.tokens(0), reader.tokens(1)) == ([0, 1, 2, 3, 4, 5], [100, 101, 102])
            group.add([output(0, 6, FinishReason.STOP)])
            await reader.settle()
            assert reader.tokens(0)[-1] == 6
        finally:
            reader.task.cancel()

    asyncio.run(main())


def test_the_more_is_under_way_the_rarer_are_frames() -> None:
    pace, occupancy = FramePace(frame_s=1.0, chunk_s=0.5), Occupancy(lambda: 0)
    groups = [GroupStream([f"r{member}" for member in range(3)], occupancy, pace) for _ in range(2)]
    assert (pace.num_groups, pace.num_requests) == (0, 0)
    groups[0].add([output(0, 1), output(1, 2)])
    groups[1].add([output(0, 1)])
    assert (pace.num_groups, pace.num_requests) == (2, 3)
    groups[1].add([output(0, 2, FinishReason.STOP)])
    assert (pace.num_groups, pace.num_requests) == (1, 2)
    groups[0].leave()
    assert (pace.num_groups, pace.num_requests) == (0, 0)


def test_pauses() -> None:
    pace = FramePace(frame_s=0.002, chunk_s=0.001)
    for groups, requests, pause_s in (
        (0, 0, 0.0),
        (1, 1, 0.002),
        (1, 64, 0.064),
        (50, 50, 0.1),
        (500, 500, MAX_PAUSE_S),
    ):
        pace.num_groups, pace.num_requests = groups, requests
        assert pace.pause_s == pytest.approx(pause_s)


def test_heartbeats_only_while_silent() -> None:
    async def test(group: GroupStream, reader: Reader) -> None:
        group.tick()
        await reader.settle()
        assert reader.frames == [Heartbeat(1, 2, 1)]
        group.add([output(0, 10)])
        await reader.settle()
        group.tick()
        await reader.settle()
        assert len(reader.frames) == 2  # the tokens were sign of life enough
        group.tick()
        await reader.settle()
        assert reader.frames[-1] == Heartbeat(3, 2, 1)

    run(test)


def test_silent_reader_loses_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(group: GroupStream, reader: Reader) -> None:
        group.tick()
        await reader.settle()
        monkeypatch.setattr(group_stream, "LEASE_S", -1.0)
        group.tick()
        await reader.settle()
        assert reader.task.cancelled()
        assert group.unfinished_ids == ["r0", "r1"]  # for the engine to abort

    run(test)


def test_abandoning_ends_what_still_runs_and_later_outputs_are_void() -> None:
    async def test(group: GroupStream, reader: Reader) -> None:
        group.add([output(0, 10, FinishReason.STOP)])
        group.abandon("the engine is gone")
        group.add([output(1, 20)])
        await reader.settle()
        group.acknowledge(1)
        await reader.settle()
        assert reader.ended
        frame = reader.frames[-1]
        assert isinstance(frame, TokenFrame)
        reasons = {member.member: (member.finish_reason, member.error) for member in frame.outputs}
        assert reasons == {0: (FinishReason.STOP, None), 1: (FinishReason.ABORT, "the engine is gone")}
        assert reader.tokens(1) == []

    run(test)


def test_outbox_carries_everything_over_in_order() -> None:
    async def test(group: GroupStream, reader: Reader) -> None:
        outbox = Outbox(asyncio.get_running_loop())

        def engine_thread() -> None:
            for token in range(1000):
                outbox.post(group, [output(0, token)])
            outbox.post(group, [output(0, 1000, FinishReason.LENGTH)])

        thread = threading.Thread(target=engine_thread)
        thread.start()
        while not reader.ended:
            await asyncio.sleep(0)
            group.acknowledge(10_000)
        thread.join()
        assert reader.tokens(0) == list(range(1001))

    run(test, members=1)


def test_outbox_outlives_its_loop() -> None:
    loop = asyncio.new_event_loop()
    outbox = Outbox(loop)
    loop.close()
    outbox.post(
        GroupStream(["r0"], Occupancy(lambda: 0), FramePace()), [output(0, 1)]
    )  # the engine's thread must not die of it


def test_what_a_replica_has_is_what_its_groups_have() -> None:
    occupancy = Occupancy(lambda: 1)
    group, other = GroupStream(["r0", "r1", "r2"], occupancy, FramePace()), GroupStream(["r0"], occupancy, FramePace())
    assert (occupancy.num_requests, occupancy.num_waiting) == (4, 3)
    group.add([output(1, 10, FinishReason.STOP), output(0, 10)])
    group.add([output(1, 11)])
    assert (occupancy.num_requests, occupancy.num_waiting) == (3, 2)
    group.leave()
    group.add([output(0, 11, FinishReason.ABORT)])
    assert (occupancy.num_requests, occupancy.num_waiting) == (1, 0)
    other.abandon("the engine is gone")
    other.leave()
    assert (occupancy.num_requests, occupancy.num_waiting) == (0, 0)
    assert occupancy.num_finished == 2  # r1, and r0, which had begun; two have left the queue
