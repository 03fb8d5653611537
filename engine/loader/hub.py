"""Fetching a model from the Hugging Face hub, into the cache that every tool built on `huggingface_hub` shares."""

from pathlib import Path
from threading import Lock
from typing import Any

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import tqdm as hub_tqdm

from engine.errors import ModelError
from engine.loader.download_lock import download_lock
from engine.loader.progress import Advance, Progress

_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_UNWANTED = ["*/*", "consolidated*", "*.onnx*"]  # second copies of the weights, and formats of other engines


def fetch_from_hub(
    hub_id: str, total_bytes: int | None, cache_dir: Path, progress: Progress, *, config_only: bool = False
) -> Path:
    """The directory of the model's snapshot. A cached one is used where the hub cannot be reached. config_only: all
    that is wanted of it is config.json.

    Raises:
        ModelError: it does not exist, may not be had, or cannot be downloaded.
    """
    lock = cache_dir / "hub-locks" / f"{hub_id.replace('/', '--')}.lock"
    with download_lock(lock, hub_id, progress), progress.task(f"Downloading {hub_id}", total_bytes) as advance:
        try:
            path: str = huggingface_hub.snapshot_download(
                hub_id,
                allow_patterns=["config.json"] if config_only else _WANTED,
                ignore_patterns=_UNWANTED,
                tqdm_class=_reporting_to(advance),
            )
        except GatedRepoError:
            raise ModelError(
                f"{hub_id}: its licence must be accepted at https://huggingface.co/{hub_id}, and the token of that "
                "account given with `hf auth login`"
            ) from None
        except RepositoryNotFoundError:
            raise ModelError(f"{hub_id}: there is no such model on the hub, and no such directory here") from None
        except Exception as error:
            # The library raises what its HTTP client, its storage and the file system raise: no common base.
            reason = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
            raise ModelError(
                f"{hub_id} cannot be downloaded ({reason}); check the network, "
                "or serve a model of your own with model=/path/to/model"
            ) from error
    return Path(path)


def _reporting_to(advance: Advance) -> type:
    """A class of progress bars that draw nothing and report the bytes of all files together."""
    lock = Lock()
    most_bytes = 0

    class ReportingBar(hub_tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            self._num_bytes = int(kwargs.get("initial") or 0)
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts_bytes:
                nonlocal most_bytes
                with lock:
                    self._num_bytes += int(n or 0)
                    if self._num_bytes > most_bytes:  # one bar counts bytes received, another bytes written
                        most_bytes = self._num_bytes
                        advance(most_bytes, int(self.total) if self.total else None)
            return None

    return ReportingBar
