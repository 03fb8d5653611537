"""Speed of the engine alone, without HTTP: `python -m benchmarks.engine --batch 1,8,32 --input 128 --output 128`."""

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, track
from rich.table import Table

from benchmarks.engine_runs import Measurement, Throughput, measure, measure_throughput
from benchmarks.hardware import hardware_name
from benchmarks.shapes import SHAPES, RandomCheckpoint, ShapeName
from benchmarks.start import cache_state, num_compiled, shown_start_up
from engine.config import CacheConfig, Device, DType, EngineConfig, KVCacheDType, Quantization, SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.loader.fetch import resolve_model
from engine.loader.progress import progress_on
from engine.precompile.gpus import known_bandwidth
from engine.quantize.formats import resolve_quantization
from engine.request import SamplingParams
from engine.runner.start_up import Phase
from engine.runner.step_bytes import step_kv_bytes, step_weight_bytes

errors = Console(stderr=True)
FIGURES = ("ttft_s", "step_time_s", "output_tokens_per_s", "total_tokens_per_s")  # of a Measurement


@dataclass(frozen=True)
class Subject:
    """An engine that is ready, and what there is to know of it. `load_s`: until its weights were on the device and its
    memory was shared out; `ready_s`: until it could take requests; `triton_cache`: empty where nothing is compiled."""

    engine: LLMEngine
    checkpoint: Checkpoint
    config: EngineConfig
    quantization: Quantization
    load_s: float
    ready_s: float
    triton_cache: str

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.engine.dtype)

    def describe(self) -> str:
        """Its number formats."""
        return f"{self.engine.dtype}, weights {self.quantization}, KV cache {self.config.cache.dtype}"

    def describe_start(self) -> str:
        """How long it took."""
        times = f"loaded in {self.load_s:.1f} s, ready in {self.ready_s:.1f} s"
        return f"{times}, {self.triton_cache}" if self.triton_cache else times

    def fields(self) -> dict[str, Any]:
        """The same for a report."""
        return {
            "dtype": self.engine.dtype,
            "quantization": self.quantization,
            "kv_cache_dtype": self.config.cache.dtype,
            "load_s": self.load_s,
            "ready_s": self.ready_s,
            "triton_cache": self.triton_cache,
        }

    def step_bytes(self, run: Measurement) -> float:
        """That a decoding step in the middle of such a run must read."""
        model, context = self.checkpoint.config, run.input_tokens + run.output_tokens / 2
        weights = step_weight_bytes(model, self.dtype, self.quantization)
        return weights + step_kv_bytes(model, self.dtype, self.config.cache.dtype, run.batch, context)


def start(model: str, shape: str, config: EngineConfig) -> Subject:
    """Load the model, or random weights of a shape."""
    on_gpu = config.device is Device.CUDA
    if not shape:
        from serve_app.config import cache_dir  # random weights need nothing of the service

        path = resolve_model(model, cache_dir=cache_dir(), progress=progress_on())
    compiled_before = num_compiled() if on_gpu else 0
    with shown_start_up() as start_up:
        checkpoint: Checkpoint
        with start_up.phase(Phase.HEADERS):
            checkpoint = (
                RandomCheckpoint(SHAPES[shape], torch.device(config.device)) if shape else open_checkpoint(path)
            )
        engine = LLMEngine.from_checkpoint(checkpoint, config, start_up)
    assert start_up.ready_s is not None
    load_s = sum(start_up.seconds[phase] for phase in (Phase.HEADERS, Phase.WEIGHTS, Phase.MEMORY))
    triton_cache = cache_state(compiled_before, num_compiled()) if on_gpu else ""
    quantization = resolve_quantization(checkpoint.config, config.quantization)
    while engine.prepare_next():  # what a service does when it is idle
        pass
    return Subject(engine, checkpoint, config, quantization, load_s, start_up.ready_s, triton_cache)


def run_batches(
    subject: Subject, sizes: list[int], input_tokens: int, output_tokens: int, sampling: SamplingParams, repeats: int
) -> list[list[Measurement]]:
    """Each batch size `repeats` times, from the slowest run to the fastest: the one in the middle counts."""
    rows = []
    short = replace(sampling, max_tokens=min(output_tokens, 4))
    for size in track(sizes, description="measuring", console=errors, transient=True):
        measure(subject.engine, size, input_tokens, short.max_tokens, short)  # whatever else is made at first use
        runs = sorted(
            (measure(subject.engine, size, input_tokens, output_tokens, sampling) for _ in range(repeats)),
            key=lambda run: run.output_tokens_per_s,
        )
        rows.append(runs)
    return rows


def run_requests(
    subject: Subject, num_requests: int, max_num_seqs: int, input_tokens: int, sampling: SamplingParams
) -> Throughput:
    """All requests at once, with a bar of those that have ended."""
    short = replace(sampling, max_tokens=min(sampling.max_tokens, 4))
    measure(subject.engine, max_num_seqs, input_tokens, short.max_tokens, short)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("requests", total=num_requests)
        return measure_throughput(
            subject.engine, num_requests, max_num_seqs, input_tokens, sampling, lambda ended: bar.advance(task, ended)
        )


def batch_row(subject: Subject, runs: list[Measurement], bytes_per_s: float | None) -> dict[str, Any]:
    """The run in the middle, with what it read: `bandwidth_fraction` is of what the card's datasheet promises. What the
    others gave is beside it, for benchmarks.compare."""
    run = runs[len(runs) // 2]
    step_bytes = subject.step_bytes(run)
    speed = step_bytes / run.step_time_s
    fraction = None if bytes_per_s is None else speed / bytes_per_s
    repeats = {name: [getattr(each, name) for each in runs] for name in FIGURES}
    read = {"step_bytes": step_bytes, "bytes_per_s": speed, "bandwidth_fraction": fraction}
    return asdict(run) | read | {"repeats": repeats}


def batch_table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    names = ("batch", "input", "output", "TTFT ms", "step ms", "decode tok/s", "overall tok/s", "GB/s", "of bandwidth")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        fraction = row["bandwidth_fraction"]
        table.add_row(
            str(row["batch"]),
            str(row["input_tokens"]),
            str(row["output_tokens"]),
            f"{row['ttft_s'] * 1e3:.1f}",
            f"{row['step_time_s'] * 1e3:.2f}",
            f"{row['output_tokens_per_s']:,.1f}",
            f"{row['total_tokens_per_s']:,.1f}",
            f"{row['bytes_per_s'] / 1e9:,.0f}",
            "" if fraction is None else f"{fraction:.0%}",
        )
    return table


def requests_table(title: str, run: Throughput) -> Table:
    table = Table(title=title)
    for name in ("requests", "at once", "input", "output", "total s", "output tok/s", "steps", "preemptions"):
        table.add_column(name, justify="right")
    counts = (run.requests, run.max_num_seqs, run.input_tokens, run.output_tokens)
    speeds = (f"{run.total_s:.2f}", f"{run.output_tokens_per_s:,.1f}")
    table.add_row(*map(str, counts), *speeds, str(run.num_steps), str(run.num_preemptions))
    return table


def write_report(results: Path, report: dict[str, Any]) -> None:
    """A JSON file, named for the time."""
    now = datetime.now(UTC)
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"engine-{now:%Y%m%d-%H%M%S}.json"
    report = {"time": now.isoformat(timespec="seconds"), "torch": torch.__version__} | report
    file.write_text(json.dumps(report, indent=2) + "\n")
    Console().print(f"written to {file}")


def main(
    model: Annotated[str, typer.Option(help="catalogue name, hub id, directory or GGUF file")] = "smollm2-135m",
    shape: ShapeName = "",
    batch: Annotated[str, typer.Option(help="batch sizes, separated by commas")] = "1,8,32",
    requests: Annotated[
        int, typer.Option(help="submit so many at once instead, of which the one size in --batch may run together")
    ] = 0,
    input: Annotated[int, typer.Option(help="prompt tokens of each request")] = 128,
    output: Annotated[int, typer.Option(help="output tokens of each request")] = 128,
    device: Device = Device.CPU,
    dtype: DType | None = None,
    quantization: Quantization = Quantization.NONE,
    kv_cache_dtype: KVCacheDType = KVCacheDType.AUTO,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repeats: Annotated[int, typer.Option(help="runs of each size; the one with the median speed is shown")] = 3,
    results: Annotated[Path, typer.Option(help="folder for the JSON file")] = Path("benchmarks/results"),
) -> None:
    """Time prefill and decoding at given batch sizes, or a queue of requests from its beginning to its end."""
    sizes = [int(size) for size in batch.split(",")]
    if requests and len(sizes) > 1:
        raise typer.BadParameter("with --requests, --batch is one size: how many requests may run at once")
    config = EngineConfig(
        device=device,
        dtype=dtype,
        quantization=quantization,
        cache=CacheConfig(enable_prefix_caching=False, dtype=kv_cache_dtype),
        scheduler=SchedulerConfig(max_num_seqs=max(sizes), max_model_len=input + output),
    )
    subject = start(model, shape, config)
    sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=1, max_tokens=output, ignore_eos=True)
    name = f"{shape} (random weights)" if shape else model
    hardware = hardware_name(device)
    title = f"{name}, {subject.describe()}, {hardware}; {subject.describe_start()}"
    rows: list[dict[str, Any]]
    if requests:
        throughput = run_requests(subject, requests, sizes[0], input, sampling)
        rows, table = [asdict(throughput)], requests_table(title, throughput)
    else:
        batches = run_batches(subject, sizes, input, output, sampling, repeats)
        rows = [batch_row(subject, runs, known_bandwidth(hardware)) for runs in batches]
        table = batch_table(title, rows)
    Console(width=None if Console().is_terminal else 120).print(table)  # in 80 columns, numbers are cut
    report = {"hardware": hardware, "model": name} | subject.fields() | {"temperature": temperature, "top_p": top_p}
    write_report(results, report | {"requests" if requests else "measurements": rows})


if __name__ == "__main__":
    typer.run(main)
