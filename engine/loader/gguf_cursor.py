"""A bounds-checked reader of the little-endian values that a GGUF header is made of.

The `gguf` package trusts its input (a count of 2**60 in the header is a loop of as many steps) and takes 2 s for a
vocabulary of 49,152 tokens, because it makes an array per string; here every count and length is checked against the
bytes that are left before anything is allocated, and the same file takes 0.1 s.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from mmap import mmap
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from engine.errors import ModelError

GGUFScalar: TypeAlias = bool | int | float | str
GGUFArray: TypeAlias = npt.NDArray[Any] | list[str] | list[Any]
GGUFValue: TypeAlias = GGUFScalar | GGUFArray

# Metadata is mostly vocabulary: 262,144 tokens with scores, types and merges are about 20 MB. The cap bounds the time
# and memory a hostile file can cost before it is refused.
MAX_HEADER_BYTES = 64 * 1024**2
MAX_ARRAY_DEPTH = 4
MAX_NAME_BYTES = 512  # the longest in use are under 100

_STRING = 8
_ARRAY = 9
_BOOL = 7
# Value types of the format, by their number there; string, array and bool are handled apart.
_NUMBERS: dict[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class GGUFCursor:
    """Reads forward through the header of `path`, held in `buffer`; `field` in each call names what an error is about.

    Raises:
        ModelError: (from every method) the file ends early, a length is impossible or a value is malformed.
    """

    def __init__(self, buffer: mmap | bytes, path: Path) -> None:
        self.position = 0
        self._buffer = buffer
        self._path = path
        self._end = min(len(buffer), MAX_HEADER_BYTES)

    def fail(self, field: str, problem: str) -> ModelError:
        """The error to raise about `field`, with the file named."""
        return ModelError(f"{self._path}: {field}: {problem}")

    def _advance(self, num_bytes: int, field: str) -> int:
        """Step over `num_bytes` and return where they began."""
        start = self.position
        if num_bytes > self._end - start:
            left = self._end - start
            reason = "the file ends" if self._end == len(self._buffer) else f"the {MAX_HEADER_BYTES}-byte header limit"
            raise self.fail(field, f"needs {num_bytes} bytes at offset {start}, {reason} after {left}")
        self.position = start + num_bytes
        return start

    def u32(self, field: str) -> int:
        value: int = _U32.unpack_from(self._buffer, self._advance(4, field))[0]
        return value

    def u64(self, field: str) -> int:
        value: int = _U64.unpack_from(self._buffer, self._advance(8, field))[0]
        return value

    def raw(self, num_bytes: int, field: str) -> bytes:
        start = self._advance(num_bytes, field)
        return self._buffer[start : start + num_bytes]

    def string(self, field: str) -> str:
        raw = self.raw(self.u64(field), field)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(field, "is not valid UTF-8") from None

    def name(self, field: str) -> str:
        """A key or a tensor's name: short and printable, so that it can stand in an error message."""
        length = self.u64(field)
        if length > MAX_NAME_BYTES:
            raise self.fail(field, f"is {length} bytes long; at most {MAX_NAME_BYTES} are accepted")
        self.position -= 8
        name = self.string(field)
        if not name.isprintable():
            raise self.fail(field, "holds unprintable characters")
        return name

    def value(self, value_type: int, field: str, depth: int = 0) -> GGUFValue:
        """One metadata value of the format's type number `value_type`: numbers as Python's, arrays of numbers and of
        bools as numpy arrays, arrays of strings and of arrays as lists."""
        if value_type == _STRING:
            return self.string(field)
        if value_type == _ARRAY:
            return self._array(field, depth)
        if value_type == _BOOL:
            return bool(self._bools(1, field)[0])
        scalar: int | float = self._numbers(value_type, 1, field)[0].item()
        return scalar

    def _array(self, field: str, depth: int) -> GGUFArray:
        if depth >= MAX_ARRAY_DEPTH:
            raise self.fail(field, f"arrays nested more than {MAX_ARRAY_DEPTH} deep")
        value_type = self.u32(field)
        count = self.u64(field)
        if value_type == _STRING:
            return self._strings(count, field)
        if value_type == _ARRAY:
            self._require(count, 12, field)  # an array is at least its type and its count
            return [self._array(field, depth + 1) for _ in range(count)]
        if value_type == _BOOL:
            return self._bools(count, field)
        return self._numbers(value_type, count, field)

    def _require(self, count: int, min_bytes: int, field: str) -> None:
        """Refuse a count whose items cannot fit before any of them is read."""
        left = self._end - self.position
        if count * min_bytes > left:
            raise self.fail(field, f"{count} items of at least {min_bytes} bytes do not fit in the {left} bytes left")

    def _strings(self, count: int, field: str) -> list[str]:
        self._require(count, 8, field)
        strings = []
        buffer, position, end = self._buffer, self.position, self._end
        for index in range(count):
            start = position + 8
            position = start + (_U64.unpack_from(buffer, position)[0] if start <= end else 0)
            if position > end:
                raise self.fail(f"{field}[{index}]", f"is cut off or has an impossible length at offset {start - 8}")
            try:
                strings.append(buffer[start:position].decode("utf-8"))
            except UnicodeDecodeError:
                raise self.fail(f"{field}[{index}]", "is not valid UTF-8") from None
        self.position = position
        return strings

    def _numbers(self, value_type: int, count: int, field: str) -> npt.NDArray[Any]:
        if value_type not in _NUMBERS:
            raise self.fail(field, f"has value type {value_type}, which the format does not define")
        dtype = np.dtype(_NUMBERS[value_type])
        self._require(count, dtype.itemsize, field)
        return np.frombuffer(self.raw(count * dtype.itemsize, field), dtype)

    def _bools(self, count: int, field: str) -> npt.NDArray[np.bool_]:
        self._require(count, 1, field)
        values = np.frombuffer(self.raw(count, field), np.uint8)
        if values.size and int(values.max()) > 1:
            raise self.fail(field, "a boolean is neither 0 nor 1")
        return values.astype(np.bool_)
