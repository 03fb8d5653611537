"""From an engine's configuration to who proposes its drafts."""

from dataclasses import replace

import torch

from engine.config import CacheConfig, Device, EngineConfig, ModelConfig, Quantization, SpeculativeMethod
from engine.errors import ConfigError
from engine.loader.checkpoint import open_checkpoint
from engine.model.kv_cache import kv_bytes_per_block
from engine.runner.device import prepare_device
from engine.runner.memory import read_memory
from engine.runner.start_up import Phase, StartUp
from engine.speculative.draft_model import DraftModel
from engine.speculative.local import LocalProposer
from engine.speculative.ngram import NgramProposer
from engine.speculative.proposer import Proposer
from engine.speculative.vocabulary import vocabulary_mismatch

DRAFT_TOKEN_BUDGET = 512  # rows of a step of the draft model: prompts are short work for it, and each bucket is a graph
DRAFT_CACHE_SHARE = 0.1  # of a GPU's free memory, for the KV of a draft model beside its target


def start_proposer(config: EngineConfig, target: ModelConfig, start_up: StartUp) -> Proposer | None:
    """None where none is needed, or the proposer is somebody else's to make (SpeculativeMethod.REMOTE).

    Raises:
        ModelError: the draft model cannot be loaded.
        ConfigError: it does not fit, or is none for this target.
    """
    if config.speculative.method is SpeculativeMethod.NGRAM:
        return NgramProposer()
    if config.speculative.method is SpeculativeMethod.LOCAL:
        with start_up.phase(Phase.DRAFT):
            return LocalProposer(_start_draft_model(config, target))
    return None


def _start_draft_model(config: EngineConfig, target: ModelConfig) -> DraftModel:
    path = config.speculative.draft_model_path
    assert path is not None
    checkpoint = open_checkpoint(path)
    mismatch = vocabulary_mismatch(str(path), checkpoint.config.vocab_size, "its target", target.vocab_size)
    if mismatch is not None:
        raise ConfigError(mismatch)
    device, dtype = prepare_device(config)
    own = local_draft_config(config, checkpoint.config, dtype, read_memory(device).free_bytes)
    return DraftModel.from_checkpoint(checkpoint, own)


def local_draft_config(config: EngineConfig, draft: ModelConfig, dtype: torch.dtype, free_bytes: int) -> EngineConfig:
    """The settings of a draft model in the process of its target, whose `config` is given. free_bytes: on the device
    that both are to share, before either is there."""
    limits = config.scheduler
    token_budget = min(limits.token_budget, DRAFT_TOKEN_BUDGET)
    scheduler = replace(limits, token_budget=token_budget, max_prefill_chunk=None, max_draft_tokens=0)
    cache = CacheConfig(block_size=config.cache.block_size)
    if config.device is Device.CUDA:
        blocks_of_longest = -(-limits.max_model_len // cache.block_size)
        longest = (blocks_of_longest + 1) * kv_bytes_per_block(draft, cache.block_size, dtype, cache.dtype)
        cache = replace(cache, memory_bytes=max(longest, int(DRAFT_CACHE_SHARE * free_bytes)))
    return replace(config, quantization=Quantization.NONE, cache=cache, scheduler=scheduler)
