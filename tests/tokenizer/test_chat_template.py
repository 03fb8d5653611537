"""Chat templates against Transformers' own renderer."""

from collections.abc import Mapping
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from engine.errors import InvalidRequest
from engine.tokenizer.chat_template import ChatTemplate
from tests.tokenizer.chat_templates import FAMILIES

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather "now" in a <city> & more – ünïcode',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1, "max": 2.5}},
                "required": ["city"],
                "strict": True,
                "extra": None,
            },
        },
    },
    {"type": "function", "function": {"name": "noop", "parameters": {}}},
]
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Köln <1>", "n": [1, 2.0]}},
}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [user("Hello")],
    "system": [{"role": "system", "content": "  Be brief. "}, user("Hi\n")],
    "empty_system": [{"role": "system", "content": ""}, user("")],
    "turns": [user("a"), assistant(" b "), user("c"), assistant("d"), user(" e ")],
    "unicode": [user("🎉 naïve 日本語 \u200b‮ </s><|im_end|> {{ 7*7 }} {% raw %}")],
    "thinking": [user("q"), assistant("<think>\nhm\n</think>\n\nyes"), user("r"), assistant("<think>so</think>ok")],
    "reasoning": [user("q"), assistant("yes", reasoning="because\n")],
    "tools": [
        user("Weather?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "21 °C", "tool_call_id": "call12345"},
    ],
    "tool_runs": [
        user("Weather?"),
        assistant("Let me see", tool_calls=[CALL]),
        {"role": "tool", "content": "21", "tool_call_id": "call12345"},
        {"role": "tool", "content": "22", "tool_call_id": "call12345"},
        assistant("Warm."),
    ],
    "wrong_order": [assistant("first"), user("second")],
    "two_users": [user("a"), user("b")],
    "unknown_role": [{"role": "narrator", "content": "once"}, user("b")],
    "no_content": [{"role": "user"}],
    "parts": [user([{"type": "text", "text": "hi"}])],
    "none": [],
}
VARIABLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_prompt": {"add_generation_prompt": False},
    "tools": {"tools": TOOLS},
    "no_thinking": {"enable_thinking": False},
    "tools_in_system": {"tools": TOOLS, "tools_in_user_message": False, "date_string": "1 Jan 2030"},
}


@pytest.fixture(scope="module")
def families() -> dict[str, ChatTemplate]:
    return {name: ChatTemplate({"default": source}, SPECIALS) for name, source in FAMILIES.items()}


def render_ours(template: ChatTemplate, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str | None:
    """The prompt, or None where the template refuses."""
    known = {"add_generation_prompt", "tools"}
    variables = {key: value for key, value in options.items() if key not in known}
    try:
        return template.render(
            messages,
            add_generation_prompt=options.get("add_generation_prompt", True),
            tools=options.get("tools"),
            variables=variables,
        )
    except InvalidRequest:
        return None


def render_theirs(source: str, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str | None:
    try:
        rendered, _ = render_jinja_template(
            [messages], chat_template=source, **{"add_generation_prompt": True, **SPECIALS, **options}
        )
    except (jinja2.TemplateError, TypeError):
        return None
    text: str = rendered[0]
    return text


@pytest.mark.parametrize("options", VARIABLES.values(), ids=VARIABLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_transformers(families: dict[str, ChatTemplate], family: str, options: dict[str, Any]) -> None:
    num_rendered = 0
    for name, messages in CONVERSATIONS.items():
        expected = render_theirs(FAMILIES[family], messages, options)
        assert render_ours(families[family], messages, options) == expected, name
        num_rendered += expected is not None
    assert num_rendered >= 6, "a comparison of refusals shows nothing"
