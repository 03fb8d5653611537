"""The key-value metadata of a GGUF file: the model's shape, its tokenizer and its chat template."""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.errors import ModelError
from engine.loader.gguf_cursor import GGUFCursor, GGUFValue

MAX_ENTRIES = 65_536  # real files have a few dozen
_VERSIONS = (2, 3)  # 1 had 32-bit lengths and was gone within days


class GGUFMetadata(Mapping[str, GGUFValue]):
    """Metadata of the file at `path`, key to value (see `GGUFCursor.value` for the types), in the file's order.

    The typed getters raise ModelError, naming file and key, for a value of another type, and for a missing key unless
    a default is given.
    """

    def __init__(self, path: Path, values: Mapping[str, GGUFValue]) -> None:
        self.path = path
        self._values = dict(values)

    def __getitem__(self, key: str) -> GGUFValue:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def fail(self, key: str, problem: str) -> ModelError:
        """The error to raise about `key`, with the file named."""
        return ModelError(f"{self.path}: {key}: {problem}")

    def string(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong_type(key, "a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong_type(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong_type(key, "a number")
        return float(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong_type(key, "a boolean")
        return value

    def strings(self, key: str, default: list[str] | None = None) -> list[str]:
        value = self._get(key, default)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong_type(key, "an array of strings")
        return value

    def integers(self, key: str, default: list[int] | None = None) -> list[int]:
        return [int(item) for item in self._numbers(key, default, "iu", "an array of integers")]

    def numbers(self, key: str, default: list[float] | None = None) -> list[float]:
        return [float(item) for item in self._numbers(key, default, "iuf", "an array of numbers")]

    def _numbers(self, key: str, default: list[int] | list[float] | None, kinds: str, wanted: str) -> list[float]:
        if default is not None and key not in self._values:
            return list(default)
        value = self._get(key, None)
        if isinstance(value, bool | int | float | str | list) or value.dtype.kind not in kinds:
            raise self._wrong_type(key, wanted)
        items: list[float] = value.tolist()
        return items

    def _get(self, key: str, default: GGUFValue | None) -> GGUFValue:
        value = self._values.get(key, default)
        if value is None:
            raise self.fail(key, "is missing")
        return value

    def _wrong_type(self, key: str, wanted: str) -> ModelError:
        return self.fail(key, f"must be {wanted}")


def map_gguf(path: Path) -> mmap.mmap:
    """Map the file read-only.

    Raises:
        ModelError: it cannot be opened or is empty.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise ModelError(f"{path}: the file is empty") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_preamble(cursor: GGUFCursor) -> tuple[int, int]:
    """Read magic, version and counts; return (number of tensors, number of metadata entries)."""
    if cursor.raw(4, "magic") != b"GGUF":
        raise cursor.fail("magic", "is not 'GGUF': this is not a GGUF file")
    version = cursor.u32("version")
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise cursor.fail("version", "the file is big-endian, which is not supported")
        raise cursor.fail("version", f"is {version}; supported are {', '.join(map(str, _VERSIONS))}")
    num_tensors = cursor.u64("tensor_count")
    num_entries = cursor.u64("metadata_kv_count")
    for field, count in (("tensor_count", num_tensors), ("metadata_kv_count", num_entries)):
        if count > MAX_ENTRIES:
            raise cursor.fail(field, f"is {count}; at most {MAX_ENTRIES} are accepted")
    return num_tensors, num_entries


def read_entries(cursor: GGUFCursor, num_entries: int) -> dict[str, GGUFValue]:
    """Read the metadata entries behind the preamble."""
    values: dict[str, GGUFValue] = {}
    for index in range(num_entries):
        key = cursor.name(f"metadata key {index}")
        if key in values:
            raise cursor.fail(key, "occurs twice")
        values[key] = cursor.value(cursor.u32(key), key)
    return values


def read_gguf_metadata(path: Path) -> GGUFMetadata:
    """Read the metadata of a GGUF file; no tensor is touched.

    Raises:
        ModelError: the file cannot be read, is no GGUF file, is cut short or malformed (file and field are named).
    """
    with map_gguf(path) as buffer:
        cursor = GGUFCursor(buffer, path)
        _, num_entries = read_preamble(cursor)
        return GGUFMetadata(path, read_entries(cursor, num_entries))
