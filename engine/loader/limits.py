"""What no sound model exceeds, and what must fit together, whatever file says it."""

# Far above any model in use: a hostile config must not make a loop or a table of 10**18 entries.
MAX_VOCAB_SIZE = 1 << 24
MAX_WIDTH = 1 << 20
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_POSITIONS = 1 << 30
MAX_ROPE_THETA = 1e15


def check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[str, str] | None:
    """What is inconsistent, as (which of "num_kv_heads" and "head_dim", the problem); None: nothing."""
    if num_heads % num_kv_heads:
        return "num_kv_heads", f"{num_kv_heads} key-value heads do not divide the {num_heads} attention heads"
    if head_dim % 2:
        return "head_dim", f"is {head_dim}; rotary position embedding needs an even number"
    return None
