"""The KV cache in both of its formats."""

from dataclasses import replace

import pytest
import torch

from engine.config import CacheConfig, KVCacheDType, SchedulerConfig
from engine.kernels.attention_plan import ChunkRows, plan_attention
from engine.kernels.reference import paged_attention, store_kv
from engine.model.kv_cache import KVCache, kv_bytes_per_block
from engine.runner.memory import plan_num_blocks
from tests.quantize.test_int8_weight import LLAMA

CPU = torch.device("cpu")
INT8 = KVCacheDType.INT8


def make_cache(cache_dtype: KVCacheDType = INT8) -> KVCache:
    cache = KVCache(LLAMA, 9, 16, torch.bfloat16, CPU, cache_dtype)
    if cache._scales is None:
        cache._data[:, :, 1:].fill_(float("nan"))
    else:
        cache._data[:, :, 1:].fill_(77)
        cache._scales[:, :, 1:].fill_(float("nan"))
    return cache


@pytest.mark.parametrize("cache_dtype", KVCacheDType)
def test_layout_and_size(cache_dtype: KVCacheDType) -> None:
    cache = make_cache(cache_dtype)
    keys, values = cache.layer(1)
    tensors = [keys, values]
    assert keys.shape == values.shape == (9, 16, LLAMA.num_kv_heads, LLAMA.head_dim)
    if scales := cache.scales(1):
        assert scales[0].shape == scales[1].shape == keys.shape[:-1]
        assert keys.dtype is torch.int8
        tensors += scales
    assert (scales is None) == (cache_dtype is KVCacheDType.AUTO)
    assert all(not tensor[0].any() for tensor in tensors), "the null block"
    in_all = LLAMA.num_layers * sum(tensor.nbytes for tensor in tensors)
    assert 9 * kv_bytes_per_block(LLAMA, 16, torch.bfloat16, cache_dtype) == in_all


def test_int8_holds_nearly_twice_as_much() -> None:
    """At a head of 64: 68 bytes in place of 128."""

    def blocks(cache_dtype: KVCacheDType) -> int:
        cache = CacheConfig(memory_bytes=10_000_000, dtype=cache_dtype)
        model = replace(LLAMA, head_dim=64)
        return plan_num_blocks(model, cache, SchedulerConfig(max_model_len=1000), torch.bfloat16, CPU)

    assert blocks(INT8) == pytest.approx(blocks(KVCacheDType.AUTO) * 128 / 68, rel=1e-2)


def test_stored_values_are_rounded_a_head_of_a_token() -> None:
    cache = make_cache()
    (keys, values), scales = cache.layer(0), cache.scales(0)
    assert scales is not None
    k, v = torch.randn(2, 3, LLAMA.num_kv_heads, LLAMA.head_dim).to(torch.bfloat16)
    k[1, 0] *= 1000
    v[2, 1] = 0
    slots = torch.tensor([17, 90, 33])
    store_kv(k, v, keys, values, slots, scales)
    for given, stored, scale in ((k, keys, scales[0]), (v, values, scales[1])):
        stored, scale = stored.flatten(0, 1)[slots], scale.flatten(0, 1)[slots]
        largest = given.float().abs().amax(-1)
        assert torch.equal(scale, torch.where(largest == 0, 1.0, largest / 127))
        assert torch.equal(stored, torch.round(given.float() / scale[..., None]).to(torch.int8))
    untouched = [slot for slot in range(16, 9 * 16) if slot not in (17, 90, 33)]
    assert scales[0].flatten(0, 1)[untouched].isnan().all()


def test_attention_reads_what_is_stored() -> None:
    """The same as attention over a cache of the dequantised values, whatever lies around them."""
    cache = make_cache()
    (keys, values), scales = cache.layer(1), cache.scales(1)
    assert scales is not None
    table, length = [3, 8, 5], 41
    slots = torch.tensor([table[p // 16] * 16 + p % 16 for p in range(length)])
    k, v = torch.randn(2, length, LLAMA.num_kv_heads, LLAMA.head_dim)
    store_kv(k, v, keys, values, slots, scales)
    plan = plan_attention([ChunkRows(0, 7, length - 7, table), ChunkRows(7, 1, 20, table)], 16, 2, None, CPU)
    q = torch.randn(8, LLAMA.num_heads, LLAMA.head_dim)
    ours = paged_attention(q, keys, values, plan, 0.25, scales)
    wide = [torch.nan_to_num(data * scale[..., None]) for data, scale in zip((keys, values), scales, strict=True)]
    assert torch.equal(ours, paged_attention(q, *wide, plan, 0.25))
    exact = torch.zeros(2, 9, 16, LLAMA.num_kv_heads, LLAMA.head_dim)
    store_kv(k, v, exact[0], exact[1], slots)
    unrounded = paged_attention(q, exact[0], exact[1], plan, 0.25)
    assert 1e-4 < (ours - unrounded).norm() / unrounded.norm() < 0.02
