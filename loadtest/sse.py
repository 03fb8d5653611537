"""Server-sent events, line by line, and what an OpenAI-compatible stream says in them."""

from dataclasses import dataclass
from typing import Any

import orjson

DONE = "[DONE]"


class SseParser:
    """Gathers the lines of a stream into events' data."""

    def __init__(self) -> None:
        self._data: list[str] = []

    def feed_line(self, line: bytes) -> str | None:
        """The data of the event that this line ends, if it ends one."""
        text = line.decode(errors="replace").rstrip("\r\n")
        if text:
            field, _, value = text.partition(":")
            if field == "data":  # comments have an empty field; other fields say nothing here
                self._data.append(value.removeprefix(" "))
            return None
        if not self._data:
            return None
        event, self._data = "\n".join(self._data), []
        return event


@dataclass(frozen=True)
class StreamEvent:
    """One chunk. `has_text`: a client sees something new; `error_code` is empty unless the chunk is an error."""

    has_text: bool
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    queue_time_s: float | None
    error_code: str


def parse_event(data: str) -> StreamEvent:
    """Of chat or text completions. Raises ValueError where it is not a JSON object."""
    chunk = orjson.loads(data)
    if not isinstance(chunk, dict):
        raise ValueError("an event that is not an object")
    usage = chunk.get("usage") or {}
    choices = chunk.get("choices") or []
    return StreamEvent(
        has_text=any(_has_text(choice) for choice in choices),
        finish_reason=next((str(c["finish_reason"]) for c in choices if c.get("finish_reason")), ""),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        queue_time_s=_queue_time_s(chunk, usage),
        error_code=error_code(chunk),
    )


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(
        delta.get("content")
        or delta.get("reasoning_content")
        or delta.get("reasoning")
        or delta.get("tool_calls")
        or choice.get("text")
    )


def _queue_time_s(chunk: dict[str, Any], usage: dict[str, Any]) -> float | None:
    """As Groq reports it: in `usage`, or in `x_groq.usage`."""
    inner = (chunk.get("x_groq") or {}).get("usage") or {}
    queue_time = usage.get("queue_time", inner.get("queue_time"))
    return float(queue_time) if queue_time is not None else None


def error_code(body: Any) -> str:
    """What an error body says in one word, or nothing where it is none."""
    error = body.get("error") if isinstance(body, dict) else None
    if not error:
        return ""
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or "error")
    return "error"
