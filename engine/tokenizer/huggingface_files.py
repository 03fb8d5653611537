"""The tokenizer in a Hugging Face model directory.

`tokenizer.json` (or, where there is only that, `tokenizer.model`) holds the vocabulary; the files around it name the
special tokens and hold the chat template. They are read as Transformers reads them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from engine.errors import ModelError
from engine.tokenizer.chat_template import DEFAULT_NAME
from engine.tokenizer.parts import TokenizerParts, bos_eos_processor
from engine.tokenizer.sentencepiece_model import read_sentencepiece_model

_CONFIG, _SPECIAL_MAP = "tokenizer_config.json", "special_tokens_map.json"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")
_TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def read_huggingface_tokenizer(folder: Path) -> TokenizerParts:
    """Build the tokenizer of a model directory.

    Raises:
        ModelError: no tokenizer, or a malformed file; file and field are named.
    """
    config = _read_object(folder / _CONFIG)
    settings = {**_read_object(folder / _SPECIAL_MAP), **config}
    named = {name: text for name in _NAMED_TOKENS if (text := _token_text(folder / _CONFIG, name, settings.get(name)))}
    json_path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_path.exists():
        backend = _read_backend(json_path)
    elif model_path.exists():
        # Files older than the setting mean the legacy way, in which they were trained.
        backend = read_sentencepiece_model(model_path).build(legacy=config.get("legacy") is not False)
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | named
    else:
        raise ModelError(f"{folder}: there is neither tokenizer.json nor tokenizer.model")
    _add_tokens(folder, backend, config, _special_texts(folder, settings, named))
    bos, eos = (_named_token(folder, backend, named, name) for name in ("bos_token", "eos_token"))
    if not json_path.exists():  # tokenizer.json says itself what goes around a text, and wins
        backend.post_processor = bos_eos_processor(
            bos if config.get("add_bos_token", True) else None, eos if config.get("add_eos_token", False) else None
        )
    ends = ([eos[1]] if eos else []) + _generation_ends(folder)
    return TokenizerParts(
        backend=backend,
        bos_token_id=bos[1] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        special_tokens=named,
        chat_templates=_chat_templates(folder, config),
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise ModelError(f"{path}: {' '.join(str(error).split())}") from None
    backend.no_truncation()  # both are settings for training batches
    backend.no_padding()
    return backend


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is not there."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must be an object")
    return value


def _token_text(path: Path, field: str, value: Any) -> str | None:
    """The text of a token that is written as a string or as an object with "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{path}: {field}: must be a text or an object with a text under 'content'")
    return value


def _special_texts(folder: Path, settings: Mapping[str, Any], named: Mapping[str, str]) -> list[str]:
    """Texts of all tokens that the settings call special."""
    texts = list(named.values())
    for field in _EXTRA_TOKENS:
        values = settings.get(field) or []
        items = values.values() if isinstance(values, Mapping) else values
        if not isinstance(items, list | type({}.values())):
            raise ModelError(f"{folder / _CONFIG}: {field}: must be a list or an object")
        texts += [text for item in items if (text := _token_text(folder / _CONFIG, field, item))]
    return texts


def _add_tokens(folder: Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: list[str]) -> None:
    """Add what the surrounding files add to the vocabulary, or mark differently, in the order of ids."""
    known = backend.get_added_tokens_decoder()
    wanted = _declared_tokens(folder, config)
    for text, token_id in _read_object(folder / "added_tokens.json").items():
        if not isinstance(token_id, int):
            raise ModelError(f"{folder / 'added_tokens.json'}: {text}: must be an integer")
        if token_id not in wanted and backend.token_to_id(text) is None:
            wanted[token_id] = AddedToken(text, special=text in special, normalized=False)
    for token_id, token in sorted(wanted.items()):
        if repr(known.get(token_id)) == repr(token):
            continue
        if token.special or token.content in special:
            backend.add_special_tokens([token])
        else:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            actual = backend.token_to_id(token.content)
            raise ModelError(
                f"{folder / _CONFIG}: added_tokens_decoder: {token.content!r} is declared as {token_id}, is {actual}"
            )
    whole = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [text for text in dict.fromkeys(special) if text not in whole and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def _declared_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    path = folder / _CONFIG
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, Mapping):
        raise ModelError(f"{path}: added_tokens_decoder: must be an object")
    tokens = {}
    for key, value in declared.items():
        text = _token_text(path, f"added_tokens_decoder.{key}", value)
        if not text or not key.isdecimal() or not isinstance(value, Mapping):
            raise ModelError(f"{path}: added_tokens_decoder.{key}: must be an object with a text under 'content'")
        tokens[int(key)] = AddedToken(text, **{flag: bool(value[flag]) for flag in _TOKEN_FLAGS if flag in value})
    return tokens


def _named_token(
    folder: Path, backend: tokenizers.Tokenizer, named: Mapping[str, str], name: str
) -> tuple[str, int] | None:
    """Text and id of "bos_token" or "eos_token", where the model has one."""
    if name not in named:
        return None
    token_id = backend.token_to_id(named[name])
    if token_id is None:
        raise ModelError(f"{folder / _CONFIG}: {name}: {named[name]!r} is not in the vocabulary")
    return named[name], token_id


def _generation_ends(folder: Path) -> list[int]:
    """Ids that end a generation by `generation_config.json`, or by `config.json` where that does not say."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        value = _read_object(path).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise ModelError(f"{path}: eos_token_id: must be a token id or a list of them")
        return ids
    return []


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files of their own win over `tokenizer_config.json`."""
    path = folder / _CONFIG
    value = config.get("chat_template")
    if value is None:
        templates = {}
    elif isinstance(value, str):
        templates = {DEFAULT_NAME: value}
    elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        templates = {item.get("name"): item.get("template") for item in value}
    else:
        raise ModelError(f"{path}: chat_template: must be a text or a list of named templates")
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise ModelError(f"{path}: chat_template: every entry needs a name and a template")
    files = [(DEFAULT_NAME, folder / "chat_template.jinja")]
    for name in _TEMPLATE_FOLDERS:
        files += [(file.stem, file) for file in sorted((folder / name).glob("*.jinja"))]
    for name, file in files:
        if not file.exists():
            continue
        try:
            templates[name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file}: cannot be read: {error}") from None
    return templates
