"""Chat messages to the prompt text that a model was trained on, by the template that came with the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequest
from engine.tokenizer.template_sandbox import TemplateSandbox

MAX_TEMPLATE_CHARS = 1_000_000  # the longest in use are around 20,000
DEFAULT_NAME = "default"
TOOL_NAME = "tool_use"
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One model's chat templates, by name; most models have only "default".

    Follows `apply_chat_template` of Transformers: the same variables, filters and choice between named templates.
    `special_tokens` ("bos_token" and the like, to their text) are variables of every rendering.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        assert templates, "a model without chat templates has no ChatTemplate"
        self._names = tuple(templates)
        self._special_tokens = dict(special_tokens)
        self._sandbox = TemplateSandbox(templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. It already holds the special tokens: encode it without adding them again.

        `variables` are further ones that the template may read, e.g. `enable_thinking`.

        Raises:
            InvalidRequest: see `TemplateSandbox.render`; or there is no template to choose.
        """
        context = {
            **self._special_tokens,
            **(variables or {}),
            "messages": [_alias_reasoning(message) for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._sandbox.render(self._choose(with_tools=tools is not None), context)

    def _choose(self, *, with_tools: bool) -> str:
        if with_tools and TOOL_NAME in self._names:
            return TOOL_NAME
        if DEFAULT_NAME in self._names:
            return DEFAULT_NAME
        known = ", ".join(self._names)
        raise InvalidRequest(f"this model has no default chat template, only: {known}", "messages")


def _alias_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give reasoning under any of its names under those that templates read, as Transformers does."""
    reasoning = next((message[key] for key in _REASONING_KEYS if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
