"""SentencePiece BPE (Kudo and Richardson 2018) as a BPE of `tokenizers`.

A SentencePiece model stores pieces with scores and no merges: it joins, again and again, the neighbours whose joined
piece scores best. The same order comes out of a merge list that holds every split of every piece into two pieces,
best-scored piece first. Text outside the vocabulary falls back to byte pieces such as `<0xE2>`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

META_SPACE = "\u2581"  # what SentencePiece writes for a space
NUM_BYTES = 256


class PieceType(IntEnum):
    """Kinds of pieces, numbered as in sentencepiece_model.proto and in `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


PIECE_TYPES = frozenset(map(int, PieceType))


@dataclass(frozen=True)
class TextRules:
    """How text is prepared before pieces are looked for."""

    add_space_prefix: bool = True  # "Hello" is cut as if it were " Hello"
    remove_extra_whitespaces: bool = False
    precompiled_charsmap: bytes = b""  # SentencePiece's compiled Unicode normalisation; empty: none


def build_sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    rules: TextRules,
    *,
    prefix_every_stretch: bool = True,
) -> tokenizers.Tokenizer:
    """A tokenizer over `pieces` (index is id), without a post-processor.

    A space prefix goes before each stretch of text between special tokens, as in llama.cpp and in the tokenizers that
    Transformers calls legacy; with `prefix_every_stretch` False only before the first, as in its other ones (which
    take a space that is there for the prefix).
    """
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    unknown = next((piece for piece, kind in zip(pieces, types, strict=True) if kind == PieceType.UNKNOWN), None)
    num_byte_pieces = sum(kind == PieceType.BYTE for kind in types)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            _merges(pieces, scores, types, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=num_byte_pieces == NUM_BYTES,
        )
    )
    backend.normalizer = _normalizer(rules, prefix_every_stretch)
    if rules.add_space_prefix and not prefix_every_stretch:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(META_SPACE, prepend_scheme="first", split=False)
    backend.decoder = _decoder(rules)
    add_marked_tokens(backend, pieces, types)
    return backend


def add_marked_tokens(backend: tokenizers.Tokenizer, pieces: Sequence[str], types: Sequence[int]) -> None:
    """Make control pieces special and user-defined ones whole: both are found in text before anything else is."""
    special = [
        piece for piece, kind in zip(pieces, types, strict=True) if kind in (PieceType.CONTROL, PieceType.UNKNOWN)
    ]
    whole = [piece for piece, kind in zip(pieces, types, strict=True) if kind == PieceType.USER_DEFINED and piece]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special if piece])
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in whole])


def _merges(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    joinable = {piece: index for piece, index in vocabulary.items() if types[index] == PieceType.NORMAL}
    by_rank = sorted(joinable.values(), key=lambda index: (-scores[index], index))
    merges: list[tuple[str, str]] = []
    for index in by_rank:
        piece = pieces[index]
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [split for split in splits if split[0] in joinable and split[1] in joinable]
        merges += sorted(known, key=lambda split: (joinable[split[0]], joinable[split[1]]))
    return merges


def _normalizer(rules: TextRules, prefix_every_stretch: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(pattern), text) for pattern, text in ((r"\A +| +\z", ""), (" {2,}", " "))]
    if rules.add_space_prefix and prefix_every_stretch:
        steps.append(normalizers.Prepend(META_SPACE))
    steps.append(normalizers.Replace(" ", META_SPACE))
    return normalizers.Sequence(steps)


def _decoder(rules: TextRules) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
