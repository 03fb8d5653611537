import re
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import (
    CacheConfig,
    Device,
    DType,
    EngineConfig,
    KVCacheDType,
    ModelConfig,
    Quantization,
    RopeConfig,
    SchedulerConfig,
)
from engine.errors import ConfigError
from serve_app.config import AppConfig, cache_dir, parse_config

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=320,
    hidden_size=64,
    intermediate_size=144,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=1000,
    rope=RopeConfig(),
)


def test_defaults() -> None:
    config = parse_config({"device": "cpu"})
    assert config.model_name == "smollm2-135m"
    assert config.engine_config(MODEL) == EngineConfig(
        cache=CacheConfig(), scheduler=SchedulerConfig(max_num_seqs=256, token_budget=256, max_model_len=1000)
    )


def test_every_engine_argument_reaches_the_engine() -> None:
    """As text, the way the command line gives them."""
    config = parse_config(
        {
            "device": "cpu",
            "dtype": "bfloat16",
            "quantization": "w8a8",
            "kv_cache_dtype": "int8",
            "max_model_len": "500",
            "max_num_seqs": "7",
            "token_budget": "70",
            "max_prefill_chunk": "35",
            "block_size": "32",
            "kv_cache_memory_gb": "0.5",
            "enable_prefix_caching": "false",
            "num_threads": "3",
        }
    )
    assert config.engine_config(MODEL) == EngineConfig(
        device=Device.CPU,
        dtype=DType.BFLOAT16,
        quantization=Quantization.W8A8,
        cache=CacheConfig(
            block_size=32, memory_bytes=500_000_000, enable_prefix_caching=False, dtype=KVCacheDType.INT8
        ),
        scheduler=SchedulerConfig(max_num_seqs=7, token_budget=70, max_prefill_chunk=35, max_model_len=500),
        num_threads=3,
    )
    assert parse_config({"device": "cpu", "num_kv_blocks": 9}).engine_config(MODEL).cache.num_blocks == 9


def test_no_argument_is_unknown_to_the_tests() -> None:
    """A new argument must be added to a test that shows its effect."""
    engine = {"device", "dtype", "max_model_len", "max_num_seqs", "token_budget", "max_prefill_chunk", "block_size"}
    engine |= {"kv_cache_memory_gb", "num_kv_blocks", "enable_prefix_caching", "num_threads"}
    engine |= {"quantization", "kv_cache_dtype"}
    service = {"model", "served_model_name", "max_queued_requests"}
    placement = {"engine_replicas", "ingress_replicas", "engine_num_cpus", "ingress_num_cpus"}
    assert set(AppConfig.model_fields) == engine | service | placement


def test_none_as_text() -> None:
    config = parse_config({"num_threads": "none", "max_model_len": "None", "served_model_name": "null"})
    assert (config.num_threads, config.max_model_len, config.served_model_name) == (None, None, None)


def test_unknown_name_lists_what_is_accepted() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"modle": "x"})
    message = str(caught.value)
    assert message.startswith("unknown argument 'modle'; did you mean 'model'? accepted: ")
    assert all(name in message for name in AppConfig.model_fields)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("dtype", "fp8", "one of auto, float32, bfloat16, float16"),
        ("quantization", "awq", "one of none, int8, w8a8"),
        ("kv_cache_dtype", "fp8", "one of auto, int8"),
        ("device", "CUDA", "one of auto, cpu, cuda"),
        ("max_num_seqs", "0", "a whole number of at least 1"),
        ("max_num_seqs", "many", "a whole number of at least 1"),
        ("max_num_seqs", True, "a whole number of at least 1"),
        ("max_model_len", "-5", "none or a whole number of at least 1"),
        ("block_size", "x", "a power of two"),
        ("block_size", "12", "a power of two"),
        ("kv_cache_memory_gb", "inf", "none or a number of gigabytes"),
        ("num_kv_blocks", "1", "none or a whole number of at least 2"),
        ("enable_prefix_caching", "maybe", "true or false"),
        ("engine_num_cpus", "nan", "a number above 0"),
        ("model", "", "a catalogue name"),
        ("model", 5, "a catalogue name"),
    ],
)
def test_wrong_value_says_what_is_accepted(name: str, value: object, accepted: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be {re.escape(accepted)}.*, not ") as caught:
        parse_config({name: value})
    assert "\n" not in str(caught.value)


def test_cache_size_is_given_once() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        parse_config({"kv_cache_memory_gb": "1", "num_kv_blocks": "10"})


def test_context_past_the_models_own() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len must be at most 1000.*not 1001"):
        parse_config({"max_model_len": "1001", "device": "cpu"}).engine_config(MODEL)


def test_quantization_follows_the_stored_weights() -> None:
    stored = replace(MODEL, stored_quantization=Quantization.INT8)
    assert parse_config({"device": "cpu"}).engine_config(stored).quantization is Quantization.INT8
    with pytest.raises(ConfigError, match="quantization=w8a8, but the model's weights are stored as int8"):
        parse_config({"device": "cpu", "quantization": "w8a8"}).engine_config(stored)


def test_threads_are_for_the_cpu() -> None:
    with pytest.raises(ConfigError, match="num_threads is for device=cpu"):
        parse_config({"num_threads": "2", "device": "cuda"}).engine_config(MODEL)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SLIPSTREAM_CACHE", raising=False)
    assert cache_dir() == tmp_path / "xdg" / "slipstream"
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
