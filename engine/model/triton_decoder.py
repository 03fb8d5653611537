"""The decoder in Triton kernels: five a layer, launched one behind the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.config import ModelConfig
from engine.kernels.attention_worklist import AttentionWorkspace, attention_workspace, build_worklist
from engine.kernels.flash_attention import flash_attention
from engine.kernels.norm_gate_up_silu import gate_up_row_order, norm_gate_up_silu
from engine.kernels.norm_logits import norm_logits
from engine.kernels.norm_qkv_rope import QKVWeights, norm_qkv_rope, qkv_row_order
from engine.kernels.product_residual import product_residual
from engine.model.kv_cache import KVCache
from engine.model.layer_weights import LayerWeights
from engine.model.rope import rope_table


@dataclass(frozen=True)
class TritonInput:
    """Rows of one step, on the device. A row is a token at a position of a request.

    token_ids, positions, slot_mapping: int64 [N]. row_request: int32 [N], each row's row of the block tables; -1 for a
    row of nobody, which has token 0, position 0 and a slot of the null block. block_tables: int32 [requests, blocks].
    logit_rows: int64 [S], the rows whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    row_request: torch.Tensor
    block_tables: torch.Tensor
    logit_rows: torch.Tensor


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer, their rows in the order that the kernels' tiles want."""

    qkv: QKVWeights
    o: torch.Tensor
    post_attention_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class _Activations:
    """What a step leaves between its kernels; made once, for the largest step."""

    hidden: torch.Tensor
    normed: torch.Tensor
    q: torch.Tensor
    attended: torch.Tensor
    activated: torch.Tensor
    logits: torch.Tensor
    attention: AttentionWorkspace


class TritonDecoder:
    """Token ids to logits over the paged KV cache. `reserve` comes before the first `forward`."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: torch.Tensor,
        layers: Sequence[_Layer],
        norm: torch.Tensor,
        lm_head: torch.Tensor,
        max_model_len: int,
    ) -> None:
        self.config = config
        self.device = embedding.device
        self.dtype = embedding.dtype
        self.max_model_len = max_model_len
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._lm_head = lm_head
        cos, sin = (table[:, 0].to(self.device) for table in rope_table(config.rope, config.head_dim, max_model_len))
        self._rope = (cos.contiguous(), sin.contiguous())
        self._activations: _Activations | None = None

    @staticmethod
    def pack(config: ModelConfig, weights: LayerWeights) -> _Layer:
        """See engine.model.decoder.Decoder."""
        order = qkv_row_order(config.num_heads, config.num_kv_heads, config.head_dim).to(weights.qkv.device)
        qkv = QKVWeights(
            norm=weights.input_norm,
            weight=weights.qkv[order],
            bias=None if weights.qkv_bias is None else weights.qkv_bias[order],
            q_norm=weights.q_norm,
            k_norm=weights.k_norm,
            eps=config.rms_norm_eps,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        gate_up = weights.gate_up[gate_up_row_order(config.intermediate_size).to(weights.gate_up.device)]
        return _Layer(qkv, weights.o.contiguous(), weights.post_attention_norm, gate_up, weights.down.contiguous())

    def reserve(self, max_rows: int, max_logit_rows: int) -> None:
        """Allocate what steps of up to so many rows need."""
        config = self.config

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        self._activations = _Activations(
            hidden=empty(max_rows, config.hidden_size),
            normed=empty(max_rows, config.hidden_size),
            q=empty(max_rows, config.num_heads, config.head_dim),
            attended=empty(max_rows, config.num_heads, config.head_dim),
            activated=empty(max_rows, config.intermediate_size),
            logits=empty(max_logit_rows, config.vocab_size, dtype=torch.float32),
            attention=attention_workspace(
                max_rows,
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                self.max_model_len,
                self.dtype,
                self.device,
                config.sliding_window,
            ),
        )

    def logits(self, num_rows: int) -> torch.Tensor:
        """The first rows of what the last `forward` returned, until the next."""
        assert self._activations is not None, "reserve comes first"
        return self._activations.logits[:num_rows]

    @torch.inference_mode()
    def forward(self, step: TritonInput, kv_cache: KVCache) -> torch.Tensor:
        """Run one step; writes its KV. Returns the logits of `step.logit_rows`: float32 [S, vocab_size], until the next
        step. Neither waits for the device nor allocates, so that a CUDA graph may hold it."""
        assert self._activations is not None, "reserve comes first"
        config, space = self.config, self._activations
        rows, wanted = step.token_ids.shape[0], step.logit_rows.shape[0]
        hidden, normed = space.hidden[:rows], space.normed[:rows]
        q, attended, activated = space.q[:rows], space.attended[:rows], space.activated[:rows]
        torch.index_select(self._embedding, 0, step.token_ids, out=hidden)
        # The kernels of torch ahead of these do not take part in programmatic launch.
        build_worklist(space.attention, step.row_request, step.positions, pdl=False)
        first = True
        for index, layer in enumerate(self._layers):
            kv = kv_cache.layer(index)
            norm_qkv_rope(
                hidden, layer.qkv, self._rope, step.positions, step.slot_mapping, q, kv, normed=normed, pdl=not first
            )
            first = False
            flash_attention(q, *kv, step.block_tables, space.attention, config.head_dim**-0.5, out=attended)
            product_residual(attended.flatten(1), layer.o, hidden, hidden)
            norm_gate_up_silu(
                hidden, layer.post_attention_norm, config.rms_norm_eps, layer.gate_up, activated, normed=normed
            )
            product_residual(activated, layer.down, hidden, hidden)
        logits = space.logits[:wanted]
        norm_logits(
            hidden,
            self._norm,
            config.rms_norm_eps,
            self._lm_head,
            logits,
            row_index=step.logit_rows,
            normed=normed[:wanted],
        )
        return logits
