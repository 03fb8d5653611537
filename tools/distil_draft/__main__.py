"""`python -m tools.distil_draft all --model PATH --work FOLDER --out models/NAME`, or one step after the other."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import orjson
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.hardware import hardware_name
from engine.config import Device, EngineConfig, SchedulerConfig, SpeculativeMethod
from engine.errors import ConfigError, SlipstreamError
from engine.llm_engine import LLMEngine
from engine.loader.catalogue import DEFAULT_MODEL
from engine.loader.converted_directory import new_directory
from engine.runner.device import prepare_device
from engine.tokenizer import load_tokenizer
from slipstream_cli.model import MODEL_HELP, open_model, progress_bars
from tools.distil_draft.card import COLUMNS, model_card, table_row
from tools.distil_draft.draft_directory import copy_draft
from tools.distil_draft.evaluate import METHODS, NUM_DRAFT_TOKENS, evaluate
from tools.distil_draft.generate import cache_for, generate
from tools.distil_draft.initial import Initial
from tools.distil_draft.llama import DraftShape
from tools.distil_draft.prompts import Split, digest, draw_prompts
from tools.distil_draft.samples import SampleStore, read_samples, read_settings
from tools.distil_draft.train import RECORD, TrainOptions, train

SAMPLES, DRAFT, EVALUATION = "samples", "draft", "evaluation.json"  # in the work folder
LINE_EVERY_S = 10.0
MAX_PROMPT_TOKENS = 512  # the longest of the recipe has about half

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
errors = Console(stderr=True)
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
Work = Annotated[Path, typer.Option(help="folder for what the steps hand on")]
Where = Annotated[Device, typer.Option(help="cpu or cuda")]
Seed = Annotated[int, typer.Option(help="of prompts, answers or weights")]


@app.command()
def prompts(split: Split = Split.TRAIN, count: int = 20, seed: Seed = 0) -> None:
    """Print some prompts of the recipe."""
    for prompt in draw_prompts(split, count, seed):
        print(f"--- {prompt.tag}, {prompt.family}")
        for role, content in prompt.messages:
            print(f"[{role}] {content}")


@app.command(name="generate")
def generate_samples(
    work: Work,
    model: Model = DEFAULT_MODEL,
    device: Where = Device.CPU,
    minutes: Annotated[float, typer.Option(help="begin no answers after so long, loading not counted")] = 3.0,
    samples: Annotated[int, typer.Option(help="the most answers, those that are there included")] = 200_000,
    num_prompts: Annotated[
        int, typer.Option(help="different prompts; more answers are further ones to these")
    ] = 40_000,
    max_tokens: Annotated[int, typer.Option(help="of one answer")] = 256,
    width: Annotated[int | None, typer.Option(help="answers at once; left out: 256 on a GPU, 32 on a CPU")] = None,
    seed: Seed = 0,
) -> None:
    """Let the target answer. Called again, it goes on where it was stopped."""
    path, checkpoint = open_model(model)
    width = width or (256 if device is Device.CUDA else 32)
    drawn = draw_prompts(Split.TRAIN, num_prompts, seed)
    settings = {"target": checkpoint.fingerprint, "seed": seed, "prompts": digest(drawn), "max_tokens": max_tokens}
    store = SampleStore(work / SAMPLES, settings)
    limits = SchedulerConfig(max_num_seqs=width, max_model_len=MAX_PROMPT_TOKENS + max_tokens)
    cache = cache_for(width, limits.max_model_len)
    engine = LLMEngine.from_checkpoint(checkpoint, EngineConfig(device=device, cache=cache, scheduler=limits))
    ended = tokens = 0
    started_s = perf_counter()
    say = _sometimes()

    def line() -> str:
        speed = tokens / (perf_counter() - started_s)
        return f"{ended:,} answers, {tokens:,} tokens, {speed:,.0f} tokens/s"

    with progress_bars() as bars:
        task = bars.add_task("answers", total=samples, completed=len(store.sample_ids))

        def advance(more_ended: int, more_tokens: int) -> None:
            nonlocal ended, tokens
            ended, tokens = ended + more_ended, tokens + more_tokens
            bars.update(task, advance=more_ended, description=line())
            say(line)

        generate(
            engine,
            load_tokenizer(path),
            drawn,
            store,
            num_samples=samples,
            max_tokens=max_tokens,
            width=width,
            deadline_s=started_s + 60 * minutes,
            on_progress=advance,
        )
    print(f"{line()}; {store.directory} now holds {len(store.sample_ids):,} and {store.num_output_tokens:,}")


@app.command(name="train")
def train_draft(
    work: Work,
    model: Model = DEFAULT_MODEL,
    device: Where = Device.CPU,
    minutes: Annotated[float | None, typer.Option(help="for all of it, from loading to the written draft")] = None,
    steps: Annotated[int | None, typer.Option(help="the most optimizer steps; 0 writes the first weights")] = None,
    hidden_size: int = DraftShape.hidden_size,
    intermediate_size: int = DraftShape.intermediate_size,
    layers: int = DraftShape.num_layers,
    initial: Annotated[Initial, typer.Option(help="the first weights")] = TrainOptions.initial,
    start_from: Annotated[Path | None, typer.Option(help="a draft to go on with, in their place")] = None,
    tokens_per_step: int = TrainOptions.tokens_per_step,
    learning_rate: float = TrainOptions.learning_rate,
    ce_weight: Annotated[float, typer.Option(help="share of the cross-entropy; the rest is divergence")] = (
        TrainOptions.ce_weight
    ),
    seed: Seed = 0,
) -> None:
    """Train a draft on the samples, and write it to the work folder with a record of its losses."""
    _, checkpoint = open_model(model)
    options = TrainOptions(
        minutes=minutes,
        steps=steps,
        tokens_per_step=tokens_per_step,
        learning_rate=learning_rate,
        ce_weight=ce_weight,
        initial=initial,
        seed=seed,
    )
    samples = read_samples(work / SAMPLES)
    if samples and read_settings(work / SAMPLES)["target"] != checkpoint.fingerprint:
        raise ConfigError(f"{work / SAMPLES}: holds what another model said")
    say = _sometimes()
    with progress_bars() as bars:
        task = bars.add_task("training", total=1.0)

        def on_step(progress: float, point: dict[str, float]) -> None:
            def line() -> str:
                speed = point["tokens"] / point["seconds"]
                return (
                    f"step {point['step']}, {point['seconds']:.0f} s: loss {point['loss']:.3f}, {speed:,.0f} tokens/s"
                )

            bars.update(task, completed=progress, description=line())
            say(line)

        def on_validation(point: dict[str, float]) -> None:
            kl, greedy, sampled = point["kl"], point["greedy"], point["sampled"]
            agreement = f"KL {kl:.3f}, agreement {greedy:.1%} greedy, {sampled:.1%} sampled"
            print(f"step {point['step']}, {point['seconds']:.0f} s: {agreement}", file=sys.stderr, flush=True)

        shape = DraftShape(hidden_size, intermediate_size, layers)
        train(
            checkpoint,
            shape,
            samples,
            work / DRAFT,
            options,
            device=device,
            start_from=start_from,
            on_step=on_step,
            on_validation=on_validation,
        )
    print(f"{work / DRAFT}: {_megabytes(work / DRAFT)}")


@app.command(name="evaluate")
def evaluate_draft(
    work: Work,
    model: Model = DEFAULT_MODEL,
    device: Where = Device.CPU,
    draft: Annotated[Path | None, typer.Option(help="left out: the one in the work folder")] = None,
    per_tag: Annotated[int, typer.Option(help="prompts of each kind")] = 8,
    max_tokens: Annotated[int, typer.Option(help="of one answer")] = 128,
    batch: Annotated[int, typer.Option(help="requests at once")] = 1,
    methods: Annotated[str, typer.Option(help="beside off, separated by commas")] = ",".join(METHODS[1:]),
    adaptive: Annotated[
        bool, typer.Option(help=f"as many drafts as pay, as in a service, and not {NUM_DRAFT_TOKENS} in each step")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Measure acceptance and speed on held-out prompts, and see that no token changes."""
    path, checkpoint = open_model(model)
    config = EngineConfig(device=device)
    draft = draft or work / DRAFT
    say = _sometimes(0.0)
    cells = evaluate(
        checkpoint,
        load_tokenizer(path),
        draft,
        config,
        per_tag=per_tag,
        max_tokens=max_tokens,
        batch=batch,
        seed=seed,
        methods=[SpeculativeMethod(name) for name in methods.split(",")],
        adaptive=adaptive,
        on_cell=lambda cell: say(lambda: ", ".join(filter(None, table_row(asdict(cell))))),
    )
    dtype = str(prepare_device(config)[1]).removeprefix("torch.")
    report: dict[str, Any] = {
        "hardware": hardware_name(device),
        "dtype": dtype,
        "torch": torch.__version__,
        "draft": str(draft),
        "num_draft_tokens": "adaptive" if adaptive else NUM_DRAFT_TOKENS,
        "per_tag": per_tag,
        "max_tokens": max_tokens,
        "batch": batch,
        "cells": [asdict(cell) for cell in cells],
    }
    work.mkdir(parents=True, exist_ok=True)
    (work / EVALUATION).write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    table = Table(*COLUMNS, title=f"{draft.name}, {report['hardware']}, {dtype}, {batch} at once")
    for row in report["cells"]:
        table.add_row(*table_row(row))
    Console().print(table)


@app.command()
def export(work: Work, out: Annotated[Path, typer.Option(help="the directory to make, such as models/NAME")]) -> None:
    """Put the draft, its record, its numbers and a model card together."""
    if not (work / DRAFT).is_dir():
        raise ConfigError(f"{work / DRAFT}: there is no draft: train one first")
    evaluation = orjson.loads((work / EVALUATION).read_bytes()) if (work / EVALUATION).exists() else None
    training = orjson.loads((work / RECORD).read_bytes())
    with new_directory(out) as part:
        copy_draft(work / DRAFT, part)
        (part / RECORD).write_bytes((work / RECORD).read_bytes())
        if evaluation is not None:
            (part / EVALUATION).write_bytes((work / EVALUATION).read_bytes())
        (part / "README.md").write_text(model_card(out.name, training, read_settings(work / SAMPLES), evaluation))
    print(f"{out}: {_megabytes(out)}")


@app.command(name="all")
def everything(
    work: Work,
    out: Annotated[Path, typer.Option(help="the directory to make, such as models/NAME")],
    model: Model = DEFAULT_MODEL,
    device: Where = Device.CPU,
    generate_minutes: float = 3.2,
    train_minutes: float = 8.3,
    per_tag: Annotated[int, typer.Option(help="prompts of each kind to evaluate with")] = 8,
) -> None:
    """All steps with their defaults, each in a process of its own so that the next one has the device to itself."""
    if out.exists():
        raise ConfigError(f"{out}: is there already: give a name that is not taken")
    common = [f"--work={work}", f"--model={model}", f"--device={device}"]
    _step("generate", *common, f"--minutes={generate_minutes}")
    _step("train", *common, f"--minutes={train_minutes}")
    _step("evaluate", *common, f"--per-tag={per_tag}")
    _step("export", f"--work={work}", f"--out={out}")


def _step(name: str, *arguments: str) -> None:
    print(f"== {name}", flush=True)
    outcome = subprocess.run([sys.executable, "-m", "tools.distil_draft", name, *arguments], check=False)
    if outcome.returncode:
        sys.exit(outcome.returncode)


def _sometimes(every_s: float = LINE_EVERY_S) -> Callable[[Callable[[], str]], None]:
    """Prints a line now and then, where there is no terminal that shows bars."""
    printed_s = perf_counter()

    def say(line: Callable[[], str]) -> None:
        nonlocal printed_s
        if not errors.is_terminal and perf_counter() - printed_s >= every_s:
            printed_s = perf_counter()
            print(line(), file=sys.stderr, flush=True)

    return say


def _megabytes(directory: Path) -> str:
    return ", ".join(f"{file.name} {file.stat().st_size / 1e6:.2f} MB" for file in sorted(directory.iterdir()))


def main() -> None:
    """What can be wrong with arguments, model or folder ends in one line."""
    try:
        app()
    except SlipstreamError as error:
        print(f"distil_draft: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
