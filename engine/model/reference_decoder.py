"""The decoder in plain torch: what runs on the CPU, and the oracle of the kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from engine.config import ModelConfig
from engine.kernels.attention_plan import AttentionPlan, ChunkRows, plan_attention
from engine.kernels.reference import KVScales, apply_rope, paged_attention, rms_norm, silu_mul, store_kv
from engine.model.int8_linear import Int8Linear
from engine.model.kv_cache import KVCache
from engine.model.layer_weights import LayerWeights
from engine.model.linear import Linear, make_linear, padded_rows
from engine.model.rope import rope_table
from engine.quantize.int8_weight import Weight


@dataclass(frozen=True)
class ReferenceInput:
    """Rows of one step, padded: N = decoder.padded_rows(number of tokens).

    token_ids, positions, slot_mapping: int64 [N]; a padding row has token 0, position 0 and a slot of the null block.
    logit_rows: int64 [S], the rows whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    chunks: Sequence[ChunkRows]
    logit_rows: torch.Tensor


_Matrix = Linear | Int8Linear


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer, packed for the matrix library."""

    input_norm: torch.Tensor
    qkv: _Matrix
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: _Matrix
    post_attention_norm: torch.Tensor
    gate_up: _Matrix
    down: _Matrix


class ReferenceDecoder:
    """Token ids to logits over the paged KV cache."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: torch.Tensor,
        layers: Sequence[_Layer],
        norm: torch.Tensor,
        lm_head: Weight,
        max_model_len: int,
    ) -> None:
        self.config = config
        self.device = embedding.device
        self.dtype = embedding.dtype
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._lm_head = make_linear(lm_head)
        cos, sin = rope_table(config.rope, config.head_dim, max_model_len)
        self._cos, self._sin = cos.to(self.device), sin.to(self.device)

    def padded_rows(self, num_rows: int) -> int:
        """How many rows a step of `num_rows` is padded to: what the products want, which are all of one kind."""
        return padded_rows(num_rows, self._lm_head.row_tile)

    @staticmethod
    def pack(config: ModelConfig, weights: LayerWeights) -> _Layer:
        """See engine.model.decoder.Decoder."""
        del config  # the weights say it all
        return _Layer(
            input_norm=weights.input_norm,
            qkv=make_linear(weights.qkv, weights.qkv_bias),
            q_norm=weights.q_norm,
            k_norm=weights.k_norm,
            o=make_linear(weights.o),
            post_attention_norm=weights.post_attention_norm,
            gate_up=make_linear(weights.gate_up),
            down=make_linear(weights.down),
        )

    @torch.inference_mode()
    def forward(self, batch: ReferenceInput, kv_cache: KVCache) -> torch.Tensor:
        """Run one step; writes its KV. Returns the logits of `batch.logit_rows`: float32 [S, vocab_size]."""
        hidden = F.embedding(batch.token_ids, self._embedding)
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        group = self.config.num_heads // self.config.num_kv_heads
        plan = plan_attention(batch.chunks, kv_cache.block_size, group, self.config.sliding_window, self.device)
        for index, layer in enumerate(self._layers):
            kv, kv_scales = kv_cache.layer(index), kv_cache.scales(index)
            attended = self._attention(layer, hidden, (cos, sin), batch.slot_mapping, plan, kv, kv_scales)
            hidden = hidden + layer.o(attended)
            normed = rms_norm(hidden, layer.post_attention_norm, self.config.rms_norm_eps)
            hidden = hidden + layer.down(silu_mul(layer.gate_up(normed)))
        return self._logits(hidden[batch.logit_rows])

    def _attention(
        self,
        layer: _Layer,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        slot_mapping: torch.Tensor,
        plan: AttentionPlan,
        kv: tuple[torch.Tensor, torch.Tensor],
        kv_scales: KVScales | None,
    ) -> torch.Tensor:
        config = self.config
        rows = hidden.shape[0]
        qkv = layer.qkv(rms_norm(hidden, layer.input_norm, config.rms_norm_eps))
        heads = qkv.view(rows, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        qk, v = heads.split((config.num_heads + config.num_kv_heads, config.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk.split((config.num_heads, config.num_kv_heads), dim=1)
            q = rms_norm(q, layer.q_norm, config.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, config.rms_norm_eps)
            qk = torch.cat((q, k), dim=1)
        q, k = apply_rope(qk, *rope).split((config.num_heads, config.num_kv_heads), dim=1)
        store_kv(k, v, *kv, slot_mapping, kv_scales)
        scale = config.head_dim**-0.5
        return paged_attention(q, *kv, plan, scale, kv_scales).view(rows, -1)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        count = hidden.shape[0]
        rows = hidden.new_zeros((self.padded_rows(count), hidden.shape[1]))
        rows[:count] = rms_norm(hidden, self._norm, self.config.rms_norm_eps)
        return self._lm_head(rows)[:count].float()
