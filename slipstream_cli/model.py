"""Opening the model that an argument names."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from engine.config import ModelConfig
from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.loader.fetch import resolve_model
from engine.loader.hf_config import read_model_config
from engine.loader.known_shapes import known_shape
from engine.loader.progress import progress_on
from engine.model.expected_tensors import check_tensors
from serve_app.config import cache_dir

MODEL_HELP = "catalogue name, directory in Hugging Face's layout, GGUF file or hub id"


def progress_bars() -> Progress:
    """On the terminal, apart from what is printed, which can be piped; none where errors go to a file."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def open_model(model: str) -> tuple[Path, Checkpoint]:
    """Fetches the model if need be.

    Raises:
        ModelError: it cannot be had, or is malformed.
    """
    path = resolve_model(model, cache_dir=cache_dir(), progress=progress_on())
    checkpoint = open_checkpoint(path)
    check_tensors(checkpoint)
    return path, checkpoint


def config_of(path: Path) -> ModelConfig:
    """Of a directory or a GGUF file; weights need not be there."""
    if path.is_dir() and (path / "config.json").exists():
        return read_model_config(path)
    return open_checkpoint(path).config


def model_shape(model: str) -> ModelConfig:
    """What memory hangs on, without weights: the catalogue's models need not even be fetched.

    Raises:
        ModelError: its configuration cannot be had, or is malformed.
    """
    known = known_shape(model)
    if known is not None:
        return known
    return config_of(resolve_model(model, cache_dir=cache_dir(), progress=progress_on(), config_only=True))
