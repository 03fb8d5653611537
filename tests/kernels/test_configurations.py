"""The table of tile shapes: every entry can be launched, and every row order puts pairs together."""

from dataclasses import replace

import pytest
import torch

from benchmarks.shapes import SHAPES
from engine.kernels import configurations
from engine.kernels.configurations import (
    BUCKETS,
    KERNELS,
    MIN_BLOCK_N,
    MIN_STAGES,
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
from engine.kernels.shared_memory import product_bytes
from engine.kernels.target import GPU, aimed_at
from engine.precompile.gpus import GPUS

IN_FEATURES = [48, 96, 320, 576, 960, 1024, 1536, 2048, 4096, 5632, 14336]
ALL_ROWS = sorted({1, 2, 2048, *BUCKETS, *(bucket + 1 for bucket in BUCKETS)})
# Of weights: dtype, a copy for few rows or not, and whether rows are rounded to int8 too.
FORMATS = [
    (torch.bfloat16, True, False),
    (torch.bfloat16, False, False),
    (torch.float16, True, False),
    (torch.float32, False, False),
    (torch.int8, True, False),
    (torch.int8, False, False),
    (torch.int8, False, True),
]


def matrix(
    in_features: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    packed: bool = True,
    rounds_inputs: bool = False,
    out_features: int = 16,
) -> Matrix:
    rows = torch.empty(out_features, in_features, dtype=dtype, device="meta")
    scales = torch.empty(out_features, device="meta") if dtype == torch.int8 else None
    return Matrix(rows, rows.flatten() if packed else None, scales, rounds_inputs)


def products(weight_format: tuple[torch.dtype, bool, bool]) -> list[tuple[Kernel, Matrix]]:
    """Of every shape that is measured, and of other widths."""
    found: list[tuple[Kernel, int, int]] = [(kernel, 16, width) for kernel in KERNELS for width in IN_FEATURES]
    for model in SHAPES.values():
        heads = model.num_heads * model.head_dim
        qkv = heads + 2 * model.num_kv_heads * model.head_dim
        found += [
            ("norm_qkv_rope", qkv, model.hidden_size),
            ("norm_qkv_head_norm_rope", qkv, model.hidden_size),
            ("product_residual", model.hidden_size, heads),
            ("norm_gate_up_silu", 2 * model.intermediate_size, model.hidden_size),
            ("product_residual", model.hidden_size, model.intermediate_size),
            ("norm_logits", model.vocab_size, model.hidden_size),
        ]
    dtype, packed, rounds = weight_format
    return [
        (kernel, matrix(width, dtype, packed=packed, rounds_inputs=rounds, out_features=outputs))
        for kernel, outputs, width in found
    ]


def taken_bytes(entry: ManyRows, weight: Matrix, gpu: GPU) -> int:
    return product_bytes(weight, gpu, entry.block_m, entry.block_n, entry.block_k, entry.num_stages)


def check(entry: configurations.Configuration, rows: int, weight: Matrix) -> None:
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
        assert taken_bytes(entry, weight, GPUS["h100"].gpu) <= GPUS["h100"].gpu.shared_bytes


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("in_features", IN_FEATURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("packed", [True, False])
def test_every_entry_fits(kernel: Kernel, in_features: int, dtype: torch.dtype, packed: bool) -> None:
    weight = matrix(in_features, dtype, packed=packed)
    for rows in ALL_ROWS:
        entry = configuration_for(kernel, rows, weight)
        assert fitted(entry, rows, weight) == entry
        check(entry, rows, weight)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("in_features", [576, 2048, 5632])
def test_every_entry_fits_with_float32(kernel: Kernel, in_features: int) -> None:
    weight = matrix(in_features, torch.float32, packed=False)
    for rows in ALL_ROWS:
        check(configuration_for(kernel, rows, weight), rows, weight)


def test_shapes_of_their_own_fit() -> None:
    for kernel, bucket, outputs, in_features in configurations._BY_SHAPE:
        rows = torch.empty(outputs, in_features, dtype=torch.bfloat16, device="meta")
        weight = Matrix(rows, rows.flatten())
        entry = configuration_for(kernel, bucket, weight)
        assert entry == fitted(configurations._BY_SHAPE[kernel, bucket, outputs, in_features], bucket, weight)
        check(entry, bucket, weight)


def test_fitted_goes_no_further_than_it_must() -> None:
    assert fitted(FewRows(16, 2), 1, matrix(2048)) == FewRows(16, 2)
    assert fitted(FewRows(16, 2), 1, matrix(5632)) == FewRows(16, 2)  # a slice is 44 steps: the last turn has 12
    assert fitted(FewRows(16, 2), 1, matrix(576)) == FewRows(8, 2)  # 12 steps
    assert fitted(FewRows(16, 2), 1, matrix(96)) == FewRows(4, 1)
    assert fitted(ManyRows(64, 64, 256, 4, 3), 64, matrix(2048)) == ManyRows(64, 64, 256, 4, 3)
    assert fitted(ManyRows(64, 64, 256, 4, 3), 64, matrix(576)) == ManyRows(64, 64, 64, 4, 8)
    assert fitted(ManyRows(64, 64, 64, 4, 3), 16, matrix(2048)) == ManyRows(64, 16, 64, 4, 3)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("gpu", ["h100", "h200", "a100"])
def test_large_gpus_have_what_the_table_says(gpu: str, weight_format: tuple[torch.dtype, bool, bool]) -> None:
    for kernel, weight in products(weight_format):
        for rows in ALL_ROWS:
            entry = configuration_for(kernel, rows, weight)
            with aimed_at(GPUS[gpu].gpu):
                assert configuration_for(kernel, rows, weight) == entry


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("gpu", GPUS)
def test_every_entry_has_room_on_every_gpu(gpu: str, weight_format: tuple[torch.dtype, bool, bool]) -> None:
    target = GPUS[gpu].gpu
    for kernel, weight in products(weight_format):
        for rows in ALL_ROWS:
            entry = configuration_for(kernel, rows, weight)
            with aimed_at(target):
                smaller = configuration_for(kernel, rows, weight)
                assert fitted(smaller, rows, weight) == smaller
            if isinstance(entry, FewRows):
                assert smaller == entry
                continue
            assert isinstance(smaller, ManyRows)
            assert taken_bytes(smaller, weight, target) <= target.shared_bytes
            # Whatever else is in an entry, none of it changes; and no more changes than has to.
            assert smaller == replace(entry, block_n=smaller.block_n, num_stages=smaller.num_stages)
            assert MIN_STAGES <= smaller.num_stages <= entry.num_stages
            if smaller.num_stages < entry.num_stages:
                more = replace(smaller, num_stages=smaller.num_stages + 1)
                assert taken_bytes(more, weight, target) > target.shared_bytes
            if smaller.block_n < entry.block_n:
                wider = replace(smaller, block_n=2 * smaller.block_n, num_stages=MIN_STAGES)
                assert taken_bytes(wider, weight, target) > target.shared_bytes


def test_stages_go_before_rows() -> None:
    weight, converted = matrix(2048), matrix(2048, torch.int8)
    with aimed_at(GPUS["l4"].gpu):
        assert fitted(ManyRows(64, 16, 256, 4, 4), 32, weight) == ManyRows(64, 16, 256, 4, 3)
        assert fitted(ManyRows(64, 16, 256, 4, 4), 32, converted) == ManyRows(64, 16, 256, 4, 3)
        assert fitted(ManyRows(128, 128, 128, 8, 3), 512, weight) == ManyRows(128, 128, 128, 8, 2)
        assert fitted(ManyRows(128, 128, 256, 8, 3), 512, weight) == ManyRows(128, 64, 256, 8, 2)
        # A tile is one head of 256 here, whatever the entry says of weight rows.
        assert fitted(ManyRows(128, 128, 64, 8, 4), 512, weight, block_m=256) == ManyRows(128, 64, 64, 8, 3)
        # There is nothing smaller than this, and it still does not fit.
        assert fitted(ManyRows(512, 32, 256, 8, 3), 512, weight) == ManyRows(512, MIN_BLOCK_N, 256, 8, MIN_STAGES)


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
