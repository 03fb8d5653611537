"""config.json and generation_config.json of a Hugging Face directory."""

from pathlib import Path

from engine.config import ModelConfig, Quantization, RopeConfig
from engine.loader.architectures import Architecture, SlidingWindowRule, find_architecture
from engine.loader.generation_defaults import GenerationDefaults
from engine.loader.json_fields import JsonFields, read_json_object
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

_NO_SCALING = ("default", "none")
_KNOWN_SCALINGS = (*_NO_SCALING, "linear", "llama3")
QUANT_METHOD = "slipstream"  # in quantization_config: written by engine.loader.converted_directory


def read_model_config(directory: Path) -> ModelConfig:
    """Read the model's shape from config.json; end-of-sequence ids from generation_config.json where it names them.

    Raises:
        ModelError: a field is missing, malformed or inconsistent, or asks for what is not supported; names both.
    """
    fields = read_json_object(directory / "config.json")
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    hidden_size = fields.integer("hidden_size", maximum=MAX_WIDTH)
    num_heads, num_kv_heads, head_dim = _heads(fields, architecture, hidden_size)
    num_layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    max_positions = fields.integer("max_position_embeddings", maximum=MAX_POSITIONS)
    vocab_size = fields.integer("vocab_size", minimum=2, maximum=MAX_VOCAB_SIZE)
    return ModelConfig(
        architecture=architecture.name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", maximum=MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", maximum=1.0),
        max_position_embeddings=max_positions,
        rope=_rope(fields, max_positions),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        sliding_window=_sliding_window(fields, architecture, num_layers),
        eos_token_ids=_eos_token_ids(directory, fields, vocab_size),
        stored_quantization=_stored_quantization(fields),
    )


def read_generation_defaults(directory: Path) -> GenerationDefaults:
    """Read the recommended sampling values from generation_config.json; all None where there is no such file.

    `do_sample: false` is what `transformers` writes when nobody chose, so it does not mean that greedy is recommended;
    the sampling values beside it mean nothing then. The repetition penalty holds either way.

    Raises:
        ModelError: a field is malformed; names file and field.
    """
    file = directory / "generation_config.json"
    if not file.exists():
        return GenerationDefaults()
    fields = read_json_object(file)
    penalty = fields.optional_number("repetition_penalty", maximum=100.0)
    if not fields.boolean("do_sample", default=False):
        return GenerationDefaults(repetition_penalty=penalty)
    return GenerationDefaults(
        temperature=fields.optional_number("temperature", above=-1e-9, maximum=100.0),
        top_p=fields.optional_number("top_p", maximum=1.0),
        top_k=fields.optional_integer("top_k", minimum=0, maximum=MAX_VOCAB_SIZE) or None,  # 0 turns it off
        min_p=fields.optional_number("min_p", above=-1e-9, maximum=1.0),
        repetition_penalty=penalty,
    )


def _architecture(fields: JsonFields) -> Architecture:
    names = fields.optional_strings("architectures")
    if not names:
        raise fields.fail("architectures", "is missing")
    return find_architecture(names[0], fields.file, "architectures")


def _refuse_unsupported(fields: JsonFields) -> None:
    activation = fields.optional_string("hidden_act")
    if activation not in (None, "silu", "swish"):  # two names of one function
        raise fields.fail("hidden_act", f"{shown(activation)} is not supported; supported is 'silu'")
    for name in ("attention_bias", "mlp_bias"):
        if fields.boolean(name, default=False):
            raise fields.fail(name, "true is not supported")


def _stored_quantization(fields: JsonFields) -> Quantization:
    quantization = fields.optional_object("quantization_config")
    if quantization is None:
        return Quantization.NONE
    method = quantization.optional_string("quant_method") or "unnamed"
    if method != QUANT_METHOD:
        raise fields.fail("quantization_config", f"weights quantised with {shown(method)} are not supported")
    stored = quantization.optional_string("format")
    known = [str(each) for each in Quantization if each is not Quantization.NONE]
    if stored not in known:
        raise quantization.fail("format", f"{shown(stored)} is not known; known are {', '.join(known)}")
    return Quantization(stored)


def _heads(fields: JsonFields, architecture: Architecture, hidden_size: int) -> tuple[int, int, int]:
    """Numbers of attention and key-value heads, and the size of one."""
    num_heads = fields.integer("num_attention_heads", maximum=MAX_HEADS)
    num_kv_heads = fields.optional_integer("num_key_value_heads", maximum=MAX_HEADS)
    if num_kv_heads is None:
        # Written as null it means "as many as heads"; left out altogether it means the class's default.
        left_out = not fields.has("num_key_value_heads")
        num_kv_heads = (architecture.default_num_kv_heads if left_out else None) or num_heads
    head_dim = fields.optional_integer("head_dim", maximum=MAX_WIDTH) or architecture.default_head_dim
    if head_dim is None:
        if hidden_size % num_heads:
            raise fields.fail("num_attention_heads", f"{num_heads} heads do not divide hidden_size {hidden_size}")
        head_dim = hidden_size // num_heads
    problem = check_heads(num_heads, num_kv_heads, head_dim)
    if problem is not None:
        names = {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
        raise fields.fail(names[problem[0]], problem[1])
    return num_heads, num_kv_heads, head_dim


def _sliding_window(fields: JsonFields, architecture: Architecture, num_layers: int) -> int | None:
    rule = architecture.sliding_window
    if rule is SlidingWindowRule.NEVER:
        return None
    window = fields.optional_integer("sliding_window", maximum=MAX_POSITIONS)
    if window is None and not fields.has("sliding_window"):
        window = architecture.default_sliding_window
    if rule is SlidingWindowRule.IF_SET or window is None:
        return window
    if not fields.boolean("use_sliding_window", default=False):
        return None
    kinds = fields.optional_strings("layer_types")
    if kinds is None:
        first = fields.optional_integer("max_window_layers", minimum=0, maximum=MAX_POSITIONS)
        first = 28 if first is None else first  # the default of `transformers`
        kinds = ["sliding_attention" if index >= first else "full_attention" for index in range(num_layers)]
    elif len(kinds) != num_layers:
        raise fields.fail("layer_types", f"has {len(kinds)} entries for {num_layers} layers")
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        raise fields.fail("use_sliding_window", "a window on some layers only is not supported")
    return window


def _rope(fields: JsonFields, max_positions: int) -> RopeConfig:
    """Rotary embedding: from `rope_parameters`, or from `rope_scaling` and `rope_theta` as older files have it."""
    source = fields.optional_object("rope_scaling") or fields.optional_object("rope_parameters")
    outer_theta = fields.optional_number("rope_theta", maximum=MAX_ROPE_THETA) or RopeConfig.theta
    for owner in (fields, source):
        factor = owner.optional_number("partial_rotary_factor", maximum=1.0) if owner is not None else None
        if owner is not None and factor not in (None, 1.0):
            raise owner.fail("partial_rotary_factor", f"{factor} is not supported; supported is 1")
    if source is None:
        return RopeConfig(theta=outer_theta)
    if source.object_names():
        raise fields.fail("rope_parameters", "a rotary embedding that differs among layers is not supported")
    theta = source.optional_number("rope_theta", maximum=MAX_ROPE_THETA) or outer_theta
    key = "rope_type" if "rope_type" in source else "type"
    kind = source.optional_string(key) or "default"
    if kind not in _KNOWN_SCALINGS:
        raise source.fail(key, f"{shown(kind)} is not supported; supported are {', '.join(_KNOWN_SCALINGS)}")
    if kind in _NO_SCALING:
        return RopeConfig(theta=theta)
    factor = source.number("factor", maximum=1e6)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=factor)
    low, high = source.number("low_freq_factor", maximum=1e6), source.number("high_freq_factor", maximum=1e6)
    if high <= low:
        raise source.fail("high_freq_factor", f"must be above low_freq_factor ({low:g}), not {high:g}")
    original = source.optional_integer("original_max_position_embeddings", maximum=MAX_POSITIONS) or max_positions
    return RopeConfig(theta, "llama3", factor, low, high, original)


def _eos_token_ids(directory: Path, fields: JsonFields, vocab_size: int) -> tuple[int, ...]:
    """generation_config.json wins where it names any: it is the newer file, and chat models put theirs there."""
    generation_file = directory / "generation_config.json"
    if generation_file.exists():
        generation = read_json_object(generation_file)
        if "eos_token_id" in generation:
            return generation.token_ids("eos_token_id", vocab_size)
    return fields.token_ids("eos_token_id", vocab_size)
