"""Attention equals its twin, and a row has the same bits however it is computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from engine.kernels.attention_plan import ChunkRows, plan_attention
from engine.kernels.attention_worklist import AttentionWorkspace, attention_workspace, build_worklist
from engine.kernels.flash_attention import flash_attention
from engine.kernels.reference import paged_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPLIT = 256
BORDERS = [0, 15, 16, 39, 40, 63, 64, 254, 255, 256, 257, 299, 511, 512, 513, 599]


@dataclass(frozen=True)
class Heads:
    kv: int = 1
    group: int = 4
    dim: int = 64

    @property
    def query(self) -> int:
        return self.kv * self.group


@dataclass(frozen=True)
class Chunk:
    """Rows of a step: `count` positions of `request` from `start` on. A request of None: rows of nobody."""

    request: int | None
    start: int
    count: int


class Cache:
    """Requests with random queries, keys and values at every position; NaN wherever none of them wrote."""

    def __init__(
        self,
        contexts: Sequence[int],
        heads: Heads,
        device: str,
        dtype: torch.dtype = torch.bfloat16,
        block_size: int = 16,
        window: int | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self.heads, self.device, self.dtype, self.block_size, self.window = heads, device, dtype, block_size, window
        counts = [-(-c // block_size) for c in contexts]
        order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        shape = (2, sum(counts) + 1, block_size, heads.kv, heads.dim)
        caches = torch.full(shape, torch.nan, dtype=dtype)
        self.queries = []
        for context, table in zip(contexts, self.tables, strict=True):
            self.queries.append(torch.randn(context, heads.query, heads.dim, generator=generator).to(device, dtype))
            written = torch.randn(2, context, heads.kv, heads.dim, generator=generator).to(dtype)
            for position in range(context):
                caches[:, table[position // block_size], position % block_size] = written[:, position]
        self.k, self.v = caches.to(device)
        # Blocks that no request has: a read through them would fault or find another's keys.
        width = max(counts) + 1
        padded = [table + [1 << 30] * (width - len(table)) for table in self.tables]
        self.block_tables = torch.tensor(padded, dtype=torch.int32, device=device)
        self.max_context = max(contexts)

    def workspace(self, rows: int, **changes: object) -> AttentionWorkspace:
        """Poisoned: nothing that an earlier step left may matter."""
        heads = self.heads
        made = attention_workspace(
            rows, heads.query, heads.kv, heads.dim, self.max_context, self.dtype, torch.device(self.device), self.window
        )
        for tensor in (made.entries, made.num_entries, made.counters):
            tensor.fill_(123456789)
        for tensor in (made.maxima, made.totals, made.values):
            tensor.fill_(torch.nan)
        return replace(made, **changes)  # type: ignore[arg-type]

    def rows(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, requests and positions of a step. Rows of nobody have queries of NaN."""
        queries, requests, positions = [], [], []
        for chunk in chunks:
            if chunk.request is None:
                shape = (chunk.count, self.heads.query, self.heads.dim)
                queries.append(torch.full(shape, torch.nan, dtype=self.dtype, device=self.device))
                requests += [-1] * chunk.count
                positions += [0] * chunk.count
            else:
                queries.append(self.queries[chunk.request][chunk.start : chunk.start + chunk.count])
                requests += [chunk.request] * chunk.count
                positions += range(chunk.start, chunk.start + chunk.count)
        return (
            torch.cat(queries),
            torch.tensor(requests, dtype=torch.int32, device=self.device),
            torch.tensor(positions, device=self.device),
        )

    def attend(self, chunks: Sequence[Chunk], workspace: AttentionWorkspace | None = None) -> torch.Tensor:
        queries, requests, positions = self.rows(chunks)
        workspace = workspace or self.workspace(len(queries))
        build_worklist(workspace, requests, positions)
        out = torch.full_like(queries, torch.nan)
        return flash_attention(queries, self.k, self.v, self.block_tables, workspace, self.heads.dim**-0.5, out)

    def expected(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        queries = self.rows(chunks)[0]
        pieces, row = [], 0
        for chunk in chunks:
            if chunk.request is not None:
                pieces.append(ChunkRows(row, chunk.count, chunk.start, self.tables[chunk.request]))
            row += chunk.count
        plan = plan_attention(pieces, self.block_size, self.heads.group, self.window, torch.device(self.device))
        k, v = (torch.nan_to_num(cache.float()) for cache in (self.k, self.v))
        return paged_attention(queries.float(), k, v, plan, self.heads.dim**-0.5)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Every row on its own: one wrong head in a row of many would drown in a norm of all."""
    tolerance = {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[actual.dtype]
    error = (actual.float() - expected).norm(dim=-1)
    assert (error <= tolerance * expected.norm(dim=-1)).all(), error.max()


def mixed_step(contexts: Sequence[int]) -> list[Chunk]:
    """Every request decodes, or computes a chunk that ends at its context; rows of nobody in between."""
    sizes = [1, 3, 1, 17, 1, 64, 5, 2]
    chunks: list[Chunk] = []
    for request, context in enumerate(contexts):
        count = min(sizes[request % len(sizes)], context)
        chunks += [Chunk(request, context - count, count), Chunk(None, 0, request % 3)]
    return [chunk for chunk in chunks if chunk.count]


CONTEXTS = [1, 15, 16, 17, 255, 256, 257, 600]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "dtype", "block_size", "window"),
    [
        (Heads(2, 1, 64), torch.bfloat16, 16, None),
        (Heads(1, 3, 64), torch.bfloat16, 8, None),
        (Heads(2, 4, 128), torch.bfloat16, 32, None),
        (Heads(2, 8, 64), torch.float16, 16, None),
        (Heads(1, 4, 80), torch.float32, 16, None),
        (Heads(1, 2, 96), torch.float16, 16, 300),
        (Heads(1, 8, 64), torch.float32, 8, 40),
        (Heads(2, 3, 64), torch.bfloat16, 32, 300),
    ],
)
def test_twin(device: str, heads: Heads, dtype: torch.dtype, block_size: int, window: int | None) -> None:
    cache = Cache(CONTEXTS, heads, device, dtype, block_size, window)
    step = mixed_step(CONTEXTS)
    actual = cache.attend(step)
    assert_near(actual, cache.expected(step))
    nobody = cache.rows(step)[1] < 0
    assert (actual[nobody] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "dtype", "context", "window"),
    [
        (Heads(1, 4, 64), torch.bfloat16, 600, None),
        (Heads(1, 8, 64), torch.bfloat16, 300, 40),
        (Heads(1, 3, 80), torch.float16, 560, 300),
        (Heads(1, 2, 64), torch.float32, 272, None),
    ],
)
def test_bits_of_a_row(device: str, heads: Heads, dtype: torch.dtype, context: int, window: int | None) -> None:
    """Decoded alone, in chunks of any size, and in one whole prefill, spread over programs or not."""
    cache = Cache([context], heads, device, dtype, window=window)
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
        for _ in range(2):
            flash_attention(inputs[0], cache.k, cache.v, cache.block_tables, workspace, 0.125, out)

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
