"""Sends one request, reads its stream, and notes when each chunk came."""

import socket
import ssl
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import orjson
from gevent import GreenletExit
from geventhttpclient.client import HTTPClient
from geventhttpclient.response import HTTPParseError, HTTPSocketPoolResponse

from loadtest.request_record import UNFINISHED, RequestRecord
from loadtest.sse import DONE, SseParser, error_code, parse_event

CHAT = "chat/completions"
COMPLETIONS = "completions"
NO_DONE = f"stream without {DONE}"
# perf_counter() is finer than time() and is never set; with this it is comparable among processes.
_EPOCH_S = time.time() - time.perf_counter()


class ServerError(Exception):
    """The server cannot be asked for its models: nothing can be measured."""


class StreamingClient:
    """Of one server; keeps connections. `base_url` may end with /v1 or not. Times out after `timeout_s` of silence."""

    def __init__(self, base_url: str, api_key: str, timeout_s: float, max_connections: int, insecure: bool) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--host must be an http(s) URL, such as http://127.0.0.1:8000, not {base_url!r}")
        path = parts.path.rstrip("/")
        self._path = path if path.endswith("/v1") else f"{path}/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._http = HTTPClient.from_url(
            f"{parts.scheme}://{parts.netloc}",
            concurrency=max_connections,
            connection_timeout=timeout_s,
            network_timeout=timeout_s,
            insecure=insecure,
        )

    def first_model(self) -> str:
        """The first name in /v1/models. Raises ServerError."""
        try:
            response = self._http.get(f"{self._path}/models", headers=self._headers)
            body = response.read()
        except (OSError, HTTPParseError) as error:
            raise ServerError(f"{self._path}/models: {_failure(error)}") from None
        if response.status_code != 200:
            raise ServerError(f"{self._path}/models: {_refusal(response.status_code, body)}")
        try:
            return str(orjson.loads(body)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise ServerError(f"{self._path}/models lists no model") from None

    def send(self, endpoint: str, body: Mapping[str, Any], record: RequestRecord) -> None:
        """Fills `record`: errors become its `error`. Only GreenletExit is raised, after `record` was filled."""
        payload = orjson.dumps(body)
        started_s = time.perf_counter()
        record.sent_s = _EPOCH_S + started_s
        response = None
        try:
            response = self._http.post(f"{self._path}/{endpoint}", body=payload, headers=self._headers)
            if response.status_code == 200:
                record.error = _read_stream(response, record, started_s)
            else:
                record.error = _refusal(response.status_code, response.read())
        except GreenletExit:
            record.error = UNFINISHED
            raise
        except (OSError, HTTPParseError) as error:
            record.error = _failure(error)
        finally:
            record.e2e_latency_s = time.perf_counter() - started_s
            if response is not None:
                response.release()  # one that was not read to its end closes its connection

    def close(self) -> None:
        self._http.close()


def epoch_s(perf_counter_s: float) -> float:
    """A time of time.perf_counter() as seconds since the epoch, as records have them."""
    return _EPOCH_S + perf_counter_s


def _read_stream(response: HTTPSocketPoolResponse, record: RequestRecord, started_s: float) -> str:
    """The kind of error, or nothing."""
    parser = SseParser()
    error = ""
    while line := response.readline(b"\n"):
        now_s = time.perf_counter()
        record.received_bytes += len(line)
        data = parser.feed_line(line)
        if data is None:
            continue
        if data == DONE:
            response.read()  # to the end of the body, so that the connection can be used again
            return error or ("" if record.chunk_s else "no text")
        try:
            event = parse_event(data)
        except ValueError:
            return "event that is not JSON"
        if event.error_code:
            error = f"error event {event.error_code}"
        if event.has_text:
            record.chunk_s.append(now_s - started_s)
            if not record.is_usage:
                record.output_tokens += 1
        record.finish_reason = event.finish_reason or record.finish_reason
        if event.queue_time_s is not None:
            record.queue_time_s = event.queue_time_s
        if event.completion_tokens is not None:
            record.prompt_tokens, record.output_tokens = event.prompt_tokens, event.completion_tokens
            record.is_usage = True
    return error or NO_DONE


def _refusal(status: int, body: bytes) -> str:
    try:
        code = error_code(orjson.loads(body))
    except ValueError:
        code = ""
    return f"http {status} {code}".rstrip()


def _failure(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, HTTPParseError):
        return "connection ended early"
    if isinstance(error, ssl.SSLError):
        return "tls"
    if isinstance(error, socket.gaierror):
        return "unknown host"
    return f"connection: {type(error).__name__}"
