"""Memory as it is planned against what it turns out to be: `python -m benchmarks.memory --shape … --device cuda`.

Each number format and context length has an engine in a process of its own.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.hardware import hardware_name
from benchmarks.memory_engine import Order
from benchmarks.shapes import ShapeName
from engine.config import Device, KVCacheDType, Quantization
from engine.loader.fetch import resolve_model
from engine.loader.progress import progress_on

errors = Console(stderr=True)
PATIENCE_S = 600.0  # kernels may have to be compiled
PARTS = ("weights", "workspace", "sampler", "kv_cache", "graph")


def compare(order: Order) -> dict[str, Any]:
    """The engine's formats and limits, with what was predicted and measured."""
    command = [sys.executable, "-m", "benchmarks.memory_engine"]
    done = subprocess.run(
        command, input=json.dumps(asdict(order)), stdout=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=True
    )
    kept = ("quantization", "kv_cache_dtype", "max_model_len", "max_num_seqs", "token_budget")
    return {name: getattr(order, name) for name in kept} | json.loads(done.stdout.splitlines()[-1])


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    """MiB, predicted / measured, and of what can be told apart the error of the prediction."""
    table = Table(title=title)
    names = [name for name in PARTS if any(f"{name}_bytes" in row["measured"] for row in rows)]
    for name in ("weights", "KV", "context", *(f"{name}, MiB" for name in names)):
        table.add_column(name, justify="right")
    for row in rows:
        cells = []
        for name in names:
            predicted, measured = (row[kind][f"{name}_bytes"] for kind in ("predicted", "measured"))
            error = f" ({predicted / measured - 1:+.1%})" if measured else ""
            cells.append(f"{predicted / 2**20:,.1f} / {measured / 2**20:,.1f}{error}")
        table.add_row(row["quantization"], row["kv_cache_dtype"], str(row["max_model_len"]), *cells)
    return table


def main(
    model: Annotated[str, typer.Option(help="catalogue name, hub id, directory or GGUF file")] = "smollm2-135m",
    shape: ShapeName = "",
    device: Device = Device.CPU,
    quantization: Annotated[str, typer.Option(help="separated by commas")] = "none,int8,w8a8",
    kv_cache_dtype: Annotated[str, typer.Option(help="separated by commas")] = "auto,int8",
    context: Annotated[str, typer.Option(help="max_model_len, separated by commas")] = "512,2048",
    max_num_seqs: int = 64,
    token_budget: Annotated[int | None, typer.Option(help="left out: 2048 on a GPU, 256 on a CPU")] = None,
    results: Annotated[Path, typer.Option(help="folder for the JSON file")] = Path("benchmarks/results"),
) -> None:
    """Start an engine for each format and context length; compare the plan with what is then taken."""
    path = ""
    if not shape:
        from serve_app.config import cache_dir  # random weights need nothing of the service

        path = str(resolve_model(model, cache_dir=cache_dir(), progress=progress_on()))
    budget = token_budget or (2048 if device is Device.CUDA else 256)
    formats = product(quantization.split(","), kv_cache_dtype.split(","), map(int, context.split(",")))
    orders = [
        Order(path, shape, device, Quantization(weights), KVCacheDType(kv), length, max_num_seqs, budget)
        for weights, kv, length in formats
    ]
    rows = [compare(order) for order in track(orders, description="starting", console=errors, transient=True)]
    hardware, name = hardware_name(device), f"{shape} (random weights)" if shape else model
    Console().print(table_of(f"{name}, {hardware}: predicted / measured", rows))
    now = datetime.now(UTC)
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"memory-{now:%Y%m%d-%H%M%S}.json"
    report = {"time": now.isoformat(timespec="seconds"), "torch": torch.__version__, "hardware": hardware}
    file.write_text(json.dumps(report | {"model": name, "rows": rows}, indent=2) + "\n")
    Console().print(f"written to {file}")


if __name__ == "__main__":
    typer.run(main)
