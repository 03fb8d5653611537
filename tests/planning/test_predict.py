"""Plans for cards that are not there: from the engine's own tensors and its own arithmetic."""

import gc
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.config import (
    CacheConfig,
    Device,
    DType,
    EngineConfig,
    KVCacheDType,
    ModelConfig,
    Quantization,
    SchedulerConfig,
)
from engine.errors import ConfigError
from engine.llm_engine import LLMEngine
from engine.loader.known_shapes import KNOWN_SHAPES
from engine.model import int8_linear, linear
from engine.model.expected_tensors import expected_tensors
from engine.planning import card as cards
from engine.planning.card import CONTEXT_BYTES, Card, card_of
from engine.planning.predict import gpu_bytes, predict_memory, tensor_bytes
from engine.precompile.gpus import GPUS
from engine.precompile.shapes_only import NOWHERE
from engine.quantize.quantizable import is_quantizable
from engine.runner import memory
from engine.runner.memory import CUDA_FRACTION, MemoryReading, cpu_weight_bytes, later_bytes, weight_bytes
from engine.runner.start_up import StartUp
from tests.quantize.test_int8_weight import LLAMA
from tests.tiny_models import write_tiny_model

GIB = 1 << 30
TINYLLAMA, MISTRAL = KNOWN_SHAPES["tinyllama-1.1b"], KNOWN_SHAPES["mistral-7b"]
LIMITS = SchedulerConfig(max_num_seqs=10**4, token_budget=2048, max_model_len=2048)
BFLOAT16 = torch.bfloat16


def config(device: Device = Device.CUDA, limits: SchedulerConfig = LIMITS, **changes: object) -> EngineConfig:
    return replace(EngineConfig(device=device, scheduler=limits), **changes)


def small(card: Card, total_bytes: int) -> Card:
    assert card.gpu is not None
    gpu = replace(card.gpu, memory_bytes=total_bytes)
    return replace(card, gpu=gpu, memory=MemoryReading("small", total_bytes, total_bytes))


def live_bytes() -> int:
    """Of all tensors on the device "meta" that this process has."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) is torch.Tensor and item.device == NOWHERE:
            storages[item.untyped_storage()._cdata] = -(-item.untyped_storage().nbytes() // 512) * 512
    return sum(storages.values())


@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.W8A8])
def test_no_tensor_is_overlooked(monkeypatch: pytest.MonkeyPatch, quantization: Quantization) -> None:
    """What is found from the decoder and the forward on is all that there is then."""
    from engine.planning import predict

    found: list[int] = []
    alive: list[int] = []
    count = predict.tensor_bytes

    def counted(root: object) -> int:
        found.append(count(root))
        alive.append(live_bytes())
        return found[-1]

    monkeypatch.setattr(predict, "tensor_bytes", counted)
    before = live_bytes()
    gpu_bytes.__wrapped__(GPUS["h100"].gpu, LLAMA, BFLOAT16, quantization, 16, SchedulerConfig(max_num_seqs=8))
    decoder, forward, _ = found
    assert decoder == alive[0] - before
    assert forward == alive[1] - before
    assert forward > decoder > weight_bytes(LLAMA, BFLOAT16, quantization)


def test_what_is_shared_counts_once_in_whole_pieces() -> None:
    def empty(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=NOWHERE)

    shared = empty(1024)
    root = SimpleNamespace(
        own=empty(513), parts=[shared[:10], (shared, "text")], named={"a": SimpleNamespace(deep=empty(1))}
    )
    root.parts.append(root)
    root.host = torch.empty(4096)
    assert tensor_bytes(root) == 1024 + 1024 + 512


def matrix_bytes(model: ModelConfig, itemsize: int) -> int:
    return itemsize * sum(prod(shape) for name, shape in expected_tensors(model).items() if is_quantizable(name))


@pytest.mark.parametrize(
    ("gpu", "model", "quantization", "copies"),
    [
        ("h100", MISTRAL, Quantization.NONE, 2),
        ("l4", MISTRAL, Quantization.NONE, 1),  # more than a quarter of the card
        ("l4", TINYLLAMA, Quantization.NONE, 2),
        ("h100", MISTRAL, Quantization.INT8, 2),
    ],
)
def test_weights_lie_twice_where_there_is_room(
    gpu: str, model: ModelConfig, quantization: Quantization, copies: int
) -> None:
    plan = predict_memory(model, config(quantization=quantization), card_of(gpu))
    once = weight_bytes(model, BFLOAT16, quantization)
    itemsize = 2 if quantization is Quantization.NONE else 1
    second = matrix_bytes(model, itemsize)
    if model is TINYLLAMA:  # eight slices of whole multiples of 128 features make 6,144 of 5,632
        second += itemsize * 22 * 2048 * (6144 - 5632)
    assert plan.weights_bytes == pytest.approx(once + (copies - 1) * second, rel=2e-3)  # beside tables of angles


def test_the_parts_make_up_the_card() -> None:
    card = card_of("l4")
    plan = predict_memory(TINYLLAMA, config(), card)
    parts = plan.weights_bytes + plan.workspace_bytes + plan.sampler_bytes + plan.kv_cache_bytes + plan.graph_bytes
    assert parts + plan.free_bytes + plan.other_bytes == plan.total_bytes == 22 * GIB
    assert plan.other_bytes == CONTEXT_BYTES
    assert plan.graph_bytes == later_bytes(TINYLLAMA, LIMITS)
    free = plan.kv_cache_bytes + plan.graph_bytes + plan.free_bytes
    most = min(free * CUDA_FRACTION, free - plan.graph_bytes)
    assert plan.kv_cache_bytes == pytest.approx(most, abs=plan.block_bytes)
    assert plan.num_tokens * 2 * 22 * 4 * 64 * 2 == plan.kv_cache_bytes - plan.block_bytes
    assert plan.num_longest_requests == plan.num_tokens // 2048


def test_more_work_leaves_less() -> None:
    card = card_of("l4")
    plain = predict_memory(TINYLLAMA, config(), card)
    int8_kv = predict_memory(TINYLLAMA, config(cache=CacheConfig(dtype=KVCacheDType.INT8)), card)
    assert int8_kv.num_tokens == pytest.approx(plain.num_tokens * 128 / 68, rel=1e-3)
    wide = predict_memory(TINYLLAMA, config(limits=replace(LIMITS, token_budget=8192)), card)
    assert wide.workspace_bytes > 1.5 * plain.workspace_bytes
    assert wide.num_tokens < plain.num_tokens
    few = predict_memory(TINYLLAMA, config(limits=replace(LIMITS, max_num_seqs=16)), card)
    assert few.num_longest_requests == 16
    assert few.free_bytes > plain.free_bytes


def test_a_draft_model_takes_from_the_cache_of_its_target() -> None:
    card = card_of("l4")
    draft = replace(TINYLLAMA, num_layers=4, hidden_size=512, intermediate_size=1408, num_heads=8, num_kv_heads=2)
    alone, both = predict_memory(TINYLLAMA, config(), card), predict_memory(TINYLLAMA, config(), card, draft)
    assert alone.draft_bytes == 0
    # A tenth of what is free is for its KV.
    assert both.draft_bytes > weight_bytes(draft, BFLOAT16, Quantization.NONE) + 0.1 * card.memory.free_bytes
    assert both.kv_cache_bytes < alone.kv_cache_bytes - 0.8 * both.draft_bytes
    assert both.other_bytes == CONTEXT_BYTES
    with pytest.raises(ConfigError, match="vocabulary"):
        predict_memory(TINYLLAMA, config(), card, replace(draft, vocab_size=31))


@pytest.mark.parametrize(
    ("total_bytes", "changes", "message"),
    [
        (GIB, {}, r"^the weights do not fit: they take 2\.05 GiB and 1\.00 GiB are free: .* quantization=int8$"),
        (5 * GIB, {"limits": replace(LIMITS, token_budget=10**5)}, r"^the workspace of a step .* lower token_budget"),
        (5 * GIB, {"cache": CacheConfig(memory_bytes=9 * GIB)}, r"^the KV cache does not fit: .* kv_cache_memory_gb"),
        (
            int(2.3 * GIB),
            {"limits": replace(LIMITS, max_num_seqs=8)},
            r"^the KV cache holds 0 tokens .*: lower max_model_len, set kv_cache_dtype=int8",
        ),
    ],
)
def test_what_does_not_fit_is_said_as_at_a_start(total_bytes: int, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predict_memory(TINYLLAMA, config(**changes), small(card_of("h100"), total_bytes))


@pytest.mark.parametrize(("quantization", "tied"), [(q, tied) for q in Quantization for tied in (True, False)])
def test_the_cpus_plan_is_the_engines_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: Quantization, tied: bool
) -> None:
    reading = MemoryReading("CPU", 16 * GIB, 8 * GIB)
    for module in (memory, cards):
        monkeypatch.setattr(module, "read_memory", lambda _device: reading)
    limits = SchedulerConfig(max_num_seqs=10**6, max_model_len=500)
    settings = config(Device.CPU, limits, quantization=quantization, dtype=DType.FLOAT32, num_threads=1)
    start_up = StartUp()
    path = write_tiny_model(tmp_path, tie_word_embeddings=tied)
    shape = LLMEngine.from_path(path, settings, start_up)._runner.forward.decoder.config
    predicted, told = predict_memory(shape, settings, card_of("cpu")), start_up.memory
    assert told is not None
    assert told.num_longest_requests > 100
    kept = ("weights_bytes", "num_blocks", "block_bytes", "max_model_len", "workspace_bytes", "graph_bytes")
    assert [getattr(predicted, name) for name in kept] == [getattr(told, name) for name in kept]


def test_what_a_cpu_has_twice_or_at_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = replace(LLAMA, tie_word_embeddings=True)
    once, int8 = (weight_bytes(tied, torch.float32, each) for each in (Quantization.NONE, Quantization.INT8))
    for has_layout in (True, False):
        monkeypatch.setattr(memory, "packs_weights", lambda _dtype, has_layout=has_layout: has_layout)
        head = has_layout * 4 * LLAMA.vocab_size * LLAMA.hidden_size
        assert cpu_weight_bytes(tied, torch.float32, Quantization.NONE) == once + head
        untied = cpu_weight_bytes(replace(tied, tie_word_embeddings=False), torch.float32, Quantization.NONE)
        assert untied == once + 4 * LLAMA.vocab_size * LLAMA.hidden_size
    for multiplies in (True, False):
        monkeypatch.setattr(memory, "onednn_is_exact", lambda _type, multiplies=multiplies: multiplies)
        values = matrix_bytes(replace(tied, tie_word_embeddings=False), 1)
        wanted = int8 + (0 if multiplies else 3 * values)
        assert cpu_weight_bytes(tied, torch.float32, Quantization.INT8) == wanted
    assert memory.packs_weights is not linear.packs_weights
    assert memory.onednn_is_exact is not int8_linear.onednn_is_exact


def test_a_card_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match=r"^gpu must be one of h100, .*, rtx4090, cpu, not 'h101'$"):
        card_of("h101")
    assert card_of("h100").bytes_per_s == 3.35e12
    assert card_of("cpu").bytes_per_s is None
