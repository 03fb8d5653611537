"""Rotary position embedding: the table of angles of every position."""

import math

import torch

from engine.config import RopeConfig
from engine.errors import ModelError


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians a position turns each pair of a head: float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (config.theta**exponents)
    match config.scaling:
        case None:
            return frequencies
        case "linear":
            return frequencies / config.factor
        case "llama3":
            return _llama3_frequencies(frequencies, config)
        case "factors":
            return frequencies / torch.tensor(config.frequency_factors, dtype=torch.float32)
    raise ModelError(f"rope scaling {config.scaling!r} is not known; known: linear, llama3, factors")


def _llama3_frequencies(frequencies: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Llama 3.1: long wavelengths slowed by `factor`, short ones kept, the band between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = config.original_max_position_embeddings / config.high_freq_factor
    shortest_slowed = config.original_max_position_embeddings / config.low_freq_factor
    smooth = (config.original_max_position_embeddings / wavelengths - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / config.factor + smooth * frequencies
    slowed = torch.where(wavelengths > shortest_slowed, frequencies / config.factor, blended)
    return torch.where(wavelengths < longest_kept, frequencies, slowed)


def rope_table(config: RopeConfig, head_dim: int, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position: two float32 tensors [num_positions, 1, head_dim / 2]."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config, head_dim))[:, None, :]
    return angles.cos(), angles.sin()
