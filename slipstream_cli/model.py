"""Opening the model that an argument names."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.loader.fetch import resolve_model
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
