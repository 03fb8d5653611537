"""What a checkpoint must hold. Without torch, so that the service can check a model before anything is loaded."""

from engine.config import ModelConfig, Quantization
from engine.errors import ModelError
from engine.loader.checkpoint import Checkpoint
from engine.quantize.quantizable import SCALE_SUFFIX, is_quantizable


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config must have, by Hugging Face's names."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        tensors[prefix + "input_layernorm.weight"] = (hidden,)
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = (size, hidden)
            if config.qkv_bias:
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
        if config.qk_norm:
            tensors[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            tensors[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        tensors[prefix + "self_attn.o_proj.weight"] = (hidden, q_size)
        tensors[prefix + "post_attention_layernorm.weight"] = (hidden,)
        tensors[prefix + "mlp.gate_proj.weight"] = (ffn, hidden)
        tensors[prefix + "mlp.up_proj.weight"] = (ffn, hidden)
        tensors[prefix + "mlp.down_proj.weight"] = (hidden, ffn)
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    if config.stored_quantization is not Quantization.NONE:
        tensors |= {name + SCALE_SUFFIX: shape[:1] for name, shape in tensors.items() if is_quantizable(name)}
    return tensors


def check_tensors(checkpoint: Checkpoint) -> None:
    """Compare the checkpoint's headers with what its config asks for, before any data is read.

    Raises:
        ModelError: a tensor is missing or has another shape or format; names file and tensor.
    """
    quantized = checkpoint.config.stored_quantization is not Quantization.NONE
    for name, shape in expected_tensors(checkpoint.config).items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise ModelError(f"{checkpoint.path}: tensor {name!r} is missing")
        if info.shape != shape:
            raise ModelError(
                f"{info.file}: tensor {name!r} has shape {list(info.shape)}, its config says {list(shape)}"
            )
        if (info.dtype == "int8") != (quantized and is_quantizable(name)):
            raise ModelError(f"{info.file}: tensor {name!r} is in {info.dtype}, which its config does not say")
