"""Perplexity through the engine's own decoder, against one pass of plain attention over each window."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers

from engine.batch import ScheduledChunk
from engine.config import CacheConfig, Device, DType, EngineConfig, KVCacheDType, Quantization
from engine.errors import ConfigError, ModelError
from engine.evaluate import perplexity
from engine.evaluate.perplexity import PerplexityResult, Window, measure_perplexity, windows
from engine.loader.checkpoint import open_checkpoint
from engine.runner.eager_forward import EagerForward
from tests.tiny_models import write_tiny_model

CONFIG = EngineConfig(dtype=DType.FLOAT32, num_threads=1)
TOKENS = torch.randint(0, 320, (301,), generator=torch.Generator().manual_seed(6)).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=256)


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(2, 10, 5), (10, 10, 5), (11, 10, 5), (301, 64, 63), (99, 9, 1)]
)
def test_every_token_is_scored_once_with_enough_before_it(length: int, context: int, stride: int) -> None:
    made = list(windows(length, context, stride))
    scored = [token for window in made for token in range(window.first_scored, window.stop)]
    assert scored == list(range(1, length))
    for window in made:
        assert window.stop - window.start <= context
        assert window.start == 0 or window.first_scored - window.start >= context - stride
    assert made[0].start == 0
    assert all(later.start - earlier.start == stride for earlier, later in pairwise(made))


def test_windows_by_example() -> None:
    assert list(windows(14, 8, 4)) == [Window(0, 8, 1), Window(4, 12, 8), Window(8, 14, 12)]


@torch.no_grad()
@pytest.mark.parametrize(("context", "stride"), [(64, 32), (100, 99), (256, 100)])
@pytest.mark.parametrize("device", [Device.CPU, pytest.param(Device.CUDA, marks=pytest.mark.gpu)])
def test_equals_transformers(
    path: Path, device: Device, context: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(perplexity.CHUNK_ROWS, device, 24)  # several chunks a window, before and in what counts
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    total = 0.0
    for window in windows(len(TOKENS), context, stride):
        logprobs = model(torch.tensor([TOKENS[window.start : window.stop]])).logits[0].log_softmax(-1)
        for token in range(window.first_scored, window.stop):
            total -= float(logprobs[token - window.start - 1, TOKENS[token]])
    seen: list[tuple[int, int]] = []
    config = EngineConfig(device=device, dtype=DType.FLOAT32)
    result = measure_perplexity(
        open_checkpoint(path), config, TOKENS, context, stride, on_score=lambda *each: seen.append(each)
    )
    assert result.num_scored_tokens == 300
    assert result.total_nll == pytest.approx(total, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / 300), rel=1e-4)
    assert seen[-1] == (300, 300)


def test_quantised_formats_cost_something_but_little(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    found = {
        (quantization, cache_dtype): measure_perplexity(
            checkpoint,
            EngineConfig(
                dtype=DType.FLOAT32, quantization=quantization, cache=CacheConfig(dtype=cache_dtype), num_threads=1
            ),
            TOKENS,
            128,
            64,
        ).perplexity
        for quantization in Quantization
        for cache_dtype in KVCacheDType
    }
    exact = found[Quantization.NONE, KVCacheDType.AUTO]
    assert len(set(found.values())) == 6
    assert all(abs(value / exact - 1) < 0.01 for value in found.values())


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "problem"),
    [
        (TOKENS, 257, 100, "context must be between 2 and 256"),
        (TOKENS, 1, 1, "context must be between 2 and 256"),
        (TOKENS, 64, 64, "stride must be between 1 and 63"),
        (TOKENS, 64, 0, "stride must be between 1 and 63"),
        ([5], 64, 32, "the text must have at least 2 tokens"),
    ],
)
def test_what_does_not_go_together(path: Path, tokens: list[int], context: int, stride: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        measure_perplexity(open_checkpoint(path), CONFIG, tokens, context, stride)


def test_a_model_that_says_nan(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say_nan(_: EagerForward, chunk: ScheduledChunk) -> torch.Tensor:
        return torch.full((chunk.num_scheduled_tokens, 320), math.nan)

    monkeypatch.setattr(EagerForward, "score", say_nan)
    with pytest.raises(ModelError, match="logits are NaN"):
        measure_perplexity(open_checkpoint(path), CONFIG, TOKENS, 64, 32)


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    assert PerplexityResult(800.0 * 3, 3, 1.0).perplexity == math.inf
