"""Paged caches with known contents, steps over them, and what attention over them must give."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from engine.kernels.attention_worklist import AttentionWorkspace, attention_workspace, build_worklist
from engine.kernels.flash_attention import flash_attention
from engine.kernels.pdl import INTERPRETED

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]),
]


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
    """Requests with random queries, keys and values at every position; NaN wherever none of them wrote.

    int8: keys and values are int8 of the whole range, with scales of very different sizes; their scales are NaN
    wherever nobody wrote.
    """

    def __init__(
        self,
        contexts: Sequence[int],
        heads: Heads,
        device: str,
        dtype: torch.dtype = torch.bfloat16,
        block_size: int = 16,
        window: int | None = None,
        int8: bool = False,
    ) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.heads, self.device, self.dtype, self.block_size, self.window = heads, device, dtype, block_size, window
        counts = [-(-c // block_size) for c in contexts]
        order = (torch.randperm(sum(counts), generator=self.generator) + 1).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        shape = (2, sum(counts) + 1, block_size, heads.kv, heads.dim)
        caches = torch.full(shape, 127, dtype=torch.int8) if int8 else torch.full(shape, torch.nan, dtype=dtype)
        scales = torch.full(shape[:-1], torch.nan)
        self.queries, self.written = [], []
        for context, table in zip(contexts, self.tables, strict=True):
            queries = torch.randn(context, heads.query, heads.dim, generator=self.generator)
            self.queries.append(queries.to(device, dtype))
            written, scale = self._random(context, int8)
            self.written.append(written.double() * scale[..., None])
            positions = torch.arange(context)
            blocks, slots = torch.tensor(table)[positions // block_size], positions % block_size
            caches[:, blocks, slots] = written
            scales[:, blocks, slots] = scale
        self.k, self.v = caches.to(device)
        self.k_scales: torch.Tensor | None = None
        self.v_scales: torch.Tensor | None = None
        if int8:
            self.k_scales, self.v_scales = scales.to(device)
        # Blocks that no request has: a read through them would fault or find another's keys.
        width = max(counts) + 1
        padded = [table + [1 << 30] * (width - len(table)) for table in self.tables]
        self.block_tables = torch.tensor(padded, dtype=torch.int32, device=device)
        self.max_context = max(contexts)

    def _random(self, context: int, int8: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [2, context, KVH, D] and their scales [2, context, KVH], 1 unless int8."""
        shape = (2, context, self.heads.kv, self.heads.dim)
        if not int8:
            return torch.randn(shape, generator=self.generator).to(self.dtype), torch.ones(shape[:-1])
        integers = torch.randint(-128, 128, shape, generator=self.generator, dtype=torch.int8)
        return integers, 0.02 * 2 ** torch.randn(shape[:-1], generator=self.generator)

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
        return self.attend_again(queries, workspace, pdl=False)

    def attend_again(self, queries: torch.Tensor, workspace: AttentionWorkspace, pdl: bool = True) -> torch.Tensor:
        """With the worklist that is there."""
        out = torch.full_like(queries, torch.nan)
        return flash_attention(
            queries, self.k, self.v, self.block_tables, workspace, self.heads.dim**-0.5, out, pdl=pdl,
            k_scales=self.k_scales, v_scales=self.v_scales,
        )  # fmt: skip

    def expected(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Softmax attention written down row by row, in float64; zero for rows of nobody."""
        return torch.cat([self._expected(chunk) for chunk in chunks]).to(self.device)

    def _expected(self, chunk: Chunk) -> torch.Tensor:
        if chunk.request is None:
            return torch.zeros(chunk.count, self.heads.query, self.heads.dim, dtype=torch.float64)
        rows = []
        for position in range(chunk.start, chunk.start + chunk.count):
            begin = 0 if self.window is None else max(0, position - self.window + 1)
            keys, values = self.written[chunk.request][:, begin : position + 1].repeat_interleave(self.heads.group, 2)
            query = self.queries[chunk.request][position].double().cpu()
            weights = torch.einsum("hd,phd->hp", query, keys).mul(self.heads.dim**-0.5).softmax(dim=1)
            rows.append(torch.einsum("hp,phd->hd", weights, values))
        return torch.stack(rows)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, int8: bool = False) -> None:
    """Every row and head on its own: one wrong head in a row of many would drown in a norm of all."""
    tolerance = {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[actual.dtype]
    if int8:
        # Weights are bfloat16, whatever the queries are, and the scaled ones are rounded apart from those of the sum.
        tolerance = 6e-3
    error = (actual.double() - expected).norm(dim=-1)
    assert (error <= tolerance * expected.norm(dim=-1)).all(), error.max()


def mixed_step(contexts: Sequence[int]) -> list[Chunk]:
    """Every request decodes, or computes a chunk that ends at its context; rows of nobody in between."""
    sizes = [1, 3, 1, 17, 1, 40, 5, 2]
    chunks: list[Chunk] = []
    for request, context in enumerate(contexts):
        count = min(sizes[request % len(sizes)], context)
        chunks += [Chunk(request, context - count, count), Chunk(None, 0, request % 3)]
    return [chunk for chunk in chunks if chunk.count]
