"""From nothing to a first token, by phases: `python -m benchmarks.cold_start --shape tinyllama-1.1b --device cuda`.

Random weights of a known shape are written to a safetensors file. Then an engine alone starts from it, in a process of
its own; and the service, whose engines are scaled to zero, gets a request. The file is in memory, as it was just
written; what Triton's cache holds is written down.
"""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.hardware import hardware_name
from benchmarks.parts import SERVICE, run_part
from benchmarks.service import app_config, serve_it
from benchmarks.service_clients import HOST, Clients, Traffic
from benchmarks.shapes import SHAPES, RandomCheckpoint, ShapeName
from benchmarks.start import cache_state, num_compiled
from engine.config import Device
from engine.loader.converted_directory import config_fields
from engine.model.expected_tensors import expected_tensors
from serve_app.app import load_engine
from serve_app.config import AppConfig
from serve_app.ports import free_port

INPUT_TOKENS, OUTPUT_TOKENS = 128, 4
SETTLE_S = 5.0  # until the service rests
errors = Console(stderr=True)


def write_model(shape: str, device: str, directory: Path) -> None:
    """config.json and model.safetensors, in bfloat16. Requests have token ids: a tokenizer is not needed."""
    checkpoint = RandomCheckpoint(SHAPES[shape], torch.device(device))
    (directory / "config.json").write_text(json.dumps(config_fields(checkpoint.config)))
    names = expected_tensors(checkpoint.config)
    save_file({name: checkpoint.load(name).bfloat16().cpu() for name in names}, directory / "model.safetensors")


def load_timed(config: AppConfig, report: Path) -> Any:
    """The engine. `report` then holds when that began and ended, by time.monotonic(), and the seconds of its phases."""
    from engine.runner.start_up import StartUp

    began_s = time.monotonic()
    start_up = StartUp()
    engine = load_engine(config, start_up=start_up)
    ready_s = time.monotonic()
    phases = {f"{phase.name.lower()}_s": seconds for phase, seconds in start_up.seconds.items()}
    report.write_text(json.dumps({"began_s": began_s, "ready_s": ready_s, "phases": phases}))
    return engine


def since(asked_s: float, report: Path) -> dict[str, float]:
    """Until loading began, of each phase, and until the engine was ready."""
    times = json.loads(report.read_text())
    return {"process_s": times["began_s"] - asked_s, **times["phases"], "ready_s": times["ready_s"] - asked_s}


def run_engine(directory: Path, config: AppConfig, asked_s: float) -> dict[str, float]:
    """Of this process, which was asked for at `asked_s`."""
    report = directory / "report.json"
    load_timed(config.model_copy(update={"model": str(directory)}), report)
    return since(asked_s, report)


def run_service(directory: Path, shape: str, config: AppConfig) -> dict[str, float]:
    """Of the first request to a service without an engine: the decision to have a replica, Ray's process for it, and
    Serve in that, come before loading."""
    report = directory / "report.json"
    report.unlink(missing_ok=True)
    port = free_port(HOST)
    written = config.model_copy(update={"model": str(directory)})  # the ingress has the other one's tokenizer
    end = serve_it(shape, config, port, lambda _: load_timed(written, report))
    clients = Clients(Traffic(port, SHAPES[shape].vocab_size, INPUT_TOKENS, OUTPUT_TOKENS), 1)
    try:
        time.sleep(SETTLE_S)
        assert not report.exists(), "an engine was there before it was needed"
        [answer] = clients.together(1)
        [warm] = clients.together(1)
    finally:
        clients.close()
        end()
    first_s, next_s = (each.first_s - each.sent_s for each in (answer, warm))
    return {**since(answer.sent_s, report), "first_token_s": first_s, "next_first_token_s": next_s}


def main(
    shape: ShapeName = "tinyllama-1.1b",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    argument: Annotated[list[str] | None, typer.Option(help="of the application, such as quantization=int8")] = None,
    repeats: Annotated[int, typer.Option(help="starts of each kind")] = 2,
    results: Annotated[Path, typer.Option(help="folder for the JSON file")] = Path("benchmarks/results"),
    part: Annotated[str, typer.Option(hidden=True)] = "",
    directory: Annotated[Path, typer.Option(hidden=True)] = Path(),
    asked_s: Annotated[float, typer.Option(hidden=True)] = 0.0,
) -> None:
    """How long an engine takes to start, alone and as a replica that a request has waited for."""
    config = app_config(device, ["min_replicas=0", "max_replicas=1", *(argument or [])])
    if part == "engine":
        print(json.dumps(run_engine(directory, config, asked_s)), flush=True)
        return
    if part == SERVICE:
        print(json.dumps(run_service(directory, shape, config)), flush=True)
        return
    rows = []
    with TemporaryDirectory() as written:
        with errors.status("writing the model"):
            write_model(shape, device, Path(written))
        for subject in ("engine", SERVICE):
            for repeat in range(repeats):
                before = num_compiled() if device == "cuda" else 0
                with errors.status(f"{subject}, start {repeat + 1} of {repeats}"):
                    given = ("--directory", written, "--asked-s", str(time.monotonic()))
                    seconds = run_part("benchmarks.cold_start", subject, *given)
                cache = cache_state(before, num_compiled()) if device == "cuda" else "no Triton"
                rows.append({"subject": subject, "start": repeat + 1, "triton_cache": cache, **seconds})
    hardware = hardware_name(Device(device))
    Console().print(table_of(f"{shape} on {hardware}, seconds", rows))
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "torch": torch.__version__,
        "shape": shape,
        "service_arguments": " ".join(argument or []),
        "rows": rows,
    }
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"cold-start-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    errors.print(f"written to {path}")


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    """A column for each start. "process" is until loading began; "ready" and what follows count from the beginning."""
    table = Table("", *(f"{row['subject']}\n{row['triton_cache']}" for row in rows), title=title)
    for name in dict.fromkeys(name for row in rows for name in row if name.endswith("_s")):
        cells = (f"{row[name]:.2f}" if name in row else "" for row in rows)
        table.add_row(name.removesuffix("_s").replace("_", " "), *cells)
    return table


if __name__ == "__main__":
    typer.run(main)
