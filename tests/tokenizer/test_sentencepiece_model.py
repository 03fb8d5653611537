"""SentencePiece vocabularies against the sentencepiece package and against Transformers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.errors import ModelError
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer.sentencepiece_model import read_sentencepiece_model
from tests.tokenizer.vocabularies import (
    CORPUS,
    TEXTS,
    sentencepiece_bytes,
    sentencepiece_entries,
    sentencepiece_processor,
    write_gguf,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "no_prefix": {"add_dummy_prefix": False},
    "clean_spaces": {"remove_extra_whitespaces": True},
    "nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no_bytes": {"byte_fallback": False},
    "user_defined": {"user_defined_symbols": "<foo>,[INST]"},
}


def random_texts(count: int) -> list[str]:
    rng = random.Random(7)
    letters = ["".join(rng.choice("ab twehr .1\n") for _ in range(rng.randrange(40))) for _ in range(count)]
    pieces = ["".join(rng.choice(CORPUS)[: rng.randrange(30)] for _ in range(5)) for _ in range(count // 4)]
    return letters + pieces


def model_folder(folder: Path, serialized: bytes, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(serialized)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ids_and_text_equal_sentencepiece(tmp_path: Path, options: dict[str, Any]) -> None:
    serialized = sentencepiece_bytes(**options)
    tokenizer, processor = load_tokenizer(model_folder(tmp_path, serialized)), sentencepiece_processor(serialized)
    # The package finds no special tokens in text; Transformers and llama.cpp do.
    texts = [text for text in (*TEXTS, *CORPUS, *random_texts(1000)) if "<unk>" not in text]
    for text in texts:
        ids = processor.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        if processor.unk_id() not in ids:  # which the package prints as " ⁇ "
            assert tokenizer.decode(ids) == processor.decode(ids)
    assert tokenizer.encode_batch(texts, add_special_tokens=False) == [processor.encode(text) for text in texts]


def test_special_tokens_of_a_bare_model(tmp_path: Path) -> None:
    serialized = sentencepiece_bytes()
    tokenizer, processor = load_tokenizer(model_folder(tmp_path, serialized)), sentencepiece_processor(serialized)
    assert tokenizer.bos_token_id == processor.bos_id()
    assert tokenizer.eos_token_ids == (processor.eos_id(),)
    assert [tokenizer.is_special(index) for index in range(4)] == [True, True, True, False]
    hello = processor.encode("hello")
    assert tokenizer.encode("hello") == [processor.bos_id(), *hello]
    assert tokenizer.encode("hello</s>hello", add_special_tokens=False) == [*hello, processor.eos_id(), *hello]
    assert not tokenizer.has_chat_template


def test_user_defined_pieces_stay_whole(tmp_path: Path) -> None:
    serialized = sentencepiece_bytes(**OPTIONS["user_defined"])
    tokenizer = load_tokenizer(model_folder(tmp_path, serialized))
    index = sentencepiece_processor(serialized).piece_to_id("[INST]")
    assert index in tokenizer.encode("a[INST]b")
    assert not tokenizer.is_special(index)
    assert tokenizer.decode([index]) == "[INST]"


@pytest.mark.parametrize("legacy", [False, True])
def test_equals_transformers(tmp_path: Path, legacy: bool) -> None:
    folder = model_folder(
        tmp_path, sentencepiece_bytes(), tokenizer_class="LlamaTokenizer", legacy=legacy, add_bos_token=True
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in (*TEXTS, *CORPUS, "<s>[INST] hi [/INST] there</s>you", "a</s>b"):
        if legacy and text.startswith((" ", "\u2581")):
            continue  # there Transformers drops the space prefix, which SentencePiece does not
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@pytest.mark.parametrize("prefix", [True, False])
def test_the_same_vocabulary_from_gguf(tmp_path: Path, prefix: bool) -> None:
    serialized = sentencepiece_bytes(add_dummy_prefix=prefix)
    path = write_gguf(
        tmp_path / "m.gguf", **sentencepiece_entries(serialized), tokenizer__ggml__add_space_prefix=prefix
    )
    from_gguf, from_model = load_tokenizer(path), load_tokenizer(model_folder(tmp_path / "m", serialized))
    texts = [*TEXTS, *CORPUS, *random_texts(100), "a</s>b <s> c"]
    assert from_gguf.encode_batch(texts) == from_model.encode_batch(texts)
    for text in texts:
        ids = from_gguf.encode(text)
        assert from_gguf.decode(ids, skip_special_tokens=False) == from_model.decode(ids, skip_special_tokens=False)
    assert from_gguf.eos_token_ids == from_model.eos_token_ids
    assert_same_tokens(from_gguf, from_model)


def assert_same_tokens(one: Tokenizer, other: Tokenizer) -> None:
    assert one.vocab_size == other.vocab_size
    for index in range(one.vocab_size):
        assert one.token_bytes(index) == other.token_bytes(index)
        assert one.is_special(index) == other.is_special(index)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no pieces"),
        (b"not a model at all", "wire type"),
        (sentencepiece_bytes()[:-3], "ends inside"),
        (
            sentencepiece_bytes()[: sentencepiece_bytes().index(b"</s>") + 11],
            "trainer_spec or normalizer_spec is missing",
        ),
        (b"\x0a" + b"\xff" * 11, "more than 64 bits"),
        (b"\x0a\x02\x0a\x00\x0a\x02\x0a\x00", "twice"),
        (b"\x0a\x03\x0a\x01a\x0a\x05\x0a\x01b\x18\x09", "type 9"),
        (sentencepiece_bytes(model_type="unigram"), "trainer_spec.model_type: is UNIGRAM"),
        (sentencepiece_bytes(treat_whitespace_as_suffix=True), "trainer_spec.treat_whitespace_as_suffix"),
    ],
    ids=["empty", "text", "cut", "no_specs", "varint", "twice", "type", "unigram", "suffix"],
)
def test_what_is_not_supported_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_sentencepiece_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
