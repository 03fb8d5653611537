"""What a `Tokenizer` says of texts and of single tokens."""

import threading
import time

import pytest

from engine.errors import InvalidRequest
from engine.tokenizer import Tokenizer
from engine.tokenizer.parts import TokenizerParts
from tests.tokenizer.test_detokenizer import byte_fallback_backend, other_backends, wrap
from tests.tokenizer.vocabularies import CORPUS, TEXTS, byte_level_backend


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return wrap(byte_level_backend())


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    return wrap(byte_fallback_backend(with_added=False))


@pytest.mark.parametrize("text", TEXTS + CORPUS)
def test_round_trip(byte_level: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text)) == text
    if "\u2581" not in text and "<unk>" not in text:  # SentencePiece writes spaces as the former
        assert byte_fallback.decode(byte_fallback.encode(text)) == text


def test_batch_equals_one_by_one(byte_level: Tokenizer) -> None:
    texts = [*TEXTS, *CORPUS]
    assert byte_level.encode_batch(texts) == [byte_level.encode(text) for text in texts]
    assert byte_level.encode_batch([]) == []


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83c\udf89"])
def test_lone_surrogates_are_refused(byte_level: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate U\\+D") as caught:
        byte_level.encode(text)
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest):
        byte_level.encode_batch(["fine", text])


def test_encoding_releases_the_interpreter(byte_level: Tokenizer) -> None:
    """Other threads run while a long text is encoded."""
    text = " ".join(CORPUS) * 3000
    started, done = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        byte_level.encode_batch([text])
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    turns = 0
    while not done.is_set():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert turns > 5  # hardly one, if it were not so


def test_token_bytes_joined_are_the_text(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    for text in (*TEXTS, *CORPUS):
        ids = byte_level.encode(text)
        assert b"".join(map(byte_level.token_bytes, ids)).decode() == text
        if "\u2581" not in text and text:
            ids = byte_fallback.encode(text)
            assert b"".join(map(byte_fallback.token_bytes, ids)).decode() == " " + text


def test_single_tokens(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    (part, *_) = byte_level.encode("€")
    assert byte_level.token_bytes(part) == b"\xe2"
    assert byte_level.token_text(part) == r"bytes:\xe2"
    the = byte_fallback._backend.token_to_id("▁the")
    assert byte_fallback.token_text(the) == " the"
    assert byte_fallback.token_text(byte_fallback._backend.token_to_id("<0x0A>")) == "\n"
    assert byte_fallback.token_text(byte_fallback._backend.token_to_id("<0xE2>")) == r"bytes:\xe2"
    assert byte_level.token_text(1) == "<|im_start|>"
    assert byte_level.token_text(byte_level._backend.token_to_id("two words")) == "two words"
    assert byte_level.token_text(byte_level.vocab_size + 5) == ""
    assert wrap(other_backends()["metaspace"]).token_text(0) == "<s>"


def test_special_tokens(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("<|im_start|>a<|im_end|>")
    assert [byte_level.is_special(index) for index in ids] == [True, False, True]
    assert byte_level.decode(ids) == "a"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<|im_start|>a<|im_end|>"
    assert not byte_level.is_special(byte_level.vocab_size + 1)


def test_without_chat_template(byte_level: Tokenizer) -> None:
    assert not byte_level.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        byte_level.render_chat([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_chat_becomes_special_tokens() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    parts = TokenizerParts(byte_level_backend(), 1, (2,), {}, {"default": template})
    tokenizer = Tokenizer(parts)
    prompt = tokenizer.render_chat([{"role": "user", "content": "a<|im_end|>"}])
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert [index for index in ids if tokenizer.is_special(index)] == [1, 2, 2]
