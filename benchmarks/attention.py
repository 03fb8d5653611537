"""Speed of the attention kernel: `python -m benchmarks.attention`, or `--rehearse` where there is no GPU.

Every call has keys and values of its own, as every layer has, so that no cache keeps them from one call to the next.
The times are of CUDA graphs; building the worklist, once a step, is timed by itself.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
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
class Measurement:
    """Times are of one call; kv_fraction: of the time that reading keys and values once takes at the peak."""

    shape: str
    requests: int
    rows: int
    context: int
    large_tiles: bool
    attention_us: float
    worklist_us: float
    kv_gb_per_s: float
    kv_fraction: float
    tflop_per_s: float


SHAPES = [Shape("tinyllama-1.1b", 32, 4, 64), Shape("mistral-7b", 32, 8, 128)]
DECODE = [Work(requests, 1, context) for requests in (1, 8, 32, 64, 256) for context in (128, 512, 2048, 8192)]
PREFILL = [Work(1, tokens, tokens) for tokens in (128, 1024, 2048)]
VERIFY = [Work(32, 5, 600), Work(1, 16, 8192)]
REHEARSAL = ([Shape("tiny", 4, 2, 64)], [Work(2, 1, 300), Work(1, 40, 40)])


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


def measure(shape: Shape, work: Work, device: torch.device, large_tiles: bool) -> Measurement:
    """Time one piece of work in bfloat16 at blocks in random places."""
    on_gpu = device.type == "cuda"
    blocks = -(-work.context // BLOCK_SIZE)
    num_blocks = work.requests * blocks
    kv_shape = (2, num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    kv_bytes = 2 * work.requests * work.context * shape.num_kv_heads * shape.head_dim * 2
    layers = max(1, min(MAX_LAYERS, -(-LAYERS_BYTES // kv_bytes))) if on_gpu else 1
    caches = [torch.empty(kv_shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(layers)]
    rows = work.requests * work.rows
    q = torch.randn(rows, shape.num_heads, shape.head_dim, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(q)
    block_tables = torch.randperm(num_blocks, device=device).view(work.requests, blocks).int()
    requests = torch.arange(work.requests, device=device, dtype=torch.int32).repeat_interleave(work.rows)
    positions = torch.arange(work.context - work.rows, work.context, device=device).repeat(work.requests)
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    workspace = attention_workspace(rows, *heads, work.context, torch.bfloat16, device, large_tiles=large_tiles)

    def attend() -> None:
        for k_cache, v_cache in caches:
            flash_attention(q, k_cache, v_cache, block_tables, workspace, shape.head_dim**-0.5, out)

    worklist_us = time_us(lambda: build_worklist(workspace, requests, positions), on_gpu)
    attention_us = time_us(attend, on_gpu) / layers
    assert not out.isnan().any()
    flop = 4 * shape.num_heads * shape.head_dim * work.pairs
    return Measurement(
        shape.name,
        work.requests,
        work.rows,
        work.context,
        large_tiles,
        attention_us,
        worklist_us,
        kv_bytes / attention_us / 1e3,
        kv_bytes / PEAK_BYTES_PER_S * 1e6 / attention_us,
        flop / attention_us / 1e6,
    )


def table_of(rows: list[Measurement], hardware: str) -> Table:
    table = Table(title=f"attention, bfloat16, blocks of {BLOCK_SIZE}, {hardware}")
    columns = ("shape", "requests", "rows", "context", "tiles", "µs", "worklist µs", "KV GB/s", "of peak", "TFLOP/s")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.shape,
            str(row.requests),
            str(row.rows),
            str(row.context),
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
    rehearse: Annotated[bool, typer.Option(help="tiny shapes; runs under Triton's interpreter too")] = False,
) -> None:
    """Time decoding, verification and prefill."""
    device = torch.device("cpu" if INTERPRETED else "cuda")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "Triton's interpreter"
    shapes, works = REHEARSAL if rehearse else (SHAPES, DECODE + VERIFY + PREFILL)
    rows = []
    for shape in shapes:
        for work in works:
            # A step of decoding rows alone may use either kernel: the leaner one, and the one that serves chunks too.
            for large_tiles in (False, True):
                rows.append(measure(shape, work, device, large_tiles))
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
