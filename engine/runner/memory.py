"""Where a device's memory goes, and how many KV blocks it has room for."""

from dataclasses import dataclass, replace
from math import prod

import psutil
import torch

from engine.config import CacheConfig, ModelConfig, Quantization, SchedulerConfig
from engine.errors import ConfigError
from engine.model.expected_tensors import expected_tensors
from engine.model.int8_linear import onednn_is_exact
from engine.model.kv_cache import kv_bytes_per_block
from engine.model.linear import packs_weights
from engine.quantize.quantizable import is_quantizable
from engine.runner.out_of_memory import gib, request_does_not_fit

CPU_DEFAULT_BYTES = 1 << 30  # or what the longest request needs; pages that are never written cost nothing
CPU_FRACTION = 0.5  # of the memory available: the rest is for the process, its workspace and its neighbours
CUDA_FRACTION = 0.9  # of the memory that is free once weights and workspace are there, or less on small cards:
# what comes later has to fit too. Upper estimates: a node of an instantiated graph takes some 10 KB (all graphs of
# TinyLlama's shape were measured at 78 MiB on an H100, five nodes a layer); five kernels a layer, and up to five more
# where rows and the cache are int8; compiled kernels and the driver's own buffers.
GRAPH_NODE_BYTES = 16 << 10
KERNELS_PER_LAYER = 10
COMPILED_BYTES = 64 << 20
HOST_CHOICE_COPIES = 8  # of a step's logits, where the host chooses tokens itself


@dataclass(frozen=True)
class MemoryReading:
    """Bytes of a device at some moment. `allocated_bytes`: of this process's tensors, known on GPUs only."""

    device_name: str
    total_bytes: int
    free_bytes: int
    allocated_bytes: int = 0


def read_memory(device: torch.device) -> MemoryReading:
    """Waits for the device, and returns to it what torch keeps for later, so that free means free."""
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        return MemoryReading("CPU", memory.total, memory.available)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return MemoryReading(torch.cuda.get_device_name(device), total, free, torch.cuda.memory_allocated(device))


@dataclass(frozen=True)
class MemoryPlan:
    """What the memory of a device is used for once an engine is ready, in bytes.

    weights_bytes: all copies of them. workspace_bytes: activations, attention's partial results, logits and the inputs
    of steps. graph_bytes: what the device had less of after steps were compiled and captured than before. draft_bytes:
    tensors of a draft model in this process. kv_cache: `num_blocks` blocks, the null block included.
    """

    device_name: str
    total_bytes: int
    free_bytes: int
    weights_bytes: int
    workspace_bytes: int
    sampler_bytes: int
    num_blocks: int
    block_size: int
    block_bytes: int
    max_model_len: int
    graph_bytes: int
    draft_bytes: int = 0

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """That the KV cache holds."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def num_longest_requests(self) -> int:
        """Requests of `max_model_len` tokens that it holds at once."""
        return (self.num_blocks - 1) // -(-self.max_model_len // self.block_size)

    @property
    def other_bytes(self) -> int:
        """Neither ours nor free: libraries, the driver's context, other processes. On a CPU, pages of the KV cache that
        nobody has written yet are both planned and free."""
        planned = self.weights_bytes + self.workspace_bytes + self.sampler_bytes + self.kv_cache_bytes
        return max(0, self.total_bytes - self.free_bytes - planned - self.graph_bytes - self.draft_bytes)

    def lines(self) -> list[str]:
        """A table for a log; parts that this device does not have are left out."""
        cache = (
            f"{self.num_blocks - 1:,} blocks of {self.block_size}: {self.num_tokens:,} tokens, or "
            f"{self.num_longest_requests:,} requests of {self.max_model_len:,}"
        )
        parts = [
            ("weights", self.weights_bytes, ""),
            ("activations and workspace", self.workspace_bytes, ""),
            ("sampler state", self.sampler_bytes, ""),
            ("KV cache", self.kv_cache_bytes, cache),
            ("CUDA graphs and kernels", self.graph_bytes, ""),
            ("draft model", self.draft_bytes, ""),
            ("other (libraries, processes)", self.other_bytes, ""),
        ]
        rows = [part for part in parts if part[1]] + [("free", self.free_bytes, "")]
        title = f"memory of {self.device_name}"
        width = max(len(title), *(len(name) + 2 for name, _, _ in rows))
        table = [f"{title:{width}} {gib(self.total_bytes):>11}"]
        table += [f"{'  ' + name:{width}} {gib(num_bytes):>11}  {note}".rstrip() for name, num_bytes, note in rows]
        return table


def weight_bytes(
    model: ModelConfig, dtype: torch.dtype, quantization: Quantization, int8_itemsize: int = torch.int8.itemsize
) -> int:
    """Bytes of one copy of the weights in the format that they are computed in. `quantization` has been resolved.
    int8_itemsize: what a value takes that is rounded to int8."""
    total = 0
    plain = replace(model, stored_quantization=Quantization.NONE)
    tensors = expected_tensors(plain)
    if model.tie_word_embeddings and quantization is not Quantization.NONE:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # a quantised copy
    for name, shape in tensors.items():
        if quantization is not Quantization.NONE and is_quantizable(name):
            total += prod(shape) * int8_itemsize + shape[0] * torch.float32.itemsize
        else:
            total += prod(shape) * (torch.float32 if name.endswith("norm.weight") else dtype).itemsize
    return total


def cpu_weight_bytes(model: ModelConfig, dtype: torch.dtype, quantization: Quantization) -> int:
    """What they take on this machine's CPU. `quantization` has been resolved.

    A head that is the embedding as well is there twice where products have a layout of their own; int8 matrices are
    float32 ones where the CPU has no instructions for int8.
    """
    if quantization is not Quantization.NONE:
        is_multiplied = onednn_is_exact("cpu")
        return weight_bytes(model, dtype, quantization, (torch.int8 if is_multiplied else torch.float32).itemsize)
    has_copy = model.tie_word_embeddings and packs_weights(dtype)
    return weight_bytes(model, dtype, quantization) + has_copy * model.vocab_size * model.hidden_size * dtype.itemsize


def sampler_bytes(model: ModelConfig, limits: SchedulerConfig) -> int:
    """Of the device's sampler: what it knows of each request, and what its kernels leave each other."""
    from engine.kernels.choose_tokens import choice_workspace  # Triton is not to be had everywhere
    from engine.kernels.token_scores import seat_tensors

    nowhere = torch.device("meta")
    max_rows = limits.max_logit_rows
    records = (
        seat_tensors(limits.max_num_seqs, model.vocab_size, nowhere),
        choice_workspace(max_rows, model.vocab_size, nowhere),
    )
    return sum(tensor.nbytes for record in records for tensor in vars(record).values())


def later_bytes(model: ModelConfig, limits: SchedulerConfig) -> int:
    """What a GPU needs after the KV cache is there, at most: graphs, compiled kernels, choices made by the host."""
    from engine.runner.step_buckets import row_buckets  # beside Triton kernels

    num_graphs = 4 * len(row_buckets(limits.token_budget))  # see StepBuckets.all
    graphs = num_graphs * (model.num_layers + 1) * KERNELS_PER_LAYER * GRAPH_NODE_BYTES
    logits = limits.max_logit_rows * model.vocab_size * torch.float32.itemsize
    return graphs + COMPILED_BYTES + HOST_CHOICE_COPIES * logits


def plan_num_blocks(
    model: ModelConfig, cache: CacheConfig, scheduler: SchedulerConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """Blocks of the KV pool, the null block included, on a device as it is now: see `blocks_within`."""
    return blocks_within(model, cache, scheduler, dtype, device.type, read_memory(device))


def blocks_within(
    model: ModelConfig,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    dtype: torch.dtype,
    device_type: str,
    reading: MemoryReading,
) -> int:
    """Blocks of the KV pool, the null block included. reading: of a device that has everything but the pool, and what
    comes after it.

    Raises:
        ConfigError: not even one request of the longest length would fit; says which settings to change.
    """
    per_block = kv_bytes_per_block(model, cache.block_size, dtype, cache.dtype)
    blocks_of_longest = -(-scheduler.max_model_len // cache.block_size)
    needed = blocks_of_longest + 1
    if cache.num_blocks is not None:
        num_blocks = cache.num_blocks
    else:
        budget = cache.memory_bytes
        if budget is None:
            free = reading.free_bytes
            if device_type == "cpu":
                budget = min(max(CPU_DEFAULT_BYTES, needed * per_block), int(free * CPU_FRACTION))
            else:
                if cache.device_share < 1.0:  # what is free says nothing: the others may have yet to start
                    free = min(free, int(cache.device_share * reading.total_bytes) - reading.allocated_bytes)
                budget = max(0, min(int(free * CUDA_FRACTION), free - later_bytes(model, scheduler)))
        # More than this no set of running requests can use.
        num_blocks = min(budget // per_block, scheduler.max_num_seqs * blocks_of_longest + 1)
    if num_blocks < needed:
        held = max(num_blocks - 1, 0) * cache.block_size
        raise ConfigError(
            request_does_not_fit(held, num_blocks * per_block, scheduler.max_model_len, needed * per_block, cache.dtype)
        )
    return num_blocks
