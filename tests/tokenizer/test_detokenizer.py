"""Incremental detokenization: any split of any ids gives the text of the whole."""

import itertools
import random
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from engine.tokenizer.detokenizer import IncrementalDetokenizer, WindowedDetokenizer
from engine.tokenizer.parts import TokenizerParts
from engine.tokenizer.sentencepiece_bpe import TextRules, build_sentencepiece_bpe
from engine.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.vocabularies import CORPUS, TEXTS, byte_level_backend, sentencepiece_bytes, sentencepiece_entries

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


def wrap(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(TokenizerParts(backend=backend, bos_token_id=None, eos_token_ids=()))


def byte_fallback_backend(*, add_space_prefix: bool = True, with_added: bool = True) -> tokenizers.Tokenizer:
    entries = sentencepiece_entries(sentencepiece_bytes())
    pieces, scores, types = (entries[f"tokenizer__ggml__{name}"] for name in ("tokens", "scores", "token_type"))
    backend = build_sentencepiece_bpe(pieces, scores, types, TextRules(add_space_prefix=add_space_prefix))
    if not with_added:
        return backend
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("▁odd▁added ", normalized=False), AddedToken("  ", normalized=False)])
    return backend


BACKENDS = {
    "byte_level": byte_level_backend(),
    "byte_fallback": byte_fallback_backend(),
    "byte_fallback_no_prefix": byte_fallback_backend(add_space_prefix=False),
}
TOKENIZERS = {name: wrap(backend) for name, backend in BACKENDS.items()}


def all_pushes(detokenizer: IncrementalDetokenizer, ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
    borders = [0, *sorted(cuts), len(ids)]
    texts = [detokenizer.push(ids[start:end]) for start, end in itertools.pairwise(borders)]
    return [*texts, detokenizer.finish()]


@st.composite
def ids_and_cuts(draw: st.DrawFn, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Any ids, rich in byte tokens and in ids beyond the vocabulary, and where to cut them."""
    anything = st.integers(0, tokenizer.vocab_size + 3)
    single_bytes = [index for index in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(index)) == 1]
    ids = draw(st.lists(st.one_of(anything, st.sampled_from(single_bytes)), max_size=40))
    return ids, draw(st.lists(st.integers(0, len(ids)), max_size=12))


@pytest.mark.parametrize("skip", [True, False], ids=["skip_special", "keep_special"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_split_of_any_ids(name: str, skip: bool) -> None:
    tokenizer, backend = TOKENIZERS[name], BACKENDS[name]

    @PROPERTY
    @given(case=ids_and_cuts(tokenizer))
    def check(case: tuple[list[int], list[int]]) -> None:
        ids, cuts = case
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        texts = all_pushes(tokenizer.detokenizer(skip_special_tokens=skip), ids, cuts)
        assert "".join(texts) == whole
        reference = backend.decode(ids, skip_special_tokens=skip)
        if name == "byte_level" or "\ufffd" not in reference:
            assert whole == reference
        else:  # a run of byte tokens that is not UTF-8: there the library replaces even its valid characters
            assert "\ufffd" in whole

    check()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS + CORPUS)
def test_every_token_of_real_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    texts = all_pushes(tokenizer.detokenizer(), ids, range(1, len(ids)))
    assert "".join(texts) == BACKENDS[name].decode(ids)
    assert texts[-1] == ""
    assert not any("\ufffd" in part for part in texts)


def test_a_character_comes_whole_and_at_once() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in "é🎉ж".encode()]
    texts = all_pushes(tokenizer.detokenizer(), ids, range(1, len(ids)))
    assert texts == ["", "é", "", "", "", "🎉", "", "ж", ""]


def test_invalid_bytes_keep_their_valid_neighbours() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in b"\xc3\xa9\xff\xe2\x82\xe2\x82\xac"]
    assert tokenizer.decode(ids) == "é\ufffd\ufffd€"
    assert tokenizer.decode(ids[:5]) == "é\ufffd\ufffd"


def test_leading_space_goes_only_from_the_beginning() -> None:
    tokenizer, backend = TOKENIZERS["byte_fallback"], BACKENDS["byte_fallback"]
    the = backend.token_to_id("▁the")
    special = backend.token_to_id("<|im_end|>")
    assert tokenizer.decode([the, the]) == "the the"
    assert tokenizer.decode([special, the]) == "the"
    assert tokenizer.decode([special, the], skip_special_tokens=False) == "<|im_end|> the"
    continued = tokenizer.detokenizer(continues_text=True)
    assert continued.push([the]) == " the"
    started = tokenizer.detokenizer()
    assert [started.push([]), started.push([the]), started.push([the])] == ["", "the", " the"]
    assert TOKENIZERS["byte_fallback_no_prefix"].decode([the]) == " the"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_runs_of_bytes_cost_no_more_each(name: str) -> None:
    """A run of 50,000 bytes that never makes a character: re-reading it for every token would take minutes."""
    tokenizer = TOKENIZERS[name]
    lead = next(index for index in range(tokenizer.vocab_size) if tokenizer.token_bytes(index) == b"\xe2")
    detokenizer = tokenizer.detokenizer()
    texts = [detokenizer.push([lead]) for _ in range(50_000)]
    assert "".join(texts) + detokenizer.finish() == "\ufffd" * 50_000
    assert max(map(len, texts)) == 1


def other_backends() -> dict[str, tokenizers.Tokenizer]:
    metaspace = tokenizers.Tokenizer(models.BPE())
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], show_progress=False)
    metaspace.train_from_iterator(CORPUS, trainer)
    pieces = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.decoder = decoders.WordPiece(cleanup=False)
    pieces.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    )
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "<x>": 2}, unk_token="<x>"))
    words.add_special_tokens(["<x>"])
    return {"metaspace": metaspace, "wordpiece": pieces, "no_decoder": words}


@pytest.mark.parametrize("name", ["metaspace", "wordpiece", "no_decoder"])
def test_other_decoders_go_through_a_window(name: str) -> None:
    backend = other_backends()[name]
    tokenizer = wrap(backend)
    rng = random.Random(5)
    assert isinstance(tokenizer.detokenizer(), WindowedDetokenizer)
    for _ in range(100):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(30))]
        texts = all_pushes(tokenizer.detokenizer(), ids, [rng.randrange(len(ids) + 1) for _ in range(10)])
        assert "".join(texts) == tokenizer.decode(ids) == backend.decode(ids)


def test_a_window_can_continue_a_text() -> None:
    backend = other_backends()["metaspace"]
    tokenizer = wrap(backend)
    ids = tokenizer.encode("the wind turned")
    assert tokenizer.decode(ids) == "the wind turned"
    continued = tokenizer.detokenizer(continues_text=True)
    assert "".join(all_pushes(continued, ids, range(1, len(ids)))) == " the wind turned"


def test_window_waits_for_whole_characters_but_not_for_ever() -> None:
    detokenizer = WindowedDetokenizer(BACKENDS["byte_level"], skip_special_tokens=True)
    tokenizer = TOKENIZERS["byte_level"]
    by_byte = {tokenizer.token_bytes(index): index for index in range(tokenizer.vocab_size)}
    ids = [by_byte[bytes([byte])] for byte in "🎉".encode()]
    assert [detokenizer.push([index]) for index in ids] == ["", "", "", "🎉"]
    texts = [detokenizer.push([by_byte[b"\xe2"]]) for _ in range(100)]
    assert "".join(texts) + detokenizer.finish() == "\ufffd" * 100
    assert len(detokenizer._window) < 30
