"""The memory plan of an engine that has not been started."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import lru_cache
from types import FunctionType, MethodType, ModuleType

import torch

from engine.config import EngineConfig, ModelConfig, Quantization, SchedulerConfig
from engine.errors import ConfigError
from engine.kernels.target import GPU, aimed_at
from engine.model.kv_cache import KVCache, kv_bytes_per_block
from engine.model.weights import load_decoder
from engine.planning.card import Card
from engine.precompile.shapes_only import NOWHERE, ShapesOnly
from engine.quantize.formats import resolve_quantization
from engine.runner.memory import (
    MemoryPlan,
    blocks_within,
    cpu_weight_bytes,
    later_bytes,
    sampler_bytes,
    weight_bytes,
)
from engine.runner.out_of_memory import kv_cache_does_not_fit, weights_do_not_fit, workspace_does_not_fit
from engine.speculative.start_proposer import local_draft_config
from engine.speculative.vocabulary import vocabulary_mismatch

_ALLOCATED_BYTES = 512  # torch gives a GPU's memory out in multiples of so many
_OPAQUE = (str, bytes, type, Enum, FunctionType, MethodType, ModuleType)


def predict_memory(
    model: ModelConfig, config: EngineConfig, card: Card, draft_model: ModelConfig | None = None
) -> MemoryPlan:
    """What the engine would say of the card once it is ready. `config.device` is the card's.

    graph_bytes are an upper estimate, as they are when the engine itself decides about the size of its KV cache.
    draft_model: one in the engine's process; draft_bytes are all that it takes. free_bytes are what is left once the
    whole KV cache has been written, and other_bytes what was not free before.

    Raises:
        ConfigError: something does not fit, in the words of the start.
    """
    dtype = getattr(torch, config.dtype or card.default_dtype)
    if draft_model is None:
        return _predict(model, config, card, dtype, draft_bytes=0)
    mismatch = vocabulary_mismatch("the draft model", draft_model.vocab_size, "its target", model.vocab_size)
    if mismatch is not None:
        raise ConfigError(mismatch)
    own = local_draft_config(config, draft_model, dtype, card.memory.free_bytes)
    draft = _predict(draft_model, own, card, dtype, draft_bytes=0)
    draft_bytes = card.memory.free_bytes - draft.free_bytes
    reading = replace(card.memory, free_bytes=draft.free_bytes, allocated_bytes=draft_bytes)
    return _predict(model, config, replace(card, memory=reading), dtype, draft_bytes=draft_bytes)


def _predict(model: ModelConfig, config: EngineConfig, card: Card, dtype: torch.dtype, draft_bytes: int) -> MemoryPlan:
    limits = replace(config.scheduler, max_model_len=min(config.scheduler.max_model_len, model.max_position_embeddings))
    quantization = resolve_quantization(model, config.quantization)
    free = card.memory.free_bytes
    needed = (cpu_weight_bytes if card.gpu is None else weight_bytes)(model, dtype, quantization)
    if needed > free:
        raise ConfigError(weights_do_not_fit(needed, free, quantization))
    if card.gpu is None:
        weights, workspace, sampler, graphs = needed, 0, 0, 0
    else:
        weights, workspace = gpu_bytes(card.gpu, model, dtype, quantization, config.cache.block_size, limits)
        sampler, graphs = sampler_bytes(model, limits), later_bytes(model, limits)
        workspace -= sampler
        if weights > free:
            raise ConfigError(weights_do_not_fit(weights, free, quantization))
    used = weights + workspace + sampler
    if used > free:
        raise ConfigError(workspace_does_not_fit(free - weights, limits.token_budget, limits.max_num_seqs))
    allocated = card.memory.allocated_bytes + used
    reading = replace(card.memory, free_bytes=free - used, allocated_bytes=allocated)
    num_blocks = blocks_within(model, config.cache, limits, dtype, config.device, reading)
    block_bytes = kv_bytes_per_block(model, config.cache.block_size, dtype, config.cache.dtype)
    left = free - used - num_blocks * block_bytes
    if left < 0:
        raise ConfigError(kv_cache_does_not_fit(num_blocks * block_bytes, free - used))
    return MemoryPlan(
        device_name=card.memory.device_name,
        total_bytes=card.memory.total_bytes,
        free_bytes=max(0, left - graphs),
        weights_bytes=weights,
        workspace_bytes=workspace,
        sampler_bytes=sampler,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        block_bytes=block_bytes,
        max_model_len=limits.max_model_len,
        graph_bytes=min(graphs, left),
        draft_bytes=draft_bytes,
    )


@lru_cache(maxsize=8)  # formats of the KV cache make no difference
def gpu_bytes(
    gpu: GPU,
    model: ModelConfig,
    dtype: torch.dtype,
    quantization: Quantization,
    block_size: int,
    limits: SchedulerConfig,
) -> tuple[int, int]:
    """Of the weights in all their copies; and of all else that is there before steps are captured, the sampler's state
    included and the KV cache not. `quantization` has been resolved."""
    try:
        from engine.model.triton_decoder import TritonDecoder  # Triton is not to be had on every platform
        from engine.runner.graph_forward import GraphForward
    except ModuleNotFoundError as error:
        raise ConfigError(f"a plan for a GPU takes {error.name}, which is not installed here: give --gpu cpu") from None
    with aimed_at(gpu):
        decoder = load_decoder(
            TritonDecoder, ShapesOnly(model), NOWHERE, dtype, limits.max_model_len, quantization=quantization
        )
        weights = tensor_bytes(decoder)
        empty = KVCache(model, 2, block_size, dtype, NOWHERE)
        forward = GraphForward(decoder, lambda: empty, limits)
    return weights, tensor_bytes(forward) - weights - tensor_bytes(empty)


def tensor_bytes(root: object) -> int:
    """Of the memory on the device "meta" that an object and whatever it is made of would hold; what tensors share
    counts once."""
    sizes: dict[int, int] = {}
    seen: dict[int, object] = {}
    left = [root]
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, _OPAQUE):
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            if item.device == NOWHERE:
                storage = item.untyped_storage()
                sizes[storage._cdata] = -(-storage.nbytes() // _ALLOCATED_BYTES) * _ALLOCATED_BYTES
        elif isinstance(item, Mapping):
            left += item.values()
        elif isinstance(item, Sequence):
            left += item
        elif hasattr(item, "__dict__"):
            left += vars(item).values()
    return sum(sizes.values())
