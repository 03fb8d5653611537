"""Small random models in Hugging Face's layout, for tests of the engine."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.loader.hf_config import read_model_config
from engine.model.expected_tensors import expected_tensors

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def write_tiny_model(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A model of random weights, large enough that its logits differ clearly from token to token."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG | changes))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(read_model_config(directory)).items():
        if name.endswith("norm.weight"):
            tensors[name] = 1 + 0.1 * torch.randn(shape, generator=generator)
        else:
            tensors[name] = torch.randn(shape, generator=generator) * (1.0 if "embed" in name else shape[-1] ** -0.5)
    save_file(tensors, str(directory / "model.safetensors"))
    return directory
