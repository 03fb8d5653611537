"""A tiny model in the real engine, whose steps take as long as those of a large one."""

import time
from pathlib import Path

from engine.config import CacheConfig, DType, EngineConfig, SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.request import RequestOutput

STEP_S = 0.05
MAX_NUM_SEQS = 32
TOKEN_BUDGET = 128


class SlowEngine(LLMEngine):
    def step(self) -> list[RequestOutput]:
        time.sleep(STEP_S)
        return super().step()


def slow_engine_config() -> EngineConfig:
    limits = SchedulerConfig(max_num_seqs=MAX_NUM_SEQS, token_budget=TOKEN_BUDGET, max_model_len=1024)
    cache = CacheConfig(num_blocks=2000)
    return EngineConfig(dtype=DType.FLOAT32, cache=cache, scheduler=limits, num_threads=1)


def load_slow_engine(path: Path, _find_drafts: object) -> LLMEngine:
    """What bind() wants, with the path bound to it."""
    return SlowEngine.from_path(path, slow_engine_config())
