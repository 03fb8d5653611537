"""The engine thread: delivery, abort, faults, health, shutdown."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import async_engine
from engine.async_engine import AsyncEngine
from engine.config import CacheConfig, DType, EngineConfig, SchedulerConfig
from engine.errors import EngineDeadError, EngineFullError
from engine.llm_engine import LLMEngine
from engine.request import FinishReason, Request, RequestOutput, SamplingParams
from tests.tiny_models import write_tiny_model

TIMEOUT_S = 60.0


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[AsyncEngine]:
    path = write_tiny_model(tmp_path)
    config = EngineConfig(
        dtype=DType.FLOAT32, cache=CacheConfig(num_blocks=400), scheduler=SchedulerConfig(), num_threads=1
    )
    engine = AsyncEngine(LLMEngine.from_path(path, config))
    engine.start()
    yield engine
    engine.shutdown()


def make_request(name: str, max_tokens: int = 5, prompt: tuple[int, ...] = (5, 6)) -> Request:
    return Request(name, list(prompt), SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))


class Collector:
    """Gathers outputs until every named request has ended."""

    def __init__(self, *names: str) -> None:
        self.outputs: dict[str, list[RequestOutput]] = {name: [] for name in names}
        self._queue: queue.Queue[list[RequestOutput]] = queue.Queue()

    def __call__(self, outputs: list[RequestOutput]) -> None:
        self._queue.put(outputs)

    def next(self) -> list[RequestOutput]:
        outputs = self._queue.get(timeout=TIMEOUT_S)
        for output in outputs:
            self.outputs[output.request_id].append(output)
        return outputs

    def wait(self) -> "Collector":
        while not all(out and out[-1].finish_reason for out in self.outputs.values()):
            self.next()
        return self

    def reason(self, name: str) -> FinishReason | None:
        assert all(output.finish_reason is None for output in self.outputs[name][:-1])
        return self.outputs[name][-1].finish_reason

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs[name] for token in output.token_ids]


def hold(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """After its first step, the engine makes no other until this is set."""
    may_go_on = threading.Event()
    step, num_steps = engine.engine.step, itertools.count()

    def held() -> list[RequestOutput]:
        if next(num_steps):
            assert may_go_on.wait(TIMEOUT_S)
        return step()

    monkeypatch.setattr(engine.engine, "step", held)
    return may_go_on


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_groups_hear_of_their_own_requests(engine: AsyncEngine) -> None:
    first, second = Collector("a", "b"), Collector("c")
    engine.submit([make_request("a"), make_request("b", prompt=(9,))], first)
    engine.submit([make_request("c")], second)
    first.wait()
    second.wait()
    assert first.tokens("a") == second.tokens("c") != first.tokens("b")
    assert {first.reason(name) for name in "ab"} == {FinishReason.LENGTH}
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.output_tokens) == (5, 15)


def test_a_refused_request_leaves_its_siblings(engine: AsyncEngine) -> None:
    collector = Collector("good", "bad")
    engine.submit([make_request("bad", prompt=(-4,)), make_request("good")], collector)
    collector.wait()
    assert collector.reason("bad") is FinishReason.ERROR
    assert "token ids" in str(collector.outputs["bad"][-1].error)
    assert collector.reason("good") is FinishReason.LENGTH


def test_a_full_engine_takes_no_more_until_others_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(cache=CacheConfig(num_blocks=400), num_threads=1)
    engine = AsyncEngine(LLMEngine.from_path(write_tiny_model(tmp_path), config), max_requests=2)
    may_go_on = hold(engine, monkeypatch)
    engine.start()
    collector = Collector("a", "b", "c")
    engine.submit([make_request("a", 1900)], collector)  # counts whether or not the thread has seen it
    engine.submit([make_request("b", 1900), make_request("c", 1900)], collector)  # taken whole
    with pytest.raises(EngineFullError, match="has 3 requests already"):
        engine.submit([make_request("d")], Collector("d"))
    collector.next()
    with pytest.raises(EngineFullError):
        engine.submit([make_request("d")], Collector("d"))
    engine.abort("ab")
    may_go_on.set()
    eventually(lambda: engine.stats().num_requests_running == 1)
    last = Collector("d")
    engine.submit([make_request("d")], last)
    assert last.wait().reason("d") is FinishReason.LENGTH
    engine.shutdown()


def test_abort_ends_one_and_frees_its_blocks(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on = hold(engine, monkeypatch)
    collector = Collector("long", "short")
    engine.submit([make_request("long", 1900), make_request("short", 200)], collector)
    collector.next()
    engine.abort(["long", "never heard of"])
    may_go_on.set()
    collector.wait()
    assert collector.reason("long") is FinishReason.ABORT
    assert len(collector.tokens("long")) <= 2
    assert len(collector.tokens("short")) == 200
    eventually(lambda: engine.stats().num_blocks_in_use == 0)
    engine.abort(["long"])


def test_submit_from_many_threads(engine: AsyncEngine) -> None:
    collectors = {str(i): Collector(str(i)) for i in range(24)}
    threads = [
        threading.Thread(target=engine.submit, args=([make_request(name, 20)], collector))
        for name, collector in collectors.items()
    ]
    for thread in threads:
        thread.start()
    assert len({tuple(c.wait().tokens(name)) for name, c in collectors.items()}) == 1


def test_a_broken_engine_ends_every_stream_and_shows_in_its_health(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.check_health()
    collector = Collector("a", "b")
    engine.submit([make_request("a", 1900)], collector)
    collector.next()

    def broken() -> Any:
        raise AssertionError("an invariant is broken")

    monkeypatch.setattr(engine.engine, "step", broken)
    try:
        engine.submit([make_request("b")], collector)
    except EngineDeadError:
        collector.outputs.pop("b")
    collector.wait()
    assert collector.reason("a") is FinishReason.ABORT  # another engine may go on with it
    assert "an invariant is broken" in str(collector.outputs["a"][-1].error)
    engine._thread.join(TIMEOUT_S)
    with pytest.raises(EngineDeadError, match="an invariant is broken"):
        engine.check_health()
    with pytest.raises(EngineDeadError):
        engine.submit([make_request("c")], collector)
    engine.abort(["a"])


def test_health_notices_a_step_that_never_ends(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    passed_s = 0.0
    monkeypatch.setattr(async_engine, "monotonic", lambda: time.monotonic() + passed_s)
    stuck, release = threading.Event(), threading.Event()
    step = engine.engine.step

    def stuck_step() -> Any:
        stuck.set()
        release.wait(TIMEOUT_S)
        return step()

    monkeypatch.setattr(engine.engine, "step", stuck_step)
    passed_s += 2 * async_engine.STALL_LIMIT_S  # idle for longer than the limit: healthy all the same
    engine.check_health()
    collector = Collector("a")
    engine.submit([make_request("a")], collector)
    engine.check_health()
    assert stuck.wait(TIMEOUT_S)
    passed_s += 2 * async_engine.STALL_LIMIT_S
    with pytest.raises(EngineDeadError, match="no step"):
        engine.check_health()
    release.set()
    collector.wait()
    engine.check_health()


def test_shutdown_ends_what_is_left(engine: AsyncEngine) -> None:
    collector = Collector("a")
    engine.submit([make_request("a", 1900)], collector)
    collector.next()
    engine.shutdown()
    assert collector.wait().reason("a") is FinishReason.ABORT
    with pytest.raises(EngineDeadError):
        engine.submit([make_request("b")], collector)


def test_idle_engine_checks_its_blocks(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = threading.Event()
    monkeypatch.setattr(engine.engine, "check_integrity", checked.set)
    engine.submit([make_request("a")], Collector("a"))
    assert checked.wait(TIMEOUT_S)


def test_that_the_blocks_were_checked_is_told(engine: AsyncEngine) -> None:
    engine.submit([make_request("a")], Collector("a"))
    deadline_s = time.monotonic() + TIMEOUT_S
    while not engine.stats().num_integrity_checks:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    engine.check_health()
