"""The same requests against all servers that are installed: `python -m benchmarks.peers`.

Needs `pip install -e '.[load]'`. A peer may live in an environment of its own: `--python vllm=/path/to/its/python`.
"""

import json
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console

from benchmarks.hardware import hardware_name
from benchmarks.peers.agreement import Agreement, compare, reference_of
from benchmarks.peers.catalogue import PEERS, parse_programs, parse_subjects
from benchmarks.peers.model_files import ModelFiles
from benchmarks.peers.peer import Place
from benchmarks.peers.report import doubts, markdown, peer_rows, rows_of
from benchmarks.peers.rounds import Bench, Outcome, own_folder
from benchmarks.peers.workload import Traffic
from engine.config import Device
from engine.errors import ModelError
from engine.loader.catalogue import DEFAULT_MODEL
from engine.loader.fetch import resolve_model
from engine.loader.progress import TerminalProgress
from engine.tokenizer import load_tokenizer
from loadtest.workloads import WORKLOAD_NAMES
from serve_app.config import cache_dir

HOST = "127.0.0.1"
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    model: Annotated[str, typer.Option(help="a name of the catalogue, a directory or a GGUF file")] = DEFAULT_MODEL,
    gguf: Annotated[Path | None, typer.Option(help="the same model, where --model is a directory")] = None,
    peers: Annotated[str, typer.Option(help="who takes part, as `peer` or `peer:format`, with commas")] = ",".join(
        PEERS
    ),
    python: Annotated[
        list[str] | None, typer.Option("--python", help="peer=/path/to/python; of llama-server: its binary")
    ] = None,
    streams: Annotated[str, typer.Option(help="requests at once, one level after the other")] = "1,8",
    requests: Annotated[int, typer.Option(help="of each level in each round, at least")] = 4,
    rounds: Annotated[int, typer.Option(help="in which all peers take turns")] = 3,
    workload: Annotated[str, typer.Option(help="kind of prompts, one of those of the load tests")] = "short_chat",
    seed: Annotated[int, typer.Option(help="of the prompts")] = 0,
    input_tokens: Annotated[int, typer.Option("--input", help="tokens of each prompt, about")] = 128,
    output_tokens: Annotated[int, typer.Option("--output", help="tokens of each answer")] = 64,
    threads: Annotated[int, typer.Option(help="of each peer's computation")] = os.cpu_count() or 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    max_model_len: Annotated[int, typer.Option(help="tokens of a request that each peer must take")] = 1024,
    start_timeout: Annotated[float, typer.Option(help="seconds for a peer to get ready")] = 300.0,
    quiet_timeout: Annotated[float, typer.Option(help="seconds to wait for others to leave the machine alone")] = 60.0,
    attempts: Annotated[int, typer.Option(help="at each level in a round, while others use the machine", min=1)] = 2,
    folder: Annotated[Path, typer.Option(help="for models in other formats, and logs")] = Path("runs/peers"),
    results: Annotated[Path, typer.Option(help="folder for the JSON file")] = Path("benchmarks/results"),
) -> None:
    """Run the same workload against all peers that are installed, and compare."""
    try:
        traffic = Traffic(workload, seed, input_tokens, output_tokens, parse_streams(streams), requests)
        subjects = parse_subjects(peers, parse_programs(python or []))
        path = resolve_model(model, cache_dir=cache_dir(), progress=TerminalProgress(sys.stderr))
        torch.set_num_threads(threads)
        hardware = hardware_name(Device(device))
    except (ValueError, ModelError) as error:
        refuse(str(error))
    if workload not in WORKLOAD_NAMES:
        refuse(f"{workload!r} is not a workload; known are {', '.join(WORKLOAD_NAMES)}")
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(HOST, 0, device, threads, max_model_len, max(traffic.streams), folder)
    with errors.status("") as status:
        files = ModelFiles(path, own_folder(folder, path), gguf)
        show = status.update if errors.is_terminal else errors.print
        bench = Bench(files, place, traffic, start_timeout, quiet_timeout, attempts, show)
        outcomes = [bench.prepare(subject) for subject in subjects]
        try:
            bench.run(outcomes, rounds)
        except KeyboardInterrupt:
            errors.print("interrupted: this is what was measured until then")
    agreements = agreements_of(outcomes, path)
    print(markdown(outcomes, agreements))
    for line in doubts(outcomes):
        errors.print(f"warning: {line}")
    if not any(outcome.samples for outcome in outcomes):
        refuse("no peer was measured")
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "model": model if model == DEFAULT_MODEL else path.name,
        "workload": workload,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "peers": peer_rows(outcomes, agreements),
        "rows": rows_of(outcomes),
    }
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"peers-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    errors.print(f"written to {file}; logs are in {folder}")


def parse_streams(text: str) -> tuple[int, ...]:
    """Of `1,8`. Raises ValueError."""
    levels = tuple(int(part) for part in text.split(",") if part.strip().isdecimal())
    if not levels or min(levels) < 1 or len(levels) != len(text.split(",")):
        raise ValueError(f"{text!r} is not like 1,8")
    return levels


def agreements_of(outcomes: list[Outcome], model: Path) -> dict[str, Agreement]:
    """Of each subject that has answered, with Slipstream where that has."""
    answers = {outcome.title: outcome.answers for outcome in outcomes if outcome.answers is not None}
    found: dict[str, Agreement] = {}
    tokenizer = load_tokenizer(model)
    for outcome in outcomes:
        reference = reference_of(outcome.number_format, list(answers))
        if outcome.title in answers and reference is not None and reference != outcome.title:
            found[outcome.title] = compare(answers[outcome.title], answers[reference], reference, tokenizer)
    return found


def refuse(line: str) -> NoReturn:
    errors.print(f"peers: {line}", markup=False)
    raise typer.Exit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: servers are ended, results are written
    typer.run(main)
