"""Whatever a client sends, it gets an OpenAI-shaped error that names the field, and the engine never hears of it."""

import json

import httpx
import pytest

from engine.errors import InvalidRequest
from tests.serve_app.http.fakes import FakeAdmitter, app_over, error_of, fetch

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
OK = {"messages": HI}


def refused(body, status=400, **kwargs):
    admitter = FakeAdmitter()
    error = error_of(fetch(admitter, PATH, body, **kwargs), status)
    assert not admitter.calls
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'messages': []}",
        b'{"messages": NaN}',
        b'{"messages": [], "temperature": 1e999}',
        b'{"messages": [], "temperature": -Infinity}',
        b'{"user": "\\ud800"}',
        b'{"user": "\xff\xfe"}',
        b'{"user": "\xed\xa0\x80"}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
        b'{"messages": []} {}',
    ],
)
def test_not_json(body):
    assert refused(body)["code"] == "invalid_json"


@pytest.mark.parametrize("value", [[], "x", 5, True])
def test_body_is_not_an_object(value):
    assert refused(value)["message"] == "the body must be a JSON object"


@pytest.mark.parametrize("brackets", [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"[":', b"}]")])
@pytest.mark.parametrize("depth", [65, 500, 100_000])
def test_deep_nesting(brackets, depth):
    opening, closing = brackets
    body = b'{"metadata":' + opening * depth + b"1" + closing * depth + b"}"
    assert refused(body)["code"] == "json_too_deep"


def test_brackets_inside_strings_are_text():
    text = "[{" * 100_000 + '"\\"['
    admitter = FakeAdmitter()
    assert fetch(admitter, PATH, {"messages": [{"role": "user", "content": text}]}).status_code == 200
    assert text in admitter.calls[0].prompts[0]


def test_too_many_containers():
    assert refused(b'{"messages": [' + b"[]," * 200_000 + b"[]]}")["code"] == "json_too_complex"


BAD_FIELDS = [
    ("messages", []),
    ("messages", "hi"),
    ("messages", {"role": "user"}),
    ("messages", None),
    ("n", 0), ("n", 129), ("n", -1), ("n", "1"), ("n", 1.5), ("n", 1.0), ("n", True), ("n", 2**64), ("n", 10**30),
    ("temperature", -0.1), ("temperature", "1"), ("temperature", True), ("temperature", 1e300), ("temperature", 10**20),
    ("top_p", 0), ("top_p", 1.1), ("top_p", []),
    ("top_k", -2), ("top_k", 0.5), ("top_k", 2**40),
    ("min_p", -0.1), ("min_p", 2),
    ("repetition_penalty", 0),
    ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
    ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 1.0), ("seed", "1"), ("seed", False),
    ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 2**31), ("max_tokens", 1e3),
    ("max_completion_tokens", 0),
    ("min_tokens", -1), ("min_tokens", 513),
    ("stop", ""), ("stop", [""]), ("stop", [1]), ("stop", {}), ("stop", ["x"] * 17), ("stop", "x" * 1025),
    ("stop_token_ids", 5), ("stop_token_ids", [1] * 1025),
    ("logprobs", 5), ("logprobs", "true"),
    ("top_logprobs", 21), ("top_logprobs", -1), ("top_logprobs", 3),  # 3: without logprobs
    ("logit_bias", []), ("logit_bias", {str(i): 1 for i in range(1025)}),
    ("stream", "yes"), ("stream", 1),
    ("stream_options", {"include_usage": True}),  # without stream
    ("stream_options", 5),
    ("model", 5),
    ("user", 5),
    ("metadata", {"a": 1}), ("metadata", {str(i): "" for i in range(17)}),
    ("priority", 2**31), ("priority", 1.5),
    ("ignore_eos", "no"),
    ("add_generation_prompt", 0),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda v: repr(v)[:30])
def test_bad_value_is_named(field, value):
    error = refused(OK | {field: value})
    assert error["param"] == field
    assert error["message"].startswith(f"{field} ")
    assert len(error["message"]) <= 500


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias.9999999999"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"1": True}}, "logit_bias.1"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ],
)
def test_bad_value_inside_a_field_has_its_path(fields, param):
    assert refused(OK | fields)["param"] == param


@pytest.mark.parametrize(
    ("message", "path", "code"),
    [
        ("hi", "", None),
        ({"content": "x"}, ".role", None),
        ({"role": "wizard", "content": "x"}, ".role", None),
        ({"role": ["user"], "content": "x"}, ".role", None),
        ({"role": "tool", "content": "x"}, ".role", "unsupported_parameter"),
        ({"role": "function", "content": "x"}, ".role", "unsupported_parameter"),
        ({"role": "user"}, ".content", None),
        ({"role": "user", "content": None}, ".content", None),
        ({"role": "user", "content": 5}, ".content", None),
        ({"role": "user", "content": []}, ".content", None),
        ({"role": "user", "content": ["x"]}, ".content[0]", None),
        ({"role": "user", "content": [{"text": "x"}]}, ".content[0].type", None),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text", None),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, ".content[0].text", None),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]},
            ".content[1].type",
            "unsupported_parameter",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]},
            ".content[0].cache_control",
            "unknown_parameter",
        ),
        ({"role": "user", "content": "x", "name": 5}, ".name", None),
        ({"role": "user", "content": "x", "mood": "good"}, ".mood", "unknown_parameter"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, ".tool_calls", "unsupported_parameter"),
        ({"role": "assistant", "content": "x", "audio": {"id": "1"}}, ".audio", "unsupported_parameter"),
    ],
)
def test_bad_message_has_its_path(message, path, code):
    error = refused({"messages": [*HI, *HI, message]})
    assert (error["param"], error["code"]) == (f"messages[2]{path}", code)


UNSUPPORTED = {
    "tools": [], "tool_choice": "auto", "functions": [], "function_call": "auto", "parallel_tool_calls": True,
    "response_format": {"type": "json_object"}, "audio": {}, "modalities": ["text", "audio"], "prediction": {},
    "service_tier": "flex", "web_search_options": {}, "reasoning_effort": "low", "verbosity": "low", "store": True,
    "prompt_cache_retention": "24h", "guided_json": {}, "best_of": 1,
    "chat_template": "{{ x }}", "documents": [], "echo": True,
}  # fmt: skip


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_unsupported_field_is_refused_by_name(field):
    error = refused(OK | {field: UNSUPPORTED[field]})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert "is not supported" in error["message"]


@pytest.mark.parametrize(
    ("field", "value"), [("store", 0), ("echo", 0.0), ("response_format", {"type": "text", "x": 1})]
)
def test_what_only_resembles_a_harmless_value_is_refused(field, value):
    assert refused(OK | {field: value})["code"] == "unsupported_parameter"


@pytest.mark.parametrize("field", ["temprature", "", "x" * 10_000, "prompt"])
def test_unknown_field_is_refused_by_name(field):
    error = refused(OK | {field: 1})
    assert error["code"] == "unknown_parameter"
    assert field[:100] in error["message"]


def test_a_million_wrong_things_are_one_short_error():
    error = refused({"messages": [5] * 1_000_000})
    assert error["param"] == "messages[0]"
    error = refused(OK | {f"field{i}": i for i in range(200_000)})
    assert error["param"] == "field0"


def test_context_length_error_passes_through():
    message = "the prompt has 600 tokens, and the context length is 512"
    admitter = FakeAdmitter(error=InvalidRequest(message, "messages", code="context_length_exceeded"))
    error = error_of(fetch(admitter, PATH, OK), 400)
    assert (error["message"], error["code"]) == (message, "context_length_exceeded")


def test_an_empty_list_is_called_that():
    assert refused({"messages": []})["message"] == "messages must have at least 1 item, not 0"


def test_unknown_model():
    error = refused(OK | {"model": "gpt-9"}, 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("POST", "/v1/embeddings"), ("POST", "/v1/completions/")])
def test_unknown_path(method, path):
    error = error_of(fetch(FakeAdmitter(), path, method=method), 404)
    assert error["message"].startswith(f"unknown path: {method} {path}; there are /v1/chat/completions, ")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", PATH, {"POST"}), ("DELETE", "/v1/completions", {"POST"}), ("POST", "/v1/models", {"GET", "HEAD"})],
)
def test_wrong_method(method, path, allowed):
    response = fetch(FakeAdmitter(), path, method=method)
    error_of(response, 405)
    assert set(response.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize(
    "kind",
    [None, "application/json", "application/json; charset=utf-8", "application/x-www-form-urlencoded", "text/plain",
     "application/vnd.api+json", "APPLICATION/JSON"],
)  # fmt: skip
def test_content_types_that_mean_json(kind):
    headers = {} if kind is None else {"content-type": kind}
    assert fetch(FakeAdmitter(), PATH, OK, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "multipart/form-data; boundary=x"}, {"content-type": "image/png"}, {"content-encoding": "gzip"}],
)
def test_content_that_is_not_json(headers):
    refused(OK, 415, headers=headers)


def test_header_limit():
    def response(size: int) -> httpx.Response:
        return fetch(FakeAdmitter(), "/health", headers={"x-long": "x" * size})

    assert response(60_000).status_code == 200
    assert error_of(response(65_600), 431)["code"] == "headers_too_large"
    many = {f"x-{i}": "v" * 40 for i in range(1_500)}
    error_of(fetch(FakeAdmitter(), "/health", headers=many), 431)
    error_of(fetch(FakeAdmitter(), "/health?" + "q" * 65_450), 431)


class Upload(httpx.AsyncByteStream):
    """A chunked body that says how much of it was taken."""

    def __init__(self, num_chunks: int, chunk: bytes) -> None:
        self.num_chunks, self.chunk, self.num_taken = num_chunks, chunk, 0

    async def __aiter__(self):
        for _ in range(self.num_chunks):
            self.num_taken += 1
            yield self.chunk


def post_stream(upload: Upload, headers: dict[str, str]) -> httpx.Response:
    import asyncio

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=app_over(FakeAdmitter()))
        request = httpx.Request("POST", f"http://test{PATH}", headers=headers, stream=upload)
        response = await transport.handle_async_request(request)
        await response.aread()
        return response

    return asyncio.run(run())


def test_chunked_body_is_read_to_the_limit_and_no_further():
    upload = Upload(64, b" " * 2**20)
    response = post_stream(upload, {"transfer-encoding": "chunked"})
    assert error_of(response, 413)["code"] == "body_too_large"
    assert upload.num_taken == 33


@pytest.mark.parametrize("length", [str(2**25 + 1), "9" * 5000])
def test_declared_length_is_refused_unread(length):
    upload = Upload(64, b" " * 2**20)
    error_of(post_stream(upload, {"content-length": length}), 413)
    assert upload.num_taken == 0


def test_body_at_the_limit_is_read():
    padding = 2**25 - len(json.dumps(OK))
    assert fetch(FakeAdmitter(), PATH, json.dumps(OK).encode() + b" " * padding).status_code == 200


@pytest.mark.parametrize("sent", ["abc-123", "a/b:c.d_e=f+g@h"])
def test_request_id_of_the_client_comes_back(sent):
    assert fetch(FakeAdmitter(), "/health", headers={"x-request-id": sent}).headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", ["", "x" * 129, "a b", "<script>"])
def test_request_id_that_is_not_sane_is_replaced(sent):
    received = fetch(FakeAdmitter(), "/health", headers={"x-request-id": sent}).headers["x-request-id"]
    assert received.startswith("req-")
