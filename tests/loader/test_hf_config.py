import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from engine.config import ModelConfig, RopeConfig
from engine.errors import ModelError
from engine.loader.architectures import KNOWN_ARCHITECTURES
from engine.loader.generation_defaults import GenerationDefaults
from engine.loader.hf_config import read_generation_defaults, read_model_config
from tests.loader.files import LLAMA, refusal_of, write_config

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 777,
    "rms_norm_eps": 1e-5,
    "rope_theta": 12345.0,
    "eos_token_id": [7, 9],
}
EXPECTED = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=777,
    rope=RopeConfig(theta=12345.0),
    eos_token_ids=(7, 9),
)


@pytest.mark.parametrize(
    ("config_class", "extra", "expected"),
    [
        (LlamaConfig, {}, EXPECTED),
        (LlamaConfig, {"tie_word_embeddings": True}, replace(EXPECTED, tie_word_embeddings=True)),
        (MistralConfig, {"sliding_window": 33}, replace(EXPECTED, sliding_window=33)),
        (MistralConfig, {"sliding_window": None}, EXPECTED),
        (Qwen2Config, {}, replace(EXPECTED, qkv_bias=True)),
        (
            Qwen2Config,
            {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0},
            replace(EXPECTED, qkv_bias=True, sliding_window=40),
        ),
        (
            Qwen2Config,
            {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 3},
            replace(EXPECTED, qkv_bias=True),
        ),
        (Qwen3Config, {"head_dim": 32}, replace(EXPECTED, qk_norm=True, head_dim=32)),
    ],
)
def test_reads_what_transformers_writes(
    tmp_path: Path, config_class: Any, extra: dict[str, Any], expected: ModelConfig
) -> None:
    name = config_class.__name__.removesuffix("Config") + "ForCausalLM"
    config_class(**SHAPE, **extra, architectures=[name]).save_pretrained(tmp_path)
    assert read_model_config(tmp_path) == replace(expected, architecture=name)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": ...}, RopeConfig()),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(scaling="linear", factor=2.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 256),
        ),
        (
            {"rope_theta": ..., "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 256),
        ),
        ({"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 77}}, RopeConfig(theta=77.0)),
    ],
)
def test_rope_in_the_old_and_the_new_style(tmp_path: Path, fields: dict[str, Any], expected: RopeConfig) -> None:
    assert read_model_config(write_config(tmp_path, **fields)).rope == expected


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures: 'GPT2LMHeadModel'"),
        ({"architectures": ...}, "architectures: is missing"),
        ({"architectures": []}, "architectures: is missing"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: must be a list of strings"),
        *[
            ({name: ...}, f"{name}: is missing")
            for name in (
                *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
                *("max_position_embeddings", "rms_norm_eps"),
            )
        ],
        ({"hidden_size": "64"}, "hidden_size: must be an integer"),
        ({"hidden_size": True}, "hidden_size: must be an integer"),
        ({"hidden_size": 64.0}, "hidden_size: must be an integer"),
        ({"hidden_size": -64}, "hidden_size: must be an integer between 1"),
        ({"hidden_size": 66}, "num_attention_heads: 4 heads do not divide hidden_size 66"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: must be an integer between 1"),
        ({"num_hidden_layers": 10**18}, "num_hidden_layers: must be an integer between 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 key-value heads do not divide"),
        ({"head_dim": 15}, "head_dim: is 15; rotary"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: must be a number above 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: must be a number"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"attention_bias": True}, "attention_bias: true is not supported"),
        ({"mlp_bias": True}, "mlp_bias: true is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: weights quantised with 'awq'"),
        (
            {"quantization_config": {"quant_method": "slipstream", "format": "int3"}},
            "quantization_config.format: 'int3' is not known; known are int8, w8a8",
        ),
        ({"quantization_config": {"quant_method": "slipstream"}}, "quantization_config.format: None is not known"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: must be true or false"),
        ({"eos_token_id": 96}, "eos_token_id: must be a token id below vocab_size (96)"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id: must be a token id"),
        ({"rope_theta": -1}, "rope_theta: must be a number above 0"),
        ({"rope_scaling": 3}, "rope_scaling: must be an object"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling.type: 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type: 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling.rope_type: 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling.low_freq_factor: is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor: must be above",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters: a rotary embedding that"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
    ],
)
def test_refuses_in_one_line_that_names_file_and_field(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    write_config(tmp_path, **fields)
    with pytest.raises(ModelError) as caught:
        read_model_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {named}")
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_refused_with_those_known(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=", ".join(KNOWN_ARCHITECTURES)):
        read_model_config(write_config(tmp_path, architectures=["Mystery"]))


@pytest.mark.parametrize("fields", [{"max_window_layers": 1}, {"layer_types": ["full_attention", "sliding_attention"]}])
def test_a_window_on_some_layers_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    write_config(
        tmp_path, architectures=["Qwen2ForCausalLM"], use_sliding_window=True, sliding_window=8, head_dim=16, **fields
    )
    with pytest.raises(ModelError, match="use_sliding_window: a window on some layers only"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a": NaN}', "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("\udcff", "is not valid JSON"),
    ],
)
def test_malformed_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=message) as caught:
        read_model_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_unreadable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: cannot be read: No such file"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        read_model_config(tmp_path)


def test_key_value_heads_left_out(tmp_path: Path) -> None:
    assert read_model_config(write_config(tmp_path, num_key_value_heads=...)).num_kv_heads == 4
    assert read_model_config(write_config(tmp_path, num_key_value_heads=None)).num_kv_heads == 4


def test_eos_ids_of_generation_config_win(tmp_path: Path) -> None:
    write_config(tmp_path, eos_token_id=5)
    assert read_model_config(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert read_model_config(tmp_path).eos_token_ids == (3, 4)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_model_config(tmp_path).eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (None, GenerationDefaults()),
        ({}, GenerationDefaults()),
        ({"temperature": 0.6, "top_p": 0.9}, GenerationDefaults()),
        ({"do_sample": False, "repetition_penalty": 1.1}, GenerationDefaults(repetition_penalty=1.1)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05},
            GenerationDefaults(0.6, 0.9, 20, 0.05),
        ),
        ({"do_sample": True, "temperature": 0, "top_k": 0, "min_p": 0}, GenerationDefaults(0.0, min_p=0.0)),
    ],
)
def test_generation_defaults(tmp_path: Path, fields: dict[str, Any] | None, expected: GenerationDefaults) -> None:
    if fields is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    assert read_generation_defaults(tmp_path) == expected


@pytest.mark.parametrize("fields", [{"top_p": 1.5}, {"top_p": 0}, {"top_k": -1}, {"temperature": "hot"}, {"min_p": -1}])
def test_malformed_generation_defaults_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True} | fields))
    with pytest.raises(ModelError, match=rf"generation_config\.json: {next(iter(fields))}: must be"):
        read_generation_defaults(tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [*LLAMA, "head_dim", "rope_scaling", "rope_parameters", "layer_types", "tie_word_embeddings", "attention_bias"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, min_size=1, max_size=3),
    architecture=st.sampled_from(sorted(KNOWN_ARCHITECTURES)),
)
def test_any_value_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], architecture: str
) -> None:
    directory = write_config(tmp_path_factory.mktemp("any"), **({"architectures": [architecture]} | changes))
    message = refusal_of(lambda: read_model_config(directory))
    if message is not None:
        assert "\n" not in message
        assert len(message) < 600
    else:
        config = read_model_config(directory)
        assert config.num_heads % config.num_kv_heads == 0
        assert config.head_dim % 2 == 0
