"""Models that ship with Slipstream, as data of this package."""

from importlib.resources import files
from pathlib import Path

from engine.errors import ModelError


def shipped_model(name: str) -> Path:
    """The directory of the model in this installation.

    Raises:
        ModelError: the installation is without it.
    """
    path = Path(str(files("engine.loader") / "shipped_models" / name))
    if not path.is_dir():
        raise ModelError(f"{name} ships with Slipstream, but {path} is missing: install Slipstream again")
    return path
