"""Speed of the decode layer's products: `python -m benchmarks.kernels --shape tinyllama --rows 1,8,32 --out FOLDER`.

Every kernel runs many times in one CUDA graph over several copies of its weights, more than the L2 cache holds, each
launch dependent on the one before as in the engine. A configuration is timed only if its bits equal the reference
configuration's; `--sweep` tries many of them. `--rehearse` goes through all of it on tiny shapes without a GPU.
"""

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
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

PEAK_BYTES_PER_S = 3.35e12  # an H100 SXM's datasheet
COPIES_BYTES = 240e6  # of weights: several times an H100's L2


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder layer."""

    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    head_norm: bool = False


SHAPES = {
    "tinyllama": Shape(2048, 5632, 32, 4, 64, 32000),
    "smollm2": Shape(576, 1536, 9, 3, 64, 49152),
    "mistral": Shape(4096, 14336, 32, 8, 128, 32000),
    "qwen3": Shape(1024, 3072, 16, 8, 128, 151936, head_norm=True),
    "tiny": Shape(64, 48, 2, 1, 16, 101),
}
PRODUCTS = ("qkv", "o", "gate_up", "down", "logits")


class Case:
    """One product of a layer at some number of rows, with copies of its weights.

    launch: runs the kernel on the i-th copy and returns the tensors that it wrote. composed: the plain-torch twin.
    library: the product alone, by torch's library.
    """

    def __init__(self, name: str, shape: Shape, rows: int, device: str, copies: int | None = None) -> None:
        self.name, self.shape, self.rows, self.device = name, shape, rows, device
        heads = shape.num_heads + 2 * shape.num_kv_heads
        self.outputs, self.features = {
            "qkv": (heads * shape.head_dim, shape.hidden),
            "o": (shape.hidden, shape.num_heads * shape.head_dim),
            "gate_up": (2 * shape.ffn, shape.hidden),
            "down": (shape.hidden, shape.ffn),
            "logits": (shape.vocab, shape.hidden),
        }[name]
        self.kernel = {
            "qkv": "norm_qkv_head_norm_rope" if shape.head_norm else "norm_qkv_rope",
            "o": "product_residual",
            "gate_up": "norm_gate_up_silu",
            "down": "product_residual",
            "logits": "norm_logits",
        }[name]
        weight_bytes = 2 * self.outputs * self.features
        self.copies = copies or max(4, -(-int(COPIES_BYTES) // weight_bytes))
        draw = torch.Generator(device).manual_seed(1)
        self.weights = [
            torch.randn(self.outputs, self.features, generator=draw, device=device).mul_(self.features**-0.5).bfloat16()
            for _ in range(self.copies)
        ]
        self.x = torch.randn(rows, self.features, generator=draw, device=device).bfloat16()
        self.normed = torch.empty_like(self.x)
        self.norm = torch.rand(self.features, generator=draw, device=device) + 0.5
        self.launch: Callable[[int, Any], list[torch.Tensor]]
        self.composed: Callable[[int], object]
        getattr(self, f"_prepare_{'residual' if name in ('o', 'down') else name}")(draw)
        written = sum(t.numel() * t.element_size() for t in self.launch(0, None))
        self.bytes = weight_bytes + self.x.numel() * 2 + written

    def library(self, index: int) -> object:
        return torch.nn.functional.linear(self.x, self.weights[index])

    def _prepare_qkv(self, draw: torch.Generator) -> None:
        from engine.kernels import reference
        from engine.kernels.norm_qkv_rope import QKVWeights, norm_qkv_rope

        shape, rows = self.shape, self.rows
        angle = torch.rand(4096, shape.head_dim // 2, generator=draw, device=self.device) * 6
        rope = (angle.cos(), angle.sin())
        positions = torch.arange(rows, device=self.device) + 100
        blocks = rows // 16 + 2
        both = torch.zeros(2, blocks, 16, shape.num_kv_heads, shape.head_dim, device=self.device, dtype=torch.bfloat16)
        kv, slots = (both[0], both[1]), torch.arange(rows, device=self.device) + 16
        q = torch.empty(rows, shape.num_heads, shape.head_dim, device=self.device, dtype=torch.bfloat16)
        head = torch.ones(shape.head_dim, device=self.device) if shape.head_norm else None
        sizes = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        ours = [QKVWeights(self.norm, w, None, head, head, 1e-5, *sizes) for w in self.weights]
        theirs = [reference.QKVProjection(self.norm, w, None, head, head, 1e-5, *sizes) for w in self.weights]

        def launch(index: int, configuration: Any) -> list[torch.Tensor]:
            norm_qkv_rope(
                self.x, ours[index], rope, positions, slots, q, kv, normed=self.normed, configuration=configuration
            )
            return [q, both.flatten(1, 2)[:, 16 : 16 + rows]]

        self.launch = launch
        self.composed = lambda index: reference.norm_qkv_rope(self.x, theirs[index], rope, positions, slots, kv)

    def _prepare_residual(self, draw: torch.Generator) -> None:
        from engine.kernels import reference
        from engine.kernels.product_residual import product_residual

        residual = torch.randn(self.rows, self.outputs, generator=draw, device=self.device).bfloat16()
        out = torch.empty_like(residual)

        def launch(index: int, configuration: Any) -> list[torch.Tensor]:
            product_residual(self.x, self.weights[index], residual, out, configuration=configuration)
            return [out]

        self.launch = launch
        self.composed = lambda index: reference.product_residual(self.x, self.weights[index], residual)

    def _prepare_gate_up(self, _: torch.Generator) -> None:
        from engine.kernels import reference
        from engine.kernels.norm_gate_up_silu import norm_gate_up_silu

        out = torch.empty(self.rows, self.outputs // 2, device=self.device, dtype=torch.bfloat16)

        def launch(index: int, configuration: Any) -> list[torch.Tensor]:
            norm_gate_up_silu(
                self.x, self.norm, 1e-5, self.weights[index], out, normed=self.normed, configuration=configuration
            )
            return [out]

        self.launch = launch
        self.composed = lambda index: reference.norm_gate_up_silu(self.x, self.norm, 1e-5, self.weights[index])

    def _prepare_logits(self, _: torch.Generator) -> None:
        from engine.kernels import reference
        from engine.kernels.norm_logits import norm_logits

        out = torch.empty(self.rows, self.outputs, device=self.device)

        def launch(index: int, configuration: Any) -> list[torch.Tensor]:
            norm_logits(
                self.x, self.norm, 1e-5, self.weights[index], out, normed=self.normed, configuration=configuration
            )
            return [out]

        self.launch = launch
        self.composed = lambda index: reference.norm_logits(self.x, self.norm, 1e-5, self.weights[index])

    def bits(self, configuration: Any) -> list[torch.Tensor]:
        """What the kernel writes for the first weights, over poisoned outputs."""
        for tensor in self.launch(0, configuration):
            tensor.fill_(float("nan"))
        self.normed.fill_(float("nan"))
        return [tensor.clone() for tensor in self.launch(0, configuration)]


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
    configuration: dict[str, Any]
    time_us: float | None
    bytes_per_s: float | None
    problem: str | None = None


def measure(case: Case, configuration: Any, expected: list[torch.Tensor]) -> Result:
    """Time a configuration whose bits are `expected`; any others are reported instead."""
    where = (case.name, case.kernel, case.rows, case.outputs, case.features, asdict(configuration))
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


def candidates(case: Case, rehearse: bool) -> Iterator[Any]:
    """First round of a sweep: tiles and stages; `refinements` tries the rest on the best of them."""
    from engine.kernels.configurations import Configuration, row_bucket

    rows = case.rows
    block_n = max(16, row_bucket(rows))
    tiles: list[tuple[int, int, int]] = {
        16: [(16, 128, 2), (16, 256, 1), (16, 256, 2), (16, 256, 4), (16, 512, 4), (32, 128, 2), (32, 128, 4),
             (32, 256, 2), (32, 256, 4), (64, 64, 4), (64, 128, 4)],
        32: [(16, 128, 4), (16, 256, 4), (32, 64, 4), (32, 128, 4), (32, 256, 4), (64, 64, 4), (64, 128, 4)],
        64: [(16, 128, 4), (32, 64, 4), (32, 128, 4), (64, 64, 4), (64, 128, 4), (128, 64, 8)],
        128: [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)],
    }[block_n]  # fmt: skip
    if case.shape.head_norm and case.name == "qkv":  # a tile is a head there
        width = 1 << (case.shape.head_dim - 1).bit_length()
        tiles = [(width, block_k, warps) for block_k, warps in product((32, 64, 128), (4, 8))]
    for (block_m, block_k, num_warps), num_stages in product(tiles[:2] if rehearse else tiles, (3, 4, 6)):
        tile_bytes = 2 * block_k * (block_m + block_n)
        if num_stages * tile_bytes <= 200 * 1024 and not (rehearse and num_stages > 3):
            fuse_norm = rows <= 16
            preload = 0 if rows > 64 else 1
            yield Configuration(block_m, block_n, block_k, num_warps, num_stages, preload, fuse_norm=fuse_norm)


def refinements(best: Any, rows: int, has_norm: bool) -> Iterator[Any]:
    """Second round: what surrounds the loop."""
    for preload, prefetch in product((0, 1, 2), (False, True)):
        for fuse_norm in (True, False) if has_norm and rows <= 64 else (best.fuse_norm,):
            for one_row in (False, True) if rows == 1 else (False,):
                changed = replace(best, preload=preload, prefetch=prefetch, fuse_norm=fuse_norm, one_row=one_row)
                if changed != best:
                    yield changed


def _compile(shape: Shape, device: str, todo: list[tuple[str, int, Any]]) -> None:
    """In a process of its own: fill Triton's cache on disk."""
    for name, rows, configuration in todo:
        try:
            Case(name, shape, rows, device, copies=1).launch(0, configuration)
        except Exception as error:  # reported when it is measured
            print(f"{name} {rows} {configuration}: {type(error).__name__}")
    if device == "cuda":
        torch.cuda.synchronize()


class Sweep:
    """The fastest configuration of a case, in two rounds; compiles on several processes ahead of each."""

    def __init__(self, shape: Shape, device: str, workers: int, rehearse: bool) -> None:
        self._shape, self._device, self._rehearse, self._workers = shape, device, rehearse, workers
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else None

    def run(self, case: Case, expected: list[torch.Tensor]) -> list[Result]:
        first = list(candidates(case, self._rehearse))
        results = self._round(case, first, expected)
        by_time = sorted((r for r in results if r.time_us is not None), key=lambda r: r.time_us or 0.0)
        from engine.kernels.configurations import Configuration

        second: list[Any] = []
        for result in by_time[: 1 if self._rehearse else 2]:
            has_norm = case.kernel != "product_residual"
            second += refinements(Configuration(**result.configuration), case.rows, has_norm)
        return results + self._round(case, second[:2] if self._rehearse else second, expected)

    def _round(self, case: Case, configurations: list[Any], expected: list[torch.Tensor]) -> list[Result]:
        if self._pool is not None:
            todo = [(case.name, case.rows, configuration) for configuration in configurations]
            parts = [todo[start :: self._workers] for start in range(self._workers)]
            list(self._pool.map(_compile, *zip(*((self._shape, self._device, p) for p in parts if p), strict=True)))
        return [measure(case, configuration, expected) for configuration in configurations]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _print(console: Console, case: Case, result: Result, library_us: float, composed_us: float) -> None:
    if result.time_us is None or result.bytes_per_s is None:
        speed = f"[red]{result.problem}[/red]"
    else:
        share = result.bytes_per_s / PEAK_BYTES_PER_S
        speed = f"{result.time_us:9.2f} µs {result.bytes_per_s / 1e9:6.0f} GB/s {share:6.1%}"
    console.print(
        f"{case.name:8}{case.rows:5} rows {speed} | product alone {library_us:.2f} µs, composed {composed_us:.2f} µs",
        soft_wrap=True,
    )


def main(
    shape: Annotated[str, typer.Option(help="one of " + ", ".join(SHAPES))] = "tinyllama",
    rows: Annotated[str, typer.Option(help="numbers of rows, with commas")] = "1,8,16,32,64,256",
    products: Annotated[str, typer.Option(help="which products, with commas")] = ",".join(PRODUCTS),
    sweep: Annotated[bool, typer.Option(help="try many configurations and print the fastest")] = False,
    workers: Annotated[int, typer.Option(help="processes that compile ahead in a sweep")] = 8,
    rehearse: Annotated[bool, typer.Option(help="tiny shapes under Triton's interpreter, without a GPU")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for kernels.json")] = None,
) -> None:
    """Time the products of a decoder layer."""
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: engine.kernels is imported late here
        shape, rows, workers = "tiny", "1,17", 1
    elif not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device; --rehearse goes without")
    unknown = set(products.split(",")) - set(PRODUCTS)
    if unknown or shape not in SHAPES:
        raise typer.BadParameter(f"not known: {', '.join(sorted(unknown)) or shape}")
    from engine.kernels.configurations import REFERENCE, Kernel, configuration_for

    device = "cpu" if rehearse else "cuda"
    console = Console(highlight=False)
    sweeper = Sweep(SHAPES[shape], device, workers, rehearse) if sweep else None
    results: list[dict[str, Any]] = []
    for name, count in product(products.split(","), map(int, rows.split(","))):
        case = Case(name, SHAPES[shape], count, device)
        kernel: Kernel = case.kernel  # type: ignore[assignment]
        expected = case.bits(REFERENCE)
        library_us = time_us(case.library, case.copies, device)
        composed_us = time_us(case.composed, case.copies, device)
        table = measure(case, configuration_for(kernel, count, case.outputs, case.features), expected)
        _print(console, case, table, library_us, composed_us)
        tried = sweeper.run(case, expected) if sweeper else []
        fastest = min((r for r in tried if r.time_us is not None), key=lambda r: r.time_us or 0.0, default=None)
        if fastest is not None:
            _print(console, case, fastest, library_us, composed_us)
            console.print(f"         {fastest.configuration}", soft_wrap=True)
        other_bits = [r for r in (table, *tried) if r.problem is not None and "other bits" in r.problem]
        for result in other_bits:
            console.print(f"[red]{name} {count} rows: {result.problem}: {result.configuration}[/red]")
        results.append(
            {
                "library_us": library_us,
                "composed_us": composed_us,
                "table": asdict(table),
                "fastest": None if fastest is None else asdict(fastest),
                "tried": [asdict(r) for r in tried],
            }
        )
        if out is not None:  # after every case: a run that is cut off keeps what it has
            _save(out, shape, device, results)
        del case
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
