"""Mirrors follow what the target chooses, and their drafts are what the draft model would have said there."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.config import SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.request import Request, SamplingParams
from engine.runner.eager_forward import EagerForward
from engine.runner.graph_forward import GraphForward
from engine.sampling.sampler import Sampler
from engine.speculative.draft_model import DraftModel
from engine.speculative.local import LocalProposer
from engine.speculative.speculation import Speculation
from tests.runner.hash_decoder import POISON, VOCAB_SIZE, HashDecoder, expected_output
from tests.runner.late_device import LateDevice
from tests.speculative.test_verification import make_engine, make_requests, run
from tests.tiny_models import write_tiny_model

GREEDY = SamplingParams(temperature=0.0, seed=0)


def make_model(num_blocks: int = 200, *, may_branch: bool = False, **limits: Any) -> tuple[DraftModel, HashDecoder]:
    """With the device's way to run steps, one ahead of the host."""
    config = SchedulerConfig(**{"max_model_len": 100, "max_num_seqs": 20, "token_budget": 40} | limits)
    decoder = HashDecoder(2, num_blocks)
    kv_cache = SimpleNamespace(num_blocks=num_blocks, block_size=2)
    forward = GraphForward(decoder, lambda: kv_cache, config)  # type: ignore[arg-type, return-value]
    return DraftModel(forward, Sampler(()), VOCAB_SIZE, config, may_branch=may_branch), decoder


def late_device(model: DraftModel, monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    forward = model._runner.forward
    assert isinstance(forward, GraphForward)
    return LateDevice(forward, monkeypatch)


def settle(model: DraftModel) -> list[str]:
    grown = []
    while model.has_work:
        grown += model.step()
        model.check_integrity()
    return grown


def drafts(model: DraftModel, key: str, count: int) -> list[int]:
    model.order(key, count)
    settle(model)
    return model.drafts(key)[1]


def test_drafts_go_on_from_what_is_accepted() -> None:
    model, decoder = make_model()
    prompt = [3, 4, 5, 6, 7]
    model.open("a", prompt, [8], GREEDY, 0)
    assert not model.has_work
    model.order("a", 4)
    assert settle(model) == ["a"] * 4
    assert model.drafts("a") == (6, expected_output([*prompt, 8], 4))
    # The first two are right, and what follows is not what was drafted.
    first, second, third, *_ = model.drafts("a")[1]
    wrong = (third + 1) % 90
    assert model.accept("a", 6, [first, second, wrong])
    assert model.drafts("a") == (9, [])
    num_calls = decoder.num_calls
    settle(model)  # the order stands
    assert model.drafts("a") == (9, expected_output([*prompt, 8, first, second, wrong], 4))
    assert decoder.num_calls == num_calls + 4


def test_what_was_drafted_ahead_stays_if_it_is_right() -> None:
    model, decoder = make_model()
    model.open("a", [1, 2], [], GREEDY, 0)
    ahead = drafts(model, "a", 9)
    num_calls = decoder.num_calls
    assert model.accept("a", 2, ahead[:4])
    assert model.drafts("a") == (6, ahead[4:])
    assert drafts(model, "a", 5) == ahead[4:]
    assert decoder.num_calls == num_calls
    assert drafts(model, "a", 6) == expected_output([1, 2, *ahead[:4]], 6)
    assert model.accept("a", 4, ahead[2:4])  # told twice
    assert model.drafts("a")[0] == 6


def test_what_a_mirror_does_not_know() -> None:
    model, _ = make_model()
    model.open("a", [1, 2, 3], [], GREEDY, 0)
    assert not model.accept("a", 5, [1])  # it lacks tokens before these
    assert not model.accept("a", 2, [1])  # the prompt is what it is
    assert not model.accept("b", 3, [1])
    model.drop("b")
    model.order("b", 3)
    assert not model.has_work
    model.open("a", [9], [], GREEDY, 0)  # replaced
    assert drafts(model, "a", 2) == expected_output([9], 2)
    model.drop("a")
    with pytest.raises(KeyError):
        model.drafts("a")


@pytest.mark.parametrize(
    ("num_blocks", "limits", "may_branch"),
    [
        (31, {}, False),
        (31, {"token_budget": 12}, True),
        (400, {"max_num_seqs": 2, "token_budget": 7}, False),
        (400, {}, True),
    ],
)
def test_many_mirrors(num_blocks: int, limits: dict[str, int], may_branch: bool) -> None:
    """Random rounds; in the small pool mirrors lose their blocks to others, and compute their tokens again."""
    model, _ = make_model(num_blocks, may_branch=may_branch, **limits)
    draw = random.Random(num_blocks)
    tokens: dict[str, list[int]] = {}
    num_branches = 0
    for turn in range(40):
        key = str(draw.randrange(8))
        if key not in tokens or len(tokens[key]) > 40:
            tokens[key] = [draw.randrange(90) for _ in range(draw.randrange(1, 20))]
            model.open(key, tokens[key], [], GREEDY, 0)
        else:
            base, known = model.drafts(key)
            assert base == len(tokens[key])
            more = known[: draw.randrange(4)] + [draw.randrange(90) for _ in range(draw.randrange(1, 3))]
            if may_branch and draw.random() < 0.5:
                num_branches += bool(corrections := model._mirrors[key].branches)
                for position, token in corrections:
                    more = [*known[: position - base], token]
            assert model.accept(key, base, more)
            tokens[key] += more
        model.order(key, draw.randrange(5))
        for _ in range(draw.randrange(3)):
            model.step()
        model.branch(key, draw.randrange(1, 4), draw.randrange(1, 4))
        model.check_integrity()
        if turn % 10 == 9:
            settle(model)
            for name, known in tokens.items():
                base, found = model.drafts(name)
                assert base == len(known)
                assert found == expected_output(known, len(found))
    for name in tokens:
        model.drop(name)
    assert model._blocks.pool.num_blocks_in_use == 0
    assert not model._mirror_of
    assert (num_branches > 0) == may_branch


@pytest.mark.parametrize("at", [0, 2])
def test_a_branch_that_comes_true(at: int) -> None:
    """What the target chooses in place of a draft was thought of: the drafts behind it are there at once."""
    model, decoder = make_model(may_branch=True)
    prompt = [*range(3, 20)]
    model.open("a", prompt, [], GREEDY, 0)
    ahead = drafts(model, "a", 5)
    model.branch("a", 3, 4)
    model.branch("a", 3, 4)  # once is enough
    settle(model)
    mirror = model._mirrors["a"]
    # All other tokens of this model are equally likely: the lowest of them, at the first places.
    others = [int(ahead[place] == 0) for place in range(3)]
    assert sorted(mirror.branches) == [(len(prompt) + place, others[place]) for place in range(3)]
    assert all(len(branch.drafts) == 4 for branch in mirror.branches.values())
    num_calls = decoder.num_calls
    chosen = [*ahead[:at], others[at]]
    assert model.accept("a", len(prompt), chosen)
    expected = expected_output(prompt + chosen, 6)
    assert model.drafts("a") == (len(prompt) + at + 1, expected[:4])
    assert not mirror.branches
    assert not model.has_work or model._mirrors["a"].num_ordered_tokens > 4
    assert decoder.num_calls == num_calls
    assert drafts(model, "a", 6) == expected
    model.check_integrity()


def test_branches_go_with_what_they_hang_on() -> None:
    model, _ = make_model(may_branch=True)
    model.open("a", [1, 2, 3], [], GREEDY, 0)
    ahead = drafts(model, "a", 6)
    model.branch("a", 6, 2)
    settle(model)
    assert len(model._mirrors["a"].branches) == 6
    assert model.accept("a", 3, ahead[:2])  # as drafted: the branches behind may still come true
    assert sorted(place for place, _ in model._mirrors["a"].branches) == [5, 6, 7, 8]
    model.check_integrity()
    assert model.accept("a", 5, [(ahead[2] + 7) % 90 + 2])  # as nobody thought
    assert not model._mirrors["a"].branches
    model.check_integrity()
    model.branch("a", 3, 2)  # nothing is drafted
    assert not model._mirrors["a"].branches


def test_no_numbers_no_drafts() -> None:
    model, _ = make_model()
    model.open("a", [1, POISON], [], GREEDY, 0)
    model.open("b", [1, 2], [], GREEDY, 0)
    assert drafts(model, "a", 3) == []
    assert drafts(model, "b", 3) == expected_output([1, 2], 3)


@pytest.mark.parametrize("may_branch", [False, True])
def test_steps_that_need_no_host_are_launched_together(may_branch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All drafts of a round are under way before the first of them is read; not if their likelihoods are wanted."""
    model, _ = make_model(may_branch=may_branch)
    device = late_device(model, monkeypatch)
    tokens = {"a": [1, 2, 3], "b": [4] * 9, "c": [5]}
    for number in range(6):
        for key, known in tokens.items():
            if number:
                known += [*model.drafts(key)[1][:1], number]
                assert model.accept(key, len(known) - 2, known[-2:])
            else:
                model.open(key, list(known), [], GREEDY, 0)
            model.order(key, 5 + (key == "b"))
        num_launched = device.num_launched
        model.step()
        if number > 1:  # graphs have been captured
            assert device.num_launched - num_launched == (2 if may_branch else 5)
            assert device.num_done - num_launched == 1
        settle(model)
        assert device.num_launched - num_launched == 6
        for key, known in tokens.items():
            assert model.drafts(key) == (len(known), expected_output(known, 5 + (key == "b")))


@pytest.mark.parametrize("reaches_device", [False, True])
@pytest.mark.parametrize("number", range(4))
def test_a_launch_fails_between_others(number: int, reaches_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of that round may be missing, and none is wrong, then or later."""
    model, _ = make_model()
    device = late_device(model, monkeypatch)
    known = [1, 2, 3]
    model.open("a", list(known), [], GREEDY, 0)
    for _ in range(3):
        assert drafts(model, "a", 4) == expected_output(known, 4)
        known.append(8)
        assert model.accept("a", len(known) - 1, [8])
    device.fail_at(device.num_launched + number, reaches_device=reaches_device)
    found = drafts(model, "a", 4)
    assert found == expected_output(known, 4)[: len(found)]
    assert len(found) < 4
    known.append(9)
    assert model.accept("a", len(known) - 1, [9])
    assert drafts(model, "a", 4) == expected_output(known, 4)
    model.drop("a")
    assert model._blocks.pool.num_blocks_in_use == 0


def test_more_drafts_than_steps_may_be_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make_model()
    late_device(model, monkeypatch)
    model.open("a", [1, 2, 3], [], GREEDY, 0)
    assert drafts(model, "a", 70) == expected_output([1, 2, 3], 70)


def test_out_of_memory_costs_drafts_and_nothing_else() -> None:
    model, decoder = make_model()
    for key in "ab":
        model.open(key, [1, 2, ord(key) % 90], [], GREEDY, 0)
    decoder.num_failures_due = 1
    model.order("a", 3)
    settle(model)
    assert model.drafts("a")[1] == []
    assert model.accept("a", 3, [5])
    for key, known in (("a", [1, 2, ord("a") % 90, 5]), ("b", [1, 2, ord("b") % 90])):
        assert drafts(model, key, 3) == expected_output(known, 3)


def test_the_longest_request_is_not_drafted_past_its_end() -> None:
    model, _ = make_model(max_model_len=10)
    model.open("a", [1] * 8, [], GREEDY, 0)
    assert len(drafts(model, "a", 5)) == 2
    model.open("b", [1] * 12, [], GREEDY, 0)
    assert drafts(model, "b", 5) == []


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target"))


def drafter_of(path: Path) -> DraftModel:
    engine: LLMEngine = make_engine(path)
    forward = engine._runner.forward
    assert isinstance(forward, EagerForward)
    return DraftModel(forward, Sampler((2,)), 320, SchedulerConfig(max_model_len=200))


@pytest.mark.parametrize("same", [True, False])
def test_a_local_draft_model(path: Path, tmp_path: Path, same: bool) -> None:
    """The target drafting for itself is always right, sampled as well, but for penalties; another one hardly ever."""
    expected = run(make_engine(path), make_requests())
    drafter = drafter_of(path if same else write_tiny_model(tmp_path, seed=9))
    engine = make_engine(path)
    engine._speculation = Speculation(LocalProposer(drafter), 4, 100, always=True)
    requests = make_requests()
    assert run(engine, requests) == expected
    assert drafter.num_mirrors == 0
    plain = [request for request in requests if request.sampling.repetition_penalty == 1.0]
    plain = [request for request in plain if not request.sampling.frequency_penalty]
    drafted = sum(request.num_drafted_tokens for request in plain)
    accepted = sum(request.num_accepted_tokens for request in plain)
    assert drafted > 100
    # Behind a stop the drafts go on, and count for nothing.
    assert accepted > 0.9 * drafted if same else accepted < 0.2 * drafted


def test_requests_that_end_are_forgotten(path: Path) -> None:
    drafter = drafter_of(path)
    engine = make_engine(path)
    engine._speculation = Speculation(LocalProposer(drafter), 3, 100, always=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    for name in "abc":
        engine.add(Request(name, [5, 6, 7], sampling))
    for _ in range(4):
        engine.step()
    assert drafter.num_mirrors == 3
    engine.abort("b")
    assert drafter.num_mirrors == 2
    while engine.has_work:
        engine.step()
    assert drafter.num_mirrors == 0
