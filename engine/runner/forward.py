"""How a step's chunks become logits: the one thing that depends on the device."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from engine.batch import ScheduledChunk
from engine.config import CacheConfig, SchedulerConfig
from engine.loader.checkpoint import Checkpoint
from engine.model.kv_cache import KVCache
from engine.model.reference_decoder import ReferenceDecoder
from engine.model.weights import load_decoder
from engine.runner.eager_forward import EagerForward
from engine.runner.memory import plan_num_blocks


class StepLogits(Protocol):
    """What a step leaves, in the order of its sampling chunks."""

    @property
    def logits(self) -> torch.Tensor:
        """float32 [S, vocab_size], until the next step is launched."""
        ...

    def choices(self) -> torch.Tensor:
        """`greedy_choices(logits)` on the host, int64 [S, 2]; waits for the step."""
        ...


class Forward(Protocol):
    """A decoder with its KV cache and the way to call it."""

    kv_cache: KVCache
    feeds_back: bool  # whether a step may be launched while the choices of the one before it are unread

    @property
    def dtype(self) -> torch.dtype: ...

    def launch(self, chunks: Sequence[ScheduledChunk]) -> StepLogits:
        """Compute the chunks' KV and the logits of those that sample. Pending tokens of requests are the greedy choices
        of the step launched before."""
        ...


def load_forward(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    cache: CacheConfig,
    limits: SchedulerConfig,
    on_progress: Callable[[int, int], None],
) -> Forward:
    """Load the weights, then give the KV cache what memory is left.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: the KV cache cannot hold one request of the longest length.
    """

    def make_kv_cache() -> KVCache:
        num_blocks = plan_num_blocks(checkpoint.config, cache, limits, dtype, device)
        return KVCache(checkpoint.config, num_blocks, cache.block_size, dtype, device)

    if device.type != "cuda":
        reference = load_decoder(ReferenceDecoder, checkpoint, device, dtype, limits.max_model_len, on_progress)
        return EagerForward(reference, make_kv_cache())

    # Imported where they are needed: Triton is not to be had on every platform with a CPU.
    from engine.model.triton_decoder import TritonDecoder
    from engine.runner.graph_forward import GraphForward

    decoder = load_decoder(TritonDecoder, checkpoint, device, dtype, limits.max_model_len, on_progress)
    return GraphForward(decoder, make_kv_cache, limits)
