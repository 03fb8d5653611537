"""Perplexity of a text over a sliding window."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from engine.batch import ScheduledChunk
from engine.config import CacheConfig, Device, EngineConfig, SchedulerConfig
from engine.errors import ConfigError, ModelError
from engine.loader.checkpoint import Checkpoint
from engine.quantize.formats import resolve_quantization
from engine.request import Request, SamplingParams
from engine.runner.device import prepare_device
from engine.runner.forward import Forward, load_forward

CHUNK_ROWS = {Device.CPU: 256, Device.CUDA: 512}  # rows of one step, and so of float32 logits held at once


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a text, of which [first_scored, stop) are predicted from those before them."""

    start: int
    stop: int
    first_scored: int


@dataclass(frozen=True)
class PerplexityResult:
    """`total_nll`: the negative log-likelihood of all scored tokens, in nats."""

    total_nll: float
    num_scored_tokens: int
    elapsed_s: float

    @property
    def perplexity(self) -> float:
        mean = self.total_nll / self.num_scored_tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def tokens_per_s(self) -> float:
        return self.num_scored_tokens / self.elapsed_s


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of up to `context` tokens, each `stride` behind the one before.

    Every token but the first is scored once: in the first window from what precedes it there, later with at least
    `context - stride` tokens before it.
    """
    scored = 1
    for start in range(0, num_tokens, stride):
        stop = min(start + context, num_tokens)
        yield Window(start, stop, scored)
        scored = stop
        if stop == num_tokens:
            return


def measure_perplexity(
    checkpoint: Checkpoint,
    config: EngineConfig,
    token_ids: Sequence[int],
    context: int,
    stride: int,
    on_load: Callable[[int, int], None] = lambda _done, _total: None,
    on_score: Callable[[int, int], None] = lambda _done, _total: None,
) -> PerplexityResult:
    """Load the model as an engine would, and score a text with it.

    Of `config`, scheduler limits and the size of the cache do not matter: they follow from the window.
    `on_load(tensors loaded, tensors in all)`, `on_score(tokens scored, tokens in all)`.

    Raises:
        ModelError: the model cannot be loaded, or says NaN.
        ConfigError: context, stride and text do not go together or with the model; or a setting does not.
    """
    limit = checkpoint.config.max_position_embeddings
    if not 2 <= context <= limit:
        raise ConfigError(f"context must be between 2 and {limit}, what the model was made for, not {context}")
    if not 1 <= stride < context:
        raise ConfigError(f"stride must be between 1 and {context - 1}, one less than context, not {stride}")
    if len(token_ids) < 2:
        raise ConfigError("the text must have at least 2 tokens: the first is not scored")
    chunk_rows = min(context, CHUNK_ROWS[config.device])
    blocks = -(-context // config.cache.block_size)
    cache = CacheConfig(config.cache.block_size, num_blocks=blocks + 1, dtype=config.cache.dtype)
    limits = SchedulerConfig(max_num_seqs=chunk_rows, token_budget=chunk_rows, max_model_len=context)
    device, dtype = prepare_device(replace(config, cache=cache, scheduler=limits))
    quantization = resolve_quantization(checkpoint.config, config.quantization)
    forward = load_forward(checkpoint, device, dtype, cache, limits, on_load, quantization)
    total_nll = 0.0
    started = perf_counter()
    for window in windows(len(token_ids), context, stride):
        total_nll += _window_nll(forward, token_ids, window, chunk_rows, [*range(1, blocks + 1)])
        on_score(window.stop - 1, len(token_ids) - 1)
    if math.isnan(total_nll):
        raise ModelError(f"{checkpoint.path}: the model's logits are NaN: try another dtype")
    return PerplexityResult(total_nll, len(token_ids) - 1, perf_counter() - started)


def _window_nll(
    forward: Forward, token_ids: Sequence[int], window: Window, chunk_rows: int, block_table: list[int]
) -> float:
    """Negative log-likelihood of the window's scored tokens, in nats."""
    tokens = list(token_ids[window.start : window.stop])
    request = Request("window", tokens, SamplingParams(seed=0))
    request.block_table = block_table
    num_rows = len(tokens) - 1  # the last token is predicted, but predicts nothing
    first_row = window.first_scored - window.start - 1
    for start in range(0, first_row, chunk_rows):
        forward.launch([ScheduledChunk(request, start, min(chunk_rows, first_row - start))])
    total = 0.0
    for start in range(first_row, num_rows, chunk_rows):
        chunk = ScheduledChunk(request, start, min(chunk_rows, num_rows - start))
        logits = forward.score(chunk)
        targets = torch.tensor(tokens[start + 1 : chunk.stop + 1], device=logits.device)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        total += float(losses.double().sum())
    return total
