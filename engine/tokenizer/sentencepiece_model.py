"""Reads `tokenizer.model`, SentencePiece's own file, for models that ship nothing else.

The file is one protocol buffer, of which a tokenizer needs a handful of fields; reading them here keeps the server
free of two native libraries. Tests compare the result with the `sentencepiece` package.
Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from engine.errors import ModelError
from engine.tokenizer.sentencepiece_bpe import PIECE_TYPES, PieceType, TextRules, build_sentencepiece_bpe

MAX_MODEL_BYTES = 64 * 1024**2  # 256,000 pieces are about 4 MB
_FLOAT = struct.Struct("<f")
# Wire types of protocol buffers.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Field numbers in the .proto.
_PIECES, _TRAINER_SPEC, _NORMALIZER_SPEC = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _SPACE_AS_SUFFIX = 3, 24
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5
_MODEL_TYPES = {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}


class _MalformedError(Exception):
    """What the message says is wrong with a protocol buffer."""


@dataclass(frozen=True)
class SentencePieceModel:
    pieces: list[str]  # index is id
    scores: list[float]
    types: list[int]  # PieceType
    rules: TextRules

    def build(self, *, legacy: bool = True) -> tokenizers.Tokenizer:
        """`legacy`: whether every stretch of text gets the space prefix, see `build_sentencepiece_bpe`."""
        return build_sentencepiece_bpe(self.pieces, self.scores, self.types, self.rules, prefix_every_stretch=legacy)


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read vocabulary and text rules.

    Raises:
        ModelError: the file is unreadable, no SentencePiece model, or of a kind other than BPE.
    """
    try:
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise ModelError(f"{path}: is larger than {MAX_MODEL_BYTES} bytes")
        serialized = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        return _read_model(serialized)
    except (_MalformedError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: is not a SentencePiece model: {error}") from None
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def _read_model(serialized: bytes) -> SentencePieceModel:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    specs: dict[int, _Fields] = {}
    for number, value in _fields(serialized):
        if number == _PIECES:
            piece = _Fields(_as_bytes(value))
            pieces.append(piece.raw(_PIECE).decode("utf-8"))
            scores.append(_FLOAT.unpack(piece.raw(_SCORE, bytes(_FLOAT.size)))[0])
            types.append(_piece_type(piece.integer(_TYPE, PieceType.NORMAL), len(types)))
        elif number in (_TRAINER_SPEC, _NORMALIZER_SPEC):
            specs[number] = _Fields(_as_bytes(value))
    if not pieces or len(set(pieces)) != len(pieces):
        raise _MalformedError("it has no pieces, or one twice")
    if len(specs) != 2:
        raise _MalformedError("trainer_spec or normalizer_spec is missing")
    trainer, normalizer = specs[_TRAINER_SPEC], specs[_NORMALIZER_SPEC]
    model_type = trainer.integer(_MODEL_TYPE, 1)
    if _MODEL_TYPES.get(model_type) != "BPE":
        found = _MODEL_TYPES.get(model_type, model_type)
        raise ModelError(f"trainer_spec.model_type: is {found}; only BPE is supported")
    if trainer.integer(_SPACE_AS_SUFFIX, 0):
        raise ModelError("trainer_spec.treat_whitespace_as_suffix: is not supported")
    if not normalizer.integer(_ESCAPE_WHITESPACES, 1):
        raise ModelError("normalizer_spec.escape_whitespaces: false is not supported")
    rules = TextRules(
        add_space_prefix=bool(normalizer.integer(_ADD_DUMMY_PREFIX, 1)),
        remove_extra_whitespaces=bool(normalizer.integer(_REMOVE_EXTRA_WHITESPACES, 1)),
        precompiled_charsmap=normalizer.raw(_CHARSMAP, b""),
    )
    return SentencePieceModel(pieces, scores, types, rules)


def _piece_type(number: int, index: int) -> int:
    if number not in PIECE_TYPES:
        raise _MalformedError(f"piece {index} is of type {number}")
    return number


class _Fields:
    """The last value of each field of one message."""

    def __init__(self, message: bytes) -> None:
        self._values = dict(_fields(message))

    def integer(self, number: int, default: int) -> int:
        value = self._values.get(number, default)
        if not isinstance(value, int):
            raise _MalformedError(f"field {number} is not an integer")
        return value

    def raw(self, number: int, default: bytes | None = None) -> bytes:
        return _as_bytes(self._values.get(number, default))


def _as_bytes(value: int | bytes | None) -> bytes:
    if not isinstance(value, bytes):
        raise _MalformedError("a field is missing or not of its type")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values: varints as int, everything else as the bytes it is stored in."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire_type = tag & 7
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield tag >> 3, value
            continue
        if wire_type == _BYTES:
            size, position = _varint(message, position)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise _MalformedError(f"wire type {wire_type} at offset {position}")
        if size > len(message) - position:
            raise _MalformedError(f"it ends inside field {tag >> 3} at offset {position}")
        yield tag >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(message):
            raise _MalformedError("it ends inside a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _MalformedError(f"a number of more than 64 bits at offset {position}")
