"""The tokenizer of a GGUF file, written as Hugging Face's files and read again."""

from pathlib import Path

import pytest

from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer.saving import save_gguf_tokenizer
from tests.tokenizer.vocabularies import byte_level_backend, byte_level_entries, sentencepiece_bytes, write_gguf
from tests.tokenizer.vocabularies import sentencepiece_entries as piece_entries

TEXTS = ["Hello there, world!  42 + 17", "  leading spaces\n\tand tabs ", "Äpfel — 苹果 🙂", ""]
MESSAGES = [{"role": "user", "content": "hi"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


def check_same(saved: Tokenizer, original: Tokenizer) -> None:
    for special in (False, True):
        ids = original.encode_batch(TEXTS, add_special_tokens=special)
        assert saved.encode_batch(TEXTS, add_special_tokens=special) == ids
        assert [saved.decode(each) for each in ids] == [original.decode(each) for each in ids]
    assert saved.vocab_size == original.vocab_size
    assert saved.bos_token_id == original.bos_token_id
    assert [saved.is_special(i) for i in range(saved.vocab_size)] == [
        original.is_special(i) for i in range(original.vocab_size)
    ]
    assert saved.has_chat_template == original.has_chat_template
    if original.has_chat_template:
        assert saved.render_chat(MESSAGES) == original.render_chat(MESSAGES)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_it_is_the_same_tokenizer(tmp_path: Path, kind: str) -> None:
    if kind == "byte-level":
        entries = byte_level_entries(byte_level_backend(), "smollm")
    else:
        entries = piece_entries(sentencepiece_bytes())
    extra = {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }
    source = write_gguf(tmp_path / "tokenizer.gguf", **{**entries, **extra})
    (tmp_path / "out").mkdir()
    save_gguf_tokenizer(source, tmp_path / "out")
    check_same(load_tokenizer(tmp_path / "out"), load_tokenizer(source))


def test_the_default_model(default_model_path: Path, tmp_path: Path) -> None:
    save_gguf_tokenizer(default_model_path, tmp_path)
    saved, original = load_tokenizer(tmp_path), load_tokenizer(default_model_path)
    check_same(saved, original)
    assert saved.eos_token_ids == original.eos_token_ids
