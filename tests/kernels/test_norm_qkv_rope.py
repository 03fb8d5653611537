"""Norm, QKV, head norms, RoPE and cache write: against the twin, on poisoned outputs and caches."""

from dataclasses import dataclass, fields

import pytest
import torch

from engine.kernels import reference
from engine.kernels.configurations import Configuration
from engine.kernels.norm_qkv_rope import QKVWeights, norm_qkv_rope, qkv_row_order
from engine.kernels.reference import QKVProjection
from tests.kernels.products import (
    DEVICES,
    DTYPES,
    FEW_ROWS,
    ROWS,
    WIDE_ROWS,
    Draw,
    assert_close,
    assert_row_invariant,
    configurations,
)

BLOCK_SIZE = 8
NUM_BLOCKS = 24
MAX_LEN = 200


@dataclass(frozen=True)
class Shape:
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool
    head_norm: bool


SHAPES = [
    Shape(96, 3, 1, 64, bias=True, head_norm=False),
    Shape(160, 2, 1, 80, bias=False, head_norm=False),
    Shape(96, 2, 1, 80, bias=True, head_norm=True),
    Shape(96, 2, 1, 128, bias=False, head_norm=True),
    Shape(96, 1, 1, 20, bias=True, head_norm=False),
]


def projection(shape: Shape, draw: Draw) -> QKVProjection:
    rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return QKVProjection(
        norm=draw.norm(shape.hidden),
        weight=draw.weight(rows, shape.hidden),
        bias=draw.normal(rows) if shape.bias else None,
        q_norm=draw.norm(shape.head_dim) if shape.head_norm else None,
        k_norm=draw.norm(shape.head_dim) if shape.head_norm else None,
        eps=1e-5,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )


def on_cpu(weights: QKVProjection) -> QKVProjection:
    values = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return QKVProjection(**{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in values.items()})


def ordered(weights: QKVProjection) -> QKVWeights:
    """As the loader hands them to the kernel."""
    order = qkv_row_order(weights.num_heads, weights.num_kv_heads, weights.head_dim).to(weights.weight.device)
    values = {field.name: getattr(weights, field.name) for field in fields(weights)}
    values["weight"] = weights.weight[order].contiguous()
    values["bias"] = None if weights.bias is None else weights.bias[order].contiguous()
    return QKVWeights(**values)


def angles(draw: Draw, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    table = draw.norm(MAX_LEN * head_dim // 2).view(MAX_LEN, head_dim // 2) * 6
    return table.cos(), table.sin()


def caches(draw: Draw, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that are views of one tensor, like the engine's."""
    both = draw.poisoned(2, NUM_BLOCKS, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    return both[0], both[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rows", "dtype"), [case for case in ROWS if case[0] not in (16, 33)])
def test_equals_the_twin(device: str, dtype: torch.dtype, shape: Shape, rows: int) -> None:
    draw = Draw(device, dtype, rows)
    weights, rope, x = projection(shape, draw), angles(draw, shape.head_dim), draw.normal(rows, shape.hidden)
    positions = draw.order(MAX_LEN)[:rows]
    slots = draw.order(BLOCK_SIZE * (NUM_BLOCKS - 1))[:rows] + BLOCK_SIZE
    expected_kv = tuple(cache.cpu().clone() for cache in caches(draw, shape))
    host_rope = (rope[0].cpu(), rope[1].cpu())
    expected = reference.norm_qkv_rope(
        x.cpu(), on_cpu(weights), host_rope, positions.cpu(), slots.cpu(), (expected_kv[0], expected_kv[1])
    )
    for configuration in configurations(rows):
        q, kv = draw.poisoned(rows, shape.num_heads, shape.head_dim), caches(draw, shape)
        norm_qkv_rope(x, ordered(weights), rope, positions, slots, q, kv, configuration=configuration)
        assert_close(q, expected, dtype)
        written = slots.cpu()
        untouched = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
        untouched[written] = False
        for cache, expected_cache in zip(kv, expected_kv, strict=True):
            flat = cache.cpu().flatten(0, 1)
            assert_close(flat[written], expected_cache.flatten(0, 1)[written], dtype)
            assert flat[untouched].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [Shape(160, 1, 1, 48, bias=True, head_norm=False), SHAPES[2]], ids=str)
def test_row_invariance(device: str, dtype: torch.dtype, shape: Shape) -> None:
    draw = Draw(device, dtype, 7)
    weights, rope, x = ordered(projection(shape, draw)), angles(draw, shape.head_dim), draw.normal(33, shape.hidden)

    def kernel(rows: torch.Tensor, configuration: Configuration | None) -> torch.Tensor:
        """Queries, keys and values of each row, all at one position."""
        q, kv = draw.poisoned(len(rows), shape.num_heads, shape.head_dim), caches(draw, shape)
        positions = torch.full((len(rows),), 11, device=device)
        slots = torch.arange(len(rows), device=device) + BLOCK_SIZE
        norm_qkv_rope(rows, weights, rope, positions, slots, q, kv, configuration=configuration)
        keys, values = (cache.flatten(0, 1)[slots] for cache in kv)
        return torch.cat((q, keys, values), dim=1)

    assert_row_invariant(kernel, x, [FEW_ROWS, WIDE_ROWS])


@pytest.mark.parametrize("device", DEVICES)
def test_padding_rows_share_the_null_block(device: str) -> None:
    """Several rows may have the same slot of block 0; the others' slots are as without them."""
    draw, shape = Draw(device, torch.float32, 3), SHAPES[0]
    weights, rope, x = ordered(projection(shape, draw)), angles(draw, shape.head_dim), draw.normal(6, shape.hidden)
    positions = torch.tensor([4, 9, 0, 0, 0, 0], device=device)
    slots = torch.tensor([20, 33, 0, 0, 0, 0], device=device)
    q, kv = draw.poisoned(6, shape.num_heads, shape.head_dim), caches(draw, shape)
    norm_qkv_rope(x, weights, rope, positions, slots, q, kv)
    alone_q, alone_kv = draw.poisoned(2, shape.num_heads, shape.head_dim), caches(draw, shape)
    norm_qkv_rope(x[:2], weights, rope, positions[:2], slots[:2], alone_q, alone_kv)
    assert torch.equal(q[:2], alone_q)
    for cache, alone in zip(kv, alone_kv, strict=True):
        assert torch.equal(cache[1:].nan_to_num(7.0), alone[1:].nan_to_num(7.0))
        assert not cache[0, 0].isnan().any()
        assert cache[0, 1:].isnan().all()
