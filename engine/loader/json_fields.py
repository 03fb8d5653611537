"""Typed, range-checked access to a JSON object in a model's directory, with errors that name file and field."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import orjson

from engine.errors import ModelError
from engine.loader.messages import shown

_T = TypeVar("_T")

MAX_JSON_BYTES = 64 * 1024**2  # the index of a model with 100,000 tensors is about 10 MB


class JsonFields:
    """The members of one JSON object. A member that is null counts as absent, as `transformers` writes it.

    Raises:
        ModelError: (from every getter) the member is missing where required, of another type or out of range.
    """

    def __init__(self, file: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.file = file
        self._values = values
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def has(self, name: str) -> bool:
        """Whether the member is there at all, be it null."""
        return name in self._values

    def fail(self, name: str, problem: str) -> ModelError:
        """The error to raise about member `name`."""
        return ModelError(f"{self.file}: {self._prefix}{name}: {problem}")

    def _unexpected(self, name: str, wanted: str) -> ModelError:
        return self.fail(name, f"must be {wanted}, not {shown(self._values[name])}")

    def optional_integer(self, name: str, *, minimum: int = 1, maximum: int) -> int | None:
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._unexpected(name, f"an integer between {minimum} and {maximum}")
        return value

    def integer(self, name: str, *, minimum: int = 1, maximum: int) -> int:
        return self._required(name, self.optional_integer(name, minimum=minimum, maximum=maximum))

    def optional_number(self, name: str, *, above: float = 0.0, maximum: float) -> float | None:
        """A number greater than `above` and at most `maximum`."""
        value = self._values.get(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not above < value <= maximum:
            raise self._unexpected(name, f"a number above {above:g} and at most {maximum:g}")
        return float(value)

    def number(self, name: str, *, above: float = 0.0, maximum: float) -> float:
        return self._required(name, self.optional_number(name, above=above, maximum=maximum))

    def boolean(self, name: str, default: bool) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._unexpected(name, "true or false")
        return value

    def optional_string(self, name: str) -> str | None:
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise self._unexpected(name, "a string")
        return value

    def optional_object(self, name: str) -> "JsonFields | None":
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._unexpected(name, "an object")
        return JsonFields(self.file, value, f"{self._prefix}{name}.")

    def members(self) -> list[tuple[str, Any]]:
        """Every member as it is: for objects whose names are data."""
        return list(self._values.items())

    def object_names(self) -> list[str]:
        """The members that are objects themselves."""
        return [name for name, value in self._values.items() if isinstance(value, dict)]

    def optional_strings(self, name: str) -> list[str] | None:
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._unexpected(name, "a list of strings")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them; absent: none."""
        value = self._values.get(name)
        items = [] if value is None else value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
                raise self._unexpected(name, f"a token id below vocab_size ({vocab_size}) or a list of such ids")
        return tuple(items)

    def _required(self, name: str, value: _T | None) -> _T:
        if value is None:
            raise self.fail(name, "is missing")
        return value


def read_json_object(file: Path) -> JsonFields:
    """Read a file that must hold one JSON object.

    Raises:
        ModelError: it cannot be read, is too large, or is not a JSON object.
    """
    try:
        size_bytes = file.stat().st_size
        if size_bytes > MAX_JSON_BYTES:
            raise ModelError(f"{file}: is {size_bytes} bytes long; at most {MAX_JSON_BYTES} are accepted")
        values = orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ModelError(f"{file}: is not valid JSON: {error}") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{file}: must hold a JSON object")
    return JsonFields(file, values)
