"""Writes a checkpoint whose matrices are int8, in Hugging Face's layout, for `SafetensorsDirectory` to read."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import save_file

from engine.config import ModelConfig, Quantization
from engine.errors import ModelError
from engine.loader.checkpoint import Checkpoint
from engine.loader.hf_config import QUANT_METHOD, read_generation_defaults, read_model_config
from engine.loader.safetensors_directory import INDEX_NAME, SINGLE_NAME
from engine.quantize.int8_weight import inputs_are_rounded, quantize_weight
from engine.quantize.quantizable import SCALE_SUFFIX, is_quantizable

MAX_SHARD_BYTES = 2_000_000_000  # held in memory while they are written
# What else belongs to a model: tokenizer, chat templates, generation settings, and its licence.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "LICENSE*", "NOTICE*", "README*")
_COMPANION_FOLDERS = ("additional_chat_templates", "chat_templates")


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to write to that gets its name, `directory`, only if the `with` block succeeds.

    Raises:
        ModelError: there is something of that name, or it cannot be made.
    """
    if directory.exists():
        raise ModelError(f"{directory}: is there already: give a name that is not taken")
    part = directory.with_name(directory.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        part.rename(directory)
    except OSError as error:
        raise ModelError(f"{directory}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_weights(
    checkpoint: Checkpoint,
    names: Sequence[str],
    quantization: Quantization,
    directory: Path,
    on_progress: Callable[[int, int], None],
) -> None:
    """Write the named tensors: matrices quantised from their stored values, the rest as the checkpoint gives it.

    A file's tensors are in memory together, at most MAX_SHARD_BYTES or one tensor.
    """
    shards = _shards(checkpoint, names)
    weight_map: dict[str, str] = {}
    total_bytes = done = 0
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for tensor_name in shard:
            tensor = checkpoint.load(tensor_name)
            if is_quantizable(tensor_name):
                weight = quantize_weight(tensor, inputs_are_rounded(tensor_name, quantization))
                tensors |= {tensor_name: weight.values, tensor_name + SCALE_SUFFIX: weight.scales}
            else:
                tensors[tensor_name] = tensor.contiguous()
            done += 1
            on_progress(done, len(names))
        save_file(tensors, directory / name, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / name)  # the library makes files for their owner alone
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_bytes(orjson.dumps(index, option=orjson.OPT_INDENT_2))


def _shards(checkpoint: Checkpoint, names: Sequence[str]) -> list[list[str]]:
    """The tensors of each file, in the order in which they are read."""
    wanted = set(names)
    shards: list[list[str]] = [[]]
    room = MAX_SHARD_BYTES
    for name, info in checkpoint.tensors.items():
        if name not in wanted:
            continue
        size_bytes = math.prod(info.shape) * (1 if is_quantizable(name) else 4)
        if size_bytes > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= size_bytes
    return shards


def write_configs(checkpoint: Checkpoint, quantization: Quantization, directory: Path) -> None:
    """Write config.json, and copy what lies beside it; for a GGUF file, put its header into Hugging Face's words.

    Raises:
        ModelError: the header says what config.json has no word for.
    """
    if checkpoint.path.is_dir():
        _copy_companions(checkpoint.path, directory)
        config = orjson.loads((checkpoint.path / "config.json").read_bytes())
    else:
        config = config_fields(checkpoint.config)
        _write_json(directory / "generation_config.json", _generation_fields(checkpoint))
    config["quantization_config"] = {"quant_method": QUANT_METHOD, "format": str(quantization)}
    _write_json(directory / "config.json", config)
    read = read_model_config(directory)
    wanted = replace(checkpoint.config, stored_quantization=quantization)
    if read != wanted:
        found = asdict(read)
        [name, value] = next([name, value] for name, value in asdict(wanted).items() if found[name] != value)
        raise ModelError(f"{checkpoint.path}: {name} is {value}, which config.json cannot say")
    assert read_generation_defaults(directory) == checkpoint.generation


def _copy_companions(source: Path, directory: Path) -> None:
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, directory / file.name)
    for name in _COMPANION_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, directory / name)


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """What Hugging Face's config.json says of a model.

    Raises:
        ModelError: it cannot say it.
    """
    fields = {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": list(config.eos_token_ids),
        "rope_theta": config.rope.theta,
    }
    if config.rope.scaling == "linear":
        fields["rope_scaling"] = {"rope_type": "linear", "factor": config.rope.factor}
    elif config.rope.scaling is not None:
        raise ModelError(
            f"rope scaling {config.rope.scaling!r} of a GGUF file cannot be said in config.json: "
            "serve the file itself with quantization=int8"
        )
    return fields


def _generation_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    recommended = {name: value for name, value in asdict(checkpoint.generation).items() if value is not None}
    return {"do_sample": bool(recommended), "eos_token_id": list(checkpoint.config.eos_token_ids), **recommended}


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")
