"""A model's shape from the metadata of a GGUF file."""

import math

from engine.config import ModelConfig, RopeConfig
from engine.errors import ModelError
from engine.loader.architectures import Architecture, find_gguf_architecture
from engine.loader.generation_defaults import GenerationDefaults
from engine.loader.gguf_metadata import GGUFMetadata
from engine.loader.gguf_tensors import GGUFHeader
from engine.loader.limits import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_ROPE_THETA,
    MAX_VOCAB_SIZE,
    MAX_WIDTH,
    check_heads,
)
from engine.loader.messages import shown

_EOS_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def gguf_architecture(metadata: GGUFMetadata) -> Architecture:
    """The architecture that `general.architecture` names.

    Raises:
        ModelError: it is missing or not known.
    """
    key = "general.architecture"
    return find_gguf_architecture(metadata.string(key), metadata.path, key)


def read_gguf_config(header: GGUFHeader, frequency_factors: tuple[float, ...] | None) -> ModelConfig:
    """Read the model's shape. `frequency_factors`: the content of `rope_freqs.weight`, where the file has it.

    Raises:
        ModelError: a key is missing, malformed or inconsistent, or asks for what is not supported; names both.
    """
    metadata = header.metadata
    architecture = gguf_architecture(metadata)
    keys = _Keys(metadata, metadata.string("general.architecture"))
    if keys.optional_integer("expert_count", MAX_HEADS):
        raise keys.fail("expert_count", "mixtures of experts are not supported")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise metadata.fail("tensor 'token_embd.weight'", "is missing")
    vocab_size = embedding.shape[0]  # the key `vocab_size` is often left out
    if not 2 <= vocab_size <= MAX_VOCAB_SIZE:
        raise metadata.fail("tensor 'token_embd.weight'", f"has {vocab_size} rows; 2 to {MAX_VOCAB_SIZE} are accepted")
    hidden_size = keys.integer("embedding_length", MAX_WIDTH)
    num_heads, num_kv_heads, head_dim = _heads(keys, hidden_size)
    return ModelConfig(
        architecture=architecture.name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length", MAX_WIDTH),
        num_layers=keys.integer("block_count", MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon", maximum=1.0),
        max_position_embeddings=keys.integer("context_length", MAX_POSITIONS),
        rope=_rope(keys, head_dim, frequency_factors),
        tie_word_embeddings="output.weight" not in header.tensors,
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        # Mistral goes by the name "llama" in this format: the key alone says that there is a window.
        sliding_window=keys.optional_integer("attention.sliding_window", MAX_POSITIONS),
        eos_token_ids=_eos_token_ids(metadata, vocab_size),
    )


def read_gguf_generation_defaults(metadata: GGUFMetadata) -> GenerationDefaults:
    """The recommended sampling values, from the `general.sampling.*` keys that newer files carry.

    Raises:
        ModelError: one is malformed or out of range.
    """
    keys = _Keys(metadata, "general.sampling")
    return GenerationDefaults(
        temperature=keys.optional_number("temp", above=-1e-9, maximum=100.0),
        top_p=keys.optional_number("top_p", maximum=1.0),
        top_k=keys.optional_integer("top_k", MAX_VOCAB_SIZE),
        min_p=keys.optional_number("min_p", above=-1e-9, maximum=1.0),
        repetition_penalty=keys.optional_number("penalty_repeat", maximum=100.0),
    )


class _Keys:
    """The keys under one prefix, with the ranges of their values checked."""

    def __init__(self, metadata: GGUFMetadata, prefix: str) -> None:
        self._metadata = metadata
        self._prefix = prefix

    def fail(self, name: str, problem: str) -> ModelError:
        return self._metadata.fail(f"{self._prefix}.{name}", problem)

    def integer(self, name: str, maximum: int) -> int:
        value = self._metadata.integer(f"{self._prefix}.{name}")
        if not 1 <= value <= maximum:
            raise self.fail(name, f"must be between 1 and {maximum}, not {value}")
        return value

    def optional_integer(self, name: str, maximum: int) -> int | None:
        """None where the key is absent or 0, the format's way to turn something off."""
        key = f"{self._prefix}.{name}"
        if key not in self._metadata or self._metadata.integer(key) == 0:
            return None
        return self.integer(name, maximum)

    def number(self, name: str, *, above: float = 0.0, maximum: float) -> float:
        value = self._metadata.number(f"{self._prefix}.{name}")
        if not math.isfinite(value) or not above < value <= maximum:
            raise self.fail(name, f"must be above {above:g} and at most {maximum:g}, not {value:g}")
        return value

    def optional_number(self, name: str, *, above: float = 0.0, maximum: float) -> float | None:
        if f"{self._prefix}.{name}" not in self._metadata:
            return None
        return self.number(name, above=above, maximum=maximum)

    def optional_string(self, name: str) -> str | None:
        key = f"{self._prefix}.{name}"
        return self._metadata.string(key) if key in self._metadata else None


def _heads(keys: _Keys, hidden_size: int) -> tuple[int, int, int]:
    """Numbers of attention and key-value heads, and the size of one."""
    num_heads = keys.integer("attention.head_count", MAX_HEADS)
    num_kv_heads = keys.optional_integer("attention.head_count_kv", MAX_HEADS) or num_heads
    head_dim = keys.optional_integer("attention.key_length", MAX_WIDTH)
    if head_dim is None:
        if hidden_size % num_heads:
            raise keys.fail("attention.head_count", f"{num_heads} heads do not divide embedding_length {hidden_size}")
        head_dim = hidden_size // num_heads
    problem = check_heads(num_heads, num_kv_heads, head_dim)
    if problem is not None:
        names = {"num_kv_heads": "attention.head_count_kv", "head_dim": "attention.key_length"}
        raise keys.fail(names[problem[0]], problem[1])
    for name in ("attention.value_length", "rope.dimension_count"):
        size = keys.optional_integer(name, MAX_WIDTH)
        if size not in (None, head_dim):
            raise keys.fail(name, f"{size} is not supported; supported is the head size, {head_dim}")
    return num_heads, num_kv_heads, head_dim


def _rope(keys: _Keys, head_dim: int, frequency_factors: tuple[float, ...] | None) -> RopeConfig:
    theta = keys.optional_number("rope.freq_base", maximum=MAX_ROPE_THETA) or RopeConfig.theta
    kind = keys.optional_string("rope.scaling.type")
    if kind not in (None, "none", "linear"):
        raise keys.fail("rope.scaling.type", f"{shown(kind)} is not supported; supported are none, linear")
    factor = keys.optional_number("rope.scaling.factor", maximum=1e6) if kind == "linear" else None
    if kind is None:  # the key of older files
        factor = keys.optional_number("rope.scale_linear", maximum=1e6)
    if kind == "linear" and factor is None:
        raise keys.fail("rope.scaling.factor", "is missing")
    if frequency_factors is None:
        return RopeConfig(theta) if factor in (None, 1.0) else RopeConfig(theta, scaling="linear", factor=factor or 1.0)
    if len(frequency_factors) != head_dim // 2:
        raise keys.fail("rope", f"rope_freqs.weight has {len(frequency_factors)} factors, not {head_dim // 2}")
    if factor not in (None, 1.0):
        raise keys.fail("rope.scaling.type", "linear scaling together with rope_freqs.weight is not supported")
    return RopeConfig(theta, scaling="factors", frequency_factors=frequency_factors)


def _eos_token_ids(metadata: GGUFMetadata, vocab_size: int) -> tuple[int, ...]:
    """Ends of sequence, of turn and of message: each of them ends an answer."""
    ids: list[int] = []
    for key in _EOS_KEYS:
        if key in metadata:
            token_id = metadata.integer(key)
            if not 0 <= token_id < vocab_size:
                raise metadata.fail(key, f"{token_id} is not below the vocabulary's size, {vocab_size}")
            ids.append(token_id)
    return tuple(dict.fromkeys(ids))
