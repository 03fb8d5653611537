"""A directory of compiled kernels, Triton's cache, and what is written beside them about how they came there."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.errors import ConfigError

MANIFEST = "slipstream-kernels.json"
_GROUP = "__grp__*.json"  # Triton's list of a kernel's files, by their absolute paths


@dataclass(frozen=True)
class Entry:
    """One engine whose kernels are there. triton: its version; another build of the same version finds nothing.
    python: whose launchers are there, where Triton compiles those too."""

    model: str
    gpu: str
    capability: str
    dtype: str
    quantization: str
    kv_cache_dtype: str
    block_size: int
    max_model_len: int
    max_num_seqs: int
    token_budget: int
    triton: str
    python: str
    num_kernels: int


class KernelDirectory:
    """Made if it is not there.

    Raises:
        ConfigError: it cannot be made or written, or holds a manifest that is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output={path}: {error.strerror or error}") from None
        if not os.access(path, os.W_OK):
            raise ConfigError(f"output={path}: cannot be written")
        self.entries = self._read_manifest()

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def expect_at(self, place: Path) -> None:
        """Make Triton find the kernels when the directory lies there. It compiles anew what a list of files names by
        paths that do not exist: so a directory that was moved is made ready for its new place by this."""
        for group in self.path.glob(f"*/{_GROUP}"):
            listed = json.loads(group.read_text())
            files = {name: str(place / group.parent.name / name) for name in listed["child_paths"]}
            if files != listed["child_paths"]:
                self._write(group, listed | {"child_paths": files})

    def note(self, entry: Entry, place: Path) -> None:
        """Write the manifest anew with this entry, in place of one of the same settings."""
        settings = _settings(entry)
        self.entries = [each for each in self.entries if _settings(each) != settings] + [entry]
        self._write(self.path / MANIFEST, {"path": str(place), "engines": [asdict(each) for each in self.entries]})

    def _read_manifest(self) -> list[Entry]:
        file = self.path / MANIFEST
        if not file.exists():
            return []
        try:
            return [Entry(**fields) for fields in json.loads(file.read_text())["engines"]]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{file}: is not a manifest of this version: delete it, or give another output") from None

    def _write(self, file: Path, content: object) -> None:
        """Whole or not at all: somebody may be starting from the directory."""
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(file)


def _settings(entry: Entry) -> dict[str, object]:
    """What tells an entry from others."""
    return {name: value for name, value in asdict(entry).items() if name != "num_kernels"}
