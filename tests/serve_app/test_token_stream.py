import asyncio

from engine.request import FinishReason, RequestOutput
from serve_app.token_stream import RequestStream


def test_reads_what_was_put_and_ends() -> None:
    async def run() -> None:
        stream = RequestStream("r", lambda: None)
        stream.put(RequestOutput("r", (1,)))
        iterator = aiter(stream)
        assert (await anext(iterator)).token_ids == (1,)
        stream.put(RequestOutput("r", (2,)))
        stream.put(RequestOutput("r", (3,), finish_reason=FinishReason.STOP))
        assert [output.token_ids async for output in iterator] == [(2, 3)]
        assert [output async for output in iterator] == []

    asyncio.run(run())


def test_waiting_reader_is_woken() -> None:
    async def run() -> None:
        stream = RequestStream("r", lambda: None)
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        stream.put(RequestOutput("r", (1,)))
        assert (await reader).token_ids == (1,)

    asyncio.run(run())


def test_cancelled_reader_loses_nothing() -> None:
    async def run() -> None:
        stream = RequestStream("r", lambda: None)
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        stream.put(RequestOutput("r", (1,)))
        reader.cancel()
        await asyncio.wait([reader])
        assert (await asyncio.wait_for(anext(stream), 30)).token_ids == (1,)

    asyncio.run(run())


def test_started_and_finished_are_told_once() -> None:
    async def run() -> None:
        told: list[str] = []
        stream = RequestStream("r", lambda: told.append("started"))
        stream.on_finished = lambda: told.append("finished")
        stream.on_abort = lambda: told.append("aborted")
        stream.put(RequestOutput("r", (1,)))
        stream.put(RequestOutput("r", (2,)))
        stream.abort()
        stream.abort()
        stream.put(RequestOutput("r", (3,)))  # was on its way
        assert told == ["started", "finished", "aborted"]
        assert [(output.token_ids, output.finish_reason) async for output in stream] == [((1, 2), FinishReason.ABORT)]

    asyncio.run(run())


def test_abort_before_any_output_gives_the_queue_place_back() -> None:
    async def run() -> None:
        told: list[str] = []
        RequestStream("r", lambda: told.append("started")).abort()
        assert told == ["started"]

    asyncio.run(run())


def test_abort_after_the_end_is_harmless() -> None:
    async def run() -> None:
        told: list[str] = []
        stream = RequestStream("r", lambda: None)
        stream.on_abort = lambda: told.append("aborted")
        stream.put(RequestOutput("r", (1,), finish_reason=FinishReason.STOP))
        stream.abort()
        assert told == []
        assert [output.finish_reason async for output in stream] == [FinishReason.STOP]

    asyncio.run(run())
