"""Models of random weights in the shapes of well-known ones: speed does not depend on what the weights say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer

from engine.config import ModelConfig
from engine.loader.checkpoint import TensorInfo
from engine.loader.generation_defaults import GenerationDefaults
from engine.loader.known_shapes import KNOWN_SHAPES
from engine.model.expected_tensors import expected_tensors


def _llama(
    vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, tied: bool, context: int
) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        rms_norm_eps=1e-5,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "tinyllama-1.1b": KNOWN_SHAPES["tinyllama-1.1b"],
    "smollm2-135m": KNOWN_SHAPES["smollm2-135m"],
    "mistral-7b": _llama(32_000, 4096, 14_336, 32, 32, 8, False, 32_768),
    "tiny": _llama(320, 64, 144, 2, 4, 2, False, 2048),
    # Draft models, with the vocabulary of the first and the third.
    "draft-4x512": _llama(32_000, 512, 1408, 4, 8, 2, True, 2048),
    "draft-135m": _llama(32_000, 576, 1536, 30, 9, 3, True, 8192),
}


def _check(name: str) -> str:
    if name and name not in SHAPES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(SHAPES)}")
    return name


# For command lines. Where there is another source of weights, "" is none of these.
ShapeName = Annotated[
    str, typer.Option(help=f"random weights in this shape, in place of a model's: {', '.join(SHAPES)}", callback=_check)
]


@dataclass(frozen=True)
class RandomCheckpoint:
    """A Checkpoint whose tensors are drawn when they are loaded, on the device that will hold them."""

    config: ModelConfig
    device: torch.device
    path: Path = Path("random")
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    fingerprint: str = "random"

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(shape, "float32", self.path) for name, shape in expected_tensors(self.config).items()}

    def load(self, name: str) -> torch.Tensor:
        shape = expected_tensors(self.config)[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self.device)
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16) * shape[-1] ** -0.5
