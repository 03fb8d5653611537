"""`slipstream convert`: a checkpoint with quantised weights."""

from pathlib import Path
from typing import Annotated

import typer

from engine.config import Quantization
from engine.errors import ConfigError, ModelError
from engine.loader.converted_directory import new_directory, write_configs, write_weights
from engine.model.expected_tensors import expected_tensors
from engine.quantize.formats import resolve_quantization
from engine.tokenizer.saving import save_gguf_tokenizer
from slipstream_cli.model import MODEL_HELP, open_model, progress_bars


def convert(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="the directory to make")],
    quantization: Annotated[Quantization, typer.Option(help="int8 or w8a8")] = Quantization.INT8,
) -> None:
    """Save MODEL with int8 weights: half the size of 16-bit ones, and nothing to quantise at each start.

    The new directory is served like any other (model=OUT), and computes in the format that it was converted to.
    """
    if quantization is Quantization.NONE:
        raise ConfigError("quantization=none would convert nothing: give int8 or w8a8")
    path, checkpoint = open_model(model)
    if checkpoint.config.stored_quantization is not Quantization.NONE:
        raise ModelError(f"{path}: has been converted already, to {checkpoint.config.stored_quantization}")
    resolve_quantization(checkpoint.config, quantization)
    names = list(expected_tensors(checkpoint.config))
    with new_directory(out) as part, progress_bars() as bar:
        task = bar.add_task("converting", total=len(names))
        write_configs(checkpoint, quantization, part)
        if path.is_file():
            save_gguf_tokenizer(path, part)
        write_weights(checkpoint, names, quantization, part, lambda done, _total: bar.update(task, completed=done))
    size_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{out}: {size_bytes / 1e6:.0f} MB, {quantization}")
