"""The whole service against its engine alone, on one machine: `python -m benchmarks.service --shape tinyllama-1.1b`.

Both serve random weights of a known shape, one after the other, each in a process of its own. Clients, HTTP and engine
share the machine. What the service adds shows in the ratio, and in the time to the first token at part of its capacity.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.engine_runs import measure_throughput
from benchmarks.hardware import hardware_name
from benchmarks.parts import SERVICE, run_part
from benchmarks.service_clients import HOST, Clients, Outcome, Traffic
from benchmarks.shapes import SHAPES, RandomCheckpoint, ShapeName
from engine.config import Device
from engine.request import SamplingParams
from serve_app.app import bind, load_served_model, num_cpu_threads
from serve_app.config import AppConfig, parse_config
from serve_app.ports import free_port
from serve_app.serve_modes import modes_of_this_process

if TYPE_CHECKING:
    from engine.llm_engine import LLMEngine
    from serve_app.draft_link import Resolve

MODULE = "benchmarks.service"
REPEATS = 3  # of the requests that are there at once
errors = Console(stderr=True)


def app_config(device: str, arguments: list[str]) -> AppConfig:
    """arguments: name=value, as `serve run` takes them."""
    given = dict(argument.split("=", 1) for argument in arguments)
    defaults: dict[str, Any] = {"device": device, "served_model_name": "m", "speculative": "off"}
    if device == "cpu":  # as many for the engine alone as the service gives it
        defaults["num_threads"] = num_cpu_threads()
    return parse_config(defaults | given)


def load_engine(shape: str, config: AppConfig) -> Any:
    """Runs in the engine's process, which need not have this package's torch before."""
    from engine.llm_engine import LLMEngine

    checkpoint = RandomCheckpoint(SHAPES[shape], torch.device(config.device))
    engine = LLMEngine.from_checkpoint(checkpoint, config.engine_config(checkpoint.config))
    while engine.prepare_next():  # what a service does when it is idle, and would do between these requests
        pass
    return engine


def run_engine(shape: str, config: AppConfig, num_streams: int, input_tokens: int, output_tokens: int) -> list[float]:
    """Output tokens/s of so many requests at once, over all of their time, of each run."""
    engine = load_engine(shape, config)
    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    short = replace(sampling, max_tokens=4)
    measure_throughput(engine, num_streams, num_streams, input_tokens, short, lambda _: None)
    runs = (
        measure_throughput(engine, num_streams, num_streams, input_tokens, sampling, lambda _: None)
        for _ in range(REPEATS)
    )
    return [run.output_tokens_per_s for run in runs]


def serve_it(
    shape: str, config: AppConfig, port: int, load: Callable[["Resolve | None"], "LLMEngine"]
) -> Callable[[], None]:
    """Starts Ray and the service on it, whose engines `load` makes. Returns what ends both."""
    import ray
    from ray import serve

    def load_model() -> Any:  # a tokenizer that knows all ids of the shape
        model = SHAPES[shape]
        served = load_served_model(config)
        return replace(served, vocab_size=model.vocab_size, max_model_len=config.resolve_max_model_len(model))

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="warning")
    serve.start(http_options={"host": HOST, "port": port})
    serve.run(bind(config, load, load_model))
    return ray.shutdown


def run_service(
    shape: str, config: AppConfig, options: dict[str, Any], num_streams: int, input_tokens: int, output_tokens: int
) -> dict[str, Any]:
    """The same requests through HTTP; then as many as saturate it, and arrivals at part of that."""
    port = free_port(HOST)
    end = serve_it(shape, config, port, lambda _: load_engine(shape, config))
    clients = Clients(Traffic(port, SHAPES[shape].vocab_size, input_tokens, output_tokens), options["processes"])
    warm = Clients(Traffic(port, SHAPES[shape].vocab_size, input_tokens, 4), options["processes"])
    try:
        warm.together(num_streams)
        together = [Outcome.of(clients.together(num_streams), output_tokens) for _ in range(REPEATS)]
        warm.together(options["saturating_streams"])
        saturated = Outcome.of(clients.together(options["saturating_streams"]), output_tokens)
        rate = options["load"] * saturated.output_tokens_per_s / output_tokens
        arriving = Outcome.of(clients.arriving(rate, options["seconds"]), output_tokens)
    finally:
        clients.close()
        warm.close()
        end()
    return {
        "modes": asdict(modes_of_this_process()),
        "together": [asdict(outcome) for outcome in together],
        "saturated": asdict(saturated),
        "arriving": asdict(arriving),
        "offered_requests_per_s": rate,
    }


def main(
    shape: ShapeName = "tinyllama-1.1b",
    streams: Annotated[int, typer.Option(help="requests at once, for the ratio")] = 64,
    saturating_streams: Annotated[int, typer.Option(help="requests at once that are taken for its capacity")] = 256,
    load: Annotated[float, typer.Option(help="arrivals, as a share of that capacity")] = 0.7,
    seconds: Annotated[float, typer.Option(help="of arrivals")] = 20.0,
    input_tokens: Annotated[int, typer.Option("--input", help="prompt tokens of each request")] = 128,
    output_tokens: Annotated[int, typer.Option("--output", help="output tokens of each request")] = 256,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    argument: Annotated[list[str] | None, typer.Option(help="of the application, such as ingress_replicas=4")] = None,
    processes: Annotated[int, typer.Option(help="of clients")] = max(1, (os.cpu_count() or 1) // 4),
    results: Annotated[Path, typer.Option(help="folder for the JSON file")] = Path("benchmarks/results"),
    part: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Speed of the whole service over that of its engine alone, and the time to the first token under load."""
    config = app_config(device, argument or [])
    if part == "engine":
        print(json.dumps(run_engine(shape, config, streams, input_tokens, output_tokens)), flush=True)
        return
    if part == SERVICE:
        options = {"saturating_streams": saturating_streams, "load": load, "seconds": seconds, "processes": processes}
        print(json.dumps(run_service(shape, config, options, streams, input_tokens, output_tokens)), flush=True)
        return
    with errors.status("the engine alone"):
        alone = run_part(MODULE, "engine")
    with errors.status("the whole service"):
        service = run_part(MODULE, SERVICE)
    hardware = hardware_name(Device(device))
    rows = rows_of(alone, service, streams, saturating_streams)
    Console().print(table_of(f"{shape} on {hardware}", rows))
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "cpus": os.cpu_count(),
        "shape": shape,
        "service_arguments": " ".join(argument or []),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "load": load,
        **service["modes"],
        "rows": rows,
    }
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"service-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    errors.print(f"written to {path}")


def rows_of(
    alone: list[float], service: dict[str, Any], num_streams: int, saturating_streams: int
) -> list[dict[str, Any]]:
    """As they are written down; of several runs, the one with the median speed."""
    speed = median(alone)
    runs = [run["output_tokens_per_s"] for run in service["together"]]
    together = sorted(service["together"], key=lambda run: run["output_tokens_per_s"])[len(runs) // 2]
    ratio = together["output_tokens_per_s"] / speed
    return [
        {
            "subject": "engine alone",
            "requests_at_once": num_streams,
            "output_tokens_per_s": speed,
            "repeats": {"output_tokens_per_s": alone},
        },
        {
            "subject": "service",
            "requests_at_once": num_streams,
            "ratio": ratio,
            **together,
            "repeats": {"output_tokens_per_s": runs},
        },
        {"subject": "service", "requests_at_once": saturating_streams, **service["saturated"]},
        {
            "subject": "service, arrivals",
            "offered_requests_per_s": service["offered_requests_per_s"],
            **service["arriving"],
        },
    ]


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table("", "requests", "tokens/s", "of the engine", "TTFT p50 ms", "p99 ms", "under way", title=title)
    for row in rows:
        at_once = row.get("requests_at_once")
        requests = f"{row['offered_requests_per_s']:.1f} a second" if at_once is None else f"{at_once} at once"
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        times = [f"{row[name] * 1000:.0f}" if name in row else "" for name in ("ttft_p50_s", "ttft_p99_s")]
        under_way = f"{row['mean_concurrency']:.0f}" if "mean_concurrency" in row else ""
        table.add_row(row["subject"], requests, f"{row['output_tokens_per_s']:,.0f}", ratio, *times, under_way)
    return table


if __name__ == "__main__":
    typer.run(main)
