"""Running out of memory in words: what did not fit, by how much, and which argument to change."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.config import KVCacheDType, Quantization
from engine.errors import ConfigError

LESS_CACHE = "give the KV cache less (kv_cache_memory_gb)"

_ASKED = re.compile(r"Tried to allocate ([0-9.]+ [KMG]iB)")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed for want of memory, on any device."""
    import torch  # whoever asks has it; whoever only writes about memory does not wait for it

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def explained(describe: Callable[[], str]) -> Iterator[None]:
    """Turns running out of memory within into a ConfigError that says what `describe` says then."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(describe()) from error


def gib(num_bytes: int) -> str:
    """A number of bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB"


def weights_do_not_fit(needed_bytes: int, free_bytes: int, quantization: Quantization) -> str:
    """`needed_bytes`: of one copy of the weights in their format."""
    knobs = "use a smaller model" + (" or quantization=int8" if quantization is Quantization.NONE else "")
    return f"the weights do not fit: they take {gib(needed_bytes)} and {gib(free_bytes)} are free: {knobs}"


def workspace_does_not_fit(free_bytes: int, token_budget: int, max_num_seqs: int) -> str:
    """Activations, what attention needs, logits and the sampler's state, which are there before the KV cache is."""
    return (
        f"the workspace of a step does not fit into the {gib(free_bytes)} that the weights leave free: "
        f"lower token_budget (now {token_budget}) or max_num_seqs (now {max_num_seqs})"
    )


def kv_cache_does_not_fit(needed_bytes: int, free_bytes: int) -> str:
    """A cache of the size that was asked for."""
    return (
        f"the KV cache does not fit: it is to take {gib(needed_bytes)} and {gib(free_bytes)} are free: "
        "lower kv_cache_memory_gb or num_kv_blocks"
    )


def request_does_not_fit(
    held_tokens: int, held_bytes: int, max_model_len: int, needed_bytes: int, cache_dtype: KVCacheDType
) -> str:
    """A KV cache too small for a single request of the longest length."""
    int8 = "" if cache_dtype is KVCacheDType.INT8 else ", set kv_cache_dtype=int8"
    return (
        f"the KV cache holds {held_tokens} tokens in {gib(held_bytes)}, fewer than max_model_len {max_model_len}: "
        f"lower max_model_len{int8}, or give the cache {gib(needed_bytes)} (kv_cache_memory_gb)"
    )


def steps_do_not_fit(free_bytes: int, token_budget: int, max_num_seqs: int) -> str:
    """CUDA graphs and what else the first steps allocate, behind everything that is planned."""
    return (
        f"out of memory before the first step, with {gib(free_bytes)} free beside weights, workspace and KV cache: "
        f"lower max_num_seqs (now {max_num_seqs}) or token_budget (now {token_budget}), or {LESS_CACHE}"
    )


def step_ran_out(error: RuntimeError) -> str:
    """What a request is told whose step failed."""
    asked = _ASKED.search(str(error))
    wanted = f" ({asked[1]} more were asked for)" if asked else ""
    return f"out of memory in this step{wanted}: lower max_num_seqs or token_budget, or {LESS_CACHE}"
