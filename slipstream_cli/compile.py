"""`slipstream compile`: an engine's kernels, on a machine without a GPU."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from engine.config import DType, KVCacheDType, Quantization
from engine.errors import ConfigError
from engine.loader.fetch import resolve_model
from engine.loader.progress import progress_on
from serve_app.config import cache_dir, parse_config
from slipstream_cli.model import MODEL_HELP, config_of, progress_bars


def compile_kernels(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP}; of a directory, config.json is enough")],
    gpu: Annotated[str, typer.Option(help="what is compiled for: h100, h200, a100, l4, l40s or rtx4090")],
    output: Annotated[
        Path | None, typer.Option(help="the directory to fill; left out: Triton's own cache (TRITON_CACHE_DIR)")
    ] = None,
    runtime_path: Annotated[
        Path | None, typer.Option(help="where that directory will lie when engines start; left out: where it is filled")
    ] = None,
    quantization: Annotated[
        Quantization, typer.Option(help="this and what follows: as the service will be given it")
    ] = Quantization.NONE,
    kv_cache_dtype: KVCacheDType = KVCacheDType.AUTO,
    dtype: Annotated[DType, typer.Option()] = DType.BFLOAT16,
    max_model_len: Annotated[int | None, typer.Option(help="left out: the model's context length")] = None,
    max_num_seqs: int = 256,
    token_budget: Annotated[int | None, typer.Option(help="left out: 2048")] = None,
    block_size: int = 16,
    speculative: Annotated[bool, typer.Option(help="for an engine that verifies drafts, by whatever method")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="processes; left out: one for each core")] = None,
) -> None:
    """Compile all kernels that serving MODEL on a GPU takes, on a machine that has none: when an image is built, say.

    An engine that starts with TRITON_CACHE_DIR=OUTPUT then compiles nothing. Triton looks kernels up by a hash of their
    source, of the settings and of Triton itself, and silently compiles what it does not find: so give the same settings
    as to the service, and have the same Slipstream and the very same wheel of Triton on both sides. It also notes
    absolute paths: if the directory is filled in one place and used in another, say where with --runtime-path. A draft
    model is a model of its own: compile for it as well, into the same directory.

    Of these GPUs, Slipstream has been tuned and measured on the h100 alone.
    """
    try:
        from engine.precompile.gpus import known_gpu  # Triton is not to be had on every platform
        from engine.precompile.precompile import precompile
    except ModuleNotFoundError as error:
        raise ConfigError(f"compiling kernels takes {error.name}, which is not installed here") from None
    gpu = gpu.lower()
    target = known_gpu(gpu)
    shape = config_of(resolve_model(model, cache_dir=cache_dir(), progress=progress_on()))
    arguments = {
        "model": model,
        "device": "cuda",
        "dtype": dtype.value,
        "quantization": quantization.value,
        "kv_cache_dtype": kv_cache_dtype.value,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "token_budget": token_budget,
        "block_size": block_size,
        "speculative": "ngram" if speculative else "off",  # by whom drafts come makes no difference
    }
    config = parse_config(arguments).engine_config(shape)
    jobs = jobs or len(os.sched_getaffinity(0))
    bar = progress_bars()
    task = bar.add_task(f"compiling for {target.title}", total=None)

    def show(done: int, total: int) -> None:
        bar.start()  # and not before: its thread should not be at work while processes are forked
        bar.update(task, completed=done, total=total)

    try:
        outcome = precompile(model, shape, config, gpu, target, output, runtime_path, jobs, show)
    finally:
        bar.stop()
    if outcome.lacks_launchers:
        print(
            "slipstream: no launchers were built, which this version of Triton compiles in C, because there is no C "
            "compiler here, or no Python.h: engines will compile them, if they find a compiler",
            file=sys.stderr,
        )
    num_new = sum(kernel.is_new for kernel in outcome.kernels)
    size = f"{outcome.directory.num_bytes / 1e6:.0f} MB"
    print(f"{outcome.directory.path}: {len(outcome.kernels)} kernels, {num_new} of them new; {size} in all")
