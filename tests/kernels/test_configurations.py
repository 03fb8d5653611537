"""The table of tile shapes: every entry can be launched, and every row order puts pairs together."""

import pytest
import torch

from engine.kernels.configurations import BUCKETS, KERNELS, Kernel, configuration_for, row_bucket
from engine.kernels.norm_gate_up_silu import gate_up_row_order
from engine.kernels.norm_qkv_rope import qkv_row_order
from engine.kernels.pair_order import pair_group

SHARED_MEMORY_BYTES = 227 * 1024  # of one CTA on an H100


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("in_features", [576, 960, 1024, 1536, 2048, 4096, 5632, 14336])
def test_every_entry_fits(kernel: Kernel, in_features: int) -> None:
    for rows in (1, 2, 16, 17, 32, 33, 64, 65, 128, 129, 2048):
        entry = configuration_for(kernel, rows, 2048, in_features)
        assert entry.block_m in (16, 32, 64, 128)
        assert entry.block_n in (16, 32, 64, 128)
        assert rows <= entry.block_n or rows > BUCKETS[-2]
        assert entry.num_warps in (1, 2, 4, 8)
        assert entry.preload in (0, 1, 2)
        assert not entry.one_row or rows == 1
        assert in_features % entry.block_k == 0
        # bfloat16 tiles of both operands in every stage
        assert (entry.block_m + entry.block_n) * entry.block_k * 2 * entry.num_stages <= SHARED_MEMORY_BYTES


def test_buckets() -> None:
    assert [row_bucket(rows) for rows in (1, 2, 16, 17, 64, 65, 128, 5000)] == [1, 16, 16, 32, 64, 128, 128, 128]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 64), (2, 2, 80), (1, 1, 20), (1, 1, 6)])
def test_pairs_share_a_tile(heads: int, kv_heads: int, head_dim: int) -> None:
    order = qkv_row_order(heads, kv_heads, head_dim)
    assert torch.equal(order.sort().values, torch.arange((heads + 2 * kv_heads) * head_dim))
    group = pair_group(head_dim // 2)
    for tile in order.view(-1, 2, group):
        assert torch.equal(tile[0] + head_dim // 2, tile[1])
        assert tile[0, 0] // head_dim == tile[1, -1] // head_dim


def test_gate_and_up_share_a_tile() -> None:
    for ffn in (16, 37, 44):
        order = gate_up_row_order(ffn)
        assert torch.equal(order.sort().values, torch.arange(2 * ffn))
        for tile in order.view(-1, 2, pair_group(ffn)):
            assert torch.equal(tile[0] + ffn, tile[1])
