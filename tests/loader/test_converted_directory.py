"""Checkpoints with int8 weights: written from both kinds of model, read back as the same numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import Quantization
from engine.errors import ModelError
from engine.loader import converted_directory
from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.loader.converted_directory import new_directory, write_configs, write_weights
from engine.model.expected_tensors import check_tensors, expected_tensors
from engine.quantize.int8_weight import inputs_are_rounded, quantize_weight
from engine.quantize.quantizable import is_quantizable
from tests.loader.test_gguf_file import tiny_weights, write_gguf
from tests.tiny_models import write_tiny_model

ADDED = ("generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE")


def convert(source: Path, out: Path, quantization: Quantization = Quantization.INT8) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    seen: list[tuple[int, int]] = []
    names = list(expected_tensors(checkpoint.config))
    with new_directory(out) as part:
        write_configs(checkpoint, quantization, part)
        write_weights(checkpoint, names, quantization, part, lambda *each: seen.append(each))
    assert seen == [(done, len(names)) for done in range(1, len(names) + 1)]
    converted = open_checkpoint(out)
    check_tensors(converted)
    return converted


def check_same_numbers(converted: Checkpoint, source: Checkpoint, quantization: Quantization) -> None:
    for name in expected_tensors(source.config):
        tensor = source.load(name)
        if is_quantizable(name):
            expected = quantize_weight(tensor, inputs_are_rounded(name, quantization))
            assert torch.equal(converted.load(name), expected.values)
            assert torch.equal(converted.load(name + "_scale"), expected.scales)
        else:
            assert torch.equal(converted.load(name), tensor)


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.W8A8])
@pytest.mark.parametrize("tied", [False, True])
def test_a_directory(tmp_path: Path, quantization: Quantization, tied: bool) -> None:
    source = write_tiny_model(tmp_path / "source", tie_word_embeddings=tied)
    for name in ADDED:
        (source / name).write_text("{}")
    (source / "model.safetensors.index.json.bak").touch()
    converted = convert(source, tmp_path / "out", quantization)
    assert converted.config.stored_quantization is quantization
    check_same_numbers(converted, open_checkpoint(source), quantization)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*ADDED, "config.json", "model.safetensors"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "slipstream", "format": quantization}
    assert config == json.loads((source / "config.json").read_text())
    assert converted.fingerprint != open_checkpoint(source).fingerprint


def test_a_gguf_file(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", weights=tiny_weights())
    converted = convert(source, tmp_path / "out")
    check_same_numbers(converted, open_checkpoint(source), Quantization.INT8)
    assert converted.generation == open_checkpoint(source).generation


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converted_directory, "MAX_SHARD_BYTES", 50_000)
    source = write_tiny_model(tmp_path / "source")
    converted = convert(source, tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    check_same_numbers(converted, open_checkpoint(source), Quantization.INT8)


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    def fail_midway() -> None:
        with new_directory(tmp_path / "out") as part:
            (part / "half").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail_midway()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="out: is there already"), new_directory(tmp_path / "out"):
        pass


def test_int8_weights_need_a_config_that_says_so(tmp_path: Path) -> None:
    convert(write_tiny_model(tmp_path / "source"), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"dtype: I8 is not supported"):
        open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("lm_head.weight", torch.zeros(320, 64), "is in float32, which its config does not say"),
        ("model.norm.weight", torch.zeros(64, dtype=torch.int8), "is in int8, which its config does not say"),
        ("lm_head.weight_scale", torch.zeros(320, 1), r"has shape \[320, 1\], its config says \[320\]"),
        ("lm_head.weight_scale", None, "is missing"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, name: str, tensor: torch.Tensor | None, problem: str) -> None:
    convert(write_tiny_model(tmp_path / "source"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors | ({} if tensor is None else {name: tensor}), file)
    with pytest.raises(ModelError, match=f"tensor '{name}' {problem}"):
        check_tensors(open_checkpoint(tmp_path / "out"))
