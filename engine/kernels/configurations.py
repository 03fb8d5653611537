"""Tile shapes of the product kernels by number of rows: a checked-in table, never tuned while serving.

None of these numbers may change a bit of a result: the order along K is the same for all of them. An entry enters
only after `benchmarks.kernels` found its bits equal to the reference configuration's on the card.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from engine.kernels.matrix import Matrix, slice_features

# norm_qkv_head_norm_rope: norm_qkv_rope of a model with norms of its own for queries and keys; a tile is a head there.
Kernel = Literal[
    "norm_qkv_rope", "norm_qkv_head_norm_rope", "product_residual", "norm_gate_up_silu", "norm_logits"
]  # fmt: skip
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512)  # rows; the last one serves all larger numbers, in several row tiles
MAX_FEW_ROWS = 16


@dataclass(frozen=True)
class FewRows:
    """How `product_few_rows` is cut. The rows are one tile.

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

# (kernel, bucket, out_features, in_features): shapes that were tuned on their own go before the bucket's entry.
_BY_SHAPE: dict[tuple[Kernel, int, int, int], Configuration] = {}


def row_bucket(rows: int) -> int:
    """The smallest bucket that holds `rows`, or the largest of all."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), BUCKETS[-1])


def configuration_for(kernel: Kernel, rows: int, matrix: Matrix) -> Configuration:
    """The table's entry for a product of `rows` rows with a weight."""
    bucket = row_bucket(rows)
    if matrix.packed is None and bucket <= MAX_FEW_ROWS:
        bucket = 32
    tuned = _BY_SHAPE.get((kernel, bucket, matrix.out_features, matrix.in_features))
    return fitted(tuned or _TABLE[kernel, bucket], rows, matrix)


def fitted(configuration: Configuration, rows: int, matrix: Matrix) -> Configuration:
    """Steps along K that divide a slice; a tile of 16 rows where no more are there."""
    width = slice_features(matrix.in_features)
    if isinstance(configuration, FewRows):
        steps = configuration.steps
        while width % (16 * steps):
            steps //= 2
        return replace(configuration, steps=steps, preload=min(configuration.preload, width // (16 * steps)))
    while width % configuration.block_k:
        stages = min(8, 2 * configuration.num_stages)
        configuration = replace(configuration, block_k=configuration.block_k // 2, num_stages=stages)
    return replace(configuration, block_n=16) if rows <= 16 < configuration.block_n else configuration
