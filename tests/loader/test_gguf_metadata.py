import struct
import time
from pathlib import Path

import pytest

from engine.errors import ModelError
from engine.loader.gguf_cursor import MAX_ARRAY_DEPTH, MAX_HEADER_BYTES
from engine.loader.gguf_metadata import MAX_ENTRIES, read_gguf_metadata

U8, U32, BOOL, STRING, ARRAY = 0, 4, 7, 8, 9


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def header(*entries: bytes, version: int = 3, tensors: int = 0, count: int | None = None) -> bytes:
    return b"GGUF" + u32(version) + u64(tensors) + u64(len(entries) if count is None else count) + b"".join(entries)


def entry(key: str | bytes, value_type: int, value: bytes) -> bytes:
    return text(key) + u32(value_type) + value


def test_every_kind_of_value(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    nested = u32(ARRAY) + u64(2) + u32(U8) + u64(1) + b"\x07" + u32(STRING) + u64(1) + text("é")
    path.write_bytes(
        header(
            *[
                entry(f"n{kind}", kind, struct.pack(f"<{code}", 1))
                for kind, code in zip(range(7), "BbHhIif", strict=True)
            ],
            *[entry(f"n{kind}", kind, struct.pack(f"<{code}", 1)) for kind, code in ((10, "Q"), (11, "q"), (12, "d"))],
            entry("flag", BOOL, b"\x01"),
            entry("word", STRING, text("grüß")),
            entry("flags", ARRAY, u32(BOOL) + u64(2) + b"\x01\x00"),
            entry("words", ARRAY, u32(STRING) + u64(2) + text("") + text("b")),
            entry("nested", ARRAY, nested),
        )
    )
    metadata = read_gguf_metadata(path)
    for kind in (*range(7), 10, 11, 12):
        assert metadata.number(f"n{kind}") == 1.0
        assert isinstance(metadata[f"n{kind}"], float if kind in (6, 12) else int)
    assert metadata.boolean("flag") is True
    assert metadata.string("word") == "grüß"
    assert metadata["flags"].tolist() == [True, False]
    assert metadata.strings("words") == ["", "b"]
    assert [list(part) for part in metadata["nested"]] == [[7], ["é"]]
    assert len(metadata) == 15


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "the file is empty"),
        (b"GGU", "magic: needs 4 bytes"),
        (b"PK\x03\x04" + bytes(20), "magic: is not 'GGUF'"),
        (header(version=1), "version: is 1; supported are 2, 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "version: the file is big-endian"),
        (header(tensors=1 << 60), "tensor_count: is 1152921504606846976; at most"),
        (header(count=MAX_ENTRIES + 1), "metadata_kv_count: is 65537; at most"),
        (header(count=1), "metadata key 0: needs 8 bytes"),
        (header(u64(1 << 63)), "metadata key 0: is 9223372036854775808 bytes long"),
        (header(u64(100)), "metadata key 0: needs 100 bytes"),
        (header(entry("a\nb", U8, b"\x01")), "metadata key 0: holds unprintable characters"),
        (header(entry(b"\xff", U8, b"\x01")), "metadata key 0: is not valid UTF-8"),
        (header(entry("k", U8, b"\x01"), entry("k", U8, b"\x01")), "k: occurs twice"),
        (header(entry("k", 13, b"\x01")), "k: has value type 13, which the format does not define"),
        (header(entry("k", U32, b"\x01")), "k: 1 items of at least 4 bytes do not fit in the 1 bytes left"),
        (header(entry("k", BOOL, b"\x02")), "k: a boolean is neither 0 nor 1"),
        (header(entry("k", STRING, u64(1 << 62))), "k: needs 4611686018427387904 bytes"),
        (header(entry("k", STRING, text(b"\xff"))), "k: is not valid UTF-8"),
        (header(entry("k", ARRAY, u32(U32) + u64(1 << 62))), "k: 4611686018427387904 items"),
        (header(entry("k", ARRAY, u32(STRING) + u64(1 << 62))), "k: 4611686018427387904 items"),
        (header(entry("k", ARRAY, u32(ARRAY) + u64(1 << 62))), "k: 4611686018427387904 items"),
        (header(entry("k", ARRAY, u32(BOOL) + u64(1 << 62))), "k: 4611686018427387904 items"),
        (header(entry("k", ARRAY, u32(STRING) + u64(2) + text("a" * 12) + b"\0")), r"k[1]: is cut off"),
        (header(entry("k", ARRAY, u32(STRING) + u64(1) + u64(1 << 63))), r"k[0]: is cut off"),
        (header(entry("k", ARRAY, u32(STRING) + u64(1) + text(b"\xc3"))), r"k[0]: is not valid UTF-8"),
        (
            header(entry("k", ARRAY, (u32(ARRAY) + u64(1)) * MAX_ARRAY_DEPTH + bytes(12))),
            "k: arrays nested more than 4",
        ),
    ],
)
def test_malformed_metadata_is_refused_by_field(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_gguf_metadata(path)
    assert str(caught.value).startswith(f"{path}: {named}")
    assert "\n" not in str(caught.value)


def test_the_header_is_capped_in_a_large_file(tmp_path: Path) -> None:
    """A sparse file, large enough that the lengths in it are possible: the cap alone stops the reader."""
    path = tmp_path / "a.gguf"
    for value in (
        entry("k", STRING, u64(MAX_HEADER_BYTES)),
        entry("k", ARRAY, u32(STRING) + u64(MAX_HEADER_BYTES)),
        entry("k", ARRAY, u32(U8) + u64(MAX_HEADER_BYTES)),
    ):
        with path.open("wb") as file:
            file.write(header(value))
            file.truncate(1 << 31)
        started_s = time.process_time()
        with pytest.raises(ModelError, match=r"k: .*(limit|do not fit)"):
            read_gguf_metadata(path)
        assert time.process_time() - started_s < 1


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.gguf: cannot be read: No such file"):
        read_gguf_metadata(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        read_gguf_metadata(tmp_path)
