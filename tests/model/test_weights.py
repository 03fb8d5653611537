"""What loading makes of a checkpoint in each number format."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.batch import ScheduledChunk
from engine.config import CacheConfig, DType, EngineConfig, KVCacheDType, Quantization, SchedulerConfig
from engine.errors import ConfigError
from engine.llm_engine import LLMEngine
from engine.loader.checkpoint import open_checkpoint
from engine.model.expected_tensors import expected_tensors
from engine.model.layer_weights import LayerWeights
from engine.model.reference_decoder import ReferenceDecoder
from engine.model.weights import load_decoder
from engine.quantize.int8_weight import Int8Weight, quantize_weight
from engine.request import Request, SamplingParams
from engine.runner.forward import load_forward
from tests.tiny_models import write_tiny_model

CPU = torch.device("cpu")


class Packed(ReferenceDecoder):
    """Keeps what loading hands over."""

    @staticmethod
    def pack(config: Any, weights: LayerWeights) -> Any:
        layer = ReferenceDecoder.pack(config, weights)
        object.__setattr__(layer, "given", weights)
        return layer

    def __init__(self, config: Any, embedding: Any, layers: Any, norm: Any, lm_head: Any, max_model_len: int) -> None:
        super().__init__(config, embedding, layers, norm, lm_head, max_model_len)
        self.given = (embedding, layers[1].given, lm_head)


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.W8A8])
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_are_quantised_from_what_is_stored(tmp_path: Path, quantization: Quantization, tied: bool) -> None:
    path = write_tiny_model(tmp_path, tie_word_embeddings=tied)
    stored = load_file(path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    seen: list[tuple[int, int]] = []
    decoder = load_decoder(
        Packed, checkpoint, CPU, torch.bfloat16, 64, lambda *each: seen.append(each), quantization=quantization
    )
    embedding, layer, head = decoder.given
    total = len(expected_tensors(checkpoint.config))
    assert seen == [(done, total) for done in range(1, total + 1)]
    assert embedding.dtype is torch.bfloat16
    assert layer.input_norm.dtype is torch.float32
    prefix, rounded = "model.layers.1.", quantization is Quantization.W8A8
    head_name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    for weight, names, rounds_inputs in (
        (layer.qkv, [f"{prefix}self_attn.{name}_proj.weight" for name in "qkv"], rounded),
        (layer.o, [f"{prefix}self_attn.o_proj.weight"], rounded),
        (layer.gate_up, [f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up")], rounded),
        (layer.down, [f"{prefix}mlp.down_proj.weight"], rounded),
        (head, [head_name], False),
    ):
        expected = quantize_weight(torch.cat([stored[name] for name in names]), rounds_inputs)
        assert isinstance(weight, Int8Weight)
        assert weight.rounds_inputs is rounds_inputs
        assert torch.equal(weight.values, expected.values)
        assert torch.equal(weight.scales, expected.scales)


def logits_of(path: Path, quantization: Quantization, cache_dtype: KVCacheDType) -> torch.Tensor:
    cache = CacheConfig(num_blocks=9, dtype=cache_dtype)
    limits = SchedulerConfig(max_model_len=128)
    forward = load_forward(
        open_checkpoint(path), CPU, torch.float32, cache, limits, lambda _done, _total: None, quantization
    )
    tokens = torch.randint(0, 320, (100,), generator=torch.Generator().manual_seed(3)).tolist()
    request = Request("r", tokens, SamplingParams(seed=1))
    request.block_table = [*range(1, 9)]
    return torch.cat([forward.launch([ScheduledChunk(request, 0, 100)]).logits])


def test_each_format_is_close_and_different(tmp_path: Path) -> None:
    """No format is another one under a wrong name, and none is far from the unquantised model."""
    path = write_tiny_model(tmp_path)
    exact = logits_of(path, Quantization.NONE, KVCacheDType.AUTO)
    seen = {}
    for quantization in Quantization:
        for cache_dtype in KVCacheDType:
            logits = logits_of(path, quantization, cache_dtype)
            seen[quantization, cache_dtype] = logits
            assert (logits - exact).norm() / exact.norm() < 0.05
    distinct = {tuple(logits.flatten().tolist()) for logits in seen.values()}
    assert len(distinct) == len(seen) == 6


def test_the_fingerprint_names_every_format(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    fingerprints = {
        LLMEngine.from_path(
            path,
            EngineConfig(
                dtype=DType.FLOAT32,
                quantization=quantization,
                cache=CacheConfig(num_blocks=200, dtype=cache_dtype),
                num_threads=1,
                warm_up=False,
            ),
        ).fingerprint
        for quantization in Quantization
        for cache_dtype in KVCacheDType
    }
    assert len(fingerprints) == 6


def test_too_wide_a_model_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, num_hidden_layers=1, intermediate_size=131_072, hidden_size=8, head_dim=2)
    with pytest.raises(ConfigError, match="quantization=w8a8 sums at most"):
        load_decoder(ReferenceDecoder, open_checkpoint(path), CPU, torch.float32, 8, quantization=Quantization.W8A8)
