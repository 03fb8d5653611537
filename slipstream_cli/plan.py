"""`slipstream plan`: what a model's memory on a card would be used for, in each number format and context length."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import orjson
import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from engine.config import DType, KVCacheDType, ModelConfig, Quantization
from engine.errors import ConfigError
from engine.planning.card import Card, card_of
from engine.planning.predict import predict_memory
from engine.runner.memory import MemoryPlan
from engine.runner.out_of_memory import gib
from engine.runner.step_bytes import step_kv_bytes, step_weight_bytes
from serve_app.config import parse_config
from slipstream_cli.model import MODEL_HELP, model_shape

USUAL_LENGTHS = (512, 2048, 8192)  # of context, beside the model's own
TABLE_WIDTH = 100  # in a narrower console, numbers would be cut off


@dataclass(frozen=True)
class Row:
    """One engine. plan: None where `problem` says why there can be none. most_tokens_per_s: of one stream at the end of
    its context, if the card did nothing but read weights and KV at its datasheet's bandwidth; None for a CPU."""

    quantization: Quantization
    kv_cache_dtype: KVCacheDType
    max_model_len: int
    kv_bytes_per_token: float
    plan: MemoryPlan | None
    problem: str | None
    step_bytes: float
    most_tokens_per_s: float | None


def plan(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP}; weights need not be there")],
    gpu: Annotated[
        str | None,
        typer.Option(help="h100, h200, a100, l4, l40s, rtx4090 or cpu; left out: what this machine has"),
    ] = None,
    quantization: Annotated[list[Quantization] | None, typer.Option(help="several; left out: all")] = None,
    kv_cache_dtype: Annotated[list[KVCacheDType] | None, typer.Option(help="several; left out: all")] = None,
    max_model_len: Annotated[
        list[int] | None, typer.Option(min=1, help="several; left out: 512, 2048, 8192 and the model's context length")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="this and what follows: as for the service")] = 256,
    draft_model: Annotated[str | None, typer.Option(help="in the engine's process (speculative=local)")] = None,
    dtype: Annotated[DType | None, typer.Option(help="left out: as the service chooses")] = None,
    token_budget: Annotated[int | None, typer.Option(min=1, help="left out: 2048 on a GPU, 256 on a CPU")] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Where a card's memory would go if it served MODEL, and how many requests it would hold at once.

    One row for each number format and context length, each of an engine with that max_model_len, planned by the code
    that plans when an engine starts. The speed is no prediction: it is what one stream could reach at most.
    """
    card = card_of(None if gpu is None else gpu.lower())
    shape = model_shape(model)
    draft = None if draft_model is None else model_shape(draft_model)
    settings = {
        "model": model,
        "device": card.device.value,
        "dtype": "auto" if dtype is None else dtype.value,
        "max_num_seqs": max_num_seqs,
        "token_budget": token_budget,
        **({} if draft is None else {"speculative": "local", "draft_model": draft_model}),
    }
    rows = [
        _row(shape, settings, each, length, card, draft)
        for each, length in product(_formats(shape, quantization, kv_cache_dtype), _lengths(shape, max_model_len))
    ]
    if json:
        print(orjson.dumps(_report(model, card, max_num_seqs, rows), option=orjson.OPT_INDENT_2).decode())
    elif any(row.plan for row in rows):
        _print_table(model, card, max_num_seqs, rows)
    if not any(row.plan for row in rows):
        least = min(reversed(rows), key=lambda row: row.max_model_len)  # the smallest format comes last
        raise ConfigError(f"{model} fits in no way: {least.problem}")


def _formats(
    shape: ModelConfig, quantization: list[Quantization] | None, kv_cache_dtype: list[KVCacheDType] | None
) -> list[tuple[Quantization, KVCacheDType]]:
    """Without repetition. A model that is stored in int8 comes in one format."""
    is_plain = shape.stored_quantization is Quantization.NONE
    weights = quantization or (list(Quantization) if is_plain else [shape.stored_quantization])
    return list(dict.fromkeys(product(weights, kv_cache_dtype or list(KVCacheDType))))


def _lengths(shape: ModelConfig, wanted: list[int] | None) -> list[int]:
    longest = shape.max_position_embeddings
    return sorted(set(wanted or [length for length in (*USUAL_LENGTHS, longest) if length <= longest]))


def _row(
    shape: ModelConfig,
    settings: dict[str, Any],
    formats: tuple[Quantization, KVCacheDType],
    length: int,
    card: Card,
    draft: ModelConfig | None,
) -> Row:
    quantization, kv_cache_dtype = formats
    arguments = settings | {
        "quantization": quantization.value,
        "kv_cache_dtype": kv_cache_dtype.value,
        "max_model_len": length,
    }
    path = None if draft is None else Path(settings["draft_model"])
    config = parse_config(arguments).engine_config(shape, path)
    outcome: MemoryPlan | None = None
    problem: str | None = None
    try:
        outcome = predict_memory(shape, config, card, draft)
    except ConfigError as error:
        problem = str(error)
    dtype: torch.dtype = getattr(torch, config.dtype or card.default_dtype)
    # config.quantization has been resolved
    step_bytes = step_weight_bytes(shape, dtype, config.quantization) + step_kv_bytes(
        shape, dtype, kv_cache_dtype, 1, length
    )
    return Row(
        quantization=config.quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=length,
        kv_bytes_per_token=step_kv_bytes(shape, dtype, kv_cache_dtype, 1, 1),
        plan=outcome,
        problem=problem,
        step_bytes=step_bytes,
        most_tokens_per_s=None if card.bytes_per_s is None else card.bytes_per_s / step_bytes,
    )


def _report(model: str, card: Card, max_num_seqs: int, rows: list[Row]) -> dict[str, Any]:
    return {
        "model": model,
        "card": card.memory.device_name,
        "total_bytes": card.memory.total_bytes,
        "bytes_per_s": card.bytes_per_s,
        "max_num_seqs": max_num_seqs,
        "rows": [_fields(row) for row in rows],
    }


def _fields(row: Row) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "quantization": row.quantization,
        "kv_cache_dtype": row.kv_cache_dtype,
        "max_model_len": row.max_model_len,
        "kv_bytes_per_token": row.kv_bytes_per_token,
        "step_bytes": row.step_bytes,
        "most_tokens_per_s": row.most_tokens_per_s,
        "problem": row.problem,
    }
    if row.plan is not None:
        plan = row.plan
        fields |= {
            "weights_bytes": plan.weights_bytes,
            "workspace_bytes": plan.workspace_bytes,
            "sampler_bytes": plan.sampler_bytes,
            "graph_bytes": plan.graph_bytes,
            "draft_bytes": plan.draft_bytes,
            "kv_cache_bytes": plan.kv_cache_bytes,
            "other_bytes": plan.other_bytes,
            "free_bytes": plan.free_bytes,
            "num_tokens": plan.num_tokens,
            "num_requests": plan.num_longest_requests,
        }
    return fields


def _print_table(model: str, card: Card, max_num_seqs: int, rows: list[Row]) -> None:
    table = Table(title=f"{model} on {card.memory.device_name}, GiB of {gib(card.memory.total_bytes)}", box=SIMPLE)
    has_draft = any(row.plan is not None and row.plan.draft_bytes for row in rows)
    parts = ["weights", *(["draft"] if has_draft else []), "work", "KV", "left"]
    for name in ("format", "context", *parts, "B/token", "KV tokens", "requests", "tok/s <"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, max_num_seqs, has_draft))
    console = Console()
    if console.width < TABLE_WIDTH:
        console = Console(width=TABLE_WIDTH)
    console.print(table)
    notes = [
        "format: of weights/KV. Each row is an engine whose max_model_len is that context.",
        "work: activations, workspace and sampler, and at most what CUDA graphs and kernels take.",
        f"requests: of the whole context, at once; *: as many as max_num_seqs={max_num_seqs} lets run.",
    ]
    if card.bytes_per_s is not None:
        notes.append(
            f"tok/s <: a bound, not a prediction: one stream at the end of its context, if reading weights and KV at "
            f"{card.bytes_per_s / 1e9:,.0f} GB/s were all there is to do."
        )
    notes += dict.fromkeys(f"does not fit: {row.problem}" for row in rows if row.problem is not None)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _cells(row: Row, max_num_seqs: int, has_draft: bool) -> list[str]:
    formats = [f"{row.quantization}/{row.kv_cache_dtype}", f"{row.max_model_len:,}"]
    per_token = f"{row.kv_bytes_per_token:,.0f}"
    plan = row.plan
    if plan is None:
        return [*formats, *[""] * (4 + has_draft), per_token, "", "none", ""]
    work = plan.workspace_bytes + plan.sampler_bytes + plan.graph_bytes
    draft = [plan.draft_bytes] if has_draft else []
    sizes = [plan.weights_bytes, *draft, work, plan.kv_cache_bytes, plan.free_bytes]
    at_once = plan.num_longest_requests
    requests = f"{at_once:,}{'*' if at_once >= max_num_seqs else ''}"
    most = "" if row.most_tokens_per_s is None else f"{row.most_tokens_per_s:,.0f}"
    return [*formats, *(f"{size / 2**30:.2f}" for size in sizes), per_token, f"{plan.num_tokens:,}", requests, most]
