"""What a step must read, which every claim about bandwidth rests on."""

from dataclasses import replace

import pytest
import torch

from benchmarks.shapes import SHAPES
from engine.config import KVCacheDType, Quantization
from engine.precompile.gpus import known_bandwidth
from engine.runner.step_bytes import step_kv_bytes, step_weight_bytes

TINYLLAMA = SHAPES["tinyllama-1.1b"]
MATRICES = 22 * (2048 * (2048 + 2 * 256) + 2048 * 2048 + 3 * 2048 * 5632) + 32_000 * 2048
NORMS = (2 * 22 + 1) * 2048


def test_weights_are_read_once_in_their_format() -> None:
    channels = 22 * (2048 + 2 * 256 + 2048 + 2 * 5632 + 2048) + 32_000
    assert step_weight_bytes(TINYLLAMA, torch.bfloat16, Quantization.NONE) == 2 * MATRICES + 4 * NORMS
    assert step_weight_bytes(TINYLLAMA, torch.bfloat16, Quantization.INT8) == MATRICES + 4 * channels + 4 * NORMS


def test_a_tied_head_is_read_like_any_other() -> None:
    untied = replace(TINYLLAMA, tie_word_embeddings=False)
    tied = replace(TINYLLAMA, tie_word_embeddings=True)
    for quantization in (Quantization.NONE, Quantization.INT8):
        sizes = {step_weight_bytes(model, torch.bfloat16, quantization) for model in (tied, untied)}
        assert len(sizes) == 1


def test_kv() -> None:
    per_token = 22 * 2 * 4 * 64 * 2
    assert step_kv_bytes(TINYLLAMA, torch.bfloat16, KVCacheDType.AUTO, 8, 256.5) == 8 * 256.5 * per_token
    assert step_kv_bytes(TINYLLAMA, torch.bfloat16, KVCacheDType.INT8, 1, 100) == 100 * per_token * 68 / 128
    windowed = replace(TINYLLAMA, sliding_window=64)
    assert step_kv_bytes(windowed, torch.bfloat16, KVCacheDType.AUTO, 1, 100) == 64 * per_token


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA H200", 4.8e12), ("NVIDIA H100 PCIe", None), ("AMD EPYC", None)],
)
def test_bandwidth_of_known_cards_only(name: str, expected: float | None) -> None:
    assert known_bandwidth(name) == expected
