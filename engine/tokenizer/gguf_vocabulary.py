"""The tokenizer inside a GGUF file.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
"""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models

from engine.loader.gguf_metadata import GGUFMetadata, read_gguf_metadata
from engine.tokenizer.chat_template import DEFAULT_NAME
from engine.tokenizer.parts import TokenizerParts, bos_eos_processor
from engine.tokenizer.pre_tokenizers import FLAVOURS, BPEFlavour
from engine.tokenizer.sentencepiece_bpe import (
    PIECE_TYPES,
    PieceType,
    TextRules,
    add_marked_tokens,
    build_sentencepiece_bpe,
)

_PREFIX = "tokenizer.ggml."
_TOKENS, _TYPES, _SCORES = f"{_PREFIX}tokens", f"{_PREFIX}token_type", f"{_PREFIX}scores"
_MERGES, _PRE, _MODEL = f"{_PREFIX}merges", f"{_PREFIX}pre", f"{_PREFIX}model"
_TEMPLATE = "tokenizer.chat_template"
# Names of special tokens in chat templates, and the keys that hold their ids.
_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelled like this in the format
    "pad_token": "padding_token_id",
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # end of sequence, of turn, of message


def read_gguf_tokenizer(path: Path) -> TokenizerParts:
    """Build the tokenizer that `path` describes: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

    Raises:
        ModelError: no tokenizer in the file, or one of another kind, or a malformed one; file and key are named.
    """
    metadata = read_gguf_metadata(path)
    model = metadata.string(_MODEL)
    tokens = metadata.strings(_TOKENS)
    types = _types(metadata, len(tokens))
    _check_distinct(metadata, tokens)
    if model == "gpt2":
        flavour = _flavour(metadata)
        backend = _build_byte_level(metadata, tokens, types, flavour)
        default_add_bos = flavour.add_bos
    elif model == "llama":
        backend = build_sentencepiece_bpe(tokens, _scores(metadata, len(tokens)), types, _text_rules(metadata))
        default_add_bos = True
    else:
        raise metadata.fail(_MODEL, f"is {model!r}; supported are 'gpt2' and 'llama'")

    ids = {key: _token_id(metadata, key, len(tokens)) for key in {*_SPECIAL_KEYS.values(), *_END_KEYS}}

    def edge_token(flag: str, default: bool, key: str) -> tuple[str, int] | None:
        if not metadata.boolean(f"{_PREFIX}{flag}", default):
            return None
        token_id = ids[key]
        if token_id is None:
            raise metadata.fail(f"{_PREFIX}{key}", f"is missing, though {flag} is set")
        return tokens[token_id], token_id

    # A default is a guess about files that name no such token: then there is none to add.
    bos = edge_token("add_bos_token", default_add_bos and ids["bos_token_id"] is not None, "bos_token_id")
    eos = edge_token("add_eos_token", False, "eos_token_id")
    backend.post_processor = bos_eos_processor(bos, eos)
    ends = [ids[key] for key in _END_KEYS]
    return TokenizerParts(
        backend=backend,
        bos_token_id=ids["bos_token_id"],
        eos_token_ids=tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None)),
        special_tokens={
            name: tokens[token_id] for name, key in _SPECIAL_KEYS.items() if (token_id := ids[key]) is not None
        },
        chat_templates=_chat_templates(metadata),
    )


def _build_byte_level(
    metadata: GGUFMetadata, tokens: list[str], types: list[int], flavour: BPEFlavour
) -> tokenizers.Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for index, merge in enumerate(metadata.strings(_MERGES)):
        left, space, right = merge.partition(" ")
        if not space or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise metadata.fail(f"{_MERGES}[{index}]", f"{merge[:80]!r} does not join two tokens into a third")
        merges.append((left, right))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=flavour.ignore_merges))
    if (normalizer := flavour.normalizer()) is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = flavour.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    add_marked_tokens(backend, tokens, types)
    return backend


def _flavour(metadata: GGUFMetadata) -> BPEFlavour:
    name = metadata.string(_PRE, "default")
    if name not in FLAVOURS:
        raise metadata.fail(_PRE, f"is {name!r}; supported are {', '.join(sorted(FLAVOURS))}")
    return FLAVOURS[name]


def _text_rules(metadata: GGUFMetadata) -> TextRules:
    return TextRules(
        add_space_prefix=metadata.boolean(f"{_PREFIX}add_space_prefix", True),
        remove_extra_whitespaces=metadata.boolean(f"{_PREFIX}remove_extra_whitespaces", False),
    )


def _types(metadata: GGUFMetadata, num_tokens: int) -> list[int]:
    types = metadata.integers(_TYPES, [int(PieceType.NORMAL)] * num_tokens)
    if len(types) != num_tokens:
        raise metadata.fail(_TYPES, f"has {len(types)} entries for {num_tokens} tokens")
    for index, kind in enumerate(types):
        if kind not in PIECE_TYPES:
            raise metadata.fail(f"{_TYPES}[{index}]", f"is {kind}; the format defines 1 to {max(PieceType)}")
    return types


def _scores(metadata: GGUFMetadata, num_tokens: int) -> list[float]:
    scores = metadata.numbers(_SCORES)
    if len(scores) != num_tokens:
        raise metadata.fail(_SCORES, f"has {len(scores)} entries for {num_tokens} tokens")
    return scores


def _check_distinct(metadata: GGUFMetadata, tokens: list[str]) -> None:
    if not tokens:
        raise metadata.fail(_TOKENS, "is empty")
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if seen.setdefault(token, index) != index:
            raise metadata.fail(_TOKENS, f"tokens {seen[token]} and {index} are both {token[:80]!r}")


def _token_id(metadata: GGUFMetadata, key: str, num_tokens: int) -> int | None:
    full_key = f"{_PREFIX}{key}"
    if full_key not in metadata:
        return None
    token_id = metadata.integer(full_key)
    if not 0 <= token_id < num_tokens:
        raise metadata.fail(full_key, f"is {token_id}, outside the vocabulary of {num_tokens} tokens")
    return token_id


def _chat_templates(metadata: GGUFMetadata) -> dict[str, str]:
    """The main template as "default", and those that the file names beside it."""
    names = metadata.strings("tokenizer.chat_templates", [])
    templates = {name: metadata.string(f"{_TEMPLATE}.{name}") for name in names}
    if _TEMPLATE in metadata:
        templates[DEFAULT_NAME] = metadata.string(_TEMPLATE)
    return templates
