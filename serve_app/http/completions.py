"""`POST /v1/completions`."""

import uuid
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Self

from pydantic import PlainValidator, model_validator
from starlette.requests import Request
from starlette.responses import Response

from engine.tokenizer import IncrementalDetokenizer, Tokenizer
from serve_app.admission import GenerateCall
from serve_app.http import unsupported
from serve_app.http.generation import ChoiceDelta, TextRules, start
from serve_app.http.json_body import read_json
from serve_app.http.limits import MAX_CHOICES, MAX_TOKEN_ID
from serve_app.http.logprobs import CompletionLogprobs
from serve_app.http.reply import Reply
from serve_app.http.schema import UNSUPPORTED_CODE, FieldError, GenerationFields, PositiveCount, TopLogprobs, parse
from serve_app.http.service import service_of
from serve_app.http.tenant import tenant_of

Prompt = str | tuple[int, ...]

_PROMPT_FORMS = "must be a string, a list of strings, a list of token ids or a list of such lists, and not empty"


def _parse_prompts(value: Any) -> tuple[Prompt, ...]:
    """The four forms that OpenAI accepts, as a list of prompts. No loop in Python over millions of ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise FieldError(_PROMPT_FORMS)
    kinds = set(map(type, value))
    if kinds == {int}:
        return (_token_ids(value, ""),)
    if kinds not in ({str}, {list}):
        raise FieldError(_PROMPT_FORMS)
    if len(value) > MAX_CHOICES:
        raise FieldError(f"must be at most {MAX_CHOICES} prompts, not {len(value)}")
    return tuple(value) if kinds == {str} else tuple(_token_ids(ids, f"[{i}]") for i, ids in enumerate(value))


def _token_ids(value: list[Any], path: str) -> tuple[int, ...]:
    if not value or set(map(type, value)) != {int} or min(value) < 0 or max(value) > MAX_TOKEN_ID:
        raise FieldError(f"must be token ids from 0 to {MAX_TOKEN_ID}, at least one", path)
    return tuple(value)


class CompletionRequest(GenerationFields):
    refused = unsupported.COMPLETIONS

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_parse_prompts)]
    max_tokens: PositiveCount | None = 16  # OpenAI's default
    logprobs: TopLogprobs | None = None
    echo: bool = False
    best_of: int | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise FieldError(f"times the number of prompts must be at most {MAX_CHOICES}", "n")
        if self.best_of is not None and self.best_of != self.n:
            raise FieldError("is not supported unless it equals n", "best_of", UNSUPPORTED_CODE)
        if self.echo and self.logprobs is not None:
            raise FieldError("together with logprobs is not supported: prompts have none", "echo", UNSUPPORTED_CODE)
        return self


async def completions(request: Request) -> Response:
    service = service_of(request)
    admitter = service.get_admitter()
    completion = parse(CompletionRequest, await read_json(request))
    service.check_model(completion.model)
    max_tokens = completion.max_tokens
    call = GenerateCall(
        request_id=f"cmpl-{uuid.uuid4().hex}",
        prompts=completion.prompt,
        n=completion.n,
        sampling=completion.sampling_params(
            service.get_defaults(), admitter.max_model_len if max_tokens is None else max_tokens, completion.logprobs
        ),
        max_tokens=max_tokens,
        add_special_tokens=completion.add_special_tokens,
        priority=completion.priority,
        tenant=tenant_of(request, completion),
        limits=service.time_limits,
    )
    # The text goes on from the prompt's: a space before its first word is part of it.
    detokenizer = partial(
        admitter.tokenizer.detokenizer, skip_special_tokens=completion.skip_special_tokens, continues_text=True
    )
    rules = TextRules(detokenizer, completion.include_stop_str_in_output)
    generation = await start(request.receive, admitter, call, rules, service.observer)
    reply = Reply(
        generation,
        _shape(completion, admitter.tokenizer, detokenizer),
        response_id=call.request_id,
        model=admitter.model_name,
        system_fingerprint=service.system_fingerprint,
    )
    return await reply.answer(request, stream=completion.stream, usage_reports=completion.usage_reports)


def _shape(
    completion: CompletionRequest, tokenizer: Tokenizer, detokenizer: Callable[[], IncrementalDetokenizer]
) -> "CompletionShape":
    def echo(prompt: Prompt) -> str:
        if not completion.echo:
            return ""
        if isinstance(prompt, str):
            return prompt
        return tokenizer.decode(prompt, skip_special_tokens=completion.skip_special_tokens)

    echoes = [text for prompt in completion.prompt for text in [echo(prompt)] * completion.n]
    if completion.logprobs is None:
        return CompletionShape(echoes, None)
    return CompletionShape(echoes, [CompletionLogprobs(tokenizer, detokenizer()) for _ in echoes])


class CompletionShape:
    """Choices as text completions have them: the same in a chunk as in the whole."""

    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(self, echoes: list[str], logprobs: list[CompletionLogprobs] | None) -> None:
        """For each choice what its text begins with, and the writer of its log-probabilities where they are wanted."""
        self._echoes: list[str | None] = list(echoes)  # None once sent
        self._logprobs = logprobs

    def choice(self, whole: ChoiceDelta) -> dict[str, Any]:
        return self._body(whole)

    def chunk(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        begins = self._echoes[delta.index] is not None
        has_logprobs = self._logprobs is not None and bool(delta.token_ids)
        if begins or delta.text or has_logprobs or delta.finish_reason is not None:
            return self._body(delta)
        return None  # half a character, or what may yet become a stop string

    def _body(self, delta: ChoiceDelta) -> dict[str, Any]:
        text = (self._echoes[delta.index] or "") + delta.text
        self._echoes[delta.index] = None
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._logprobs[delta.index].body(delta.token_ids, delta.logprobs)
        return {"index": delta.index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
