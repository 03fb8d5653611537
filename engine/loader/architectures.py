"""The model architectures that can be served: the one list that loaders, the decoder and error messages read."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType

from engine.errors import ModelError
from engine.loader.messages import shown


class SlidingWindowRule(Enum):
    """When `sliding_window` in config.json limits attention."""

    NEVER = "never"  # the field has no meaning
    IF_SET = "if set"  # null turns it off
    IF_ENABLED = "if enabled"  # only with `use_sliding_window`, and then from layer `max_window_layers` on


@dataclass(frozen=True)
class Architecture:
    """What sets one architecture apart from the shared decoder, and the defaults its configs may leave out.

    `gguf_name` is its `general.architecture` in GGUF files (Mistral goes by "llama" there, hence None).
    `gguf_permuted` says that GGUF converters store its query and key rows for interleaved RoPE.
    """

    name: str  # the class name in config.json's `architectures`
    qkv_bias: bool
    qk_norm: bool
    sliding_window: SlidingWindowRule
    gguf_name: str | None
    gguf_permuted: bool = False
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    default_num_kv_heads: int | None = None  # None: num_attention_heads
    default_sliding_window: int | None = None


# Defaults are those of `transformers`, which writes a field into config.json only if its version knew it.
KNOWN_ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        architecture.name: architecture
        for architecture in (
            Architecture("LlamaForCausalLM", False, False, SlidingWindowRule.NEVER, "llama", gguf_permuted=True),
            Architecture(
                "MistralForCausalLM",
                qkv_bias=False,
                qk_norm=False,
                sliding_window=SlidingWindowRule.IF_SET,
                gguf_name=None,
                default_num_kv_heads=8,
                default_sliding_window=4096,
            ),
            Architecture(
                "Qwen2ForCausalLM",
                qkv_bias=True,
                qk_norm=False,
                sliding_window=SlidingWindowRule.IF_ENABLED,
                gguf_name="qwen2",
                default_num_kv_heads=32,
                default_sliding_window=4096,
            ),
            Architecture(
                "Qwen3ForCausalLM",
                qkv_bias=False,
                qk_norm=True,
                sliding_window=SlidingWindowRule.IF_ENABLED,
                gguf_name="qwen3",
                default_head_dim=128,
                default_num_kv_heads=32,
                default_sliding_window=4096,
            ),
        )
    }
)


def find_architecture(name: str, file: Path, field: str) -> Architecture:
    """The architecture that config.json calls `name`.

    Raises:
        ModelError: it is not known; names `file`, `field` and those known.
    """
    if name not in KNOWN_ARCHITECTURES:
        raise ModelError(f"{file}: {field}: {shown(name)} is not known; known are {', '.join(KNOWN_ARCHITECTURES)}")
    return KNOWN_ARCHITECTURES[name]


def find_gguf_architecture(name: str, file: Path, field: str) -> Architecture:
    """The architecture that a GGUF file calls `name`.

    Raises:
        ModelError: it is not known; names `file`, `field` and those known.
    """
    by_gguf_name = {entry.gguf_name: entry for entry in KNOWN_ARCHITECTURES.values() if entry.gguf_name is not None}
    if name not in by_gguf_name:
        raise ModelError(f"{file}: {field}: {shown(name)} is not known; known are {', '.join(by_gguf_name)}")
    return by_gguf_name[name]
