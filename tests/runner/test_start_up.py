"""What is said while an engine starts."""

import re
from pathlib import Path

import pytest

from engine.config import CacheConfig, DType, EngineConfig, SchedulerConfig
from engine.errors import ModelError
from engine.llm_engine import LLMEngine
from engine.runner.start_up import LoggedStartUp, Phase, StartUp
from tests.runner.test_memory import PLAN
from tests.tiny_models import write_tiny_model

CONFIG = EngineConfig(
    dtype=DType.FLOAT32, cache=CacheConfig(num_blocks=41), scheduler=SchedulerConfig(max_model_len=160), num_threads=1
)


def test_an_engine_tells_of_each_phase(tmp_path: Path) -> None:
    lines: list[str] = []
    start_up = LoggedStartUp(lines.append)
    LLMEngine.from_path(write_tiny_model(tmp_path), CONFIG, start_up)
    text = "\n".join(lines)
    assert [line.split(":")[0] for line in lines[:5]] == [
        Phase.HEADERS,
        Phase.WEIGHTS,  # from its first tensor on
        Phase.WEIGHTS,
        Phase.MEMORY,
        Phase.STEPS,
    ]
    assert "loading weights: 1/21 tensors\nloading weights: 21/21 tensors, 0.00 GiB, " in text
    assert re.search(r"compiling and capturing steps: no kinds of steps, \d+\.\d", text)
    assert "40 blocks of 16: 640 tokens, or 4 requests of 160" in text
    assert lines[-1].startswith("ready in ")
    # Without a draft model, and in a process that has imported everything.
    assert list(start_up.seconds) == [phase for phase in Phase if phase not in (Phase.IMPORTS, Phase.DRAFT)]
    assert start_up.ready_s is not None
    assert sum(start_up.seconds.values()) <= start_up.ready_s
    assert start_up.memory is not None
    assert start_up.memory.num_blocks == 41
    assert start_up.memory.weights_bytes > 4 * 2 * 320 * 64


def test_a_long_phase_is_heard_of_now_and_then() -> None:
    for interval_s, expected in ((60.0, 1), (0.0, 9)):
        lines: list[str] = []
        start_up = LoggedStartUp(lines.append, interval_s)
        with start_up.phase(Phase.STEPS) as (_, advance):
            for done in range(1, 10):
                advance(done, 9)
        assert len(lines) == expected + 1
        assert lines[0] == "compiling and capturing steps: 1/9 kinds of steps"
        assert re.match(r"compiling and capturing steps: 9/9 kinds of steps, \d+\.\d", lines[-1])
        start_up.ready(PLAN)
        assert lines[expected + 1 : -1] == PLAN.lines()


def test_a_phase_that_fails_has_no_end() -> None:
    start_up = StartUp()
    with pytest.raises(ModelError), start_up.phase(Phase.HEADERS):
        raise ModelError("no such file")
    assert not start_up.seconds
    assert start_up.ready_s is None
