"""A draft's first weights: nothing, or what a cut through the target leaves."""

from enum import StrEnum
from typing import Any

import torch

from engine.config import ModelConfig
from tools.distil_draft.llama import EMBEDDING, make_llama


class Initial(StrEnum):
    RANDOM = "random"
    EMBEDDING = "embedding"  # the target's embedding, projected; random layers
    PROJECTED = "projected"  # some of the target's layers too


def make_draft(target: Any, config: ModelConfig, initial: Initial, seed: int) -> Any:
    """A LlamaForCausalLM of the shape `config`, float32. target: the same class, float32."""
    torch.manual_seed(seed)
    draft = make_llama(config)
    if initial is Initial.RANDOM:
        return draft
    with torch.no_grad():
        basis = principal_basis(target.lm_head.weight, config.hidden_size)
        weights = projected_head(target, basis)
        if initial is Initial.PROJECTED:
            for place, layer in enumerate(_evenly_spaced(config.num_layers, target.config.num_hidden_layers)):
                projected = projected_layer(target.model.layers[layer], basis, config.intermediate_size)
                weights |= {f"model.layers.{place}.{name}": weight for name, weight in projected.items()}
        _, unexpected = draft.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
    return draft


def principal_basis(embedding: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` orthonormal directions [hidden, size] that hold the most of the rows of `embedding` [vocab, hidden]:
    for a given size no other projection changes the rows, and with them logits, less."""
    matrix = embedding.double()
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    return vectors.flip(1)[:, :size].float()


def projected_head(target: Any, basis: torch.Tensor) -> dict[str, torch.Tensor]:
    """Embedding and last norm in the directions of `basis`. Their product is that of the target if the norm's weights
    are all equal, and else as near as a diagonal comes to the projected one."""
    norm = torch.einsum("hd,h,hd->d", basis, target.model.norm.weight, basis)
    return {EMBEDDING: target.lm_head.weight @ basis, "model.norm.weight": norm * _norm_scale(basis)}


def projected_layer(layer: Any, basis: torch.Tensor, intermediate_size: int) -> dict[str, torch.Tensor]:
    """A layer whose residual stream is projected, as SliceGPT does (Ashkboos et al. 2024): the norms' weights go into
    the matrices behind them, since a norm without weights commutes with a rotation. Of the feed-forward neurons those
    with the largest weights are kept."""
    attention, mlp = layer.self_attn, layer.mlp
    read, read_mlp = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    size = (mlp.gate_proj.weight * read_mlp).norm(dim=1) * (mlp.up_proj.weight * read_mlp).norm(dim=1)
    kept = (size * mlp.down_proj.weight.norm(dim=0)).topk(intermediate_size).indices.sort().values
    norm = torch.full((basis.shape[1],), _norm_scale(basis))
    return {
        "input_layernorm.weight": norm,
        "self_attn.q_proj.weight": attention.q_proj.weight * read @ basis,
        "self_attn.k_proj.weight": attention.k_proj.weight * read @ basis,
        "self_attn.v_proj.weight": attention.v_proj.weight * read @ basis,
        "self_attn.o_proj.weight": basis.T @ attention.o_proj.weight,
        "post_attention_layernorm.weight": norm,
        "mlp.gate_proj.weight": (mlp.gate_proj.weight * read_mlp)[kept] @ basis,
        "mlp.up_proj.weight": (mlp.up_proj.weight * read_mlp)[kept] @ basis,
        "mlp.down_proj.weight": basis.T @ mlp.down_proj.weight[:, kept],
    }


def _norm_scale(basis: torch.Tensor) -> float:
    """A norm divides by the root of the mean square: of fewer features, that hold the same in all, it is larger."""
    hidden, size = basis.shape
    return float((hidden / size) ** 0.5)


def _evenly_spaced(count: int, total: int) -> list[int]:
    """Layers with the first and the last among them; one alone is the first."""
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]
