"""No body, however odd, is ever our fault; and the nesting check agrees with a plain reading of the text."""

import asyncio
import contextlib
import json
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from serve_app.http.chat import ChatRequest
from serve_app.http.completions import CompletionRequest
from serve_app.http.json_body import check_nesting
from tests.serve_app.http.fakes import FakeAdmitter, app_over, says

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([2**31, 2**63, 2**64, -1]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
RARELY = st.integers(0, 9).map(lambda roll: roll == 9)
PLAUSIBLE = {
    "n": st.integers(0, 3), "stop": st.text(max_size=3) | st.lists(st.text(min_size=1, max_size=3), max_size=3),
    "temperature": st.floats(-0.1, 3), "top_p": st.floats(0, 1), "top_k": st.integers(-2, 50), "seed": st.integers(),
    "max_tokens": st.integers(0, 9), "min_tokens": st.integers(-1, 9), "ignore_eos": st.booleans(),
    "stop_token_ids": st.lists(st.integers(-1, 300), max_size=3), "skip_special_tokens": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-101, 101), max_size=3),
    "logprobs": st.booleans() | st.integers(0, 21), "top_logprobs": st.integers(-1, 21), "echo": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}), "stream": st.booleans(),
    "chat_template_kwargs": st.dictionaries(st.text(max_size=9), ANYTHING, max_size=2),
}  # fmt: skip


@st.composite
def messages(draw):
    """A chat in which any field of any message may be something else entirely."""
    roles = draw(st.lists(st.sampled_from(["user", "system", "assistant", "developer"]), min_size=1, max_size=3))
    chat = [{"role": role, "content": draw(st.text(max_size=9))} for role in roles]
    if draw(RARELY):
        draw(st.sampled_from(chat))[draw(st.sampled_from(["role", "content", "name", "tool_calls"]))] = draw(ANYTHING)
    return chat


PROMPTS = st.text(max_size=9) | st.lists(st.text(max_size=3), max_size=3) | st.lists(st.integers(-1, 300), max_size=3)


@st.composite
def cases(draw):
    """A path and a body that is mostly right, so that many get through and the others fail for one reason."""
    path, model, required = draw(
        st.sampled_from(
            [
                ("/v1/chat/completions", ChatRequest, {"messages": messages()}),
                ("/v1/completions", CompletionRequest, {"prompt": PROMPTS}),
            ]
        )
    )
    if draw(RARELY):
        return path, draw(ANYTHING)
    body = draw(st.fixed_dictionaries(required))
    names = [*PLAUSIBLE.keys() & model.model_fields.keys()]
    for name in draw(st.lists(st.sampled_from(sorted(names)), max_size=3, unique=True)):
        body[name] = draw(ANYTHING if draw(RARELY) else PLAUSIBLE[name])
    if draw(RARELY):
        body[draw(st.sampled_from(sorted({*model.model_fields, *model.refused})))] = draw(ANYTHING)
    return path, body


async def post(path, content):
    # An engine that always has log-probabilities: they must only be there where they are asked for.
    admitter = FakeAdmitter([says("héllo", top=2)])
    transport = httpx.ASGITransport(app=app_over(admitter))
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        response = await client.post(path, content=content)
    return admitter, response


@settings(deadline=None, max_examples=300, derandomize=True)
@given(cases())
def test_json_of_any_shape_is_never_a_5xx(case):
    path, body = case
    admitter, response = asyncio.run(post(path, json.dumps(body).encode("utf-8", "surrogatepass")))
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code == 200:
        assert all(stream.freed for stream in admitter.streams)
        assert '"error"' not in response.text
    else:
        error = response.json()["error"]
        assert error["message"]
        assert "\n" not in error["message"]
        assert not admitter.calls


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\1ea ', max_size=60).map(str.encode))
def test_bytes_of_any_kind_are_never_a_5xx(content):
    _, response = asyncio.run(post("/v1/completions", content))
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@settings(deadline=None, max_examples=300, derandomize=True)
@given(ANYTHING, st.text(alphabet='[{"\\é', max_size=20))
def test_nesting_is_counted_as_a_parser_would(value, text):
    value = [text, value, {text: text}]

    def depth(node):
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    for ensure_ascii in (False, True):
        body = json.dumps(value, ensure_ascii=ensure_ascii).encode("utf-8", "surrogatepass")
        check_nesting(body, max_depth=depth(value))
        with pytest.raises(InvalidRequest, match="nested deeper"):
            check_nesting(body, max_depth=depth(value) - 1)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 70 + b'"' + b'\\"' * 2**22,  # an unterminated string with a quote in every second byte
        b"[" * 70 + b'"\\' * 2**22,
        b'[""' + b',""' * 2**21 + b",[]" * 70 + b"]",
        b"[" + b"[]," * 2**21,
    ],
)
def test_nesting_check_takes_linear_time(body):
    started = time.perf_counter()
    with contextlib.suppress(InvalidRequest):
        check_nesting(body)
    assert time.perf_counter() - started < 60  # quadratic would be hours
