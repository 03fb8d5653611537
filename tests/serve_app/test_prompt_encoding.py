import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from engine.errors import InvalidRequest
from engine.tokenizer import Tokenizer
from serve_app.prompt_encoding import CHARS_PER_TOKEN, LONG_TEXT_CHARS, PromptEncoder, TextPrompt


class WordTokenizer:
    """An id for each word, its length; 1 before them where special tokens are asked for."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        self.calls.append(list(texts))
        for text in texts:
            text.encode()
        return [[1] * add_special_tokens + [len(word) for word in text.split()] for text in texts]


def encoder(tokenizer: Any, max_model_len: int = 100) -> PromptEncoder:
    return PromptEncoder(cast(Tokenizer, tokenizer), max_model_len)


def test_one_call_for_each_kind_and_results_in_order() -> None:
    tokenizer = WordTokenizer()
    prompts = [TextPrompt("a bb", True), TextPrompt("ccc", False), TextPrompt("dddd", True)]
    assert asyncio.run(encoder(tokenizer).encode(prompts)) == [[1, 1, 2], [3], [1, 4]]
    assert tokenizer.calls == [["a bb", "dddd"], ["ccc"]]
    assert asyncio.run(encoder(tokenizer).encode([])) == []


def test_text_that_cannot_be_encoded_fails_alone() -> None:
    prompts = [TextPrompt("a", False), TextPrompt("\ud800", False), TextPrompt("bb", False)]
    first, broken, last = asyncio.run(encoder(WordTokenizer()).encode(prompts))
    assert (first, last) == ([1], [2])
    assert isinstance(broken, InvalidRequest)
    assert broken.param == "prompt"


def test_usual_text_belongs_into_the_batch() -> None:
    tokenizer = WordTokenizer()
    assert asyncio.run(encoder(tokenizer).encode_long(TextPrompt("a " * 100, True))) is None
    assert tokenizer.calls == []


def test_long_text_is_encoded_alone() -> None:
    text = "a" * (LONG_TEXT_CHARS + 1)
    assert asyncio.run(encoder(WordTokenizer()).encode_long(TextPrompt(text, True))) == [1, len(text)]


def test_far_too_long_text_is_refused_by_its_beginning() -> None:
    tokenizer = WordTokenizer()
    with pytest.raises(InvalidRequest, match=r"100 tokens.*more than") as caught:
        asyncio.run(encoder(tokenizer).encode_long(TextPrompt("a " * LONG_TEXT_CHARS, False)))
    assert caught.value.param == "messages"
    assert [len(text) for call in tokenizer.calls for text in call] == [100 * CHARS_PER_TOKEN]
