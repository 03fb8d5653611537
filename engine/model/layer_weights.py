"""The weights of one layer as they come from a checkpoint, before a decoder arranges them for its operators."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerWeights:
    """Norms are float32, whatever the format of the rest; matrices are [out_features, in_features].

    `qkv` and its bias stack the query, key and value projections; `gate_up` stacks gate and up.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    post_attention_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
