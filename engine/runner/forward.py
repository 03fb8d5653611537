"""How a step's chunks become logits: the one thing that depends on the device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import SampledToken, ScheduledChunk
from engine.config import CacheConfig, Quantization, SchedulerConfig
from engine.loader.checkpoint import Checkpoint
from engine.model.kv_cache import KVCache
from engine.model.reference_decoder import ReferenceDecoder
from engine.model.weights import load_decoder
from engine.request import Request
from engine.runner.eager_forward import EagerForward
from engine.runner.memory import plan_num_blocks

Choices = npt.NDArray[np.int64]  # [S, 2]


class StepLogits(Protocol):
    """What a step leaves, in the order of its sampling chunks."""

    @property
    def logits(self) -> torch.Tensor:
        """float32 [S, vocab_size], until the next step is launched."""
        ...

    def choices(self) -> Choices:
        """On the host, until the step after the next is launched: whether each row holds numbers only, and the token
        that was chosen, or the likeliest where the host is to choose. Waits for the step."""
        ...

    def details(self, requests: Sequence[Request]) -> Mapping[int, SampledToken]:
        """Of requests that sampled in this step, in order, and by their places: errors and log-probabilities of what
        the device chose."""
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

    def chooses(self, request: Request) -> bool:
        """Whether the device chooses this request's tokens; depends on nothing but what was asked for."""
        ...

    def warm_up(self, on_progress: Callable[[int, int], None]) -> None:
        """Compile and record what most steps need, before the first of them. `on_progress(done, in all)`."""
        ...

    def prepare_next(self) -> bool:
        """Do a little of what `warm_up` has left for later, while no step is under way. False if nothing is left."""
        ...


def load_forward(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    cache: CacheConfig,
    limits: SchedulerConfig,
    on_progress: Callable[[int, int], None],
    quantization: Quantization = Quantization.NONE,
) -> Forward:
    """Load the weights, then give the KV cache what memory is left.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: the KV cache cannot hold one request of the longest length; the model cannot be quantised so.
    """

    def make_kv_cache() -> KVCache:
        num_blocks = plan_num_blocks(checkpoint.config, cache, limits, dtype, device)
        return KVCache(checkpoint.config, num_blocks, cache.block_size, dtype, device, cache.dtype)

    if device.type != "cuda":
        reference = load_decoder(
            ReferenceDecoder, checkpoint, device, dtype, limits.max_model_len, on_progress, quantization
        )
        return EagerForward(reference, make_kv_cache())

    # Imported where they are needed: Triton is not to be had on every platform with a CPU.
    from engine.model.triton_decoder import TritonDecoder
    from engine.runner.graph_forward import GraphForward

    decoder = load_decoder(TritonDecoder, checkpoint, device, dtype, limits.max_model_len, on_progress, quantization)
    return GraphForward(decoder, make_kv_cache, limits)
