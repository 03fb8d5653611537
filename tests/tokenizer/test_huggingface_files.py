"""Tokenizers in Hugging Face directories."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import processors

from engine.errors import ModelError
from engine.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.vocabularies import CORPUS, TEXTS, byte_level_backend, sentencepiece_bytes

MESSAGES = [{"role": "user", "content": "hi"}]
CONFIG = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}


def folder_with(folder: Path, **files: Any) -> Path:
    """A model directory. `__` in a name stands for a dot; what is not text is written as JSON."""
    folder.mkdir(exist_ok=True, parents=True)
    files = {"tokenizer__json": byte_level_backend().to_str(), "tokenizer_config__json": CONFIG} | files
    for name, content in files.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def load(folder: Path, **files: Any) -> Tokenizer:
    return load_tokenizer(folder_with(folder, **files))


def assert_like_transformers(folder: Path) -> Tokenizer:
    theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(folder), load_tokenizer(folder)
    for text in (*TEXTS, *CORPUS, "<|im_start|>a<|im_end|> <tool_call> two words <new> <extra>"):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids[:1] == (theirs.eos_token_id,)
    return ours


def test_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = assert_like_transformers(folder_with(tmp_path))
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.vocab_size == byte_level_backend().get_vocab_size()


def test_post_processor_of_tokenizer_json_adds_the_bos(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.enable_truncation(5)
    backend.enable_padding(length=64)
    tokenizer = load(tmp_path, tokenizer__json=backend.to_str())
    plain = tokenizer.encode("a long enough text", add_special_tokens=False)
    assert len(plain) > 5
    assert tokenizer.encode("a long enough text") == [1, *plain]


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_bos_and_eos_flags_are_for_tokenizer_model(tmp_path: Path, bos: bool, eos: bool) -> None:
    flags = {"add_bos_token": bos, "add_eos_token": eos}
    beside_json = assert_like_transformers(folder_with(tmp_path / "json", tokenizer_config__json=CONFIG | flags))
    assert beside_json.encode("hi") == beside_json.encode("hi", add_special_tokens=False)
    folder = folder_with(tmp_path / "model", tokenizer__json=None, tokenizer_config__json=flags)
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes())
    beside_model = load_tokenizer(folder)
    plain = beside_model.encode("hi", add_special_tokens=False)
    assert beside_model.encode("hi") == [1] * bos + plain + [2] * eos


def test_tokens_as_objects_and_in_the_special_tokens_map(tmp_path: Path) -> None:
    tokenizer = load(
        tmp_path,
        tokenizer_config__json={"bos_token": {"content": "<|im_start|>", "lstrip": False}},
        special_tokens_map__json={"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|endoftext|>"},
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))


def test_added_tokens_of_the_config(tmp_path: Path) -> None:
    size = byte_level_backend().get_vocab_size()
    flags = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False}
    added = {
        str(size): {"content": "<new>", "special": False, **flags},
        str(size + 1): {"content": "<extra>", "special": True, **flags},
        str(size - 2): {"content": "<tool_call>", "special": True, **flags, "rstrip": False},
    }
    folder = folder_with(tmp_path, tokenizer_config__json=CONFIG | {"added_tokens_decoder": added})
    tokenizer = assert_like_transformers(folder)
    assert tokenizer.encode("<new>  <extra>") == [size, size + 1]
    assert [tokenizer.is_special(index) for index in (size, size + 1, size - 2)] == [False, True, True]
    assert tokenizer.vocab_size == size + 2


def test_added_tokens_file_and_additional_special_tokens(tmp_path: Path) -> None:
    size = byte_level_backend().get_vocab_size()
    tokenizer = load(
        tmp_path,
        added_tokens__json={"<extra>": size, "<new>": size + 1, "<tool_call>": size - 2},
        special_tokens_map__json={"additional_special_tokens": ["<extra>", {"content": "<tool_call>"}]},
    )
    assert tokenizer.encode("<extra><new>") == [size, size + 1]
    assert [tokenizer.is_special(index) for index in (size, size + 1)] == [True, False]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config__json": {"eos_token_id": [2, 0, 5]}}, (2, 0, 5)),
        ({"generation_config__json": {"eos_token_id": 0}, "config__json": {"eos_token_id": 7}}, (2, 0)),
        ({"generation_config__json": {}, "config__json": {"eos_token_id": [7]}}, (2, 7)),
        ({"tokenizer_config__json": {}, "config__json": {"eos_token_id": 7}}, (7,)),
        ({"tokenizer_config__json": {}}, ()),
    ],
)
def test_every_end_token_counts(tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert load(tmp_path, **files).eos_token_ids == expected


def test_chat_template_places(tmp_path: Path) -> None:
    assert not load(tmp_path / "none").has_chat_template
    in_config = load(tmp_path / "a", tokenizer_config__json=CONFIG | {"chat_template": "c{{ bos_token }}"})
    assert in_config.render_chat(MESSAGES) == "c<|im_start|>"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t{{ tools | length }}"}]
    in_list = load(tmp_path / "b", tokenizer_config__json=CONFIG | {"chat_template": named})
    assert in_list.render_chat(MESSAGES) == "d"
    assert in_list.render_chat(MESSAGES, tools=[{}, {}]) == "t2"
    in_file = load(
        tmp_path / "c",
        tokenizer_config__json=CONFIG | {"chat_template": "config"},
        chat_template__jinja="é{{ messages[0].content }}{{ enable_thinking }}\n",
    )
    assert in_file.render_chat(MESSAGES, enable_thinking=False) == "éhiFalse"
    (tmp_path / "c" / "additional_chat_templates").mkdir()
    (tmp_path / "c" / "additional_chat_templates" / "tool_use.jinja").write_text("extra")
    assert load_tokenizer(tmp_path / "c").render_chat(MESSAGES, tools=[]) == "extra"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer__json": None}, "neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer__json": "{"}, "tokenizer.json: "),
        ({"tokenizer__json": '{"model": {"type": "Mystery"}}'}, "tokenizer.json: "),
        ({"tokenizer_config__json": "{nonsense"}, "tokenizer_config.json: is not valid JSON"),
        ({"tokenizer_config__json": "[" * 100_000}, "tokenizer_config.json: is not valid JSON"),
        ({"tokenizer_config__json": [1]}, "tokenizer_config.json: must be an object"),
        ({"tokenizer_config__json": {"eos_token": 5}}, "tokenizer_config.json: eos_token: must be a text"),
        ({"tokenizer_config__json": {"eos_token": "<nowhere>"}}, "eos_token: '<nowhere>' is not in the vocabulary"),
        ({"tokenizer_config__json": {"chat_template": 5}}, "tokenizer_config.json: chat_template: must be"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "x"}]}}, "chat_template: every entry"),
        ({"tokenizer_config__json": {"chat_template": "\ud800"}}, "lone surrogate"),
        ({"tokenizer_config__json": {"added_tokens_decoder": 5}}, "added_tokens_decoder: must be an object"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"x": {}}}}, "added_tokens_decoder.x"),
        (
            {"tokenizer_config__json": {"added_tokens_decoder": {"9000": {"content": "<gap>"}}}},
            "'<gap>' is declared as 9000, is 42",
        ),
        ({"tokenizer_config__json": {"additional_special_tokens": 3}}, "additional_special_tokens: must be a list"),
        ({"added_tokens__json": {"<a>": "b"}}, "added_tokens.json: <a>: must be an integer"),
        ({"generation_config__json": {"eos_token_id": "two"}}, "generation_config.json: eos_token_id"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(tmp_path, **files)
    assert reason in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_template_file_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: cannot be read"):
        load_tokenizer(folder)
