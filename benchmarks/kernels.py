"""Speed of the decode layer's products: `python -m benchmarks.kernels --shape tinyllama --rows 1,8,32 --out FOLDER`.

Every kernel runs many times in one CUDA graph over several copies of its weights, more than the L2 cache holds, each
launch dependent on the one before as in the engine. A configuration is timed only if its bits equal the reference
configuration's; `--sweep` tries many of them. `--rehearse` goes through all of it on tiny shapes without a GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.product_cases import PRODUCTS, SHAPES, Case, Product, Shape

if TYPE_CHECKING:
    from engine.kernels.configurations import Configuration, ManyRows

PEAK_BYTES_PER_S = 3.35e12  # an H100 SXM's datasheet


def time_us(run: Callable[[int], object], copies: int, device: str) -> float:
    """Microseconds of one run, from a graph of at least 20 over all copies; the median of 15 replays."""
    count = copies * -(-20 // copies)
    if device != "cuda":
        started = perf_counter()
        run(0)
        return 1e6 * (perf_counter() - started)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for index in range(count):
                run(index % copies)
        times = []
        for _ in range(18):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end) / count)
    return median(times[3:])


@dataclass(frozen=True)
class Result:
    """Time of one configuration; None where it could not run, with the reason."""

    product: str
    kernel: str
    rows: int
    outputs: int
    features: int
    int8: bool
    configuration: Configuration
    time_us: float | None
    bytes_per_s: float | None
    problem: str | None = None


def measure(case: Case, configuration: Configuration, expected: list[torch.Tensor]) -> Result:
    """Time a configuration whose bits are `expected`; any others are reported instead."""
    where = (case.name, case.kernel, case.rows, case.outputs, case.features, case.int8, configuration)
    try:
        actual = case.bits(configuration)
        if not all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)):
            different = sum(int((a != b).sum()) for a, b in zip(actual, expected, strict=True))
            return Result(*where, None, None, f"other bits in {different} values")
        elapsed_us = time_us(lambda index: case.launch(index, configuration), case.copies, case.device)
    except Exception as error:  # what does not fit the card is one line of the report, not its end
        if case.device == "cuda":
            torch.cuda.synchronize()
        return Result(*where, None, None, f"{type(error).__name__}: {error}"[:200])
    return Result(*where, elapsed_us, case.bytes / elapsed_us * 1e6)


def fastest_of(results: list[Result]) -> list[Result]:
    """Those that ran, the fastest first."""
    return sorted((r for r in results if r.time_us is not None), key=lambda r: r.time_us or 0.0)


def candidates(case: Case, rehearse: bool) -> Iterator[Configuration]:
    """First round of a sweep: every way for few rows, the tiles for many; `refinements` tries the rest on the best."""
    from engine.kernels.configurations import MAX_FEW_ROWS, FewRows, ManyRows, row_bucket

    bucket = max(16, row_bucket(case.rows))
    whole_tiles = not case.shape.head_norm or case.name != "qkv" or case.shape.head_dim % 16 == 0
    if case.rows <= MAX_FEW_ROWS and whole_tiles:
        for steps, preload in product((4,) if rehearse else (4, 8, 16), (1, 2)):
            yield FewRows(steps, preload)
    tiles = product((16, 32, 64, 128), sorted({max(16, bucket // 2), bucket}), (64, 128, 256))
    for block_m, block_n, block_k in list(tiles)[:2] if rehearse else tiles:
        num_warps = 8 if block_m * block_n >= 128 * 64 else 4
        stages = [s for s in (4, 3) if _fits(case, ManyRows(block_m, block_n, block_k, num_warps, s))]
        yield from (ManyRows(block_m, block_n, block_k, num_warps, s) for s in stages[:1])


def refinements(best: ManyRows, case: Case) -> Iterator[Configuration]:
    """Second round: warps and stages of a good tile."""
    for num_warps, num_stages in product((4, 8), (3, 4, 5, 6)):
        changed = replace(best, num_warps=num_warps, num_stages=num_stages)
        if changed != best and _fits(case, changed):
            yield changed


def _fits(case: Case, configuration: ManyRows) -> bool:
    """Whether the GPU has the shared memory; Triton's interpreter needs none."""
    from engine.kernels.shared_memory import product_bytes
    from engine.kernels.target import gpu_of

    gpu = gpu_of(torch.device(case.device))
    if gpu is None:
        return True
    block_m = configuration.block_m
    if case.shape.head_norm and case.name == "qkv":  # a tile is a head there
        block_m = 1 << (case.shape.head_dim - 1).bit_length()
    tile = (block_m, configuration.block_n, configuration.block_k)
    return product_bytes(case.matrices[0], gpu, *tile, configuration.num_stages) <= gpu.shared_bytes


Todo = tuple[Product, int, "Configuration"]


def _compile(shape: Shape, device: str, int8: bool, todo: list[Todo]) -> None:
    """In a process of its own: fill Triton's cache on disk."""
    for name, rows, configuration in todo:
        try:
            Case(name, shape, rows, device, int8=int8, copies=1).launch(0, configuration)
        except Exception as error:  # reported when it is measured
            print(f"{name} {rows} {configuration}: {type(error).__name__}")
    if device == "cuda":
        torch.cuda.synchronize()


class Sweep:
    """The fastest configuration of a case, in two rounds; compiles on several processes ahead of each."""

    def __init__(self, workers: int, rehearse: bool) -> None:
        self._rehearse, self._workers = rehearse, workers
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else None

    def run(self, case: Case, expected: list[torch.Tensor]) -> list[Result]:
        from engine.kernels.configurations import ManyRows

        results = self._round(case, candidates(case, self._rehearse), expected, [])
        second: list[Configuration] = []
        tiles = [r.configuration for r in fastest_of(results) if isinstance(r.configuration, ManyRows)]
        for tile in tiles[: 1 if self._rehearse else 2]:
            second += refinements(tile, case)
        return results + self._round(case, second[:2] if self._rehearse else second, expected, results)

    def _round(
        self, case: Case, tried: Iterator[Configuration] | list[Configuration], expected: list[torch.Tensor],
        before: list[Result],
    ) -> list[Result]:  # fmt: skip
        """Measure what is new among the candidates, as they are fitted to the weight."""
        from engine.kernels.configurations import fitted

        fitting = dict.fromkeys(fitted(c, case.rows, case.matrices[0]) for c in tried)
        new = [c for c in fitting if c not in {r.configuration for r in before}]
        if self._pool is not None:
            parts = [[(case.name, case.rows, c) for c in new[start :: self._workers]] for start in range(self._workers)]
            jobs = [self._pool.submit(_compile, case.shape, case.device, case.int8, part) for part in parts if part]
            for job in jobs:
                job.result()
        return [measure(case, configuration, expected) for configuration in new]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _print(console: Console, case: Case, result: Result, library_us: float, composed_us: float) -> None:
    if result.time_us is None or result.bytes_per_s is None:
        speed = f"[red]{result.problem}[/red]"
    else:
        share = result.bytes_per_s / PEAK_BYTES_PER_S
        speed = f"{result.time_us:9.2f} µs {result.bytes_per_s / 1e9:6.0f} GB/s {share:6.1%} of the peak"
    console.print(
        f"{case.name:8}{case.rows:5} rows {speed} | bfloat16 product alone, cuBLAS {library_us:.2f} µs, "
        f"composed {composed_us:.2f} µs",
        soft_wrap=True,
    )


def _run(console: Console, case: Case, sweep: Sweep | None) -> dict[str, Any]:
    """Measure the table's configuration of a case, and others in a sweep; print, and return the report's entry."""
    from engine.kernels.configurations import REFERENCE, configuration_for

    expected = case.bits(REFERENCE)
    library_us = time_us(case.library, case.copies, case.device)
    composed_us = time_us(case.composed, case.copies, case.device)
    table = measure(case, configuration_for(case.kernel, case.rows, case.matrices[0]), expected)
    _print(console, case, table, library_us, composed_us)
    tried = sweep.run(case, expected) if sweep else []
    fastest = next(iter(fastest_of(tried)), None)
    if fastest is not None:
        _print(console, case, fastest, library_us, composed_us)
        console.print(f"         {fastest.configuration}", soft_wrap=True)
    for result in (table, *tried):
        if result.problem is not None and "other bits" in result.problem:
            console.print(f"[red]{case.name} {case.rows} rows: {result.problem}: {result.configuration}[/red]")
    return {
        "library_us": library_us,
        "composed_us": composed_us,
        "table": asdict(table),
        "fastest": None if fastest is None else asdict(fastest),
        "tried": [asdict(r) for r in tried],
    }


def main(
    shape: Annotated[str, typer.Option(help="one of " + ", ".join(SHAPES))] = "tinyllama",
    rows: Annotated[str, typer.Option(help="numbers of rows, with commas")] = "1,8,16,32,64,256",
    products: Annotated[str, typer.Option(help="which products, with commas")] = ",".join(PRODUCTS),
    int8: Annotated[bool, typer.Option("--int8", help="weights in int8 with a scale a row")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="try many configurations and print the fastest")] = False,
    workers: Annotated[int, typer.Option(help="processes that compile ahead in a sweep")] = 8,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="tiny shapes under Triton's interpreter, without a GPU")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="folder for kernels.json")] = None,
) -> None:
    """Time the products of a decoder layer."""
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: engine.kernels is imported late here
        shape, rows, workers = "tiny", "1,17", 1
    elif not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device; --rehearse goes without")
    chosen = [name for name in PRODUCTS if name in products.split(",")]
    unknown = set(products.split(",")) - set(PRODUCTS)
    if unknown or shape not in SHAPES:
        raise typer.BadParameter(f"not known: {', '.join(sorted(unknown)) or shape}")
    device = "cpu" if rehearse else "cuda"
    console = Console(highlight=False)
    sweeper = Sweep(workers, rehearse) if sweep else None
    results: list[dict[str, Any]] = []
    for name, count in product(chosen, map(int, rows.split(","))):
        case = Case(name, SHAPES[shape], count, device, int8=int8, copies=2 if rehearse else None)
        results.append(_run(console, case, sweeper))
        if out is not None:  # after every case: a run that is cut off keeps what it has
            _save(out, shape, device, results)
    if sweeper:
        sweeper.close()


def _save(out: Path, shape: str, device: str, results: list[dict[str, Any]]) -> None:
    import triton

    out.mkdir(parents=True, exist_ok=True)
    report = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else "interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": {"name": shape, **asdict(SHAPES[shape])},
        "results": results,
    }
    (out / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
