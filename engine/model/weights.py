"""From a checkpoint's tensors to a decoder, one tensor at a time."""

from collections.abc import Callable, Sequence

import torch

from engine.config import ModelConfig, Quantization
from engine.loader.checkpoint import Checkpoint
from engine.model.decoder import AnyDecoder
from engine.model.expected_tensors import check_tensors, expected_tensors
from engine.model.layer_weights import LayerWeights
from engine.quantize.formats import resolve_quantization
from engine.quantize.int8_weight import Int8Weight, Weight, inputs_are_rounded, quantize_weight, stack_weights
from engine.quantize.quantizable import SCALE_SUFFIX

OnProgress = Callable[[int, int], None]  # (tensors loaded, tensors in all)


def load_decoder(
    kind: type[AnyDecoder],
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    on_progress: OnProgress = lambda _done, _total: None,
    quantization: Quantization = Quantization.NONE,
) -> AnyDecoder:
    """Stream the weights to the device; host memory stays near the largest fused tensor.

    Matrices that are to be quantised and are not yet are quantised on the device, from the values in the checkpoint.

    Raises:
        ModelError: see `check_tensors`.
        ConfigError: the model cannot be quantised so.
    """
    check_tensors(checkpoint)
    config = checkpoint.config
    source = _TensorStream(checkpoint, device, dtype, resolve_quantization(config, quantization), on_progress)
    embedding = source.take("model.embed_tokens.weight")
    layers = [
        kind.pack(config, _load_layer(source, config, f"model.layers.{index}.")) for index in range(config.num_layers)
    ]
    norm = source.take("model.norm.weight")
    lm_head = source.tied_head(embedding) if config.tie_word_embeddings else source.matrix("lm_head.weight")
    return kind(config, embedding, layers, norm, lm_head, max_model_len)


class _TensorStream:
    """Takes tensors out of a checkpoint onto the device, and counts them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        quantization: Quantization,
        on_progress: OnProgress,
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._quantization = quantization
        self._on_progress = on_progress
        self._taken = 0
        self._total = len(expected_tensors(checkpoint.config))

    def take(self, name: str) -> torch.Tensor:
        """A tensor that is never quantised."""
        dtype = torch.float32 if name.endswith("norm.weight") else self._dtype
        return self._load(name, dtype)

    def matrix(self, name: str) -> Weight:
        """A matrix, in the format that it is computed in."""
        if self._quantization is Quantization.NONE:
            return self._load(name, self._dtype)
        rounded = inputs_are_rounded(name, self._quantization)
        if self._checkpoint.config.stored_quantization is Quantization.NONE:
            return quantize_weight(self._load(name, None), rounded)
        values = self._load(name, torch.int8).contiguous()
        return Int8Weight(values, self._load(name + SCALE_SUFFIX, torch.float32), rounded)

    def tied_head(self, embedding: torch.Tensor) -> Weight:
        """The embedding, or where matrices are quantised a quantised copy."""
        if self._quantization is Quantization.NONE:
            return embedding
        return quantize_weight(self._checkpoint.load("model.embed_tokens.weight").to(self._device))

    def stack(self, names: Sequence[str]) -> torch.Tensor:
        """Tensors that are never quantised, one below the other."""
        return torch.cat([self.take(name) for name in names])

    def stacked_matrix(self, names: Sequence[str]) -> Weight:
        return stack_weights([self.matrix(name) for name in names])

    def _load(self, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        """`dtype` None: as it is stored."""
        tensor = self._checkpoint.load(name).to(device=self._device, dtype=dtype)
        self._taken += 1
        self._on_progress(self._taken, self._total)
        return tensor


def _load_layer(source: _TensorStream, config: ModelConfig, prefix: str) -> LayerWeights:
    attention = f"{prefix}self_attn."
    return LayerWeights(
        input_norm=source.take(prefix + "input_layernorm.weight"),
        qkv=source.stacked_matrix([f"{attention}{name}_proj.weight" for name in "qkv"]),
        qkv_bias=source.stack([f"{attention}{name}_proj.bias" for name in "qkv"]) if config.qkv_bias else None,
        q_norm=source.take(attention + "q_norm.weight") if config.qk_norm else None,
        k_norm=source.take(attention + "k_norm.weight") if config.qk_norm else None,
        o=source.matrix(attention + "o_proj.weight"),
        post_attention_norm=source.take(prefix + "post_attention_layernorm.weight"),
        gate_up=source.stacked_matrix([prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"]),
        down=source.matrix(prefix + "mlp.down_proj.weight"),
    )
