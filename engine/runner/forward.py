"""How a step's chunks become logits: the one thing that depends on the device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import SampledToken, ScheduledChunk
from engine.config import CacheConfig, Quantization, SchedulerConfig
from engine.errors import ConfigError
from engine.loader.checkpoint import Checkpoint
from engine.model.decoder import Decoder
from engine.model.kv_cache import KVCache, kv_bytes_per_block
from engine.model.reference_decoder import ReferenceDecoder
from engine.model.weights import load_decoder
from engine.quantize.formats import resolve_quantization
from engine.request import Request
from engine.runner.eager_forward import EagerForward
from engine.runner.memory import plan_num_blocks, read_memory, weight_bytes
from engine.runner.out_of_memory import explained, kv_cache_does_not_fit, weights_do_not_fit, workspace_does_not_fit

Choices = npt.NDArray[np.int64]  # [S, 2]
MAX_FURTHER = 12  # steps that may be launched behind a step before that one is read


class StepLogits(Protocol):
    """What a step leaves, in the order of its sampling chunks."""

    @property
    def logits(self) -> torch.Tensor:
        """float32 [S, vocab_size], until the next step is launched."""
        ...

    def choices(self) -> Choices:
        """On the host, until MAX_FURTHER + 2 more steps have been launched: whether each row holds numbers only, and
        the token that was chosen, or the likeliest where the host is to choose. Waits for the step."""
        ...

    def details(self, requests: Sequence[Request]) -> Mapping[int, SampledToken]:
        """Of requests that sampled in this step, in order, and by their places: errors and log-probabilities of what
        the device chose."""
        ...


class Forward(Protocol):
    """A decoder with its KV cache and the way to call it."""

    kv_cache: KVCache
    padded_sizes: Sequence[int]  # of rows, ascending: steps are padded to the next of them; empty if they are not
    feeds_back: bool  # whether a step may be launched while the choices of the one before it are unread

    @property
    def dtype(self) -> torch.dtype: ...

    def launch(self, chunks: Sequence[ScheduledChunk], num_further: int = 0) -> StepLogits:
        """Compute the chunks' KV and the logits of those that sample. Pending tokens of requests are the choices of the
        step launched before. num_further: so many times may `launch_further` follow; the requests have the blocks."""
        ...

    def launch_further(self) -> StepLogits:
        """One more step for the requests that sampled in the last one, in the same order and without the host's help:
        the KV of the tokens chosen there, and the logits behind them. Only where `feeds_back` holds, and where the last
        step had neither drafts nor anyone who asks for log-probabilities."""
        ...

    def score(self, chunk: ScheduledChunk) -> torch.Tensor:
        """Compute one chunk's KV. Returns the logits of all its rows: float32 [num_scheduled_tokens, vocab_size], until
        the next step. It has no more rows than a step may have logits."""
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
    """Load the weights, then give the KV cache what memory is left: `load_weights`, then `make_forward`.

    Raises:
        ModelError, ConfigError: as they do.
    """
    decoder = load_weights(checkpoint, device, dtype, limits.max_model_len, on_progress, quantization)
    return make_forward(decoder, cache, limits)


def load_weights(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    on_progress: Callable[[int, int], None],
    quantization: Quantization,
) -> Decoder:
    """The device's decoder, with its weights. `on_progress(tensors loaded, tensors in all)`.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: the model cannot be quantised so, or its weights do not fit.
    """
    quantization = resolve_quantization(checkpoint.config, quantization)
    needed, free = weight_bytes(checkpoint.config, dtype, quantization), read_memory(device).free_bytes
    if needed > free:
        raise ConfigError(weights_do_not_fit(needed, free, quantization))
    kind: type[Decoder] = ReferenceDecoder
    if device.type == "cuda":
        # Imported where it is needed: Triton is not to be had on every platform with a CPU.
        from engine.model.triton_decoder import TritonDecoder

        kind = TritonDecoder
    with explained(lambda: weights_do_not_fit(needed, free, quantization)):
        return load_decoder(kind, checkpoint, device, dtype, max_model_len, on_progress, quantization)


def make_forward(decoder: Decoder, cache: CacheConfig, limits: SchedulerConfig) -> Forward:
    """Set aside what steps need, then give the KV cache what memory is left.

    Raises:
        ConfigError: one of them does not fit, or the KV cache cannot hold one request of the longest length.
    """
    model, device, dtype = decoder.config, decoder.device, decoder.dtype

    def make_kv_cache() -> KVCache:
        num_blocks = plan_num_blocks(model, cache, limits, dtype, device)
        needed = num_blocks * kv_bytes_per_block(model, cache.block_size, dtype, cache.dtype)
        with explained(lambda: kv_cache_does_not_fit(needed, read_memory(device).free_bytes)):
            return KVCache(model, num_blocks, cache.block_size, dtype, device, cache.dtype)

    if isinstance(decoder, ReferenceDecoder):
        return EagerForward(decoder, make_kv_cache())

    from engine.model.triton_decoder import TritonDecoder
    from engine.runner.graph_forward import GraphForward

    assert isinstance(decoder, TritonDecoder)
    free = read_memory(device).free_bytes
    with explained(lambda: workspace_does_not_fit(free, limits.token_budget, limits.max_num_seqs)):
        return GraphForward(decoder, make_kv_cache, limits)
