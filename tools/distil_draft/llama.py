"""Models as transformers runs them, which has their gradients: the target, and drafts cut from it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import ModelConfig, Quantization
from engine.errors import ConfigError
from engine.loader.checkpoint import Checkpoint
from engine.model.expected_tensors import check_tensors, expected_tensors

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class DraftShape:
    """What of a draft is smaller than its target. Heads are as many and as large: their cost is in the hidden size."""

    hidden_size: int = 432
    intermediate_size: int = 1152
    num_layers: int = 4

    def of(self, target: ModelConfig) -> ModelConfig:
        """The draft's config, with a tied embedding.

        Raises:
            ConfigError: it does not go with this target.
        """
        if self.hidden_size % target.num_heads:
            raise ConfigError(f"the hidden size must be a multiple of the target's {target.num_heads} heads")
        for name in ("hidden_size", "intermediate_size", "num_layers"):
            if not 1 <= getattr(self, name) <= getattr(target, name):
                raise ConfigError(f"{name} must be between 1 and the target's {getattr(target, name)}")
        return replace(
            target,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            tie_word_embeddings=True,
        )


def make_llama(config: ModelConfig) -> Any:
    """A LlamaForCausalLM with random weights (torch's global generator), float32.

    Raises:
        ConfigError: the model is none that this class computes.
    """
    if config.architecture != "LlamaForCausalLM" or config.rope.scaling is not None:
        raise ConfigError(
            f"only plain Llama models are distilled, not {config.architecture} or scaled rotary positions"
        )
    if config.stored_quantization is not Quantization.NONE:
        raise ConfigError(f"a model with {config.stored_quantization} weights is no target: take the one it came from")
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=None,
            eos_token_id=list(config.eos_token_ids),
            attn_implementation="sdpa",
        )
    )


def load_llama(checkpoint: Checkpoint) -> Any:
    """A checkpoint's weights, whatever file they are in, float32 on the CPU.

    Raises:
        ConfigError: see `make_llama`.
        ModelError: the checkpoint is malformed.
    """
    check_tensors(checkpoint)
    model = make_llama(checkpoint.config)
    weights = {name: checkpoint.load(name).float() for name in expected_tensors(checkpoint.config)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    assert not missing or model.lm_head.weight is model.model.embed_tokens.weight
    return model


def plain_weights(model: Any) -> dict[str, torch.Tensor]:
    """By Hugging Face's names, without the second name of a tied embedding."""
    weights: dict[str, torch.Tensor] = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights
