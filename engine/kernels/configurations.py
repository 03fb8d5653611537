"""Tile shapes of the product kernels by number of rows: a checked-in table, never tuned while serving.

None of these numbers may change a bit of a result: the order along K is the same for all of them. An entry enters
only after `benchmarks.kernels` found its bits equal to the reference configuration's on the card. On a GPU with less
shared memory than an entry takes, it is used with fewer stages and, where that is not enough, smaller tiles of rows.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

import torch

from engine.kernels.matrix import Matrix, num_slices, slice_features
from engine.kernels.shared_memory import product_bytes
from engine.kernels.target import gpu_of

# norm_qkv_head_norm_rope: norm_qkv_rope of a model with norms of its own for queries and keys; a tile is a head there.
Kernel = Literal[
    "norm_qkv_rope", "norm_qkv_head_norm_rope", "product_residual", "norm_gate_up_silu", "norm_logits"
]  # fmt: skip
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512)  # rows; the last one serves all larger numbers, in several row tiles
MAX_FEW_ROWS = 16
MIN_BLOCK_N = 16
MIN_STAGES = 2  # with one, nothing is loaded ahead of its use


@dataclass(frozen=True)
class FewRows:
    """How `product_few_rows` is cut. Rows are tiles of 8, or of 16 if there are more than 8.

    steps: tensor-core steps (of 16 features of each slice) that a program has in registers for one turn: 4, 8 or 16.
    preload: turns whose weights are asked for before the wait for the kernel ahead, 1 or 2.
    """

    steps: int = 8
    preload: int = 2


@dataclass(frozen=True)
class ManyRows:
    """How `product_many_rows` is cut.

    block_m: weight rows of a tile, at least 16; 64 and more use Hopper's warpgroup products.
    block_n: rows of activations of a tile. block_k: features of one step along K.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


Configuration = FewRows | ManyRows

# The bits of every other configuration are compared with this one's.
REFERENCE = ManyRows(64, 64, 64, 4, 3)

# The fastest of a sweep over TinyLlama's shapes on one H100 80GB (benchmarks/results). Nobody has timed the entries
# with a head norm.
_TABLE: dict[tuple[Kernel, int], Configuration] = {
    ("norm_qkv_rope", 1): FewRows(8, 2),
    ("norm_qkv_rope", 8): FewRows(8, 2),
    ("norm_qkv_rope", 16): FewRows(16, 1),
    ("norm_qkv_rope", 32): ManyRows(64, 16, 256, 4, 4),
    ("norm_qkv_rope", 64): ManyRows(64, 32, 128, 4, 6),
    ("norm_qkv_rope", 128): ManyRows(64, 64, 128, 4, 4),
    ("norm_qkv_rope", 256): ManyRows(128, 64, 128, 8, 3),
    ("norm_qkv_rope", 512): ManyRows(128, 128, 128, 8, 3),
    ("norm_qkv_head_norm_rope", 1): FewRows(4, 1),
    ("norm_qkv_head_norm_rope", 8): FewRows(4, 1),
    ("norm_qkv_head_norm_rope", 16): ManyRows(128, 16, 64, 4, 5),
    ("norm_qkv_head_norm_rope", 32): ManyRows(128, 32, 64, 4, 5),
    ("norm_qkv_head_norm_rope", 64): ManyRows(128, 64, 64, 8, 4),
    ("norm_qkv_head_norm_rope", 128): ManyRows(128, 64, 64, 8, 4),
    ("norm_qkv_head_norm_rope", 256): ManyRows(128, 64, 64, 8, 4),
    ("norm_qkv_head_norm_rope", 512): ManyRows(128, 128, 64, 8, 4),
    ("product_residual", 1): FewRows(8, 2),
    ("product_residual", 8): FewRows(8, 2),
    ("product_residual", 16): FewRows(16, 1),
    ("product_residual", 32): ManyRows(64, 16, 256, 4, 4),
    ("product_residual", 64): ManyRows(64, 16, 128, 4, 6),
    ("product_residual", 128): ManyRows(64, 32, 128, 4, 6),
    ("product_residual", 256): ManyRows(64, 64, 128, 4, 4),
    ("product_residual", 512): ManyRows(128, 128, 64, 8, 4),
    ("norm_gate_up_silu", 1): FewRows(8, 2),
    ("norm_gate_up_silu", 8): FewRows(8, 2),
    ("norm_gate_up_silu", 16): FewRows(16, 1),
    ("norm_gate_up_silu", 32): ManyRows(64, 16, 128, 4, 3),
    ("norm_gate_up_silu", 64): ManyRows(64, 64, 128, 4, 3),
    ("norm_gate_up_silu", 128): ManyRows(64, 64, 64, 4, 4),
    ("norm_gate_up_silu", 256): ManyRows(128, 64, 64, 8, 4),
    ("norm_gate_up_silu", 512): ManyRows(128, 128, 64, 8, 4),
    ("norm_logits", 1): FewRows(8, 2),
    ("norm_logits", 8): FewRows(8, 2),
    ("norm_logits", 16): FewRows(4, 1),
    ("norm_logits", 32): ManyRows(64, 32, 128, 4, 4),
    ("norm_logits", 64): ManyRows(64, 64, 128, 4, 3),
    ("norm_logits", 128): ManyRows(64, 128, 64, 4, 4),
    ("norm_logits", 256): ManyRows(128, 128, 64, 8, 4),
    ("norm_logits", 512): ManyRows(128, 128, 64, 8, 4),
}

# Twice the bytes, and no tensor cores: for comparisons, not for speed.
_FLOAT32 = ManyRows(32, 32, 64, 4, 3)

# int8 weights that meet rows of 16 bits, in place of the entries above. Up to 64 rows several tiles of few rows beat a
# product that has to convert its weights for every tile of many.
_INT8: dict[tuple[Kernel, int], Configuration] = {
    ("norm_qkv_rope", 1): FewRows(16, 2),
    ("norm_qkv_rope", 8): FewRows(16, 2),
    ("norm_qkv_rope", 16): FewRows(8, 2),
    ("norm_qkv_rope", 32): FewRows(8, 1),
    ("norm_qkv_rope", 64): FewRows(4, 1),
    ("product_residual", 1): FewRows(16, 2),
    ("product_residual", 8): FewRows(16, 2),
    ("product_residual", 16): FewRows(16, 2),
    ("product_residual", 32): FewRows(8, 2),
    ("product_residual", 64): FewRows(4, 1),
    ("norm_gate_up_silu", 1): FewRows(16, 1),
    ("norm_gate_up_silu", 8): FewRows(16, 1),
    ("norm_gate_up_silu", 16): FewRows(8, 1),
    ("norm_gate_up_silu", 32): FewRows(4, 1),
    ("norm_gate_up_silu", 64): FewRows(4, 1),
    ("norm_logits", 1): FewRows(16, 1),
    ("norm_logits", 8): FewRows(16, 1),
    ("norm_logits", 16): FewRows(8, 1),
    ("norm_logits", 32): FewRows(4, 1),
    ("norm_logits", 64): FewRows(4, 1),
}

# (kernel, bucket, out_features, in_features): shapes that were tuned on their own go before the bucket's entry.
_BY_SHAPE: dict[tuple[Kernel, int, int, int], Configuration] = {
    # TinyLlama-1.1B
    ("product_residual", 32, 2048, 2048): FewRows(8, 1),
    # SmolLM2-135M
    ("norm_qkv_rope", 32, 960, 576): ManyRows(32, 16, 64, 4, 8),
    ("norm_qkv_rope", 256, 960, 576): ManyRows(64, 64, 64, 4, 8),
    ("product_residual", 32, 576, 576): ManyRows(64, 16, 64, 4, 6),
    ("product_residual", 256, 576, 576): ManyRows(64, 64, 64, 4, 4),
    ("norm_gate_up_silu", 32, 3072, 576): ManyRows(64, 32, 64, 4, 4),
    ("norm_gate_up_silu", 256, 3072, 576): ManyRows(128, 64, 64, 8, 6),
    ("product_residual", 32, 576, 1536): ManyRows(64, 16, 128, 4, 6),
    ("product_residual", 256, 576, 1536): ManyRows(64, 64, 128, 4, 4),
    ("norm_logits", 32, 49152, 576): ManyRows(64, 32, 64, 4, 4),
    ("norm_logits", 256, 49152, 576): ManyRows(128, 64, 64, 4, 3),
}


def row_bucket(rows: int) -> int:
    """The smallest bucket that holds `rows`, or the largest of all."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), BUCKETS[-1])


def configuration_for(kernel: Kernel, rows: int, matrix: Matrix) -> Configuration:
    """The table's entry for a product of `rows` rows with a weight."""
    if matrix.rows.dtype == torch.float32:
        return fitted(_FLOAT32, rows, matrix)
    bucket = row_bucket(rows)
    is_int8 = matrix.scales is not None and not matrix.rounds_inputs
    if is_int8 and matrix.packed is not None and (kernel, bucket) in _INT8:
        return fitted(_INT8[kernel, bucket], rows, matrix)
    shape = (matrix.out_features, matrix.in_features)
    configuration = _BY_SHAPE.get((kernel, bucket, *shape)) or _TABLE[kernel, bucket]
    while matrix.packed is None and isinstance(configuration, FewRows):
        bucket = BUCKETS[BUCKETS.index(bucket) + 1]
        configuration = _TABLE[kernel, bucket]
    return fitted(configuration, rows, matrix)


def fitted(
    configuration: Configuration,
    rows: int,
    matrix: Matrix,
    *,
    row_bytes: int | None = None,
    block_m: int | None = None,
) -> Configuration:
    """The same with steps along K that suit the slices, a tile of 16 rows where no more are there, and no more shared
    memory than the weight's GPU has. row_bytes: see `product_bytes`. block_m: weight rows of a tile, where the
    configuration does not say."""
    width = slice_features(matrix.in_features)
    if isinstance(configuration, FewRows):
        steps, preload = configuration.steps, configuration.preload
        while 16 * steps > width:
            steps //= 2
        if rows > 8 and num_slices(matrix.in_features) > 4:  # twice the warps leave half the registers
            steps, preload = min(steps, 8), 1
        return FewRows(steps, min(preload, -(-width // (16 * steps))))
    while width % configuration.block_k:
        stages = min(8, 2 * configuration.num_stages)
        configuration = replace(configuration, block_k=configuration.block_k // 2, num_stages=stages)
    if rows <= MIN_BLOCK_N:
        configuration = replace(configuration, block_n=MIN_BLOCK_N)
    return _with_room(configuration, matrix, block_m or configuration.block_m, row_bytes)


def _with_room(configuration: ManyRows, matrix: Matrix, block_m: int, row_bytes: int | None) -> ManyRows:
    """The same within the shared memory of the weight's GPU: with fewer stages, or else with smaller tiles of rows too.
    If nothing fits, what comes nearest: once it is compiled, Triton says what it lacks."""
    gpu = gpu_of(matrix.rows.device)
    if gpu is None:
        return configuration
    stages = range(configuration.num_stages, min(MIN_STAGES, configuration.num_stages) - 1, -1)
    tiles = (n for n in (128, 64, 32, MIN_BLOCK_N) if n <= configuration.block_n)
    tried = configuration
    for block_n, num_stages in product(tiles, stages):
        tried = replace(configuration, block_n=block_n, num_stages=num_stages)
        taken = product_bytes(matrix, gpu, block_m, block_n, tried.block_k, num_stages, row_bytes)
        if taken <= gpu.shared_bytes:
            break
    return tried
