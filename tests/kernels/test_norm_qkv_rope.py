"""Norm, QKV, head norms, RoPE and cache write: against the twin, on poisoned outputs and caches; exactly, where sums
are exact; a row keeps its bits.
"""

from dataclasses import dataclass

import pytest
import torch

from engine.kernels import reference
from engine.kernels.configurations import Configuration, FewRows
from engine.kernels.norm_qkv_rope import QKVWeights, norm_qkv_rope, qkv_row_order
from engine.kernels.pdl import INTERPRETED
from engine.kernels.reference import QKVProjection
from engine.kernels.row_norm import NormedRows
from tests.kernels.exact_products import EXACT_ROWS, all_configurations, assert_exact, exact_products
from tests.kernels.products import (
    DEVICES,
    EPS,
    INVARIANT_ROWS,
    KINDS,
    ROWS,
    Draw,
    Weight,
    assert_normed_close,
    assert_row_invariant,
    configurations,
    normed_rows,
)

BLOCK_SIZE = 8
NUM_BLOCKS = 40
MAX_LEN = 200


@dataclass(frozen=True)
class Shape:
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool
    head_norm: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def outputs(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


SHAPES = [
    Shape(96, 3, 1, 64, bias=True, head_norm=False),
    Shape(160, 2, 1, 80, bias=False, head_norm=False),
    Shape(96, 1, 1, 20, bias=True, head_norm=False),
    Shape(320, 1, 1, 48, bias=False, head_norm=False),
    Shape(96, 2, 1, 80, bias=True, head_norm=True),
    Shape(96, 2, 1, 128, bias=False, head_norm=True),
    Shape(160, 1, 1, 48, bias=True, head_norm=True),
    Shape(96, 1, 1, 20, bias=False, head_norm=True),  # heads that are no whole number of packed tiles
]
LARGE = [Shape(160, 1, 1, 20, bias=True, head_norm=False), Shape(160, 1, 1, 32, bias=True, head_norm=True)]
if not INTERPRETED:
    LARGE = [
        Shape(2048, 32, 4, 64, bias=False, head_norm=False),
        Shape(576, 9, 3, 64, bias=True, head_norm=False),
        Shape(1024, 16, 8, 128, bias=False, head_norm=True),
    ]


@dataclass(frozen=True)
class Layer:
    """One layer's weights: in their natural order, for the twin on the host, and as the kernel wants them."""

    natural: QKVProjection
    ordered: QKVWeights
    norm: torch.Tensor

    @property
    def packed(self) -> bool:
        """Whether the kernel can serve few rows from the packed weight."""
        whole_tiles = self.ordered.q_norm is None or self.ordered.head_dim % 16 == 0
        return self.ordered.weight.packed is not None and whole_tiles


def layer(shape: Shape, draw: Draw, weight: Weight, eps: float = EPS) -> Layer:
    norm, bias = draw.norm(shape.hidden), draw.integers(-9, 9, shape.outputs).to(draw.dtype) if shape.bias else None
    heads = [draw.norm(shape.head_dim) for _ in range(2)] if shape.head_norm else [None, None]
    order = qkv_row_order(*shape.sizes).to(draw.device)
    on_host = [None if t is None else t.cpu() for t in (norm, weight.dequantised(draw.dtype), bias, *heads)]
    ordered_bias = None if bias is None else bias[order].contiguous()
    return Layer(
        QKVProjection(*on_host, eps, *shape.sizes),
        QKVWeights(weight.matrix(order), ordered_bias, *heads, eps, *shape.sizes),
        norm,
    )


def angles(draw: Draw, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    table = draw.norm(MAX_LEN * head_dim // 2).view(MAX_LEN, head_dim // 2) * 6
    return table.cos(), table.sin()


def caches(draw: Draw, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that are views of one tensor, like the engine's."""
    both = draw.poisoned(2, NUM_BLOCKS, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    return both[0], both[1]


def projected(
    draw: Draw,
    shape: Shape,
    weights: QKVWeights,
    x: NormedRows,
    rope: tuple[torch.Tensor, torch.Tensor],
    configuration: Configuration | None,
) -> torch.Tensor:
    """Queries, keys and values of each row, all at one position: [N, H + 2 KVH, D]."""
    rows = len(x.weighted)
    q, kv = draw.poisoned(rows, shape.num_heads, shape.head_dim), caches(draw, shape)
    positions = torch.full((rows,), 11, device=draw.device)
    slots = torch.arange(rows, device=draw.device) + BLOCK_SIZE
    norm_qkv_rope(x, weights, rope, positions, slots, q, kv, configuration=configuration)
    keys, values = (cache.flatten(0, 1)[slots] for cache in kv)
    return torch.cat((q, keys, values), dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rows", "dtype", "int8"), [case for case in ROWS if case[0] != 33])
def test_equals_the_twin(device: str, dtype: torch.dtype, int8: bool, shape: Shape, rows: int) -> None:
    draw = Draw(device, dtype, rows)
    x, eps = draw.rows_for_norm(rows, shape.hidden)
    made = layer(shape, draw, draw.weight(shape.outputs, shape.hidden, int8), eps)
    rope = angles(draw, shape.head_dim)
    positions = draw.order(MAX_LEN)[:rows]
    slots = draw.order(BLOCK_SIZE * (NUM_BLOCKS - 1))[:rows] + BLOCK_SIZE
    keys, values = (cache.cpu().clone() for cache in caches(draw, shape))
    host_rope = (rope[0].cpu(), rope[1].cpu())
    expected = reference.norm_qkv_rope(x.cpu(), made.natural, host_rope, positions.cpu(), slots.cpu(), (keys, values))
    for part, configuration in zip((16, 128, 1024), configurations(rows, made.ordered.weight), strict=False):
        if isinstance(configuration, FewRows) and not made.packed:
            continue
        q, kv = draw.poisoned(rows, shape.num_heads, shape.head_dim), caches(draw, shape)
        norm_qkv_rope(
            normed_rows(x, made.norm, eps, part), made.ordered, rope, positions, slots, q, kv,
            configuration=configuration,
        )  # fmt: skip
        assert_normed_close(q, expected, dtype)
        written = slots.cpu()
        untouched = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
        untouched[written] = False
        for cache, expected_cache in zip(kv, (keys, values), strict=True):
            flat = cache.cpu().flatten(0, 1)
            assert_normed_close(flat[written], expected_cache.flatten(0, 1)[written], dtype)
            assert flat[untouched].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("rows", EXACT_ROWS)
def test_exact_sums(device: str, rows: int, int8: bool) -> None:
    """Without rotation queries, keys and values are the rounded product."""
    draw, shape = Draw(device, torch.bfloat16, rows), LARGE[0]
    rope = (
        torch.ones(MAX_LEN, shape.head_dim // 2, device=device),
        torch.zeros(MAX_LEN, shape.head_dim // 2, device=device),
    )
    for drawn in exact_products(draw, rows, shape.outputs, shape.hidden, int8):
        x = NormedRows(drawn.x, torch.zeros(rows, 1, device=device), 1, eps=0.25)  # 1 / rms is 2
        made = layer(shape, draw, drawn.weight)
        expected = drawn.product * 2
        if made.natural.bias is not None:
            expected = expected + made.natural.bias.to(device).float()

        def launch(configuration: Configuration | None) -> torch.Tensor:
            return projected(draw, shape, made.ordered, x, rope, configuration).flatten(1)  # noqa: B023

        assert_exact(launch, expected.to(draw.dtype), all_configurations(rows, packed=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "int8"), KINDS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_row_invariance(device: str, dtype: torch.dtype, shape: Shape, int8: bool) -> None:
    draw = Draw(device, dtype, 7)
    made, rope = layer(shape, draw, draw.weight(shape.outputs, shape.hidden, int8)), angles(draw, shape.head_dim)

    def kernel(rows: torch.Tensor, configuration: Configuration | None) -> torch.Tensor:
        return projected(draw, shape, made.ordered, normed_rows(rows, made.norm), rope, configuration)

    assert_row_invariant(kernel, draw.normal(INVARIANT_ROWS, shape.hidden), made.packed)


@pytest.mark.parametrize("device", DEVICES)
def test_padding_rows_share_the_null_block(device: str) -> None:
    """Several rows may have the same slot of block 0; the others' slots are as without them."""
    draw, shape = Draw(device, torch.float32, 3), SHAPES[0]
    made, rope = layer(shape, draw, draw.weight(shape.outputs, shape.hidden)), angles(draw, shape.head_dim)
    x = draw.normal(6, shape.hidden)
    positions = torch.tensor([4, 9, 0, 0, 0, 0], device=device)
    slots = torch.tensor([20, 33, 0, 0, 0, 0], device=device)
    q, kv = draw.poisoned(6, shape.num_heads, shape.head_dim), caches(draw, shape)
    norm_qkv_rope(normed_rows(x, made.norm), made.ordered, rope, positions, slots, q, kv)
    alone_q, alone_kv = draw.poisoned(2, shape.num_heads, shape.head_dim), caches(draw, shape)
    alone = normed_rows(x[:2], made.norm)
    norm_qkv_rope(alone, made.ordered, rope, positions[:2], slots[:2], alone_q, alone_kv)
    assert torch.equal(q[:2], alone_q)
    for cache, alone_cache in zip(kv, alone_kv, strict=True):
        assert torch.equal(cache[1:].nan_to_num(7.0), alone_cache[1:].nan_to_num(7.0))
        assert not cache[0, 0].isnan().any()
        assert cache[0, 1:].isnan().all()
