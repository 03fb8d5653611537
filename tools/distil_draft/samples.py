"""What the target said, as token ids in shards of safetensors files with a manifest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from safetensors.numpy import load_file, save_file

from engine.errors import ConfigError

MANIFEST = "manifest.json"
SHARD_SAMPLES = 512


@dataclass(frozen=True)
class Sample:
    """`num_prompt_tokens`: the border; the answer is what stands behind it, with the token that ended it."""

    sample_id: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


class SampleStore:
    """Adds samples to a directory. What is in a shard stays when the process ends, and is not made again.

    A shard holds `token_ids` int32 of its samples one behind the other, `ends` int64 (where each ends in them),
    `prompts` int32 (tokens of each prompt) and `sample_ids` int64.

    Raises:
        ConfigError: the directory holds samples that were made in another way.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], shard_samples: int = SHARD_SAMPLES) -> None:
        self.directory = directory
        self._shard_samples = shard_samples
        self._pending: list[Sample] = []
        directory.mkdir(parents=True, exist_ok=True)
        self._manifest: dict[str, Any] = {"settings": settings, "shards": []}
        if (directory / MANIFEST).exists():
            self._manifest = _read_manifest(directory)
            for name, value in settings.items():
                found = self._manifest["settings"].get(name)
                if found != value:
                    raise ConfigError(
                        f"{directory}: holds samples with {name} {found!r}, not {value!r}: take another folder"
                    )
        self.sample_ids = {sample.sample_id for sample in read_samples(directory)}

    @property
    def num_output_tokens(self) -> int:
        """In shards."""
        return sum(shard["num_output_tokens"] for shard in self._manifest["shards"])

    def add(self, sample: Sample) -> None:
        self._pending.append(sample)
        self.sample_ids.add(sample.sample_id)
        if len(self._pending) >= self._shard_samples:
            self.flush()

    def flush(self) -> None:
        """Write what is pending to a shard, and then, in one move, the manifest that names it."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        name = f"{len(self._manifest['shards']):05}.safetensors"
        save_file(_arrays(pending), self.directory / name)
        num_output_tokens = sum(sample.num_output_tokens for sample in pending)
        shard = {"file": name, "num_samples": len(pending), "num_output_tokens": num_output_tokens}
        self._manifest["shards"].append(shard)
        part = self.directory / (MANIFEST + ".part")
        part.write_bytes(orjson.dumps(self._manifest, option=orjson.OPT_INDENT_2) + b"\n")
        part.rename(self.directory / MANIFEST)


def read_samples(directory: Path) -> list[Sample]:
    """All samples of a directory in the order of their ids; none where there is no manifest yet."""
    if not (directory / MANIFEST).exists():
        return []
    shards = _read_manifest(directory)["shards"]
    samples = [sample for shard in shards for sample in _samples(load_file(directory / shard["file"]))]
    return sorted(samples, key=lambda sample: sample.sample_id)


def read_settings(directory: Path) -> dict[str, Any]:
    """How the samples of a directory were made."""
    settings: dict[str, Any] = _read_manifest(directory)["settings"]
    return settings


def _read_manifest(directory: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = orjson.loads((directory / MANIFEST).read_bytes())
    return manifest


def _arrays(samples: Sequence[Sample]) -> dict[str, Any]:
    lengths = [len(sample.token_ids) for sample in samples]
    return {
        "token_ids": np.concatenate([np.array(sample.token_ids, np.int32) for sample in samples]),
        "ends": np.cumsum(lengths, dtype=np.int64),
        "prompts": np.array([sample.num_prompt_tokens for sample in samples], np.int32),
        "sample_ids": np.array([sample.sample_id for sample in samples], np.int64),
    }


def _samples(arrays: dict[str, Any]) -> Iterable[Sample]:
    start = 0
    token_ids = arrays["token_ids"].tolist()
    rows = zip(arrays["ends"].tolist(), arrays["prompts"].tolist(), arrays["sample_ids"].tolist(), strict=True)
    for end, num_prompt_tokens, sample_id in rows:
        yield Sample(sample_id, tuple(token_ids[start:end]), num_prompt_tokens)
        start = end
