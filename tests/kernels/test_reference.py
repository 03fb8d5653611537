"""The reference operators against independent formulations, on poisoned caches."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from engine.kernels.attention_plan import ChunkRows, plan_attention
from engine.kernels.reference import paged_attention, rms_norm, silu_mul, store_kv

CPU = torch.device("cpu")
NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_their_neighbours(dtype: torch.dtype) -> None:
    """Awkward widths: tails of vectors are where the bits would differ."""
    for width in (61, 144, 576, 1000):
        x = torch.randn(24, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype)
        weight = torch.randn(2 * width)
        for rows in (slice(0, 1), slice(3, 4), slice(5, 21), slice(23, 24)):
            assert torch.equal(rms_norm(x[rows], weight, 1e-5), rms_norm(x, weight, 1e-5)[rows])
            assert torch.equal(silu_mul(x[rows]), silu_mul(x)[rows])


def test_silu_mul_is_swiglu() -> None:
    x = torch.randn(5, 34) * 4
    gate, up = x.chunk(2, -1)
    assert torch.allclose(silu_mul(x), F.silu(gate) * up, atol=1e-5)
    assert torch.equal(silu_mul(torch.tensor([[-200.0, 1.0]])), torch.tensor([[-0.0]]))


def scatter(lengths: list[int], block_size: int, heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Keys and values of several contexts in a shuffled cache full of NaN; returns caches, tables, k and v."""
    per_request = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(per_request) + 3) + 1
    tables = [[int(b) for b in part] for part in order[: sum(per_request)].split(per_request)]
    caches = torch.full((2, len(order) + 1, block_size, heads, head_dim), NAN)
    caches[:, 0] = 0.0  # the null block
    keys = [torch.randn(length, heads, head_dim) for length in lengths]
    values = [torch.randn(length, heads, head_dim) for length in lengths]
    for table, k, v in zip(tables, keys, values, strict=True):
        slots = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(len(k))])
        store_kv(k, v, caches[0], caches[1], slots)
    return caches[0], caches[1], tables, keys, values


@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize(
    ("block_size", "head_dim", "heads", "kv_heads"), [(2, 80, 3, 3), (16, 60, 6, 2), (512, 64, 4, 1)]
)
def test_attention_equals_torch(window: int | None, block_size: int, head_dim: int, heads: int, kv_heads: int) -> None:
    torch.manual_seed(block_size)
    lengths = [1, 17, 256, 257, 600, 301, 2]
    queries = [1, 17, 1, 1, 63, 300, 1]  # of each context, at its end
    k_cache, v_cache, tables, keys, values = scatter(lengths, block_size, kv_heads, head_dim)
    q = torch.randn(sum(queries) + 5, heads, head_dim)
    chunks, start = [], 0
    for table, length, count in zip(tables, lengths, queries, strict=True):
        chunks.append(ChunkRows(start, count, length - count, table))
        start += count
    plan = plan_attention(chunks, block_size, heads // kv_heads, window, CPU)
    scale = head_dim**-0.5
    out = paged_attention(q, k_cache, v_cache, plan, scale)
    for chunk, k, v in zip(chunks, keys, values, strict=True):
        position = torch.arange(chunk.first_position, chunk.context_len)[:, None]
        key = torch.arange(chunk.context_len)
        mask = (key <= position) & (key > position - (window or 10_000))
        rows = slice(chunk.row_start, chunk.row_start + chunk.num_rows)
        expected = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1),
            k.transpose(0, 1).repeat_interleave(heads // kv_heads, 0),
            v.transpose(0, 1).repeat_interleave(heads // kv_heads, 0),
            attn_mask=mask,
            scale=scale,
        )
        assert torch.allclose(out[rows], expected.transpose(0, 1), atol=2e-5)
    assert torch.equal(out[start:], torch.zeros(5, heads, head_dim))


def test_attention_does_not_depend_on_the_cut() -> None:
    torch.manual_seed(0)
    k_cache, v_cache, tables, _, _ = scatter([700], 16, 2, 32)
    q = torch.randn(700, 4, 32)
    for window in (None, 100):
        whole = paged_attention(
            q, k_cache, v_cache, plan_attention([ChunkRows(0, 700, 0, tables[0])], 16, 2, window, CPU), 0.2
        )
        for size, stride in ((1, 37), (3, 41), (130, 130), (256, 256)):
            for first in range(0, 700, stride):
                count = min(size, 700 - first)
                plan = plan_attention([ChunkRows(0, count, first, tables[0])], 16, 2, window, CPU)
                part = paged_attention(q[first : first + count], k_cache, v_cache, plan, 0.2)
                assert torch.equal(part, whole[first : first + count])
