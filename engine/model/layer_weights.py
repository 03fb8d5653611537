"""The weights of one layer as they come from a checkpoint, before a decoder arranges them for its operators."""

from dataclasses import dataclass

import torch

from engine.quantize.int8_weight import Weight


@dataclass(frozen=True)
class LayerWeights:
    """Norms are float32, whatever the format of the rest; matrices are [out_features, in_features], in the
    dtype of the activations or in int8.

    `qkv` and its bias stack the query, key and value projections; `gate_up` stacks gate and up.
    """

    input_norm: torch.Tensor
    qkv: Weight
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Weight
    post_attention_norm: torch.Tensor
    gate_up: Weight
    down: Weight
