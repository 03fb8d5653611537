"""One model in the files that peers read: as it is, as a directory with safetensors, as GGUF files of other types."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import save_file

from benchmarks.peers.peer import AbsentError, FileKind
from engine.loader.checkpoint import open_checkpoint
from engine.loader.converted_directory import config_fields, new_directory
from engine.model.expected_tensors import expected_tensors
from engine.tokenizer.saving import save_gguf_tokenizer

AS_STORED = "stored"  # the types that the file has
GGUF_FORMATS = (AS_STORED, "Q8_0", "F16", "BF16", "F32")
DIRECTORY_NAME = "float32"
_FILE_TYPES = {
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "F32": gguf.LlamaFileType.ALL_F32,
}


class ModelFiles:
    """Of `model`, a directory or GGUF file. What is made of it is kept in `folder`, of this model alone.

    gguf_file: beside a directory, which is not turned into one.
    """

    def __init__(self, model: Path, folder: Path, gguf_file: Path | None = None) -> None:
        self._model = model
        self._folder = folder
        self._gguf = gguf_file or (model if model.is_file() else None)

    def path(self, kind: FileKind, number_format: str) -> Path:
        """Made where there is none yet.

        Raises:
            AbsentError: it cannot be.
        """
        if kind is FileKind.ANY or (kind is FileKind.DIRECTORY and self._model.is_dir()):
            return self._model
        if kind is FileKind.DIRECTORY:
            return self._made(DIRECTORY_NAME, self._write_directory)
        if self._gguf is None:
            raise AbsentError("it reads GGUF files, and there is none of this model: give one with --gguf")
        if number_format == AS_STORED:
            return self._gguf
        return self._made(f"{number_format}.gguf", lambda path: self._write_gguf(number_format, path))

    def shown_format(self, number_format: str) -> str:
        """What a format is called in the results."""
        if number_format != AS_STORED or self._gguf is None:
            return number_format
        return main_type(self._gguf)

    def _made(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self._folder / name
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            write(path)
        return path

    def _write_directory(self, path: Path) -> None:
        """In float32, which holds all that the file's types hold."""
        checkpoint = open_checkpoint(self._model)
        fields = config_fields(checkpoint.config)
        ends = {"do_sample": False, "eos_token_id": fields["eos_token_id"]}
        with new_directory(path) as part:
            (part / "config.json").write_text(json.dumps(fields | {"dtype": DIRECTORY_NAME}, indent=1))
            (part / "generation_config.json").write_text(json.dumps(ends, indent=1))
            save_gguf_tokenizer(self._model, part)
            names = expected_tensors(checkpoint.config)
            tensors = {name: checkpoint.load(name).float().contiguous() for name in names}
            save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})

    def _write_gguf(self, number_format: str, path: Path) -> None:
        """Matrices in another type, all else as it is."""
        assert self._gguf is not None
        reader = gguf.GGUFReader(self._gguf)
        unfinished = path.with_name(f"unfinished-{path.name}")
        architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
        writer = gguf.GGUFWriter(unfinished, architecture)
        writer.add_file_type(_FILE_TYPES[number_format])
        for name, entry in reader.fields.items():
            if name in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE) or name.startswith("GGUF."):
                continue
            is_list = entry.types[0] is gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[-1] if is_list else None)
        wanted = gguf.GGMLQuantizationType[number_format]
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            kind = wanted if values.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        unfinished.rename(path)


def main_type(gguf_file: Path) -> str:
    """The type that most of the values have."""
    counts: dict[str, int] = {}
    for tensor in gguf.GGUFReader(gguf_file).tensors:
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return max(counts, key=lambda name: counts[name])
