"""Speed of the engine alone, without HTTP: `python -m benchmarks.engine --batch 1,8,32 --input 128 --output 128`."""

import json
import platform
import random
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.shapes import SHAPES, RandomCheckpoint, weight_bytes
from engine.config import CacheConfig, Device, DType, EngineConfig, SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.loader.fetch import resolve_model
from engine.loader.progress import progress_on
from engine.request import Request, SamplingParams


@dataclass(frozen=True)
class Measurement:
    """One batch size: `output_tokens_per_s` counts decoding only, from the step after the last prefill."""

    batch: int
    input_tokens: int
    output_tokens: int
    ttft_s: float
    step_time_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float


def measure(
    engine: LLMEngine, batch: int, input_tokens: int, output_tokens: int, sampling: SamplingParams
) -> Measurement:
    """Run `batch` requests of random tokens together and time every step."""
    draw = random.Random(batch)
    requests = [
        Request(f"{batch}-{index}-{perf_counter()}", draw.choices(range(engine.vocab_size), k=input_tokens), sampling)
        for index in range(batch)
    ]
    started = perf_counter()
    for request in requests:
        engine.add(request)
    while any(not request.output_token_ids for request in requests):
        engine.step()
    ttft_s = perf_counter() - started
    prefilled = sum(len(request.output_token_ids) for request in requests)
    steps = []
    while engine.has_work:
        begun = perf_counter()
        engine.step()
        steps.append(perf_counter() - begun)
    produced = sum(len(request.output_token_ids) for request in requests)
    return Measurement(
        batch,
        input_tokens,
        output_tokens,
        ttft_s,
        median(steps),
        (produced - prefilled) / sum(steps),
        produced / (ttft_s + sum(steps)),
    )


def hardware_name(device: Device) -> str:
    """The card's name, or the processor's with the number of threads."""
    if device is Device.CUDA:
        return torch.cuda.get_device_name()
    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main(
    model: Annotated[str, typer.Option(help="catalogue name, hub id, directory or GGUF file")] = "smollm2-135m",
    shape: Annotated[str, typer.Option(help=f"in its place, random weights: {', '.join(SHAPES)}")] = "",
    batch: Annotated[str, typer.Option(help="batch sizes, separated by commas")] = "1,8,32",
    input: Annotated[int, typer.Option(help="prompt tokens of each request")] = 128,
    output: Annotated[int, typer.Option(help="output tokens of each request")] = 128,
    device: Device = Device.CPU,
    dtype: DType | None = None,
    temperature: float = 0.0,
    repeats: Annotated[int, typer.Option(help="runs of each size; the one with the median speed is shown")] = 3,
    results: Annotated[Path, typer.Option(help="folder for the JSON file")] = Path("benchmarks/results"),
) -> None:
    """Time prefill and decoding at given batch sizes."""
    sizes = [int(size) for size in batch.split(",")]
    config = EngineConfig(
        device=device,
        dtype=dtype,
        cache=CacheConfig(enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=max(sizes), max_model_len=input + output),
    )
    checkpoint: Checkpoint
    if shape:
        model = f"{shape} (random weights)"
        checkpoint = RandomCheckpoint(SHAPES[shape], torch.device(device))
    else:
        from serve_app.config import cache_dir  # random weights need nothing of the service

        checkpoint = open_checkpoint(resolve_model(model, cache_dir=cache_dir(), progress=progress_on()))
    begun = perf_counter()
    engine = LLMEngine.from_checkpoint(checkpoint, config)
    load_s = perf_counter() - begun
    sampling = SamplingParams(temperature=temperature, seed=1, max_tokens=output, ignore_eos=True)
    warm_up = replace(sampling, max_tokens=min(output, 4))
    rows = []
    for size in track(sizes, description="measuring", console=Console(stderr=True)):
        for _ in range(2):  # compiles kernels and captures graphs, of which each number of rows has its own
            measure(engine, size, input, warm_up.max_tokens, warm_up)
        runs = sorted(
            (measure(engine, size, input, output, sampling) for _ in range(repeats)),
            key=lambda run: run.output_tokens_per_s,
        )
        rows.append(runs[len(runs) // 2])
    hardware = hardware_name(device)
    step_bytes = weight_bytes(checkpoint.config, getattr(torch, engine.dtype).itemsize)
    table = Table(title=f"{model}, {engine.dtype}, {hardware}; loaded in {load_s:.1f} s")
    for column in ("batch", "input", "output", "TTFT ms", "step ms", "decode tok/s", "overall tok/s", "weights GB/s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row.batch),
            str(row.input_tokens),
            str(row.output_tokens),
            f"{row.ttft_s * 1e3:.0f}",
            f"{row.step_time_s * 1e3:.1f}",
            f"{row.output_tokens_per_s:.1f}",
            f"{row.total_tokens_per_s:.1f}",
            f"{step_bytes / row.step_time_s / 1e9:.0f}",
        )
    Console().print(table)
    results.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    file = results / f"engine-{now:%Y%m%d-%H%M%S}.json"
    report = {
        "hardware": hardware,
        "model": model,
        "dtype": engine.dtype,
        "torch": torch.__version__,
        "time": now.isoformat(timespec="seconds"),
        "load_s": load_s,
        "weight_bytes_per_step": step_bytes,
        "measurements": [asdict(row) for row in rows],
    }
    file.write_text(json.dumps(report, indent=2) + "\n")
    Console().print(f"written to {file}")


if __name__ == "__main__":
    typer.run(main)
