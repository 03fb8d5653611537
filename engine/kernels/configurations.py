"""Tile shapes of the product kernels by number of rows: a checked-in table, never tuned while serving.

None of these numbers may change a bit of a result: the order along K is the same for all of them. An entry enters
only after `benchmarks.kernels` found its bits equal to the reference configuration's on the card.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

# norm_qkv_head_norm_rope: norm_qkv_rope of a model with norms of its own for queries and keys; a tile is a head there.
Kernel = Literal[
    "norm_qkv_rope", "norm_qkv_head_norm_rope", "product_residual", "norm_gate_up_silu", "norm_logits"
]  # fmt: skip
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
BUCKETS = (1, 16, 32, 64, 128)  # rows; the last one serves all larger numbers, in several row tiles


@dataclass(frozen=True)
class Configuration:
    """How a product is cut and launched.

    block_m: weight rows of a tile, at least 16; 64 and more use Hopper's warpgroup products.
    block_n: rows of activations of a tile. block_k: features of one step along K.
    preload: weight tiles (0 to 2) that are read into registers before the wait for the kernel ahead.
    prefetch: ask for the CTA's whole weight slab in L2 before the wait.
    fuse_norm: normalise in this kernel, every CTA for itself: one launch less, but each CTA reads the rows once more
    and converts them; otherwise a small kernel ahead does it once. Kernels without a norm ignore it.
    one_row: hold one row in registers and broadcast it, instead of a tile of mostly absent rows; needs rows = 1.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    preload: int = 1
    prefetch: bool = False
    fuse_norm: bool = True
    one_row: bool = False


# The bits of every other configuration are compared with this one's.
REFERENCE = Configuration(64, 64, 64, 4, 3, preload=0, fuse_norm=False)

# The fastest of a sweep over TinyLlama's shapes on one H100 80GB (benchmarks/results/kernels-tinyllama-h100-*.json).
# Guesses that nobody has timed: the entries with a head norm, and norm_logits at 16, 32 and 128.
_BY_BUCKET: dict[tuple[Kernel, int], Configuration] = {
    ("norm_qkv_rope", 1): Configuration(32, 16, 256, 4, 3, one_row=True),
    ("norm_qkv_rope", 16): Configuration(32, 16, 256, 4, 6, prefetch=True, fuse_norm=False),
    ("norm_qkv_rope", 32): Configuration(64, 32, 128, 4, 6, preload=0, fuse_norm=False),
    ("norm_qkv_rope", 64): Configuration(64, 64, 128, 4, 4, fuse_norm=False),
    ("norm_qkv_rope", 128): Configuration(64, 128, 128, 4, 3, preload=0, fuse_norm=False),
    ("norm_qkv_head_norm_rope", 1): Configuration(128, 16, 64, 4, 5, one_row=True),
    ("norm_qkv_head_norm_rope", 16): Configuration(128, 16, 64, 4, 5),
    ("norm_qkv_head_norm_rope", 32): Configuration(128, 32, 64, 4, 5, fuse_norm=False),
    ("norm_qkv_head_norm_rope", 64): Configuration(128, 64, 64, 8, 4, fuse_norm=False),
    ("norm_qkv_head_norm_rope", 128): Configuration(128, 64, 64, 8, 4, preload=0, fuse_norm=False),
    ("product_residual", 1): Configuration(64, 16, 128, 4, 6, preload=0),
    ("product_residual", 16): Configuration(64, 16, 128, 4, 6, preload=0),
    ("product_residual", 32): Configuration(64, 32, 128, 4, 6),
    ("product_residual", 64): Configuration(64, 64, 128, 4, 4),
    ("product_residual", 128): Configuration(64, 128, 128, 4, 3, preload=0),
    ("norm_gate_up_silu", 1): Configuration(32, 16, 256, 4, 3, one_row=True),
    ("norm_gate_up_silu", 16): Configuration(64, 16, 128, 4, 4, preload=2),
    ("norm_gate_up_silu", 32): Configuration(64, 32, 128, 4, 3, preload=2, fuse_norm=False),
    ("norm_gate_up_silu", 64): Configuration(128, 64, 64, 8, 6, preload=2, fuse_norm=False),
    ("norm_gate_up_silu", 128): Configuration(64, 128, 64, 4, 3, preload=0, fuse_norm=False),
    ("norm_logits", 1): Configuration(64, 16, 128, 4, 3, preload=2, one_row=True),
    ("norm_logits", 16): Configuration(64, 16, 128, 4, 5),
    ("norm_logits", 32): Configuration(64, 32, 128, 4, 5, fuse_norm=False),
    ("norm_logits", 64): Configuration(128, 64, 64, 8, 3, preload=2, fuse_norm=False),
    ("norm_logits", 128): Configuration(128, 128, 64, 8, 4, preload=0, fuse_norm=False),
}

# (kernel, bucket, out_features, in_features): shapes that were tuned on their own go before the bucket's entry.
_BY_SHAPE: dict[tuple[Kernel, int, int, int], Configuration] = {}


def row_bucket(rows: int) -> int:
    """The smallest bucket that holds `rows`, or the largest of all."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), BUCKETS[-1])


def configuration_for(kernel: Kernel, rows: int, out_features: int, in_features: int) -> Configuration:
    """The table's entry for a product of `rows` rows with a weight [out_features, in_features]."""
    bucket = row_bucket(rows)
    tuned = _BY_SHAPE.get((kernel, bucket, out_features, in_features))
    return tuned or _fitted(_BY_BUCKET[kernel, bucket], in_features)


def _fitted(configuration: Configuration, in_features: int) -> Configuration:
    """Steps along K that leave little or no remainder, and more of them under way."""
    while in_features % configuration.block_k and configuration.block_k > 64:
        stages = min(8, 2 * configuration.num_stages)
        configuration = replace(configuration, block_k=configuration.block_k // 2, num_stages=stages)
    return configuration
