"""Drafts from a request's own tokens: against a search of the whole text, and on texts that repeat themselves."""

import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import Request, RequestStatus, SamplingParams
from engine.speculative import ngram
from engine.speculative.ngram import MAX_MATCH, MAX_OCCURRENCES, MIN_MATCH, NgramProposer
from engine.speculative.proposer import DraftOrder, Proposer

CODE = '''
class Account:
    """Money of one owner."""

    def __init__(self, owner: str, total: int = 0) -> None:
        self.owner = owner
        self.total = total

    def deposit(self, amount: int) -> int:
        if amount <= 0:
            raise ValueError(f"cannot deposit {amount}")
        self.total += amount
        return self.total

    def withdraw(self, amount: int) -> int:
        if amount > self.total:
            raise ValueError(f"cannot withdraw {amount}")
        self.total -= amount
        return self.total
'''
REPORT = """The harbour was closed on Monday because of the storm. Two ferries had to wait outside the bay until the
evening, and a sailing boat was damaged at the northern pier. The mayor said that the new wall had held, but that
the lights at the entrance must be replaced before the winter. Repairs begin next week and will cost about forty
thousand crowns, half of which the county pays."""
SUMMARY = """In short: the harbour was closed on Monday because of the storm. As the article says, "a sailing boat was
damaged at the northern pier". The mayor said that the new wall had held, but that the lights at the entrance must be
replaced before the winter; repairs begin next week and will cost about forty thousand crowns."""
PEOPLE = [{"name": name, "age": age, "city": city, "active": True} for name, age, city in (
    ("Alice", 30, "Paris"), ("Bob", 31, "Rome"), ("Carol", 25, "Oslo"), ("Dan", 41, "Bern"), ("Eve", 38, "Riga")
)]  # fmt: skip
OLDER_PEOPLE = [person | {"age": int(str(person["age"])) + 1} for person in PEOPLE]


def request_of(prompt: list[int], output: list[int] | None = None) -> Request:
    request = Request("r", list(prompt), SamplingParams(seed=0))
    for token in output or ():
        request.append_output(token)
    return request


def propose(proposer: Proposer, request: Request, num_draft_tokens: int) -> list[int]:
    [draft] = proposer.propose([DraftOrder(request, num_draft_tokens)], 0.0)
    return list(draft)


def drafted_by_search(tokens: list[int], num_draft_tokens: int, max_match: int, max_occurrences: int) -> list[int]:
    """What the proposer should say, from all earlier places at which the text's last tokens stand."""
    count = len(tokens)
    ends = [end for end in range(MIN_MATCH, count) if tokens[end - MIN_MATCH : end] == tokens[count - MIN_MATCH :]]
    if not ends:
        return []

    def length(end: int) -> int:
        lengths = range(1, min(end, max_match) + 1)
        return max(size for size in lengths if tokens[end - size : end] == tokens[count - size :])

    best = max(ends[-max_occurrences:], key=lambda end: (length(end), end))
    text = list(tokens)
    for place in range(best, best + num_draft_tokens):
        text.append(text[place])
    return text[count:]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    prompt=st.lists(st.integers(0, 2), max_size=40),
    turns=st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=4), st.integers(1, 9)), min_size=1, max_size=12),
    limits=st.sampled_from([(MAX_MATCH, MAX_OCCURRENCES), (4, MAX_OCCURRENCES), (MAX_MATCH, 3), (3, 2)]),
)
def test_drafts_are_those_of_a_search_of_the_whole_text(
    prompt: list[int], turns: list[tuple[list[int], int]], limits: tuple[int, int]
) -> None:
    """Asked after any number of new tokens, it says what a new proposer says, and what a plain search finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "MAX_MATCH", limits[0])
        patch.setattr(ngram, "MAX_OCCURRENCES", limits[1])
        proposer, request = NgramProposer(), request_of(prompt)
        for new, num_draft_tokens in turns:
            for token in new:
                request.append_output(token)
            expected = drafted_by_search(prompt + request.output_token_ids, num_draft_tokens, *limits)
            assert proposer.may_propose(request) == bool(expected)
            assert propose(proposer, request, num_draft_tokens) == expected
            assert propose(NgramProposer(), request, num_draft_tokens) == expected


@pytest.mark.parametrize("period", [1, 2, 3, 5])
@pytest.mark.parametrize("num_draft_tokens", [1, 4, 13])
def test_a_text_with_a_period_goes_on_with_it(period: int, num_draft_tokens: int) -> None:
    text = [place % period for place in range(4 * period + 37)]
    split = 3 * period + 9
    draft = propose(NgramProposer(), request_of(text[: split - 2], text[split - 2 : split]), num_draft_tokens)
    assert draft == text[split : split + num_draft_tokens]


def test_of_equally_long_matches_the_last_one_counts_and_a_longer_one_before_it() -> None:
    assert propose(NgramProposer(), request_of([7, 8, 1, 7, 8, 2, 7, 8]), 2) == [2, 7]
    assert propose(NgramProposer(), request_of([6, 7, 8, 1, 7, 8, 2, 6, 7, 8]), 2) == [1, 7]


def test_beyond_the_longest_match_that_is_told_apart_the_last_one_counts() -> None:
    shared = list(range(MAX_MATCH + 1))
    assert propose(NgramProposer(), request_of([90, *shared, 91, *shared, 92, 90, *shared]), 1) == [92]
    shared = shared[2:]
    assert propose(NgramProposer(), request_of([90, *shared, 91, *shared, 92, 90, *shared]), 1) == [91]


def test_nothing_is_proposed_without_a_match() -> None:
    proposer = NgramProposer()
    for tokens in ([1], [1, 2], [1, 2, 3, 2], [1, 1]):
        assert not proposer.may_propose(request_of(tokens))
        assert propose(proposer, request_of(tokens), 4) == []


def test_token_ids_of_any_size_stay_apart() -> None:
    """Pairs are found by one number each."""
    large = 2**31 - 1
    assert propose(NgramProposer(), request_of([0, large, 5, large, 0, 6, 0, large]), 1) == [5]
    assert propose(NgramProposer(), request_of([1, 0, 5, 0, 1, 6, 0, 1]), 1) == [6]


def test_a_token_on_the_device_is_waited_for() -> None:
    proposer, request = NgramProposer(), request_of([1, 2, 3, 1, 2])
    request.expect_output()
    assert proposer.may_propose(request)
    request.append_output(3)
    assert propose(proposer, request, 2) == [1, 2]
    request.expect_output()
    assert proposer.may_propose(request)
    request.append_output(9)
    assert not proposer.may_propose(request)


def test_preemption_changes_nothing() -> None:
    proposer, request = NgramProposer(), request_of([1, 2, 3, 4, 1, 2])
    assert propose(proposer, request, 2) == [3, 4]
    request.status, request.num_computed_tokens, request.block_table = RequestStatus.WAITING, 0, []
    request.status = RequestStatus.RUNNING
    request.append_output(3)
    assert propose(proposer, request, 2) == [4, 1]


def test_requests_do_not_mix() -> None:
    proposer = NgramProposer()
    first, second, third = request_of([1, 2, 3, 1, 2]), request_of([1, 2, 4, 1, 2]), request_of([1, 2])
    orders = [DraftOrder(request, count) for request, count in ((second, 1), (third, 4), (first, 2))]
    assert list(proposer.propose(orders, 0.0)) == [[4], [], [3, 1]]


def test_what_has_ended_is_forgotten() -> None:
    proposer, request = NgramProposer(), request_of([1, 2, 3, 1, 2])
    references = sys.getrefcount(request)
    proposer.forget(request)  # never proposed for
    assert propose(proposer, request, 1) == [3]
    assert sys.getrefcount(request) > references
    proposer.forget(request)
    assert sys.getrefcount(request) == references
    assert proposer.may_propose(request)
    proposer.close()
    assert sys.getrefcount(request) == references


def test_a_token_is_indexed_once() -> None:
    """The text is not read again at each step: a proposer that has seen it takes only what is new."""
    taken: list[tuple[int, int]] = []

    class WatchedRequest(Request):
        def token_ids(self, start: int, stop: int) -> list[int]:
            taken.append((start, stop))
            return Request.token_ids(self, start, stop)

    proposer, request = NgramProposer(), WatchedRequest("r", [1, 2, 3, 1, 2], SamplingParams(seed=0))
    for token in (3, 1, 9):
        proposer.may_propose(request)
        propose(proposer, request, 4)
        request.append_output(token)
    proposer.may_propose(request)
    assert taken == [(0, 5), (5, 6), (6, 7), (7, 8)]


def one_line(text: str) -> str:
    """Without the line breaks that only this file needs."""
    return " ".join(text.split())


def mean_acceptance_length(prompt: str, answer: str, num_draft_tokens: int = 4) -> float:
    """Tokens a round where the target answers so. A token is a word with the space before it, or a sign."""
    ids: dict[str, int] = {}
    tokens, output = (
        [ids.setdefault(part, len(ids)) for part in re.findall(r"\s?\w+|\s|[^\w\s]", text)] for text in (prompt, answer)
    )
    proposer, request, num_rounds = NgramProposer(), request_of(tokens), 0
    while len(request.output_token_ids) < len(output):
        draft = propose(proposer, request, num_draft_tokens)
        rest = output[len(request.output_token_ids) :]
        num_accepted = next((i for i, pair in enumerate(zip(draft, rest, strict=False)) if pair[0] != pair[1]), None)
        if num_accepted is None:
            num_accepted = min(len(draft), len(rest))
        for token in rest[: num_accepted + 1]:
            request.append_output(token)
        num_rounds += 1
    return len(output) / num_rounds


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        pytest.param(f"Make everyone a year older:\n{json.dumps(PEOPLE)}\n", json.dumps(OLDER_PEOPLE), id="json"),
        pytest.param(f"Call total balance:\n{CODE}\n", CODE.replace("total", "balance"), id="rename"),
        pytest.param(f"Summarise this and quote from it:\n{one_line(REPORT)}\n", one_line(SUMMARY), id="summary"),
    ],
)
def test_edits_and_quotes_are_drafted_well(prompt: str, answer: str) -> None:
    assert mean_acceptance_length(prompt, answer) >= 2.0


def test_text_that_shares_nothing_with_its_prompt_is_not_drafted() -> None:
    assert mean_acceptance_length("what is new?", "every word differs from any other here") == 1.0
