"""`slipstream eval perplexity`: what a number format does to a model's predictions of a text."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import orjson
import torch
import typer
from rich.console import Console
from rich.table import Table

from engine.config import CacheConfig, Device, DType, EngineConfig, KVCacheDType, Quantization
from engine.errors import ConfigError
from engine.evaluate.perplexity import PerplexityResult, measure_perplexity
from engine.loader.checkpoint import Checkpoint
from engine.quantize.formats import resolve_quantization
from engine.runner.device import prepare_device
from engine.tokenizer import load_tokenizer
from slipstream_cli.model import MODEL_HELP, open_model, progress_bars

UNQUANTISED = (Quantization.NONE, KVCacheDType.AUTO)


@dataclass(frozen=True)
class Row:
    """`rise_percent`: of the perplexity, against the unquantised model; None where that was not measured."""

    dtype: str
    quantization: Quantization
    kv_cache_dtype: KVCacheDType
    result: PerplexityResult
    rise_percent: float | None = None


def perplexity(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    text: Annotated[Path, typer.Option(help="a file of running text, UTF-8")],
    quantization: Annotated[
        list[Quantization] | None, typer.Option(help="several: one run each; left out: none, the checkpoint as it is")
    ] = None,
    kv_cache_dtype: Annotated[
        list[KVCacheDType] | None, typer.Option(help="the same for the KV cache; left out: auto")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="run it unquantised too, and show the rise")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[DType | None, typer.Option(help="left out: as the service chooses")] = None,
    context: Annotated[int, typer.Option(help="tokens of a window")] = 1024,
    stride: Annotated[int, typer.Option(help="tokens between the starts of windows")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="use only the beginning of the text")] = None,
    num_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; left out: all cores")] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Perplexity of MODEL on a text: e to the mean negative log-likelihood of a token; lower is better.

    A window slides over the text. Each token but the first is scored once, from the tokens before it in its window: at
    least context - stride of them once the first window is full.
    """
    path, checkpoint = open_model(model)
    config = EngineConfig(device=_device(device), dtype=dtype, num_threads=num_threads)
    formats = list(dict.fromkeys(product(quantization or [Quantization.NONE], kv_cache_dtype or [KVCacheDType.AUTO])))
    if compare and UNQUANTISED not in formats:
        formats.insert(0, UNQUANTISED)
    if compare and checkpoint.config.stored_quantization is not Quantization.NONE:
        raise ConfigError(f"{path}: holds no unquantised weights to compare with: leave --compare out")
    token_ids = load_tokenizer(path).encode(_read(text))[:max_tokens]
    rows = [_measure(checkpoint, config, token_ids, each, context, stride) for each in formats]
    unquantised = (r for r in rows if (r.quantization, r.kv_cache_dtype) == UNQUANTISED)
    if baseline := next(unquantised, None):
        rows = [replace(r, rise_percent=100 * (r.result.perplexity / baseline.result.perplexity - 1)) for r in rows]
    if json:
        print(orjson.dumps([_fields(row) for row in rows], option=orjson.OPT_INDENT_2).decode())
    else:
        Console().print(_table(f"{model}, {text.name}, context {context}, stride {stride}", rows))


def _device(name: str) -> Device:
    if name == "auto":
        return Device.CUDA if torch.cuda.is_available() else Device.CPU
    if name not in list(Device):
        raise ConfigError(f"device must be one of auto, cpu, cuda, not {name!r}")
    return Device(name)


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"text={text}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"text={text}: is not UTF-8: byte {error.start}") from None


def _measure(
    checkpoint: Checkpoint,
    config: EngineConfig,
    token_ids: list[int],
    formats: tuple[Quantization, KVCacheDType],
    context: int,
    stride: int,
) -> Row:
    quantization, kv_cache_dtype = formats
    config = replace(config, quantization=quantization, cache=CacheConfig(dtype=kv_cache_dtype))
    computed = resolve_quantization(checkpoint.config, quantization)
    with progress_bars() as bar:
        loading = bar.add_task(f"loading {computed}", total=None)
        scoring = bar.add_task(f"scoring, KV cache {kv_cache_dtype}", total=None)
        result = measure_perplexity(
            checkpoint,
            config,
            token_ids,
            context,
            stride,
            on_load=lambda done, total: bar.update(loading, completed=done, total=total),
            on_score=lambda done, total: bar.update(scoring, completed=done, total=total),
        )
    dtype = str(prepare_device(config)[1]).removeprefix("torch.")
    return Row(dtype, computed, kv_cache_dtype, result)


def _fields(row: Row) -> dict[str, object]:
    return {
        "dtype": row.dtype,
        "quantization": row.quantization,
        "kv_cache_dtype": row.kv_cache_dtype,
        "perplexity": row.result.perplexity,
        "rise_percent": row.rise_percent,
        "num_scored_tokens": row.result.num_scored_tokens,
        "tokens_per_s": row.result.tokens_per_s,
    }


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title)
    for column in ("weights", "KV cache", "perplexity", "rise", "tokens scored", "tokens/s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.dtype if row.quantization is Quantization.NONE else f"{row.quantization} ({row.dtype})",
            row.dtype if row.kv_cache_dtype is KVCacheDType.AUTO else str(row.kv_cache_dtype),
            f"{row.result.perplexity:.4f}",
            "" if row.rise_percent is None else f"{row.rise_percent:+.2f} %",
            str(row.result.num_scored_tokens),
            f"{row.result.tokens_per_s:.0f}",
        )
    return table
