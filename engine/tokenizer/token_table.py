"""The bytes that each token stands for, where a tokenizer's decoder works token by token."""

import json
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

_OUTSIDE = "\uffff"  # not Latin-1: marks a token that is no string of byte characters


@dataclass(frozen=True)
class TokenTable:
    """`token_bytes[id]` as in the middle of a text; text is their concatenation, read as UTF-8.

    `num_leading_spaces`: so many spaces are taken off the beginning of a whole text (SentencePiece's space prefix).
    """

    token_bytes: tuple[bytes, ...]
    num_leading_spaces: int = 0


def make_token_table(backend: tokenizers.Tokenizer) -> TokenTable | None:
    """The table of a byte-level or byte-fallback tokenizer; None for any other decoder, which may look at neighbours.

    Byte-level tokens equal the decoder of `tokenizers` on every sequence of ids. With byte fallback they differ from
    it only in runs of byte tokens that are not UTF-8: that decoder then replaces the whole run, byte by byte, and so
    could say nothing of a run before its end; here the valid characters in it stay.
    """
    steps = _steps(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else []
    kinds = [step["type"] for step in steps]
    texts = _texts(backend)
    if kinds == ["ByteLevel"]:
        return TokenTable(_byte_level(texts))
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        pattern, strip = steps[0]["pattern"].get("String"), steps[3:]
        if pattern and all(step["content"] == " " and step["stop"] == 0 for step in strip):
            spaces = strip[0]["start"] if strip else 0
            return TokenTable(_byte_fallback(texts, pattern, steps[0]["content"]), spaces)
    return None


def _steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [step for part in state["decoders"] for step in _steps(part)]


def _texts(backend: tokenizers.Tokenizer) -> list[str]:
    """Texts as the vocabulary spells them, by id; empty for ids that no token has."""
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    texts = [""] * (max(vocabulary.values(), default=-1) + 1)
    for text, index in vocabulary.items():
        texts[index] = text
    return texts


def _byte_level(texts: list[str]) -> tuple[bytes, ...]:
    """Undo GPT-2's spelling of bytes as printable characters; a token with any other character is its own text."""
    alphabet = _byte_alphabet()
    to_byte = {ord(character): chr(byte) for character, byte in alphabet.items()}
    others = {code: _OUTSIDE for code in range(256) if code not in to_byte}
    table = to_byte | others

    def spelled(text: str) -> bytes:
        try:
            return text.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            return text.encode("utf-8")

    return tuple(map(spelled, texts))


def _byte_alphabet() -> dict[str, int]:
    """Character to byte: printable Latin-1 stands for itself, the other bytes, in order, for characters from 256 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    alone = {character: ord(character) for character in alphabet if ord(character) < 256}
    rest = [byte for byte in range(256) if byte not in alone.values()]
    return alone | {chr(256 + index): byte for index, byte in enumerate(rest)}


def _byte_fallback(texts: list[str], pattern: str, replacement: str) -> tuple[bytes, ...]:
    byte_texts = {f"<0x{byte:{case}}>": bytes([byte]) for byte in range(256) for case in ("02X", "02x")}

    def spelled(text: str) -> bytes:
        text = text.replace(pattern, replacement)
        return byte_texts.get(text) or text.encode("utf-8")

    return tuple(map(spelled, texts))
