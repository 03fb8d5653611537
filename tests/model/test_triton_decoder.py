"""The decoder in kernels against the one in plain torch; on the CPU under Triton's interpreter."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import ScheduledChunk
from engine.config import KVCacheDType, Quantization, SchedulerConfig
from engine.loader.checkpoint import open_checkpoint
from engine.model.kv_cache import KVCache
from engine.model.reference_decoder import ReferenceDecoder
from engine.model.triton_decoder import TritonDecoder
from engine.model.weights import load_decoder
from engine.request import Request, SamplingParams
from engine.runner.eager_forward import EagerForward
from engine.runner.graph_forward import GraphForward
from tests.tiny_models import write_tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1, "vocab_size": 77},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 20},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_attention_heads": 2, "head_dim": 40},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
}
LIMITS = SchedulerConfig(max_num_seqs=4, token_budget=40, max_model_len=128)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def forwards(
    path: Path,
    device: str,
    dtype: torch.dtype,
    quantization: Quantization = Quantization.NONE,
    cache_dtype: KVCacheDType = KVCacheDType.AUTO,
) -> tuple[EagerForward, GraphForward]:
    checkpoint = open_checkpoint(path)
    where = torch.device(device)

    def kv_cache() -> KVCache:
        cache = KVCache(checkpoint.config, 30, 16, dtype, where, cache_dtype)
        if cache._scales is not None:
            cache._scales[:, :, 1:].fill_(float("nan"))
        else:
            cache._data[:, :, 1:].fill_(float("nan"))
        return cache

    def ignore(_done: int, _total: int) -> None: ...

    reference = load_decoder(ReferenceDecoder, checkpoint, where, dtype, LIMITS.max_model_len, ignore, quantization)
    decoder = load_decoder(TritonDecoder, checkpoint, where, dtype, LIMITS.max_model_len, ignore, quantization)
    return EagerForward(reference, kv_cache()), GraphForward(decoder, kv_cache, LIMITS)


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for index, length in enumerate((35, 3, 17)):
        prompt = torch.randint(0, 77, (length,), generator=generator).tolist()
        request = Request(str(index), prompt, SamplingParams(seed=1))
        request.block_table = [*range(1 + 4 * index, 5 + 4 * index)]
        made.append(request)
    return made


def steps(made: list[Request]) -> list[list[ScheduledChunk]]:
    """A whole prefill, prefills in chunks beside it, then decodes. Each step's outcome is teacher-forced."""
    first, second, third = made
    return [
        [ScheduledChunk(first, 0, 35), ScheduledChunk(second, 0, 3)],
        [ScheduledChunk(third, 0, 1), ScheduledChunk(second, 2, 1)],
        [ScheduledChunk(third, 1, 15), ScheduledChunk(first, 34, 1)],
        [ScheduledChunk(third, 16, 1), ScheduledChunk(first, 34, 1), ScheduledChunk(second, 2, 1)],
        [ScheduledChunk(second, 2, 1)],
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_reference(name: str, dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    if device == "cpu" and dtype is torch.bfloat16 and name != "llama":
        pytest.skip("one model in bfloat16 is enough for the interpreter")
    reference, kernels = forwards(write_tiny_model(tmp_path, **MODELS[name]), device, dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for _ in range(1 if device == "cpu" else 3):  # the first step of a bucket runs, the second is captured
        for chunks in steps(requests()):
            expected, actual = reference.launch(chunks).logits, kernels.launch(chunks).logits.clone()
            assert torch.isfinite(actual).all()
            assert (actual - expected).norm() / expected.norm() < tolerance
            sampling = [chunk for chunk in chunks if chunk.samples]
            for chunk, row in zip(sampling, actual, strict=True):
                key = (chunk.request.request_id, chunk.stop)
                before = seen.setdefault(key, row)
                if device == "cuda":  # the interpreter's products are numpy's, whose order depends on the shape
                    assert torch.equal(before, row), "prefilled, decoded and replayed: the same bits"
    assert len(seen) == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "quantization", "cache_dtype"),
    [
        ("llama", Quantization.INT8, KVCacheDType.AUTO),
        ("llama", Quantization.W8A8, KVCacheDType.AUTO),
        ("llama", Quantization.NONE, KVCacheDType.INT8),
        ("tied", Quantization.INT8, KVCacheDType.INT8),
        ("qwen3", Quantization.W8A8, KVCacheDType.INT8),
    ],
)
def test_formats_equal_the_reference(
    name: str,
    quantization: Quantization,
    cache_dtype: KVCacheDType,
    dtype: torch.dtype,
    device: str,
    tmp_path: Path,
) -> None:
    """int8 weights, int8 rows, an int8 cache. Rounding to int8 turns an ulp of difference into a step of it."""
    if dtype is torch.float32 and cache_dtype is KVCacheDType.INT8:
        pytest.skip("an int8 cache is for models of 16 bits")
    if device == "cpu" and dtype is torch.float32:
        pytest.skip("the interpreter is slow: bfloat16, which takes both ways through a product, is enough for it")
    model = dict(MODELS[name])
    if device == "cpu" and name == "llama":  # what one layer hands the next is tested with the others
        model["num_hidden_layers"] = 1
    reference, kernels = forwards(write_tiny_model(tmp_path, **model), device, dtype, quantization, cache_dtype)
    rounds = quantization is Quantization.W8A8 or cache_dtype is KVCacheDType.INT8
    tolerance = 3e-2 if rounds or dtype is torch.bfloat16 else 1e-5
    for _ in range(1 if device == "cpu" else 3):
        for chunks in steps(requests()):
            expected, actual = reference.launch(chunks).logits, kernels.launch(chunks).logits.clone()
            assert (actual - expected).norm() / expected.norm() < tolerance


def test_block_tables_follow_their_requests(tmp_path: Path) -> None:
    """More requests than rows, blocks that change with a preemption."""
    reference, kernels = forwards(write_tiny_model(tmp_path, num_hidden_layers=1), "cpu", torch.float32)
    for index in range(5):
        request = Request(str(index), [index + 1] * 18, SamplingParams(seed=1))
        request.block_table = [1 + index, 20 - index]
        for _ in range(2):
            chunks = [ScheduledChunk(request, 0, 18)]
            assert torch.allclose(kernels.launch(chunks).logits, reference.launch(chunks).logits, atol=1e-4)
            request.block_table = [25, 26]
            request.num_preemptions += 1
