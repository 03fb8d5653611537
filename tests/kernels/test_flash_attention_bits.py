"""A row of attention has the same bits however it is computed."""

import pytest
import torch

from engine.kernels.attention_worklist import build_worklist
from engine.kernels.flash_attention import flash_attention
from tests.kernels.attention_cases import DEVICES, Cache, Chunk, Heads, assert_near

BORDERS = [0, 15, 16, 39, 40, 63, 64, 65, 254, 255, 256, 257, 299, 511, 512, 513, 599]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "dtype", "context", "window", "int8"),
    [
        (Heads(1, 4, 64), BF16, 600, None, False),
        (Heads(1, 8, 64), BF16, 300, 40, False),
        (Heads(1, 8, 128), BF16, 330, None, False),
        (Heads(1, 3, 80), FP16, 560, 300, False),
        (Heads(1, 2, 64), FP32, 272, None, False),
        (Heads(1, 8, 64), BF16, 330, None, True),
        (Heads(1, 8, 128), FP16, 270, 100, True),
    ],
)
def test_bits_of_a_row(
    device: str, heads: Heads, dtype: torch.dtype, context: int, window: int | None, int8: bool
) -> None:
    """Decoded alone, in chunks of any size, and in one whole prefill, spread over programs or not."""
    if device == "cpu" and context > 300:
        pytest.skip("the shorter ones are enough for the interpreter, which takes ten seconds for each of these")
    cache = Cache([context], heads, device, dtype, window=window, int8=int8)
    whole = cache.attend([Chunk(0, 0, context)])
    for position in BORDERS:
        if position < context:
            assert torch.equal(cache.attend([Chunk(0, position, 1)])[0], whole[position]), position
    for start, count in [(254, 3), (255, 17), (247, 64), (509, 5)]:
        if start + count <= context:
            assert torch.equal(cache.attend([Chunk(0, start, count)]), whole[start : start + count]), (start, count)
    last = Chunk(0, context - 64, 64)
    small = cache.workspace(64, large_tiles=False)
    assert torch.equal(cache.attend([last], small), whole[-64:])
    spread = cache.workspace(64, num_processors=64)
    assert torch.equal(cache.attend([last], spread), whole[-64:])


@pytest.mark.parametrize("device", DEVICES)
def test_bits_in_company(device: str) -> None:
    """At any place in a batch, beside chunks, decoding rows and NaN; with and without room for partial states."""
    cache = Cache([600, 257, 40, 513], Heads(1, 4, 64), device)
    alone = {
        chunk: cache.attend([chunk])
        for chunk in [Chunk(0, 599, 1), Chunk(1, 251, 6), Chunk(2, 0, 40), Chunk(3, 512, 1), Chunk(0, 256, 1)]
    }
    nobody = Chunk(None, 0, 3)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [4, 0, 3, 1]):
        step = [list(alone)[index] for index in order]
        step = [step[0], nobody, *step[1:], Chunk(None, 0, 20)]
        for changes in ({}, {"large_tiles": False}, {"num_processors": 40}):
            rows = sum(chunk.count for chunk in step)
            out = cache.attend(step, cache.workspace(rows + 9, **changes))
            start = 0
            for chunk in step:
                expected = alone.get(chunk, torch.zeros_like(out[:1]))
                assert torch.equal(out[start : start + chunk.count], expected.expand(chunk.count, -1, -1)), chunk
                start += chunk.count


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("heads", [Heads(4, 8, 64), Heads(8, 4, 128)])
def test_bits_of_decoding_batches(heads: Heads, int8: bool) -> None:
    """One row alone and among 255 others: spread over programs or not, in kernels with large tiles or without."""
    contexts = [1 + (37 * request) % 700 for request in range(256)]
    cache = Cache(contexts, heads, "cuda", int8=int8)
    step = [Chunk(request, context - 1, 1) for request, context in enumerate(contexts)]
    alone = torch.cat([cache.attend([chunk]) for chunk in step])
    assert_near(alone, cache.expected(step), int8)
    for rows in (2, 3, 8, 17, 64, 256):
        for large_tiles in (False, True):
            for start in (0, 256 - rows):
                out = cache.attend(step[start : start + rows], cache.workspace(rows, large_tiles=large_tiles))
                assert torch.equal(out, alone[start : start + rows]), (rows, large_tiles, start)


@pytest.mark.gpu
def test_graph() -> None:
    """One captured launch serves other requests, positions and rows of nobody, over many replays."""
    cache = Cache([600, 257, 40, 513], Heads(2, 4, 64), "cuda")
    steps = [
        [Chunk(0, 599, 1), Chunk(1, 200, 30), Chunk(None, 0, 33)],
        [Chunk(3, 449, 64)],
        [Chunk(2, 39, 1), Chunk(None, 0, 63)],
        [Chunk(None, 0, 7), Chunk(0, 250, 9), Chunk(3, 512, 1), Chunk(1, 256, 1), Chunk(0, 300, 46)],
    ]
    expected = [cache.attend(step) for step in steps]
    inputs = [tensor.clone() for tensor in cache.rows(steps[0])]
    workspace = cache.workspace(64)
    out = torch.empty_like(inputs[0])

    def run() -> None:
        build_worklist(workspace, inputs[1], inputs[2])
        for first in (True, False):
            flash_attention(inputs[0], cache.k, cache.v, cache.block_tables, workspace, 0.125, out, pdl=not first)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for replay in range(1000):
        step = replay % len(steps)
        for destination, source in zip(inputs, cache.rows(steps[step]), strict=True):
            destination.copy_(source)
        workspace.values.fill_(torch.nan)
        workspace.entries.fill_(1 << 30)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected[step])
