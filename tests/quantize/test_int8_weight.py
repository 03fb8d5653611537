"""Rounding to int8: the formula, its edges, and which tensors it is for."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.config import ModelConfig, Quantization
from engine.errors import ConfigError
from engine.model.expected_tensors import expected_tensors
from engine.quantize.formats import MAX_INPUT_FEATURES, resolve_quantization
from engine.quantize.int8_weight import Int8Weight, inputs_are_rounded, quantize_rows, quantize_weight, stack_weights
from engine.quantize.quantizable import is_quantizable

LLAMA = ModelConfig("LlamaForCausalLM", 320, 64, 144, 2, 4, 2, 16, 1e-5, 2048, qkv_bias=True, qk_norm=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_formula(dtype: torch.dtype) -> None:
    weight = torch.randn(37, 101, generator=torch.Generator().manual_seed(1)).to(dtype)
    quantized = quantize_weight(weight)
    exact = weight.float().numpy()
    scales = np.abs(exact).max(axis=1) / np.float32(127)
    assert quantized.values.dtype is torch.int8
    assert np.array_equal(quantized.scales.numpy(), scales)
    assert np.array_equal(quantized.values.numpy(), np.rint(exact / scales[:, None]))  # half to even
    assert quantized.values.abs().amax(dim=1).eq(127).all()
    error = (quantized.values * quantized.scales[:, None] - weight.float()).abs()
    assert (error <= quantized.scales[:, None] * 0.50001).all()


def test_half_goes_to_even() -> None:
    values, scales = quantize_rows(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]))
    assert scales == 1.0
    assert values.tolist() == [127, 0, 2, 2, 0, -2]


def test_what_rounds_its_inputs() -> None:
    assert inputs_are_rounded("model.layers.3.mlp.up_proj.weight", Quantization.W8A8)
    assert not inputs_are_rounded("model.layers.3.mlp.up_proj.weight", Quantization.INT8)
    assert not inputs_are_rounded("lm_head.weight", Quantization.W8A8)


def test_rows_without_a_scale() -> None:
    values, scales = quantize_rows(torch.tensor([[0.0, -0.0], [1e-37, 1e-44], [float("nan"), 1.0], [3.0, -1.5]]))
    assert values[:2].eq(0).all()
    assert scales[:2].eq(1).all()
    assert scales[2].isnan()
    assert values[3].tolist() == [127, -64]


def test_rows_and_stacks_keep_channels_together() -> None:
    first, second = (quantize_weight(torch.randn(5, 8) * size, rounds_inputs=True) for size in (1, 100))
    stacked = stack_weights([first, second])
    assert isinstance(stacked, Int8Weight)
    assert stacked.rounds_inputs
    order = torch.tensor([9, 0, 4])
    chosen = stacked[order].contiguous()
    assert chosen.rounds_inputs
    assert torch.equal(chosen.values, torch.cat([first.values, second.values])[order])
    assert torch.equal(chosen.scales, torch.cat([first.scales, second.scales])[order])


def test_matrices_are_quantised_and_nothing_else() -> None:
    names = [name for name in expected_tensors(LLAMA) if is_quantizable(name)]
    assert len(names) == 7 * LLAMA.num_layers + 1
    assert all(name.endswith("_proj.weight") or name == "lm_head.weight" for name in names)


def test_the_format_of_the_checkpoint_is_the_default() -> None:
    stored = replace(LLAMA, stored_quantization=Quantization.W8A8)
    assert resolve_quantization(LLAMA, Quantization.NONE) is Quantization.NONE
    assert resolve_quantization(LLAMA, Quantization.INT8) is Quantization.INT8
    assert resolve_quantization(stored, Quantization.NONE) is Quantization.W8A8
    assert resolve_quantization(stored, Quantization.W8A8) is Quantization.W8A8
    with pytest.raises(ConfigError, match="quantization=int8, but the model's weights are stored as w8a8: leave"):
        resolve_quantization(stored, Quantization.INT8)


def test_sums_that_could_leave_int32_are_refused() -> None:
    assert MAX_INPUT_FEATURES * 128 * 128 < 2**31
    wide = replace(LLAMA, intermediate_size=MAX_INPUT_FEATURES + 1)
    assert resolve_quantization(wide, Quantization.NONE) is Quantization.NONE
    with pytest.raises(ConfigError, match=r"quantization=int8 sums at most 131071 .* 131072 columns"):
        resolve_quantization(wide, Quantization.INT8)
