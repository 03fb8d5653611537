"""Whatever does not fit says how large it is and what to change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import CacheConfig, Device, DType, EngineConfig, Quantization, SchedulerConfig
from engine.errors import ConfigError
from engine.llm_engine import LLMEngine
from engine.runner import forward, start_forward
from engine.runner.memory import MemoryReading
from engine.runner.out_of_memory import explained, is_out_of_memory, step_ran_out
from tests.tiny_models import write_tiny_model

EXHAUSTED = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 9 GiB"
)


def raises(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path)


def start(path: Path, **settings: Any) -> LLMEngine:
    limits = SchedulerConfig(max_model_len=128, token_budget=64, max_num_seqs=8)
    cache = CacheConfig(num_blocks=20)
    settings = {"dtype": DType.FLOAT32, "cache": cache, "scheduler": limits, "num_threads": 1} | settings
    return LLMEngine.from_path(path, EngineConfig(**settings))


def test_only_memory_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"^much too large$"), explained(lambda: "much too large"):
        raise EXHAUSTED
    with pytest.raises(RuntimeError, match=r"^illegal address$"), explained(lambda: "much too large"):
        raise RuntimeError("illegal address")
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))


@pytest.mark.parametrize(
    ("quantization", "knobs"), [("none", "a smaller model or quantization=int8"), ("int8", "a smaller model")]
)
def test_weights_larger_than_the_memory(
    path: Path, quantization: str, knobs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (forward, start_forward):
        monkeypatch.setattr(module, "read_memory", lambda _device: MemoryReading("Some GPU", 1 << 30, 1000))
    with pytest.raises(ConfigError, match=rf"^the weights do not fit: they take 0\.00 GiB .* are free: use {knobs}$"):
        start(path, quantization=Quantization(quantization))


def test_weights_that_run_out_while_they_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "load_decoder", raises(EXHAUSTED))
    with pytest.raises(ConfigError, match="the weights do not fit"):
        start(path)


def test_a_cache_larger_than_the_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "KVCache", raises(EXHAUSTED))
    with pytest.raises(ConfigError, match=r"^the KV cache does not fit: it is to take 0\.00 GiB .* num_kv_blocks$"):
        start(path)


def test_a_workspace_larger_than_the_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the Triton decoder, which runs in the interpreter here."""
    from engine.loader.checkpoint import open_checkpoint
    from engine.model.triton_decoder import TritonDecoder
    from engine.model.weights import load_decoder

    decoder = load_decoder(TritonDecoder, open_checkpoint(path), torch.device("cpu"), torch.bfloat16, 128)
    monkeypatch.setattr(TritonDecoder, "reserve", raises(EXHAUSTED))
    message = r"workspace of a step .* lower token_budget \(now 64\) or max_num_seqs \(now 8\)$"
    with pytest.raises(ConfigError, match=message):
        forward.make_forward(decoder, CacheConfig(num_blocks=20), SchedulerConfig(token_budget=64, max_num_seqs=8))


def test_a_step() -> None:
    assert step_ran_out(EXHAUSTED) == (
        "out of memory in this step (512.00 MiB more were asked for): lower max_num_seqs or token_budget, "
        "or give the KV cache less (kv_cache_memory_gb)"
    )
    assert step_ran_out(RuntimeError("DefaultCPUAllocator")).startswith("out of memory in this step: lower")


@pytest.mark.gpu
def test_a_gpu_that_is_too_small(path: Path) -> None:
    with pytest.raises(ConfigError, match="the KV cache does not fit"):
        start(path, device=Device.CUDA, dtype=DType.BFLOAT16, cache=CacheConfig(num_blocks=1 << 34))
