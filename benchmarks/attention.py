"""Speed of the attention kernel: `python -m benchmarks.attention`, or `--rehearse` where there is no GPU.

Every call has keys and values of its own, as every layer has, so that no cache keeps them from one call to the next.
The times are of CUDA graphs that hold a call for each layer, one behind the other with programmatic launch; building
the worklist, once a step, is timed by itself. Before anything is timed, rows must have the same bits in batches of all
sizes and in a prefill.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table

from engine.kernels.attention_worklist import attention_workspace, build_worklist
from engine.kernels.flash_attention import flash_attention
from engine.kernels.pdl import INTERPRETED

PEAK_BYTES_PER_S = 3.35e12  # HBM3 of an H100 SXM, as its data sheet has it
LAYERS_BYTES = 256 << 20  # keys and values of all calls together: several times what the second-level cache holds
MAX_LAYERS = 512
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Shape:
    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Work:
    """`requests` chunks of `rows` rows that end at `context` tokens."""

    requests: int
    rows: int
    context: int

    @property
    def pairs(self) -> int:
        """Query rows times the keys that they see."""
        return self.requests * (self.rows * self.context - self.rows * (self.rows - 1) // 2)


@dataclass(frozen=True)
class Variant:
    """Ways to do the same work: the cache's format, and the kernel of a graph that serves chunks too."""

    int8: bool
    large_tiles: bool


@dataclass(frozen=True)
class Measurement:
    """Times are of one call; kv_fraction: of the time that reading keys and values once takes at the peak."""

    shape: str
    requests: int
    rows: int
    context: int
    int8: bool
    large_tiles: bool
    attention_us: float
    worklist_us: float
    kv_gb_per_s: float
    kv_fraction: float
    tflop_per_s: float


class Part(StrEnum):
    SHORT = "short"
    LONG = "long"
    VERIFY = "verify"
    PREFILL = "prefill"


TINYLLAMA, MISTRAL = Shape("tinyllama-1.1b", 32, 4, 64), Shape("mistral-7b", 32, 8, 128)
REQUESTS = (1, 8, 32, 64, 256)
PARTS = {
    Part.SHORT: [(TINYLLAMA, Work(requests, 1, context)) for requests in REQUESTS for context in (128, 256, 512)],
    Part.LONG: [
        (shape, Work(requests, 1, context))
        for shape, context in ((TINYLLAMA, 2048), (MISTRAL, 512), (MISTRAL, 8192))
        for requests in REQUESTS
    ],
    Part.VERIFY: [(shape, work) for shape in (TINYLLAMA, MISTRAL) for work in (Work(32, 5, 600), Work(1, 16, 8192))],
    Part.PREFILL: [(shape, Work(1, tokens, tokens)) for shape in (TINYLLAMA, MISTRAL) for tokens in (128, 1024, 2048)],
}
TINY = Shape("tiny", 4, 2, 64)
REHEARSAL = [(TINY, Work(2, 1, 300)), (TINY, Work(1, 20, 20))]


class Rows:
    """Decoding rows or chunks over one layer's random cache, with blocks in random places."""

    def __init__(self, shape: Shape, work: Work, device: torch.device, variant: Variant) -> None:
        self.shape, self.work, self.device, self.variant = shape, work, device, variant
        blocks = -(-work.context // BLOCK_SIZE)
        self.kv_shape = (2, work.requests * blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        self.block_tables = torch.randperm(self.kv_shape[1], device=device).view(work.requests, blocks).int()
        self.requests = torch.arange(work.requests, device=device, dtype=torch.int32).repeat_interleave(work.rows)
        self.positions = torch.arange(work.context - work.rows, work.context, device=device).repeat(work.requests)
        count = work.requests * work.rows
        self.q = torch.randn(count, shape.num_heads, shape.head_dim, device=device).bfloat16()

    @property
    def kv_bytes(self) -> int:
        """That a call reads."""
        bytes_per_head = self.shape.head_dim + 4 if self.variant.int8 else 2 * self.shape.head_dim
        return 2 * self.work.requests * self.work.context * self.shape.num_kv_heads * bytes_per_head

    def cache(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys and values [2, ...], and their scales."""
        if not self.variant.int8:
            return torch.empty(self.kv_shape, dtype=torch.bfloat16, device=self.device).normal_(), None
        integers = torch.randint(-127, 128, self.kv_shape, dtype=torch.int8, device=self.device)
        return integers, torch.rand(self.kv_shape[:-1], device=self.device) * 0.03

    def attend(
        self, caches: list[tuple[torch.Tensor, torch.Tensor | None]], first: int = 0, count: int | None = None
    ) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
        """Two calls for `count` rows from `first` on: one that attends to every cache, and returns the last output,
        and one that builds the worklist; it has been called."""
        shape, picked = self.shape, slice(first, first + (count or len(self.q)))
        q, requests, positions = self.q[picked], self.requests[picked], self.positions[picked]
        workspace = attention_workspace(
            len(q), shape.num_heads, shape.num_kv_heads, shape.head_dim, self.work.context, torch.bfloat16, self.device,
            large_tiles=self.variant.large_tiles,
        )  # fmt: skip
        out = torch.empty_like(q)

        def run() -> torch.Tensor:
            for layer, (kv, scales) in enumerate(caches):
                k_scales, v_scales = (None, None) if scales is None else scales.unbind()
                flash_attention(
                    q, kv[0], kv[1], self.block_tables, workspace, shape.head_dim**-0.5, out, pdl=layer > 0,
                    k_scales=k_scales, v_scales=v_scales,
                )  # fmt: skip
            return out

        def build() -> None:
            build_worklist(workspace, requests, positions)

        build()
        return run, build


def check_bits(shape: Shape, device: torch.device, int8: bool, requests: int, context: int) -> None:
    """Raises unless decoding rows have the same bits in batches of all sizes, and those of a prefill."""
    rows = Rows(shape, Work(requests, 1, context), device, Variant(int8, True))
    # Contexts of all lengths.
    rows.positions = torch.arange(requests, device=device) * 37 % context
    caches = [rows.cache()]
    expected = rows.attend(caches)[0]().clone()
    small = Rows(shape, rows.work, device, Variant(int8, False))
    small.q, small.block_tables, small.positions = rows.q, rows.block_tables, rows.positions
    for count in (1, 2, 3, 8, 32, 64, requests):
        for start in range(0, requests - count + 1, max(count, requests // 4)):
            for batch in (rows, small):
                if not torch.equal(batch.attend(caches, start, count)[0](), expected[start : start + count]):
                    raise SystemExit(f"{shape.name}: {count} rows from {start} on differ from {requests} rows")
    prefill = Rows(shape, Work(1, context, context), device, Variant(int8, True))
    caches = [prefill.cache()]
    expected = prefill.attend(caches)[0]().clone()
    for row in {0, 63, 64, 255, 256, context - 1} & set(range(context)):
        if not torch.equal(prefill.attend(caches, row, 1)[0](), expected[row : row + 1]):
            raise SystemExit(f"{shape.name}: position {row} differs between prefill and decoding")


def time_us(run: Callable[[], object], on_gpu: bool, repeats: int = 20) -> float:
    """Median time of `run`, replayed as a CUDA graph where there is a GPU."""
    run()
    if not on_gpu:
        begun = perf_counter()
        run()
        return (perf_counter() - begun) * 1e6
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return median(times)


def measure(shape: Shape, work: Work, device: torch.device, variant: Variant) -> Measurement:
    """Time one piece of work."""
    on_gpu = device.type == "cuda"
    rows = Rows(shape, work, device, variant)
    layers = max(1, min(MAX_LAYERS, -(-LAYERS_BYTES // rows.kv_bytes))) if on_gpu else 1
    run, build = rows.attend([rows.cache() for _ in range(layers)])
    worklist_us = time_us(build, on_gpu)
    attention_us = time_us(run, on_gpu) / layers
    assert not run().isnan().any()
    flop = 4 * shape.num_heads * shape.head_dim * work.pairs
    return Measurement(
        shape.name,
        work.requests,
        work.rows,
        work.context,
        variant.int8,
        variant.large_tiles,
        attention_us,
        worklist_us,
        rows.kv_bytes / attention_us / 1e3,
        rows.kv_bytes / PEAK_BYTES_PER_S * 1e6 / attention_us,
        flop / attention_us / 1e6,
    )


def table_of(rows: list[Measurement], hardware: str) -> Table:
    table = Table(title=f"attention, bfloat16, blocks of {BLOCK_SIZE}, {hardware}")
    columns = ("shape", "requests", "rows", "context", "KV", "tiles", "µs", "list µs", "KV GB/s", "of peak", "TFLOP/s")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.shape,
            str(row.requests),
            str(row.rows),
            str(row.context),
            "int8" if row.int8 else "bf16",
            "large" if row.large_tiles else "small",
            f"{row.attention_us:.1f}",
            f"{row.worklist_us:.1f}",
            f"{row.kv_gb_per_s:.0f}",
            f"{row.kv_fraction:.1%}",
            f"{row.tflop_per_s:.1f}",
        )
    return table


def main(
    results: Annotated[Path, typer.Option(help="folder for the JSON file")] = Path("benchmarks/results"),
    part: Annotated[list[Part] | None, typer.Option(help="what to time; all if not given")] = None,
    rehearse: Annotated[bool, typer.Option(help="tiny shapes; runs under Triton's interpreter too")] = False,
) -> None:
    """Time decoding at short and long contexts, verification and prefill, after a check of the bits."""
    device = torch.device("cpu" if INTERPRETED else "cuda")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "Triton's interpreter"
    works = REHEARSAL if rehearse else [pair for chosen in part or PARTS for pair in PARTS[chosen]]
    for shape in dict.fromkeys(shape for shape, _ in works):
        for int8 in (False, True):
            check_bits(shape, device, int8, *((4, 70) if rehearse else (256, 1100)))
    print("the same bits in batches of all sizes and in a prefill")
    rows = []
    for shape, work in works:
        for int8 in (False, True):
            # A step of decoding rows alone may use either kernel: the leaner one, and the one that serves chunks too.
            for large_tiles in (False, True):
                rows.append(measure(shape, work, device, Variant(int8, large_tiles)))
    Console(width=120).print(table_of(rows, hardware))
    results.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    record = {
        "hardware": hardware,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "time": now.isoformat(timespec="seconds"),
        "peak_bytes_per_s": PEAK_BYTES_PER_S,
        "rows": [asdict(row) for row in rows],
    }
    path = results / f"attention-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    typer.run(main)
