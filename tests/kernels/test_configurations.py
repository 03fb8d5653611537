"""The table of tile shapes: every entry can be launched, and every row order puts pairs together."""

import pytest
import torch

from engine.kernels import configurations
from engine.kernels.configurations import (
    BUCKETS,
    KERNELS,
    FewRows,
    Kernel,
    ManyRows,
    configuration_for,
    fitted,
    row_bucket,
)
from engine.kernels.matrix import Matrix, slice_features
from engine.kernels.norm_gate_up_silu import gate_up_row_order
from engine.kernels.norm_qkv_rope import qkv_row_order
from engine.kernels.pair_order import pair_group

SHARED_MEMORY_BYTES = 227 * 1024  # of one CTA on an H100
IN_FEATURES = [48, 96, 320, 576, 960, 1024, 1536, 2048, 4096, 5632, 14336]
ALL_ROWS = sorted({1, 2, 2048, *BUCKETS, *(bucket + 1 for bucket in BUCKETS)})


def matrix(in_features: int, dtype: torch.dtype = torch.bfloat16, *, packed: bool = True) -> Matrix:
    rows = torch.empty(16, in_features, dtype=dtype, device="meta")
    scales = torch.empty(16, device="meta") if dtype == torch.int8 else None
    return Matrix(rows, rows.flatten() if packed else None, scales)


def check(entry: configurations.Configuration, rows: int, weight: Matrix, activation_bytes: int) -> None:
    """An entry can serve so many rows on an H100."""
    width = slice_features(weight.in_features)
    if isinstance(entry, FewRows):
        assert weight.packed is not None
        assert rows <= 64
        assert entry.steps in (4, 8, 16)
        assert entry.preload in (1, 2)
        assert (entry.preload - 1) * 16 * entry.steps < width
    else:
        assert entry.block_m in (16, 32, 64, 128)
        assert entry.block_n in (16, 32, 64, 128)
        assert entry.block_n <= max(16, row_bucket(rows))
        assert entry.num_warps in (4, 8)
        assert width % entry.block_k == 0
        row_bytes = entry.block_m * weight.rows.element_size() + entry.block_n * activation_bytes
        assert row_bytes * entry.block_k * entry.num_stages <= SHARED_MEMORY_BYTES


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("in_features", IN_FEATURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("packed", [True, False])
def test_every_entry_fits(kernel: Kernel, in_features: int, dtype: torch.dtype, packed: bool) -> None:
    weight = matrix(in_features, dtype, packed=packed)
    for rows in ALL_ROWS:
        entry = configuration_for(kernel, rows, weight)
        assert fitted(entry, rows, weight) == entry
        check(entry, rows, weight, activation_bytes=2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("in_features", [576, 2048, 5632])
def test_every_entry_fits_with_float32(kernel: Kernel, in_features: int) -> None:
    weight = matrix(in_features, torch.float32, packed=False)
    for rows in ALL_ROWS:
        check(configuration_for(kernel, rows, weight), rows, weight, activation_bytes=4)


def test_shapes_of_their_own_fit() -> None:
    for kernel, bucket, outputs, in_features in configurations._BY_SHAPE:
        rows = torch.empty(outputs, in_features, dtype=torch.bfloat16, device="meta")
        weight = Matrix(rows, rows.flatten())
        entry = configuration_for(kernel, bucket, weight)
        assert entry == fitted(configurations._BY_SHAPE[kernel, bucket, outputs, in_features], bucket, weight)
        check(entry, bucket, weight, activation_bytes=2)


def test_fitted_goes_no_further_than_it_must() -> None:
    assert fitted(FewRows(16, 2), 1, matrix(2048)) == FewRows(16, 2)
    assert fitted(FewRows(16, 2), 1, matrix(5632)) == FewRows(16, 2)  # a slice is 44 steps: the last turn has 12
    assert fitted(FewRows(16, 2), 1, matrix(576)) == FewRows(8, 2)  # 12 steps
    assert fitted(FewRows(16, 2), 1, matrix(96)) == FewRows(4, 1)
    assert fitted(ManyRows(64, 64, 256, 4, 3), 64, matrix(2048)) == ManyRows(64, 64, 256, 4, 3)
    assert fitted(ManyRows(64, 64, 256, 4, 3), 64, matrix(576)) == ManyRows(64, 64, 64, 4, 8)
    assert fitted(ManyRows(64, 64, 64, 4, 3), 16, matrix(2048)) == ManyRows(64, 16, 64, 4, 3)


def test_a_shape_of_its_own_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configurations._BY_SHAPE, ("norm_logits", 8, 16, 2048), FewRows(4, 1))
    assert configuration_for("norm_logits", 5, matrix(2048)) == FewRows(4, 1)
    assert configuration_for("norm_logits", 5, matrix(3072)) == configurations._TABLE["norm_logits", 8]
    assert configuration_for("norm_logits", 9, matrix(2048)) == configurations._TABLE["norm_logits", 16]


def test_buckets() -> None:
    expected = {1: 1, 2: 8, 8: 8, 9: 16, 17: 32, 64: 64, 65: 128, 5000: 512}
    assert {rows: row_bucket(rows) for rows in expected} == expected


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
