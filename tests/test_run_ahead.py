"""Launching a step before the one ahead of it is read changes no token, whatever happens between the two."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engine.batch import ScheduledChunk
from engine.config import CacheConfig, DType, EngineConfig, SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.request import FinishReason, Request, SamplingParams
from engine.runner.eager_forward import EagerForward
from engine.runner.step_rows import StepRows
from engine.sampling.greedy import greedy_choices, is_plain_greedy
from tests.tiny_models import write_tiny_model


@dataclass
class Late:
    """Choices that are handed out when they are asked for; logits that the next launch overwrites."""

    logits: torch.Tensor
    computed: torch.Tensor
    was_read: bool = False

    def choices(self) -> npt.NDArray[np.int64]:
        self.was_read = True
        return self.computed.numpy()


class LateForward(EagerForward):
    """Behaves as a device does that runs ahead: pending tokens come from the choices of the step before."""

    feeds_back = True
    last: Late | None = None
    choice_of: dict[Request, int] = {}  # noqa: RUF012 - replaced, never changed
    num_ahead = 0

    def chooses(self, request: Request) -> bool:
        return is_plain_greedy(request)

    def launch(self, chunks: Sequence[ScheduledChunk], num_further: int = 0) -> Late:  # type: ignore[override]
        assert not num_further
        pending = [chunk.request for chunk in chunks if chunk.request.num_pending_tokens]
        for request in pending:
            assert self.last is not None
            request.output_token_ids.append(int(self.last.computed[self.choice_of[request], 1]))
        rows = StepRows.of(chunks, self.kv_cache.block_size)
        for request in pending:
            request.output_token_ids.pop()
        if self.last is not None:
            self.num_ahead += not self.last.was_read
            self.last.logits.fill_(float("nan"))
        logits = self.decoder.forward(self.make_input(chunks, rows), self.kv_cache).clone()  # an ordinary tensor
        self.last = Late(logits, greedy_choices(logits))
        self.choice_of = {c.request: place for place, c in enumerate(c for c in chunks if c.samples)}
        return self.last


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def make_engine(path: Path, ahead: bool, num_blocks: int = 300, **limits: int) -> LLMEngine:
    config = EngineConfig(
        dtype=DType.FLOAT32,
        cache=CacheConfig(num_blocks=num_blocks),
        scheduler=SchedulerConfig(**{"max_model_len": 200} | limits),
        num_threads=1,
    )
    engine = LLMEngine.from_path(path, config)
    if ahead:
        eager = engine._runner.forward
        assert isinstance(eager, EagerForward)
        engine._runner.forward = LateForward(eager.decoder, eager.kv_cache)
    return engine


def num_ahead(engine: LLMEngine) -> int:
    forward = engine._runner.forward
    assert isinstance(forward, LateForward)
    return forward.num_ahead


def make_requests(sampled: bool = False) -> list[Request]:
    draw = random.Random(8)
    requests = []
    for index in range(12):
        kind = {"temperature": 0.9, "seed": index} if sampled and index % 3 == 0 else {"temperature": 0.0}
        sampling = SamplingParams(max_tokens=draw.randrange(1, 40), stop_token_ids=(7, 11, 30, 31, 32), **kind)
        requests.append(Request(str(index), [draw.randrange(320) for _ in range(draw.choice((1, 16, 45)))], sampling))
    return requests


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("num_blocks", [300, 24])
@pytest.mark.parametrize("limits", [{}, {"max_prefill_chunk": 9, "max_num_seqs": 5}])
def test_same_tokens(path: Path, sampled: bool, num_blocks: int, limits: dict[str, int]) -> None:
    """Stops, lengths, sampled neighbours that make the engine wait, and a pool so small that requests are preempted."""
    expected = make_engine(path, ahead=False, num_blocks=num_blocks, **limits).generate(make_requests(sampled))
    engine = make_engine(path, ahead=True, num_blocks=num_blocks, **limits)
    requests = engine.generate(make_requests(sampled))
    assert num_ahead(engine) > (0 if sampled else 10)
    for ours, theirs in zip(requests, expected, strict=True):
        assert ours.output_token_ids == theirs.output_token_ids
        assert ours.finish_reason == theirs.finish_reason
    assert {request.finish_reason for request in requests} == {FinishReason.STOP, FinishReason.LENGTH}
    engine.check_integrity()
    assert engine.stats().num_blocks_in_use == 0


def test_context_and_pool_may_end_a_request(path: Path) -> None:
    for num_blocks in (14, 300):
        results = []
        for ahead in (False, True):
            engine = make_engine(path, ahead, num_blocks)
            requests = [Request("a", [5] * 150, SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True))]
            results.append([(r.output_token_ids, r.finish_reason) for r in engine.generate(requests)])
        assert results[0] == results[1]
        assert len(results[0][0][0]) == 50


def test_aborts_arrivals_and_failures_between_steps(path: Path) -> None:
    expected = {r.request_id: r.output_token_ids for r in make_engine(path, ahead=False).generate(make_requests())}
    engine = make_engine(path, ahead=True)
    draw = random.Random(3)
    waiting = make_requests()
    kept = {request.request_id: request for request in waiting}
    noise = [Request(f"n{i}", [i + 40] * 20, SamplingParams(temperature=0.0, max_tokens=100)) for i in range(8)]
    produced: dict[str, list[int]] = {}
    while waiting or noise or engine.has_work:
        for queue in (waiting, noise):
            if queue and draw.random() < 0.4:
                engine.add(queue.pop())
        if draw.random() < 0.3:
            engine.abort(f"n{draw.randrange(8)}")
        for output in engine.step():
            produced.setdefault(output.request_id, []).extend(output.token_ids)
        engine.check_integrity()
    assert num_ahead(engine) > 20
    assert {name: produced[name] for name in kept} == expected
    assert engine.stats().num_blocks_in_use == 0


def test_out_of_memory_ahead_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_engine(path, ahead=False).generate(make_requests())
    engine = make_engine(path, ahead=True)
    forward = engine._runner.forward
    launch, draw = forward.launch, random.Random(1)

    def tight(chunks: Sequence[ScheduledChunk], num_further: int) -> Late:
        if engine._in_flight is None and any(c.request.num_pending_tokens for c in chunks) and draw.random() < 0.5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(chunks, num_further)

    monkeypatch.setattr(forward, "launch", tight)
    requests = engine.generate(make_requests())
    assert [r.output_token_ids for r in requests] == [r.output_token_ids for r in expected]


def test_an_idle_engine_waits_for_what_is_under_way(path: Path) -> None:
    engine = make_engine(path, ahead=True)
    engine.add(Request("a", [5] * 20, SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)))
    engine.step()
    assert engine._in_flight is not None
    with pytest.raises(AssertionError, match="under way"):
        engine.prepare_next()
    engine.abort("a")
    assert not engine.prepare_next()  # nothing is compiled on a CPU
    assert engine._in_flight is None
    expected = make_engine(path, ahead=False).generate(make_requests())
    assert [r.output_token_ids for r in engine.generate(make_requests())] == [r.output_token_ids for r in expected]


def test_another_tenant_is_let_in_and_no_token_changes(path: Path) -> None:
    """A holds all seats and runs ahead; B takes one of them, for which the engine pauses running ahead."""
    sampling = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)

    def make(tenant: str, count: int) -> list[Request]:
        return [Request(f"{tenant}{i}", [i + 9] * (10 + i), sampling, tenant=tenant) for i in range(count)]

    expected = make_engine(path, ahead=False).generate(make("A", 6) + make("B", 1))
    engine = make_engine(path, ahead=True, max_num_seqs=4)
    of_a, [of_b] = make("A", 6), make("B", 1)
    for request in of_a:
        engine.add(request)
    for _ in range(10):
        engine.step()
    before = num_ahead(engine)
    engine.add(of_b)
    for _ in range(4):
        engine.step()
    assert of_b.output_token_ids
    assert engine.stats().num_preemptions == 1
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert before > 5
    assert num_ahead(engine) - before > 50
    assert [r.output_token_ids for r in (*of_a, of_b)] == [r.output_token_ids for r in expected]
