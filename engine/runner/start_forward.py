"""From an open checkpoint to a forward that is ready for its first step."""

import torch

from engine.config import CacheConfig, Quantization, SchedulerConfig
from engine.loader.checkpoint import Checkpoint
from engine.model.kv_cache import kv_bytes_per_block
from engine.runner.forward import Forward, load_weights, make_forward
from engine.runner.memory import MemoryPlan, MemoryReading, cpu_weight_bytes, read_memory, sampler_bytes
from engine.runner.out_of_memory import explained, steps_do_not_fit
from engine.runner.start_up import Phase, StartUp


def start_forward(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization,
    cache: CacheConfig,
    limits: SchedulerConfig,
    *,
    warm_up: bool,
    start_up: StartUp,
    draft_bytes: int = 0,
) -> Forward:
    """Load the weights, share out the memory, and if asked to, compile and capture what most steps need.

    `quantization` has been resolved. `start_up` hears of each phase, and in the end where the memory went, of which
    `draft_bytes` were taken before.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: something does not fit; says how large it is and what to change.
    """
    empty = read_memory(device)
    with start_up.phase(Phase.WEIGHTS) as (stage, advance):
        decoder = load_weights(checkpoint, device, dtype, limits.max_model_len, advance, quantization)
        loaded = read_memory(device)
        if device.type == "cpu":
            stage.num_bytes = cpu_weight_bytes(checkpoint.config, dtype, quantization)
        else:
            stage.num_bytes = loaded.allocated_bytes - empty.allocated_bytes
    with start_up.phase(Phase.MEMORY):
        forward = make_forward(decoder, cache, limits)
        planned = read_memory(device)
    if warm_up:
        with (
            start_up.phase(Phase.STEPS) as (_, advance),
            explained(lambda: steps_do_not_fit(planned.free_bytes, limits.token_budget, limits.max_num_seqs)),
        ):
            forward.warm_up(advance)
    block_bytes = kv_bytes_per_block(checkpoint.config, cache.block_size, dtype, cache.dtype)
    num_blocks = forward.kv_cache.num_blocks
    sampler = sampler_bytes(checkpoint.config, limits) if device.type == "cuda" else 0
    ready = read_memory(device)
    start_up.ready(
        MemoryPlan(
            device_name=ready.device_name,
            total_bytes=ready.total_bytes,
            free_bytes=ready.free_bytes,
            weights_bytes=stage.num_bytes,
            workspace_bytes=_workspace_bytes(loaded, planned, num_blocks * block_bytes + sampler),
            sampler_bytes=sampler,
            num_blocks=num_blocks,
            block_size=cache.block_size,
            block_bytes=block_bytes,
            max_model_len=limits.max_model_len,
            graph_bytes=max(0, planned.free_bytes - ready.free_bytes) if device.type == "cuda" else 0,
            draft_bytes=draft_bytes,
        )
    )
    return forward


def _workspace_bytes(loaded: MemoryReading, planned: MemoryReading, known_bytes: int) -> int:
    """Of what was allocated behind the weights, all but the known parts. On a CPU nothing is set aside."""
    return max(0, planned.allocated_bytes - loaded.allocated_bytes - known_bytes)
