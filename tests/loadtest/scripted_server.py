"""An OpenAI-compatible server that answers to a script, and notes when it did what. In a thread of the test."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class Script:
    """What each request meets. `failures` are taken from by request number, counted from 0."""

    ttft_s: float = 0.1
    gap_s: float = 0.02
    num_chunks: int = 5
    tokens_a_chunk: int = 1
    has_usage: bool = True
    queue_time_s: float | None = None
    failures: dict[int, str] = field(default_factory=dict)  # "429", "event", "cut", "stop", "hang", "empty"
    may_answer: Callable[[], bool] = lambda: True  # else it waits
    num_heard: Callable[[], int] | None = None  # chunks of the answer that the client has: it waits for each


@dataclass
class Served:
    """Times of time.perf_counter(), which all processes of a machine share."""

    body: dict
    arrived_s: float
    chunk_s: list[float] = field(default_factory=list)
    heard_s: list[float] = field(default_factory=list)  # when the client was known to have each chunk


class ScriptedServer:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.served: list[Served] = []
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._answer, methods=["POST"]),
            Route("/v1/completions", self._answer, methods=["POST"]),
        ]
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off"))

    @contextmanager
    def running(self) -> Iterator["ScriptedServer"]:
        thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        thread.start()
        deadline_s = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        yield self
        self._server.should_exit = True
        self._server.force_exit = True
        thread.join(timeout=30)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "scripted"}]})

    async def _answer(self, request: Request) -> Response:
        served = Served(await request.json(), time.perf_counter())
        failure = self.script.failures.get(len(self.served), "")
        self.served.append(served)
        if failure == "429":
            return JSONResponse({"error": {"message": "full", "code": "overloaded"}}, 429)
        return StreamingResponse(self._stream(served, failure), media_type="text/event-stream")

    async def _stream(self, served: Served, failure: str) -> AsyncIterator[bytes]:
        script = self.script
        is_chat = "messages" in served.body
        yield self._event(is_chat, "")  # as the role's chunk of a chat: no text, no first token
        await asyncio.sleep(script.ttft_s)
        while not script.may_answer():
            await asyncio.sleep(0.005)
        for number in range(0 if failure == "empty" else script.num_chunks):
            if number:
                await asyncio.sleep(script.gap_s)
            if number == 2 and failure == "hang":
                await asyncio.sleep(60)
            if number == 2 and failure == "cut":
                raise ConnectionResetError
            if number == 2 and failure == "stop":
                return
            if number == 2 and failure == "event":
                yield b'data: {"error": {"message": "broken", "code": "generation_failed"}}\n\ndata: [DONE]\n\n'
                return
            served.chunk_s.append(time.perf_counter())
            yield self._event(is_chat, "word " * script.tokens_a_chunk)
            while script.num_heard is not None and script.num_heard() <= number:
                await asyncio.sleep(0.001)
            served.heard_s.append(time.perf_counter())
        if script.has_usage and served.body.get("stream_options"):
            usage = {"prompt_tokens": 7, "completion_tokens": script.num_chunks * script.tokens_a_chunk}
            if script.queue_time_s is not None:
                usage["queue_time"] = script.queue_time_s
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode()
        yield b"data: [DONE]\n\n"

    def _event(self, is_chat: bool, text: str) -> bytes:
        choice = {"index": 0, "delta": {"content": text}} if is_chat else {"index": 0, "text": text}
        return f"data: {json.dumps({'choices': [choice], 'usage': None})}\n\n".encode()
