"""Attention equals its definition, reads nothing that it must not, and keeps its hands off other memory."""

from dataclasses import replace

import pytest
import torch

from engine.kernels.attention_worklist import build_worklist
from engine.kernels.flash_attention import flash_attention
from tests.kernels.attention_cases import DEVICES, Cache, Chunk, Heads, assert_near, mixed_step

CONTEXTS = [1, 15, 16, 17, 255, 256, 257, 600]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "dtype", "block_size", "window", "int8"),
    [
        (Heads(2, 1, 64), BF16, 16, None, False),
        (Heads(1, 3, 64), BF16, 8, None, False),
        (Heads(2, 4, 128), BF16, 32, None, False),
        (Heads(1, 8, 64), FP16, 16, None, False),
        (Heads(1, 24, 80), BF16, 16, 70, False),
        (Heads(1, 4, 80), FP32, 16, None, False),
        (Heads(1, 2, 96), FP16, 16, 300, False),
        (Heads(1, 8, 64), FP32, 8, 40, False),
        (Heads(2, 3, 64), BF16, 32, 300, False),
        (Heads(1, 8, 64), BF16, 16, None, True),
        (Heads(1, 4, 128), BF16, 16, 300, True),
        (Heads(1, 3, 80), FP16, 8, None, True),
        (Heads(2, 2, 96), FP16, 32, 40, True),
    ],
)
def test_definition(
    device: str, heads: Heads, dtype: torch.dtype, block_size: int, window: int | None, int8: bool
) -> None:
    cache = Cache(CONTEXTS, heads, device, dtype, block_size, window, int8)
    step = mixed_step(CONTEXTS)
    actual = cache.attend(step)
    assert_near(actual, cache.expected(step), int8)
    nobody = cache.rows(step)[1] < 0
    assert (actual[nobody] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [None, 1, 63, 64, 65, 256])
def test_border_positions(device: str, window: int | None, int8: bool) -> None:
    """Decoding rows that see exactly a tile or a split of keys, one less or one more."""
    borders = [0, 1, 15, 16, 62, 63, 64, 65, 127, 128, 254, 255, 256, 257, 319, 320, 511, 512, 513]
    cache = Cache([514], Heads(1, 8, 64), device, window=window, int8=int8)
    step = [Chunk(0, position, 1) for position in borders]
    assert_near(cache.attend(step), cache.expected(step), int8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_partials", [1, 4, 9])
def test_little_room_for_partial_states(device: str, max_partials: int) -> None:
    """Tiles whose states do not fit are not spread, and no other memory is written."""
    cache = Cache([600, 513, 257], Heads(1, 4, 64), device)
    step = [Chunk(0, 599, 1), Chunk(1, 510, 3), Chunk(2, 256, 1)]
    full = cache.workspace(8)
    tight = replace(
        full,
        maxima=full.maxima[:max_partials],
        totals=full.totals[:max_partials],
        values=full.values[:max_partials],
        entries=full.entries[: 8 + max_partials],
    )
    out = cache.attend(step, tight)
    assert full.values[max_partials:].isnan().all()
    assert full.maxima[max_partials:].isnan().all()
    assert torch.equal(out, cache.attend(step))


@pytest.mark.parametrize("device", DEVICES)
def test_layers_share_a_worklist(device: str) -> None:
    """One list, several layers and steps: the counters are as they were after each."""
    cache = Cache([600, 300], Heads(1, 4, 64), device)
    workspace = cache.workspace(4)
    step = [Chunk(0, 598, 2), Chunk(1, 299, 1)]
    first = cache.attend(step, workspace)
    queries, _, _ = cache.rows(step)
    arguments = (queries, cache.k, cache.v, cache.block_tables, workspace, cache.heads.dim**-0.5)
    for _ in range(3):
        assert torch.equal(flash_attention(*arguments), first)
    alone = cache.attend([Chunk(1, 299, 1)], workspace)
    assert torch.equal(alone, first[2:])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_do_not_follow_each_other(device: str) -> None:
    """Rows of one request in any order are still right: they only share no tile."""
    cache = Cache([300, 20], Heads(1, 4, 64), device)
    step = [Chunk(0, 299, 1), Chunk(0, 298, 1), Chunk(0, 10, 1), Chunk(1, 11, 1), Chunk(0, 12, 1), Chunk(0, 12, 1)]
    out = cache.attend(step)
    for row, chunk in enumerate(step):
        assert torch.equal(out[row], cache.attend([chunk])[0])


@pytest.mark.parametrize("device", DEVICES)
def test_strided_operands(device: str) -> None:
    """Queries inside the rows of a fused projection, keys and values interleaved."""
    cache = Cache([260], Heads(2, 2, 64), device)
    step = [Chunk(0, 250, 10)]
    expected = cache.attend(step)
    queries, requests, positions = cache.rows(step)
    fused = torch.full((10, 8, 64), torch.nan, dtype=queries.dtype, device=device)
    fused[:, :4] = queries
    both = torch.stack((cache.k, cache.v), dim=2)
    workspace = cache.workspace(10)
    build_worklist(workspace, requests, positions)
    out = flash_attention(fused[:, :4], both[:, :, 0], both[:, :, 1], cache.block_tables, workspace, 0.125)
    assert torch.equal(out, expected)
