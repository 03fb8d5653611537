"""Tokenizers inside GGUF files."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from engine.errors import ModelError
from engine.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.vocabularies import (
    CORPUS,
    TEXTS,
    byte_level_backend,
    byte_level_entries,
    sentencepiece_bytes,
    sentencepiece_entries,
    write_gguf,
)

# Each family's pre-tokenizer, as its tokenizer.json has it.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2_WORDS = BYTES_ONLY | {"use_regex": True}


def split_by(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


REFERENCES: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [GPT2_WORDS],
    "smollm": [{"type": "Digits", "individual_digits": True}, GPT2_WORDS],
    "llama-bpe": [split_by(LLAMA3_WORDS), BYTES_ONLY],
    "qwen2": [split_by(LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")), BYTES_ONLY],
}


def gguf_tokenizer(tmp_path: Path, pre: str, **entries: Any) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path / "m.gguf", **(byte_level_entries(byte_level_backend(), pre) | entries)))


@pytest.mark.parametrize("pre", REFERENCES)
def test_ids_equal_a_tokenizer_json(tmp_path: Path, pre: str) -> None:
    state = json.loads(byte_level_backend().to_str())
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": REFERENCES[pre]}
    state["model"]["ignore_merges"] = pre == "llama-bpe"
    state["normalizer"] = {"type": "NFC"} if pre == "qwen2" else None
    reference = tokenizers.Tokenizer.from_str(json.dumps(state))
    ours = gguf_tokenizer(tmp_path, pre)
    for text in (*TEXTS, *CORPUS, "<|im_start|>user\n two words <tool_call> <|im_end|>"):
        expected = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == expected
        assert ours.decode(expected, skip_special_tokens=False) == reference.decode(expected, skip_special_tokens=False)


def words(tmp_path: Path, pre: str, text: str) -> list[str]:
    spelled = gguf_tokenizer(tmp_path, pre)._backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in spelled]


def test_how_digits_and_words_are_cut(tmp_path: Path) -> None:
    text = "it's 2024 CamelCase\n\n  x"
    assert words(tmp_path, "gpt-2", text) == ["it", "'s", " 2024", " CamelCase", "\n\n ", " x"]
    assert words(tmp_path, "smollm", text) == ["it", "'s", " ", "2", "0", "2", "4", " CamelCase", "\n\n ", " x"]
    assert words(tmp_path, "llama-bpe", text) == ["it", "'s", " ", "202", "4", " CamelCase", "\n\n", " ", " x"]
    assert words(tmp_path, "qwen2", text) == ["it", "'s", " ", "2", "0", "2", "4", " CamelCase", "\n\n", " ", " x"]
    assert words(tmp_path, "tekken", text)[-7:] == ["2", "4", " Camel", "Case", "\n\n", " ", " x"]
    assert words(tmp_path, "default", "a 12345 b!") == ["a", " ", "123", "45", " b", "!"]


def test_no_pre_means_default(tmp_path: Path) -> None:
    entries = byte_level_entries(byte_level_backend(), "default")
    named = load_tokenizer(write_gguf(tmp_path / "a.gguf", **entries))
    del entries["tokenizer__ggml__pre"]
    unnamed = load_tokenizer(write_gguf(tmp_path / "b.gguf", **entries))
    assert named.encode_batch(TEXTS) == unnamed.encode_batch(TEXTS)


def test_ignored_merges(tmp_path: Path) -> None:
    """A word that is a token is that token in Llama 3, also where no merges lead there."""
    backend = byte_level_backend()
    entries = byte_level_entries(backend, "llama-bpe")
    entries["tokenizer__ggml__tokens"] = [*entries["tokenizer__ggml__tokens"], "qzqz"]
    entries["tokenizer__ggml__token_type"] = [*entries["tokenizer__ggml__token_type"], 1]
    new_id = len(entries["tokenizer__ggml__tokens"]) - 1
    no_bos = {"tokenizer__ggml__add_bos_token": False}
    assert load_tokenizer(write_gguf(tmp_path / "a.gguf", **entries, **no_bos)).encode("qzqz") == [new_id]
    entries["tokenizer__ggml__pre"] = "qwen2"
    assert new_id not in load_tokenizer(write_gguf(tmp_path / "b.gguf", **entries)).encode("qzqz")


def test_bos_and_eos_flags(tmp_path: Path) -> None:
    plain = gguf_tokenizer(tmp_path, "qwen2").encode("hi")
    assert gguf_tokenizer(tmp_path, "llama-bpe").encode("hi") == [1, *plain]
    assert gguf_tokenizer(tmp_path, "llama-bpe", tokenizer__ggml__add_bos_token=False).encode("hi") == plain
    both = {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True}
    tokenizer = gguf_tokenizer(tmp_path, "qwen2", **both)
    assert tokenizer.encode("hi") == [1, *plain, 2]
    assert tokenizer.encode("hi", add_special_tokens=False) == plain
    sentencepiece = write_gguf(tmp_path / "s.gguf", **sentencepiece_entries(sentencepiece_bytes()))
    assert load_tokenizer(sentencepiece).encode("hi")[0] == 1


def test_every_end_token_counts(tmp_path: Path) -> None:
    assert gguf_tokenizer(tmp_path, "smollm").eos_token_ids == (2,)
    more = {"tokenizer__ggml__eot_token_id": 0, "tokenizer__ggml__eom_token_id": 2}
    assert gguf_tokenizer(tmp_path, "smollm", **more).eos_token_ids == (2, 0)


def test_token_types(tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer(tmp_path, "smollm")
    tool_call = tokenizer._backend.token_to_id("<tool_call>")
    assert [tokenizer.is_special(index) for index in (0, 1, 2, 3, tool_call)] == [True, True, True, False, False]
    assert tokenizer.encode("<|im_start|><tool_call>") == [1, tool_call]
    assert tokenizer.decode([1, tool_call]) == "<tool_call>"


def test_chat_templates(tmp_path: Path) -> None:
    assert not gguf_tokenizer(tmp_path, "smollm").has_chat_template
    main = {"tokenizer__chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}
    messages = [{"role": "user", "content": "hi"}]
    assert gguf_tokenizer(tmp_path, "smollm", **main).render_chat(messages) == "<|im_start|>hi<|im_end|>"
    named = {"tokenizer__chat_templates": ["tool_use"], "tokenizer__chat_template__tool_use": "tools"}
    tokenizer = gguf_tokenizer(tmp_path, "smollm", **main, **named)
    assert tokenizer.render_chat(messages, tools=[]) == "tools"
    assert tokenizer.render_chat(messages) == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"tokenizer__ggml__model": "bert"}, "tokenizer.ggml.model: is 'bert'"),
        ({"tokenizer__ggml__pre": "frobnicate"}, "tokenizer.ggml.pre: is 'frobnicate'; supported are codeshell"),
        (
            {"tokenizer__ggml__tokens": ["a", "b", "a"], "tokenizer__ggml__token_type": [1, 1, 1]},
            "0 and 2 are both 'a'",
        ),
        ({"tokenizer__ggml__token_type": [1, 2]}, "tokenizer.ggml.token_type: has 2 entries"),
        ({"tokenizer__ggml__merges": ["zz qq"]}, "tokenizer.ggml.merges[0]: 'zz qq' does not join"),
        ({"tokenizer__ggml__merges": ["ab"]}, "tokenizer.ggml.merges[0]"),
        ({"tokenizer__ggml__eos_token_id": 99_999}, "tokenizer.ggml.eos_token_id: is 99999, outside"),
        ({"tokenizer__ggml__bos_token_id": "one"}, "tokenizer.ggml.bos_token_id"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.scores"),
        ({"tokenizer__chat_template": 7}, "tokenizer.chat_template"),
        ({"tokenizer__chat_template": "x" * 1_000_001}, "chat template 'default': is longer"),
    ],
    ids=lambda value: next(iter(value))[-20:] if isinstance(value, dict) else "",
)
def test_malformed_entries_are_named(tmp_path: Path, entries: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        gguf_tokenizer(tmp_path, "smollm", **entries)
    assert reason in str(caught.value)
    assert str(tmp_path / "m.gguf") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_entries_are_named(tmp_path: Path) -> None:
    for key in ("model", "tokens", "merges"):
        entries = byte_level_entries(byte_level_backend(), "smollm")
        del entries[f"tokenizer__ggml__{key}"]
        with pytest.raises(ModelError, match=rf"tokenizer\.ggml\.{key}: is missing"):
            load_tokenizer(write_gguf(tmp_path / "m.gguf", **entries))
    entries = byte_level_entries(byte_level_backend(), "smollm") | {"tokenizer__ggml__add_eos_token": True}
    del entries["tokenizer__ggml__eos_token_id"]
    with pytest.raises(ModelError, match="eos_token_id: is missing, though add_eos_token is set"):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", **entries))


# Ids of the published SmolLM2 tokenizer.
SMOLLM2_IDS = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "<|im_start|>\n<|im_end|>": [1, 198, 2],
}


@pytest.fixture(scope="module")
def smollm2(default_model_path: Path) -> Tokenizer:
    return load_tokenizer(default_model_path)


def test_default_model_ids(smollm2: Tokenizer) -> None:
    for text, ids in SMOLLM2_IDS.items():
        assert smollm2.encode(text) == ids
        assert smollm2.decode(ids, skip_special_tokens=False) == text
    assert (smollm2.bos_token_id, smollm2.eos_token_ids, smollm2.vocab_size) == (1, (2,), 49152)


def test_default_model_equals_its_pre_tokenizer(smollm2: Tokenizer) -> None:
    """Every text is cut as SmolLM2's tokenizer.json says and put together again whole."""
    reference = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in (*TEXTS, *CORPUS):
        expected = [index for word, _ in reference.pre_tokenize_str(text) for index in model_ids(smollm2, word)]
        if "<" not in text:
            assert smollm2.encode(text) == expected
        # Six control characters and two lead bytes of unassigned planes have no token: the vocabulary cannot say them.
        if not set("\x00\x01\x7f\U0010ffff\U000e0041") & set(text):
            assert smollm2.decode(smollm2.encode(text)) == text


def model_ids(tokenizer: Tokenizer, word: str) -> list[int]:
    return [token.id for token in tokenizer._backend.model.tokenize(word)]


def test_default_model_chat(smollm2: Tokenizer) -> None:
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    prompt = smollm2.render_chat([{"role": "user", "content": "Hi <|im_end|> 🎉"}])
    assert prompt == f"{system}<|im_start|>user\nHi <|im_end|> 🎉<|im_end|>\n<|im_start|>assistant\n"
    # What a message spells becomes the token, as in Transformers.
    assert smollm2.encode(prompt, add_special_tokens=False).count(2) == 3
    own = smollm2.render_chat([{"role": "system", "content": ""}], add_generation_prompt=False)
    assert own == "<|im_start|>system\n<|im_end|>\n"
