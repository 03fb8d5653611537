"""Shapes that are written down, against what else is known of their models."""

from pathlib import Path

import pytest
import torch

from engine.config import Quantization
from engine.loader.catalogue import CATALOGUE, DEFAULT_MODEL
from engine.loader.checkpoint import open_checkpoint
from engine.loader.known_shapes import KNOWN_SHAPES, known_shape
from engine.model.expected_tensors import expected_tensors
from engine.runner.memory import weight_bytes


def test_every_model_that_has_to_be_fetched() -> None:
    assert set(KNOWN_SHAPES) == {name for name, entry in CATALOGUE.items() if entry.hub_id is not None}
    assert known_shape("Qwen/Qwen3-0.6B") is known_shape("qwen3-0.6b") is KNOWN_SHAPES["qwen3-0.6b"]
    assert known_shape("smollm2-135m-draft") is None
    assert known_shape("owner/name") is None


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "llama-3.2-1b", "qwen3-0.6b", "mistral-7b"])
def test_the_size_is_that_of_the_download(name: str) -> None:
    """In bfloat16. Qwen's files hold its tied head as well."""
    shape = KNOWN_SHAPES[name]
    size = weight_bytes(shape, torch.bfloat16, Quantization.NONE)
    if name.startswith("qwen"):
        size += 2 * shape.vocab_size * shape.hidden_size
    assert size == pytest.approx(CATALOGUE[name].size_bytes, rel=0.02)


def test_the_default_models_shape_is_that_of_its_file(default_model_path: Path) -> None:
    file, shape = open_checkpoint(default_model_path).config, KNOWN_SHAPES[DEFAULT_MODEL]
    assert expected_tensors(file) == expected_tensors(shape)
    kept = ("architecture", "num_heads", "num_kv_heads", "head_dim", "max_position_embeddings", "sliding_window")
    assert [getattr(file, name) for name in kept] == [getattr(shape, name) for name in kept]
