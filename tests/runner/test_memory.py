"""The memory plan: its arithmetic, what a GPU keeps back for later, and the size of weights, with made-up devices."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.config import CacheConfig, KVCacheDType, Quantization, SchedulerConfig
from engine.errors import ConfigError
from engine.loader.checkpoint import open_checkpoint
from engine.model.kv_cache import kv_bytes_per_block
from engine.model.triton_decoder import TritonDecoder
from engine.model.weights import load_decoder
from engine.runner import memory
from engine.runner.graph_forward import GraphForward
from engine.runner.memory import MemoryPlan, MemoryReading, plan_num_blocks, sampler_bytes, weight_bytes
from tests.quantize.test_int8_weight import LLAMA
from tests.tiny_models import write_tiny_model

GIB = 1 << 30
CUDA = torch.device("cuda", 0)
PLAN = MemoryPlan(
    device_name="Some GPU",
    total_bytes=80 * GIB,
    free_bytes=6 * GIB,
    weights_bytes=4 * GIB,
    workspace_bytes=GIB // 2,
    sampler_bytes=GIB // 4,
    num_blocks=1001,
    block_size=16,
    block_bytes=GIB // 16,
    max_model_len=2000,
    graph_bytes=GIB // 8,
)


def test_a_plan_adds_up() -> None:
    assert PLAN.num_tokens == 16_000
    assert PLAN.num_longest_requests == 8  # 125 blocks each
    assert replace(PLAN, max_model_len=2001).num_longest_requests == 7
    parts = PLAN.weights_bytes + PLAN.workspace_bytes + PLAN.sampler_bytes + PLAN.kv_cache_bytes + PLAN.graph_bytes
    assert parts + PLAN.other_bytes + PLAN.free_bytes == PLAN.total_bytes
    assert replace(PLAN, total_bytes=10 * GIB).other_bytes == 0, "planned, but not yet taken"


def test_the_table() -> None:
    assert PLAN.lines() == [
        "memory of Some GPU               80.00 GiB",
        "  weights                         4.00 GiB",
        "  activations and workspace       0.50 GiB",
        "  sampler state                   0.25 GiB",
        "  KV cache                       62.56 GiB  1,000 blocks of 16: 16,000 tokens, or 8 requests of 2,000",
        "  CUDA graphs and kernels         0.12 GiB",
        "  other (libraries, processes)    6.56 GiB",
        "  free                            6.00 GiB",
    ]
    on_a_cpu = replace(PLAN, workspace_bytes=0, sampler_bytes=0, graph_bytes=0).lines()
    assert [line.split("  ")[1] for line in on_a_cpu[1:]] == [
        "weights",
        "KV cache",
        "other (libraries, processes)",
        "free",
    ]


def blocks_with(monkeypatch: pytest.MonkeyPatch, free_bytes: int, cache: CacheConfig, limits: SchedulerConfig) -> int:
    monkeypatch.setattr(memory, "read_memory", lambda _device: MemoryReading("Some GPU", 80 * GIB, free_bytes))
    return plan_num_blocks(LLAMA, cache, limits, torch.bfloat16, CUDA)


def test_graphs_find_room_behind_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, limits = CacheConfig(), SchedulerConfig(max_num_seqs=10**6, max_model_len=2048)
    per_block = kv_bytes_per_block(LLAMA, cache.block_size, torch.bfloat16)
    later = memory.later_bytes(LLAMA, limits)
    for free in (GIB, 2 * GIB, 100 * GIB):
        left = free - blocks_with(monkeypatch, free, cache, limits) * per_block
        assert left == pytest.approx(max(later, free * 0.1), abs=per_block + 1)
    assert later > 0.1 * GIB, "the small card is a case of its own"
    assert memory.later_bytes(replace(LLAMA, num_layers=80), limits) > later


def test_a_share_of_a_device_is_kept_whoever_starts_first(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = SchedulerConfig(max_num_seqs=10**6, max_model_len=2048)
    shared = CacheConfig(device_share=0.25)
    blocks = blocks_with(monkeypatch, 80 * GIB, shared, limits)
    assert blocks == blocks_with(monkeypatch, 20 * GIB, CacheConfig(), limits)
    assert blocks_with(monkeypatch, 10 * GIB, shared, limits) < blocks, "no more than there is"
    reading = MemoryReading("Some GPU", 80 * GIB, 70 * GIB, allocated_bytes=5 * GIB)  # weights are part of the share
    monkeypatch.setattr(memory, "read_memory", lambda _device: reading)
    with_weights = plan_num_blocks(LLAMA, shared, limits, torch.bfloat16, CUDA)
    assert with_weights == blocks_with(monkeypatch, 15 * GIB, CacheConfig(), limits)


def test_a_cache_for_less_than_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = SchedulerConfig(max_model_len=1_000_000)
    message = (
        r"^the KV cache holds \d+ tokens in 0\.01 GiB, fewer than max_model_len 1000000: lower max_model_len, "
        r"set kv_cache_dtype=int8, or give the cache \d\.\d\d GiB \(kv_cache_memory_gb\)$"
    )
    with pytest.raises(ConfigError, match=message):
        blocks_with(monkeypatch, GIB, CacheConfig(memory_bytes=10_000_000), limits)
    with pytest.raises(ConfigError, match=r"1000000: lower max_model_len, or give"):
        blocks_with(monkeypatch, GIB, CacheConfig(memory_bytes=10_000_000, dtype=KVCacheDType.INT8), limits)
    with pytest.raises(ConfigError, match=r"holds 0 tokens in 0\.00 GiB"):
        blocks_with(monkeypatch, 1000, CacheConfig(), limits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.INT8])
def test_the_size_of_weights_is_that_of_their_tensors(tmp_path: Path, tied: bool, quantization: Quantization) -> None:
    """The Triton decoder keeps them as they are, each beside a copy, which may be left out here."""
    checkpoint = open_checkpoint(write_tiny_model(tmp_path, tie_word_embeddings=tied))
    decoder = load_decoder(
        TritonDecoder, checkpoint, torch.device("cpu"), torch.bfloat16, 64, quantization=quantization
    )
    matrices = [decoder._lm_head]
    plain = [decoder._norm]
    for layer in decoder._layers:
        matrices += [layer.qkv.weight, layer.o, layer.gate_up, layer.down]
        plain += [layer.input_norm, layer.post_attention_norm]
    found = sum(tensor.nbytes for tensor in plain)
    found += sum(matrix.rows.nbytes + (0 if matrix.scales is None else matrix.scales.nbytes) for matrix in matrices)
    if not tied or quantization is not Quantization.NONE:
        found += decoder._embedding.nbytes
    assert weight_bytes(checkpoint.config, torch.bfloat16, quantization) == found


def test_the_size_of_the_sampler_is_that_of_its_tensors(tmp_path: Path) -> None:
    model = open_checkpoint(write_tiny_model(tmp_path)).config
    limits = SchedulerConfig(max_num_seqs=6, token_budget=32, max_model_len=64)
    decoder = load_decoder(TritonDecoder, open_checkpoint(tmp_path), torch.device("cpu"), torch.bfloat16, 64)
    forward = GraphForward(decoder, lambda: SimpleNamespace(block_size=16), limits)
    sampler = forward._sampler
    tensors = [*vars(sampler._tensors).values(), *vars(sampler._workspace).values()]
    assert sampler_bytes(model, limits) == sum(tensor.nbytes for tensor in tensors)
