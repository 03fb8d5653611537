"""Stop strings, against a search of the whole text."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.text import TextDelta, TextStream
from engine.tokenizer.detokenizer import ByteDetokenizer

PROPERTY = settings(max_examples=400, deadline=None, derandomize=True)
# Token id to bytes. Small and repetitive, so that stop strings meet, overlap and cross borders; with parts of "é".
TOKENS = (b"a", b"b", b"ab", b"aba", b"bb", b"", b"c", b"caab", b"\xc3", b"\xa9", " é".encode(), b"\n\n")
ALPHABET = "abcé \n\ufffd"


def stream(stop: tuple[str, ...], min_tokens: int = 0, include_stop: bool = False) -> TextStream:
    return TextStream(ByteDetokenizer(TOKENS, 0), stop, min_tokens, include_stop)


def oracle(ids: list[int], stop: tuple[str, ...], min_tokens: int, include_stop: bool) -> tuple[str, int, str | None]:
    """Text, tokens used and stop string, found in the texts after each token, each searched whole."""
    detokenizer = ByteDetokenizer(TOKENS, 0)
    texts, text = [], ""
    for token_id in ids:
        text += detokenizer.push([token_id])
        texts.append(text)
    texts.append(text + detokenizer.finish())
    previous = 0
    for index, text in enumerate(texts):
        num_tokens = min(index + 1, len(ids))
        ends = [
            (start, len(word))
            for word in stop
            for start in range(len(text))
            if text.startswith(word, start) and start + len(word) > previous
        ]
        if ends and num_tokens > min_tokens:
            start, length = min(ends)
            return text[: start + length if include_stop else start], num_tokens, text[start : start + length]
        previous = len(text)
    return texts[-1], len(ids), None


def held_back(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may begin a stop string."""
    return max((n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)


@PROPERTY
@given(
    ids=st.lists(st.integers(0, len(TOKENS) - 1), max_size=24),
    stop=st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=16).map(tuple),
    min_tokens=st.integers(0, 8),
    include_stop=st.booleans(),
    cuts=st.lists(st.integers(0, 24), max_size=6),
)
@example(ids=[0, 1, 0, 1, 6], stop=("abab", "bc"), min_tokens=0, include_stop=False, cuts=[2])
@example(ids=[3], stop=("ba", "ab", "aba"), min_tokens=0, include_stop=True, cuts=[])
@example(ids=[2, 6], stop=("ab", "abc"), min_tokens=1, include_stop=False, cuts=[1])
@example(ids=[0, 8], stop=("\ufffd",), min_tokens=0, include_stop=False, cuts=[])
def test_equals_a_search_of_the_whole_text(
    ids: list[int], stop: tuple[str, ...], min_tokens: int, include_stop: bool, cuts: list[int]
) -> None:
    text_stream = stream(stop, min_tokens, include_stop)
    borders = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    text, used, found = "", 0, None
    plain = ByteDetokenizer(TOKENS, 0)
    complete = ""
    for start, end in itertools.pairwise(borders):
        delta = text_stream.push(ids[start:end])
        text, used, found = text + delta.text, used + delta.num_tokens_used, delta.stop
        if found is not None:
            break
        complete += plain.push(ids[start:end])
        assert used == end
        # Nothing that may begin a stop string is sent, and nothing else is held.
        assert text == complete[: len(complete) - held_back(complete, stop)]
    if found is None:
        delta = text_stream.finish()
        text, found = text + delta.text, delta.stop
        assert delta.num_tokens_used == 0
    assert (text, used, found) == oracle(ids, stop, min_tokens, include_stop)


def ids_of(*tokens: bytes) -> list[int]:
    return [TOKENS.index(token) for token in tokens]


def test_stop_across_tokens_counts_tokens() -> None:
    text_stream = stream(("bcaab",))
    assert text_stream.push(ids_of(b"a", b"b")) == TextDelta("a", 2)
    assert text_stream.push(ids_of(b"caab", b"a", b"a")) == TextDelta("", 1, "bcaab")
    with pytest.raises(AssertionError):
        text_stream.push(ids_of(b"a"))


def test_what_cannot_become_a_stop_is_released() -> None:
    text_stream = stream(("abab", "bbb"))
    deltas = [text_stream.push(ids_of(token)).text for token in (b"a", b"b", b"b", b"a", b"c")]
    assert deltas == ["", "", "a", "bb", "ac"]


def test_the_end_releases_what_was_held() -> None:
    text_stream = stream(("abab",))
    assert text_stream.push(ids_of(b"aba")).text == ""
    assert text_stream.finish() == TextDelta("aba", 0)
    with pytest.raises(AssertionError):
        text_stream.finish()


def test_min_tokens_pass_a_stop_over() -> None:
    text_stream = stream(("b",), min_tokens=2)
    assert text_stream.push(ids_of(b"a", b"b", b"a")) == TextDelta("aba", 3)
    assert text_stream.push(ids_of(b"a", b"b")) == TextDelta("a", 2, "b")
    begun_before = stream(("ab",), min_tokens=1)
    assert begun_before.push(ids_of(b"a", b"b")) == TextDelta("", 2, "ab")


def test_first_start_then_shortest() -> None:
    assert stream(("ab", "ba")).push(ids_of(b"aba")) == TextDelta("", 1, "ab")
    assert stream(("aba", "ab"), include_stop=True).push(ids_of(b"aba")) == TextDelta("ab", 1, "ab")
    assert stream(("caab", "aa")).push(ids_of(b"b", b"caab")) == TextDelta("b", 2, "caab")


def test_unfinished_character_and_stop() -> None:
    text_stream = stream(("é",))
    assert text_stream.push(ids_of(b"a", b"\xc3")) == TextDelta("a", 2)
    assert text_stream.push(ids_of(b"\xa9", b"b")) == TextDelta("", 1, "é")
    unfinished = stream(("zz",))
    assert unfinished.push(ids_of(b"\xc3")).text == ""
    assert unfinished.finish() == TextDelta("\ufffd", 0)


def test_without_stop_strings_a_push_is_one_detokenization() -> None:
    calls: list[list[int]] = []

    class Recorder(ByteDetokenizer):
        def push(self, token_ids: list[int]) -> str:  # type: ignore[override]
            calls.append(list(token_ids))
            return super().push(token_ids)

    text_stream = TextStream(Recorder(TOKENS, 0))
    assert text_stream.push([0, 1, 2]) == TextDelta("abab", 3)
    assert calls == [[0, 1, 2]]


def test_long_stop_strings_stay_cheap() -> None:
    """16 stop strings of 5,000 characters that are nearly met, over 20,000 tokens."""
    stop = tuple("a" * 5000 + chr(ord("f") + index) for index in range(16))
    text_stream = stream(stop)
    period = ids_of(*[b"a"] * 4990, b"c")
    sent = "".join(text_stream.push(period).text for _ in range(4)) + text_stream.finish().text
    assert sent == ("a" * 4990 + "c") * 4
