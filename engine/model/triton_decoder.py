"""The decoder in Triton kernels: five a layer, launched one behind the other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.config import ModelConfig
from engine.kernels.attention_worklist import AttentionWorkspace, attention_workspace, build_worklist
from engine.kernels.embed_rows import embed_rows
from engine.kernels.flash_attention import flash_attention
from engine.kernels.int8_rows import Int8Rows, round_normed, round_rows, store_kv_int8
from engine.kernels.matrix import Matrix, pack
from engine.kernels.norm_gate_up_silu import gate_up_row_order, norm_gate_up_silu
from engine.kernels.norm_logits import norm_logits
from engine.kernels.norm_qkv_rope import QKVWeights, norm_qkv_rope, qkv_row_order
from engine.kernels.prefetch import upcoming
from engine.kernels.product_residual import product_residual
from engine.kernels.row_norm import NormedRows, max_parts
from engine.kernels.target import gpu_of
from engine.model.kv_cache import KVCache
from engine.model.layer_weights import LayerWeights
from engine.model.rope import rope_table
from engine.quantize.int8_weight import Int8Weight, Weight
from engine.quantize.rotation import rotation_block

PACKED_FRACTION = 0.25  # of the device's memory: larger models do without the copies of their weights for few rows


@dataclass(frozen=True)
class TritonInput:
    """Rows of one step, on the device. A row is a token at a position of a request.

    token_ids, positions, slot_mapping: int64 [N]. row_request: int32 [N], each row's row of the block tables; -1 for a
    row of nobody, which has token 0, position 0 and a slot of the null block. block_tables: int32 [requests, blocks].
    logit_rows: int64 [S], the rows whose logits are wanted. decodes: whether no request has more than one row, which
    makes attention cheaper.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    row_request: torch.Tensor
    block_tables: torch.Tensor
    logit_rows: torch.Tensor
    decodes: bool = False


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer, their rows in the order that the kernels' tiles want."""

    input_norm: torch.Tensor
    qkv: QKVWeights
    o: Matrix
    post_attention_norm: torch.Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True)
class _Activations:
    """What a step leaves between its kernels; made once, for the largest step."""

    hidden: torch.Tensor
    weighted: torch.Tensor
    squares: torch.Tensor
    q: torch.Tensor
    kv: torch.Tensor  # keys and values, [2, N, KVH, D], where the cache has another format
    attended: torch.Tensor
    activated: torch.Tensor
    rounded: Int8Rows  # whatever goes into a w8a8 product
    places: torch.Tensor  # 0, 1, 2 …
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
        lm_head: Weight,
        max_model_len: int,
    ) -> None:
        self.config = config
        self.device = embedding.device
        self.dtype = embedding.dtype
        self.max_model_len = max_model_len
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._lm_head = _matrix(config, lm_head)
        cos, sin = (table[:, 0].to(self.device) for table in rope_table(config.rope, config.head_dim, max_model_len))
        self._rope = (cos.contiguous(), sin.contiguous())
        self._activations: _Activations | None = None

    @staticmethod
    def pack(config: ModelConfig, weights: LayerWeights) -> _Layer:
        """See engine.model.decoder.Decoder."""
        order = qkv_row_order(config.num_heads, config.num_kv_heads, config.head_dim).to(weights.qkv.device)
        qkv = QKVWeights(
            weight=_matrix(config, weights.qkv[order]),
            bias=None if weights.qkv_bias is None else weights.qkv_bias[order],
            q_norm=weights.q_norm,
            k_norm=weights.k_norm,
            eps=config.rms_norm_eps,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        gate_up = weights.gate_up[gate_up_row_order(config.intermediate_size).to(weights.gate_up.device)]
        return _Layer(
            weights.input_norm,
            qkv,
            _matrix(config, weights.o),
            weights.post_attention_norm,
            _matrix(config, gate_up),
            _matrix(config, weights.down),
        )

    def reserve(self, max_rows: int, max_logit_rows: int) -> None:
        """Allocate what steps of up to so many rows need."""
        config = self.config
        heads = config.num_heads * config.head_dim

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        self._activations = _Activations(
            hidden=empty(max_rows, config.hidden_size),
            weighted=empty(max_rows, config.hidden_size),
            squares=empty(max_rows, max_parts(config.hidden_size), dtype=torch.float32),
            q=empty(max_rows, config.num_heads, config.head_dim),
            kv=empty(2, max_rows, config.num_kv_heads, config.head_dim),
            attended=empty(max_rows, config.num_heads, config.head_dim),
            activated=empty(max_rows, config.intermediate_size),
            rounded=Int8Rows(
                empty(max_rows, max(config.hidden_size, config.intermediate_size, heads), dtype=torch.int8),
                empty(max_rows, dtype=torch.float32),
            ),
            places=torch.arange(max_rows, device=self.device),
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
        return self._space.logits[:num_rows]

    @torch.inference_mode()
    def forward(self, step: TritonInput, kv_cache: KVCache) -> torch.Tensor:
        """Run one step; writes its KV. Returns the logits of `step.logit_rows`: float32 [S, vocab_size], until the next
        step. Neither waits for the device nor allocates, so that a CUDA graph may hold it."""
        config, space = self.config, self._space
        rows, wanted = step.token_ids.shape[0], step.logit_rows.shape[0]
        hidden, weighted, squares = space.hidden[:rows], space.weighted[:rows], space.squares[:rows]
        q, attended, activated = space.q[:rows], space.attended[:rows], space.activated[:rows]
        eps = config.rms_norm_eps
        # What the kernels of the layers read before they wait (worklist, positions, slots) has to be there when the
        # first of them starts: so these two start only when all ahead of them is done.
        attention = replace(space.attention, large_tiles=False) if step.decodes else space.attention
        build_worklist(attention, step.row_request, step.positions, pdl=False)
        x = embed_rows(
            step.token_ids, self._embedding, self._layers[0].input_norm, eps, hidden, weighted, squares, pdl=False
        )
        next_norms = [*(layer.input_norm for layer in self._layers[1:]), self._norm]
        for index, (layer, next_norm) in enumerate(zip(self._layers, next_norms, strict=True)):
            self._attend(index, self._for(layer.qkv.weight, x), q, attended, step, kv_cache, attention)
            into_o = self._rounded(attended.flatten(1)) if layer.o.rounds_inputs else attended.flatten(1)
            ahead = upcoming("norm_gate_up_silu", rows, layer.gate_up)
            x = product_residual(
                into_o, layer.o, hidden, layer.post_attention_norm, eps, hidden, weighted, squares, ahead=ahead
            )
            norm_gate_up_silu(self._for(layer.gate_up, x), layer.gate_up, activated)
            into_down = self._rounded(activated) if layer.down.rounds_inputs else activated
            ahead = self._after(index, rows)
            x = product_residual(into_down, layer.down, hidden, next_norm, eps, hidden, weighted, squares, ahead=ahead)
        logits = space.logits[:wanted]
        norm_logits(x, self._lm_head, logits, row_index=step.logit_rows)
        return logits

    def _after(self, index: int, rows: int) -> torch.Tensor | None:
        """What the product behind a layer reads, if it pays to fetch it early."""
        if index + 1 < len(self._layers):
            return upcoming("norm_qkv_rope", rows, self._layers[index + 1].qkv.weight)
        return upcoming("norm_logits", rows, self._lm_head)

    def _attend(
        self,
        index: int,
        x: NormedRows,
        q: torch.Tensor,
        attended: torch.Tensor,
        step: TritonInput,
        kv_cache: KVCache,
        attention: AttentionWorkspace,
    ) -> None:
        """Fill the layer's slots of the cache, then `attended` [N, H, D]."""
        space, layer, rows = self._space, self._layers[index], q.shape[0]
        keys, values = kv_cache.layer(index)
        scales = kv_cache.scales(index)
        if scales is None:
            norm_qkv_rope(x, layer.qkv, self._rope, step.positions, step.slot_mapping, q, (keys, values))
        else:
            own = (space.kv[0, :rows], space.kv[1, :rows])
            as_cache = (own[0][None], own[1][None])  # one block
            norm_qkv_rope(x, layer.qkv, self._rope, step.positions, space.places[:rows], q, as_cache)
            store_kv_int8(own, (keys, values), scales, step.slot_mapping)
        key_scales, value_scales = scales or (None, None)
        flash_attention(
            q,
            keys,
            values,
            step.block_tables,
            attention,
            self.config.head_dim**-0.5,
            out=attended,
            k_scales=key_scales,
            v_scales=value_scales,
        )

    def _for(self, matrix: Matrix, x: NormedRows) -> NormedRows:
        """The rows as the matrix wants them."""
        if not matrix.rounds_inputs:
            return x
        rows, features = x.weighted.shape
        return round_normed(x, rotation_block(features), self._space.rounded.first(rows, features))

    def _rounded(self, x: torch.Tensor) -> Int8Rows:
        return round_rows(x, rotation_block(x.shape[1]), self._space.rounded.first(*x.shape))

    @property
    def _space(self) -> _Activations:
        assert self._activations is not None, "reserve comes first"
        return self._activations


def _matrix(config: ModelConfig, weight: Weight) -> Matrix:
    """The weight, with a copy for few rows where memory allows."""
    values, scales = (weight.values, weight.scales) if isinstance(weight, Int8Weight) else (weight, None)
    values = values.contiguous()
    if isinstance(weight, Int8Weight) and weight.rounds_inputs:
        return Matrix(values, None, scales, rounds_inputs=True)
    gpu = gpu_of(values.device)
    has_room = gpu is None or _weight_bytes(config, values.dtype) <= PACKED_FRACTION * gpu.memory_bytes
    return Matrix(values, pack(values) if values.element_size() <= 2 and has_room else None, scales)


def _weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of all matrices of the model, once."""
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    per_layer = config.hidden_size * (attention + 3 * config.intermediate_size)
    return (config.num_layers * per_layer + config.vocab_size * config.hidden_size) * dtype.itemsize
