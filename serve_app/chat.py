"""`POST /v1/chat/completions`."""

import uuid
from typing import Annotated, Any, Self

from engine.tokenizer import Tokenizer
from pydantic import FailFast, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from serve_app import unsupported
from serve_app.admission import GenerateCall
from serve_app.chat_message import ChatMessage
from serve_app.generation import ChoiceDelta, start
from serve_app.json_body import read_json
from serve_app.logprobs import chat_logprobs
from serve_app.reply import Reply
from serve_app.schema import FieldError, GenerationFields, PositiveCount, TopLogprobs, parse
from serve_app.service import service_of


class ChatRequest(GenerationFields):
    refused = unsupported.CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1), FailFast()]
    max_completion_tokens: PositiveCount | None = None  # the newer name of max_tokens
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    add_generation_prompt: bool = True

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
    service.check_model(chat.model)
    # Rendered on the event loop on purpose: it takes microseconds and fuel bounds it, while minijinja holds the GIL
    # throughout, so that a thread was measured to add 130 µs and to block the loop just as long.
    prompt = admitter.tokenizer.render_chat(
        [message.for_template() for message in chat.messages], add_generation_prompt=chat.add_generation_prompt
    )
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
    )
    generation = await start(request.receive, admitter, call)
    reply = Reply(
        generation,
        ChatShape(admitter.tokenizer, with_logprobs=chat.logprobs),
        response_id=call.request_id,
        model=admitter.model_name,
        system_fingerprint=service.system_fingerprint,
    )
    return await reply.answer(request, stream=chat.stream, include_usage=chat.include_usage)


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
