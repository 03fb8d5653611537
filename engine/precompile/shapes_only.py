"""A checkpoint whose tensors have shapes and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.config import ModelConfig, Quantization
from engine.loader.generation_defaults import GenerationDefaults
from engine.loader.tensor_info import TensorInfo
from engine.model.expected_tensors import expected_tensors
from engine.quantize.quantizable import is_quantizable

NOWHERE = torch.device("meta")


@dataclass(frozen=True)
class ShapesOnly:
    """An engine.loader.checkpoint.Checkpoint of any model: its weights take no memory, and need not be there."""

    config: ModelConfig
    path: Path = Path("shapes")
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    fingerprint: str = "shapes"

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(shape, self._format(name), self.path)
            for name, shape in expected_tensors(self.config).items()
        }

    def load(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        return torch.empty(info.shape, dtype=getattr(torch, info.dtype), device=NOWHERE)

    def _format(self, name: str) -> str:
        stored = self.config.stored_quantization is not Quantization.NONE
        return "int8" if stored and is_quantizable(name) else "float32"
