"""A service without an engine: scripted streams, a byte tokenizer, and an ASGI client that can walk away."""

import asyncio
import codecs
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import httpx
from starlette.applications import Starlette

from engine.request import FinishReason, RequestOutput, TokenLogprobs
from serve_app.admission import Admitted, GenerateCall
from serve_app.http import build_http_app

EOS = 256
MODEL = "tiny/bytes"


class ByteDetokenizer:
    """Emits whole characters only."""

    def __init__(self, end_text: bytes) -> None:
        self._end_text = end_text
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(self._end_text if t == EOS else bytes([t]) for t in token_ids))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """Token id = byte value; 256 ends a sequence."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push(ids) + detokenizer.finish()

    def token_text(self, token_id: int) -> str:
        return "<|end|>" if token_id == EOS else chr(token_id) if token_id < 128 else f"bytes:\\x{token_id:02x}"

    def token_bytes(self, token_id: int) -> bytes:
        return b"<|end|>" if token_id == EOS else bytes([token_id])

    def is_special(self, token_id: int) -> bool:
        return token_id == EOS

    def detokenizer(self, *, skip_special_tokens: bool = True, continues_text: bool = False) -> ByteDetokenizer:
        self.continues_text = continues_text
        return ByteDetokenizer(b"" if skip_special_tokens else b"<|end|>")

    def render_chat(self, messages: Any, *, add_generation_prompt: bool = True, **variables: Any) -> str:
        text = str(variables.get("mood", "")) + "".join(
            f"<{m['role']}{':' + m['name'] if 'name' in m else ''}>{m['content']}" for m in messages
        )
        return text + ("<assistant>" if add_generation_prompt else "")


# An output, an error to raise, seconds to sleep, the fingerprint of the engine that speaks from here on, or what to do.
Script = list[RequestOutput | BaseException | float | str | Callable[[], None]]
LIMIT_S = 60.0  # for anything here, on a busy machine


def says(text: str | bytes, *, end: FinishReason | None = FinishReason.STOP, size: int = 1, top: int = -1) -> Script:
    """A stream that says `text`, `size` tokens an output; top >= 0 adds log-probabilities with that many others."""
    ids = list(text.encode() if isinstance(text, str) else text) + ([EOS] if end is FinishReason.STOP else [])
    script: Script = []
    for at in range(0, len(ids), size):
        part, last = tuple(ids[at : at + size]), at + size >= len(ids)
        logprobs = tuple(TokenLogprobs(-0.5, tuple((k + 65, -0.5 - k) for k in range(top))) for _ in part if top >= 0)
        stop = EOS if last and end is FinishReason.STOP else None
        script.append(RequestOutput("r", part, logprobs, end if last else None, stop, num_cached_tokens=3))
    return script


def with_drafts(script: Script, *totals: tuple[int, int]) -> Script:
    """The script with the drafted and the accepted tokens up to each of its outputs."""
    return [
        replace(output, num_drafted_tokens=drafted, num_accepted_tokens=accepted)
        for output, (drafted, accepted) in zip(script, totals, strict=True)
    ]


class ScriptedStream:
    def __init__(self, script: Script) -> None:
        self._script = script
        self.num_aborts = 0
        self.num_read = 0
        self.ended = False
        self._aborted = asyncio.Event()
        self.fingerprints: list[str] = []

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        for item in self._script:
            if isinstance(item, float):
                try:
                    async with asyncio.timeout(item):
                        await self._aborted.wait()
                except TimeoutError:
                    continue
                yield RequestOutput("r", finish_reason=FinishReason.ABORT)
                return
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, str):
                self.fingerprints.append(item)
                continue
            if not isinstance(item, RequestOutput):
                item()
                for _ in range(3):  # what is due by then, happens
                    await asyncio.sleep(0)
                continue
            await asyncio.sleep(0)
            self.num_read += 1
            self.ended = item.finish_reason is not None
            yield item

    def abort(self) -> None:
        self.num_aborts += 1
        self._aborted.set()

    @property
    def freed(self) -> bool:
        return self.ended or self.num_aborts > 0


@dataclass
class FakeAdmitter:
    """Replays scripts, one for each choice, the last again and again; keeps what it was called with."""

    scripts: list[Script] = field(default_factory=lambda: [says("hello")])
    error: BaseException | None = None
    admit_delay_s: float = 0.0
    state: str = "ready"
    model_name: str = MODEL
    max_model_len: int = 512
    tokenizer: Any = field(default_factory=ByteTokenizer)
    calls: list[GenerateCall] = field(default_factory=list)
    streams: list[ScriptedStream] = field(default_factory=list)

    async def admit(self, call: GenerateCall) -> Admitted:
        self.calls.append(call)
        await asyncio.sleep(self.admit_delay_s)
        if self.error is not None:
            raise self.error
        prompts = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in call.prompts]
        count = len(prompts) * call.n
        scripts = (self.scripts + self.scripts[-1:] * count)[:count]
        self.streams += (streams := [ScriptedStream(script) for script in scripts])
        return Admitted(prompts, list(streams), 77 if call.sampling.seed is None else call.sampling.seed)

    def retry_after_s(self) -> float:
        return 6.5

    async def readiness(self) -> Any:
        return SimpleNamespace(ready=self.state == "ready", state=self.state)


def put_forward(seconds: float) -> None:
    """The clock of the event loop: its timers for until then are due."""
    loop = asyncio.get_running_loop()
    now_s = loop.time
    loop.time = lambda: now_s() + seconds  # type: ignore[method-assign]


async def left_over(before: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """Tasks that are there in addition, and do not end."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + LIMIT_S
    while (left := asyncio.all_tasks() - before) and loop.time() < deadline_s:
        await asyncio.sleep(0.01)
    return left


def app_over(admitter: FakeAdmitter, **options: Any) -> Starlette:
    return build_http_app(lambda: admitter, version="1.2.3", **options)


def fetch(
    admitter: FakeAdmitter, path: str, body: Any = None, *, method: str | None = None, app: Any = None, **kwargs: Any
) -> httpx.Response:
    """One request. `body`: bytes as they are, anything else as JSON; none: GET."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=app or app_over(admitter))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            return await client.request(method or ("GET" if body is None else "POST"), path, content=content, **kwargs)

    return asyncio.run(run())


def events_of(response: httpx.Response) -> list[Any]:
    """The JSON of every event but the closing [DONE], which must be there."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


async def leave(app: Starlette, path: str, body: Any, when: Callable[[list[dict[str, Any]]], bool]) -> list[Any]:
    """POST `body` and disconnect once `when` holds of the messages sent so far; returns those messages."""
    sent: list[dict[str, Any]] = []
    news = asyncio.Event()
    inbox = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if inbox:
            return inbox.pop()
        while not when(sent):
            news.clear()
            await news.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        news.set()

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("c", 1), "server": ("s", 80),
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), LIMIT_S)
    return sent
