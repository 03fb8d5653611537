"""A draft as a model directory that the engine, and transformers, read."""

import shutil
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import save_file

from engine.config import ModelConfig
from engine.loader.converted_directory import config_fields
from engine.loader.hf_config import read_model_config
from engine.loader.safetensors_directory import SINGLE_NAME
from tools.distil_draft.llama import plain_weights


def write_draft(directory: Path, model: Any, config: ModelConfig) -> None:
    """Weights in bfloat16 and config.json, in place of what the directory held. A draft needs no tokenizer: it only
    ever sees its target's ids."""
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = {name: weight.to("cpu", torch.bfloat16).contiguous() for name, weight in plain_weights(model).items()}
    save_file(weights, part / SINGLE_NAME, metadata={"format": "pt"})
    fields = config_fields(config) | {"dtype": "bfloat16"}
    (part / "config.json").write_bytes(orjson.dumps(fields, option=orjson.OPT_INDENT_2) + b"\n")
    shutil.copymode(part / "config.json", part / SINGLE_NAME)  # the library makes files for their owner alone
    assert read_model_config(part) == config
    shutil.rmtree(directory, ignore_errors=True)
    part.rename(directory)


def copy_draft(source: Path, destination: Path) -> None:
    """Into a directory that exists."""
    for name in (SINGLE_NAME, "config.json"):
        shutil.copy(source / name, destination / name)
