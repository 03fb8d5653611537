"""The official client parses everything that we send, strictly."""

import asyncio

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engine.errors import InvalidRequest
from serve_app.errors import OverloadedError, UnavailableError
from tests.serve_app.http.fakes import MODEL, FakeAdmitter, app_over, says, with_drafts

HI = [{"role": "user", "content": "hi"}]


def with_client(admitter, work, *, strict=True):
    async def main():
        transport = httpx.ASGITransport(app=app_over(admitter))
        async with AsyncOpenAI(
            api_key="none",
            base_url="http://test/v1",
            http_client=httpx.AsyncClient(transport=transport),
            max_retries=0,
            _strict_response_validation=strict,
        ) as client:
            return await work(client)

    return asyncio.run(main())


def test_chat():
    async def work(client):
        return await client.chat.completions.create(
            model=MODEL, messages=HI, n=2, logprobs=True, top_logprobs=2, seed=-1, max_completion_tokens=9
        )

    answer = with_client(FakeAdmitter([says("hé", top=2)]), work)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    assert [c.message.content for c in answer.choices] == ["hé", "hé"]
    assert [c.message.role for c in answer.choices] == ["assistant"] * 2
    (first, *_) = answer.choices[0].logprobs.content
    assert (first.token, first.bytes, first.logprob) == ("h", [104], -0.5)
    assert [(t.token, t.logprob) for t in first.top_logprobs] == [("A", -0.5), ("B", -1.5)]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.seed == 2**63 - 1
    assert answer._request_id


def test_chat_stream():
    async def work(client):
        stream = await client.chat.completions.create(
            model=MODEL, messages=HI, stream=True, logprobs=True, stream_options={"include_usage": True}
        )
        return [chunk async for chunk in stream]

    *chunks, last = with_client(FakeAdmitter([says("hello", top=0)]), work)
    for chunk in (*chunks, last):
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "hello"
    assert [c.choices[0].finish_reason for c in chunks][-1] == "stop"
    assert sum(len(c.choices[0].logprobs.content) for c in chunks if c.choices[0].logprobs) == 6
    assert all(c.usage is None for c in chunks)
    assert (last.choices, last.usage.completion_tokens) == ([], 6)


@pytest.mark.parametrize("stream", [False, True])
def test_usage_counts_drafts(stream):
    """Of all choices, as of the last output of each."""
    scripts = [
        with_drafts(says("hello", size=2), (0, 0), (4, 1), (8, 3)),
        with_drafts(says("hi", size=3), (5, 2)),
        says("no drafts"),
    ]

    async def work(client):
        options = {"stream_options": {"include_usage": True}} if stream else {}
        answer = await client.chat.completions.create(model=MODEL, messages=HI, n=3, stream=stream, **options)
        return [chunk async for chunk in answer][-1] if stream else answer

    usage = with_client(FakeAdmitter(scripts), work).usage
    details = usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (5, 8)
    assert details.reasoning_tokens is details.audio_tokens is None  # not known, and not there


def test_an_answer_can_be_sent_back_as_a_message():
    admitter = FakeAdmitter([says("hello")])

    async def work(client):
        first = await client.chat.completions.create(model=MODEL, messages=HI)
        echoed = [*HI, first.choices[0].message, *HI]
        await client.chat.completions.create(model=MODEL, messages=echoed)
        await client.chat.completions.create(model=MODEL, messages=[*HI, first.choices[0].message.model_dump()])

    with_client(admitter, work)
    assert admitter.calls[1].prompts == ("<user>hi<assistant>hello<user>hi<assistant>",)


def test_chat_stream_helper():
    async def work(client):
        async with client.chat.completions.stream(model=MODEL, messages=HI) as stream:
            return await stream.get_final_completion()

    answer = with_client(FakeAdmitter([says("hello")]), work)
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_completions(stream):
    async def work(client):
        options = {"stream_options": {"include_usage": True}} if stream else {}
        answer = await client.completions.create(
            model=MODEL, prompt=["a", "b"], n=2, logprobs=1, max_tokens=5, stream=stream, **options
        )
        return [chunk async for chunk in answer] if stream else [answer]

    # The client's type has no null finish_reason, which OpenAI's own chunks of text completions do have.
    answers = with_client(FakeAdmitter([says("hé", top=1)]), work, strict=not stream)
    texts, tokens = ["", "", "", ""], [[], [], [], []]
    for answer in answers:
        for choice in answer.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            assert len(choice.logprobs.text_offset) == len(choice.logprobs.top_logprobs)
    assert texts == ["hé"] * 4
    assert tokens == [["h", r"bytes:\xc3", r"bytes:\xa9", "<|end|>"]] * 4
    assert answers[-1].usage.completion_tokens == 16


def test_models():
    async def work(client):
        return [m async for m in client.models.list()], await client.models.retrieve(MODEL)

    (listed,), retrieved = with_client(FakeAdmitter(), work)
    assert listed.id == retrieved.id == MODEL


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequest("too long", "messages", code="context_length_exceeded"), openai.BadRequestError),
        (OverloadedError("full"), openai.RateLimitError),
        (UnavailableError("none"), openai.InternalServerError),
    ],
)
def test_errors_are_the_clients_exceptions(error, expected):
    async def work(client):
        await client.chat.completions.create(model=MODEL, messages=HI)

    with pytest.raises(expected) as caught:
        with_client(FakeAdmitter(error=error), work)
    assert str(error) in caught.value.message
    assert caught.value.param == getattr(error, "param", None)


def test_unknown_model():
    async def work(client):
        await client.chat.completions.create(model="other", messages=HI)

    with pytest.raises(openai.NotFoundError) as caught:
        with_client(FakeAdmitter(), work)
    assert caught.value.code == "model_not_found"


def test_failed_stream_raises_in_the_client():
    async def work(client):
        stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        return [chunk async for chunk in stream]

    with pytest.raises(openai.APIError, match="internal error"):
        with_client(FakeAdmitter([[*says("ab", end=None), RuntimeError("x")]]), work)
