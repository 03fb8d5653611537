"""From a checkpoint's tensors to a decoder, one tensor at a time."""

from collections.abc import Callable, Sequence

import torch

from engine.config import ModelConfig
from engine.errors import ModelError
from engine.loader.checkpoint import Checkpoint
from engine.model.decoder import AnyDecoder
from engine.model.layer_weights import LayerWeights

OnProgress = Callable[[int, int], None]  # (tensors loaded, tensors in all)


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
    return tensors


def check_tensors(checkpoint: Checkpoint) -> None:
    """Compare the checkpoint's headers with what its config asks for, before any data is read.

    Raises:
        ModelError: a tensor is missing or has another shape; names file and tensor.
    """
    for name, shape in expected_tensors(checkpoint.config).items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise ModelError(f"{checkpoint.path}: tensor {name!r} is missing")
        if info.shape != shape:
            raise ModelError(
                f"{info.file}: tensor {name!r} has shape {list(info.shape)}, its config says {list(shape)}"
            )


def load_decoder(
    kind: type[AnyDecoder],
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    on_progress: OnProgress = lambda _done, _total: None,
) -> AnyDecoder:
    """Stream the weights to the device; host memory stays near the largest fused tensor.

    Raises:
        ModelError: see `check_tensors`.
    """
    check_tensors(checkpoint)
    config = checkpoint.config
    source = _TensorStream(checkpoint, device, dtype, on_progress)
    embedding = source.take("model.embed_tokens.weight")
    layers = [
        kind.pack(config, _load_layer(source, config, f"model.layers.{index}.")) for index in range(config.num_layers)
    ]
    norm = source.take("model.norm.weight")
    lm_head = embedding if config.tie_word_embeddings else source.take("lm_head.weight")
    return kind(config, embedding, layers, norm, lm_head, max_model_len)


class _TensorStream:
    """Takes tensors out of a checkpoint onto the device, and counts them."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, on_progress: OnProgress
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._on_progress = on_progress
        self._taken = 0
        self._total = len(expected_tensors(checkpoint.config))

    def take(self, name: str) -> torch.Tensor:
        dtype = torch.float32 if name.endswith("norm.weight") else self._dtype
        tensor = self._checkpoint.load(name).to(device=self._device, dtype=dtype)
        self._taken += 1
        self._on_progress(self._taken, self._total)
        return tensor

    def stack(self, names: Sequence[str]) -> torch.Tensor:
        """The named tensors, one below the other."""
        return torch.cat([self.take(name) for name in names])


def _load_layer(source: _TensorStream, config: ModelConfig, prefix: str) -> LayerWeights:
    def attention(kind: str) -> torch.Tensor:
        return source.stack([f"{prefix}self_attn.{name}_proj.{kind}" for name in "qkv"])

    return LayerWeights(
        input_norm=source.take(prefix + "input_layernorm.weight"),
        qkv=attention("weight"),
        qkv_bias=attention("bias") if config.qkv_bias else None,
        q_norm=source.take(prefix + "self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm=source.take(prefix + "self_attn.k_norm.weight") if config.qk_norm else None,
        o=source.take(prefix + "self_attn.o_proj.weight"),
        post_attention_norm=source.take(prefix + "post_attention_layernorm.weight"),
        gate_up=source.stack([prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"]),
        down=source.take(prefix + "mlp.down_proj.weight"),
    )
