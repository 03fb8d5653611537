"""`POST /v1/chat/completions`."""

import asyncio
import time
import uuid
from functools import partial
from typing import Annotated, Any, Self

from pydantic import FailFast, Field, PlainValidator, model_validator
from starlette.requests import Request
from starlette.responses import Response

from engine.tokenizer import Tokenizer
from serve_app.admission import GenerateCall
from serve_app.http import unsupported
from serve_app.http.chat_message import ChatMessage
from serve_app.http.disconnect import until_disconnect
from serve_app.http.generation import ChoiceDelta, TextRules, start
from serve_app.http.json_body import read_json
from serve_app.http.logprobs import chat_logprobs
from serve_app.http.reply import Reply
from serve_app.http.schema import FieldError, GenerationFields, PositiveCount, TopLogprobs, parse
from serve_app.http.service import Service, service_of
from serve_app.http.tenant import tenant_of

# Variables of every rendering, which have fields of their own, and a name that Python needs.
_RESERVED_VARIABLES = ("messages", "add_generation_prompt", "tools", "documents", "self")


def _parse_template_variables(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError("must be an object")
    for name in _RESERVED_VARIABLES:
        if name in value:
            raise FieldError("cannot be set here", name)
    return value


class ChatRequest(GenerationFields):
    refused = unsupported.CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1), FailFast()]
    max_completion_tokens: PositiveCount | None = None  # the newer name of max_tokens
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: Annotated[dict[str, Any], PlainValidator(_parse_template_variables)] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("needs logprobs: true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise FieldError("differs from max_completion_tokens: send one of them", "max_tokens")
        return self

    @property
    def output_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


async def chat_completions(request: Request) -> Response:
    service = service_of(request)
    admitter = service.get_admitter()
    chat = parse(ChatRequest, await read_json(request))
    arrival_s = time.monotonic()
    service.check_model(chat.model)
    prompt = await until_disconnect(request.receive, _render(chat, service, admitter.tokenizer))
    max_tokens = chat.output_tokens
    call = GenerateCall(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        prompts=(prompt,),
        n=chat.n,
        sampling=chat.sampling_params(
            service.get_defaults(), admitter.max_model_len if max_tokens is None else max_tokens, chat.num_logprobs
        ),
        max_tokens=max_tokens,
        add_special_tokens=False,
        priority=chat.priority,
        tenant=tenant_of(request, chat),
        limits=service.time_limits,
        arrival_s=arrival_s,
    )
    detokenizer = partial(admitter.tokenizer.detokenizer, skip_special_tokens=chat.skip_special_tokens)
    rules = TextRules(detokenizer, chat.include_stop_str_in_output)
    generation = await start(request.receive, admitter, call, rules, service.observer)
    reply = Reply(
        generation,
        ChatShape(admitter.tokenizer, with_logprobs=chat.logprobs),
        response_id=call.request_id,
        model=admitter.model_name,
        system_fingerprint=service.system_fingerprint,
    )
    return await reply.answer(request, stream=chat.stream, usage_reports=chat.usage_reports)


async def _render(chat: ChatRequest, service: Service, tokenizer: Tokenizer) -> str:
    """The prompt. A template may take up to a second, in a process that renders one chat after another: so the event
    loop does not wait for it, and the threads that everything else shares are not used up by waiting."""
    render = partial(
        tokenizer.render_chat,
        [message.for_template() for message in chat.messages],
        add_generation_prompt=chat.add_generation_prompt,
        **chat.chat_template_kwargs,
    )
    return await asyncio.get_running_loop().run_in_executor(service.template_thread, render)


class ChatShape:
    """Choices as chat completions have them."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, with_logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._begun: set[int] = set()  # choices whose role has been sent

    def choice(self, whole: ChoiceDelta) -> dict[str, Any]:
        return {
            "index": whole.index,
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": self._logprobs(whole),
            "finish_reason": whole.finish_reason,
        }

    def chunk(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        content: dict[str, str] = {}
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            content = {"role": "assistant", "content": delta.text}
        elif delta.text:
            content = {"content": delta.text}
        logprobs = self._logprobs(delta) if delta.token_ids else None
        if not content and logprobs is None and delta.finish_reason is None:
            return None  # half a character, or what may yet become a stop string
        return {
            "index": delta.index,
            "delta": content,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, delta.token_ids, delta.logprobs) if self._with_logprobs else None
