"""The messages of a chat, text only, and what the chat template gets to see of them."""

from typing import Annotated, Any

from pydantic import PlainValidator

from serve_app.http import unsupported
from serve_app.http.schema import UNKNOWN_CODE, UNSUPPORTED_CODE, FieldError, Wire

# "developer" is OpenAI's newer name for "system"; the templates of open models know only the older one.
_TEMPLATE_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_LATER_ROLES = ("tool", "function")


def _parse_role(value: Any) -> str:
    if value in _LATER_ROLES:
        raise FieldError(f"{value!r} is not supported", code=UNSUPPORTED_CODE)
    if not isinstance(value, str) or value not in _TEMPLATE_ROLES:
        raise FieldError(f"must be one of {', '.join(_TEMPLATE_ROLES)}")
    return value


def _parse_content(value: Any) -> str:
    """A string, or text parts: these are joined by line ends, so that two of them never run into one word."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise FieldError("must be a string or a list of text parts that is not empty")
    return "\n".join(_parse_part(f"[{index}]", part) for index, part in enumerate(value))


def _parse_part(path: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise FieldError("must be an object with type and text", path)
    kind = part.get("type")
    if not isinstance(kind, str):
        raise FieldError("must be a string", f"{path}.type")
    if kind != "text":
        raise FieldError(f"{kind[:100]!r} is not supported: only text parts are", f"{path}.type", UNSUPPORTED_CODE)
    for name, value in part.items():
        if name not in ("type", "text") and value is not None:
            raise FieldError("is not a field of a text part", f"{path}.{name[:100]}", UNKNOWN_CODE)
    text = part.get("text")
    if not isinstance(text, str):
        raise FieldError("must be a string", f"{path}.text")
    return text


class ChatMessage(Wire):
    refused = unsupported.MESSAGE

    role: Annotated[str, PlainValidator(_parse_role)]
    content: Annotated[str, PlainValidator(_parse_content)]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        message = {"role": _TEMPLATE_ROLES[self.role], "content": self.content}
        return message if self.name is None else {**message, "name": self.name}
