import re
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    SpeculativeConfig,
    SpeculativeMethod,
)
from engine.errors import ConfigError
from serve_app.config import AppConfig, cache_dir, parse_config
from serve_app.failover import FailoverPolicy
from serve_app.placement import PlacementRule
from serve_app.time_limits import TimeLimits

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
        cache=CacheConfig(),
        scheduler=SchedulerConfig(max_num_seqs=256, token_budget=256, max_model_len=1000, max_draft_tokens=256),
        speculative=SpeculativeConfig(SpeculativeMethod.NGRAM),
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
            "speculative": "off",
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
    service = {"model", "served_model_name", "max_queued_requests", "max_queued_requests_per_key"}
    service |= {"max_waiting_requests", "queue_timeout_s", "request_timeout_s"}
    placement = {"engine_replicas", "ingress_replicas", "engine_num_cpus", "ingress_num_cpus"}
    placement |= {"draft_replicas", "draft_num_cpus", "draft_num_gpus", "proxy"}
    scaling = {"min_replicas", "max_replicas", "target_queue_depth"}
    placement |= {prefix + name for prefix in ("", "draft_", "ingress_") for name in scaling}
    speculation = {"speculative", "draft_model", "num_draft_tokens"}
    failover = {"failover_timeout_s", "failover_across_fingerprints"}
    assert set(AppConfig.model_fields) == engine | service | placement | speculation | failover


def test_placement_rule() -> None:
    """Where there is a choice, and something in the caches to be found."""
    assert parse_config({}).placement_rule is None
    assert parse_config({"engine_replicas": 2, "enable_prefix_caching": False}).placement_rule is None
    assert parse_config({"max_replicas": 2, "block_size": 32}).placement_rule == PlacementRule(32, home_requests=0)
    with_others = parse_config({"engine_replicas": 2, "ingress_max_replicas": 2})
    assert with_others.placement_rule == PlacementRule(16)


def test_failover_policy() -> None:
    assert parse_config({}).failover_policy == FailoverPolicy(timeout_s=60.0, across_fingerprints=False)
    config = parse_config({"failover_timeout_s": "2.5", "failover_across_fingerprints": "true"})
    assert config.failover_policy == FailoverPolicy(timeout_s=2.5, across_fingerprints=True)
    with pytest.raises(ConfigError, match="failover_timeout_s must be a number of seconds above 0"):
        parse_config({"failover_timeout_s": "0"})


def test_time_limits() -> None:
    assert parse_config({}).time_limits == TimeLimits(120.0, None)
    assert parse_config({"queue_timeout_s": "none", "request_timeout_s": "2.5"}).time_limits == TimeLimits(None, 2.5)


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


def test_port_is_no_argument_and_the_message_says_where_it_is_set() -> None:
    message = r"^unknown argument 'port'; a Serve config file has it, as http_options\.port; accepted: "
    with pytest.raises(ConfigError, match=message):
        parse_config({"port": "9000"})


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
        ("queue_timeout_s", "0", "none or a number of seconds above 0"),
        ("max_queued_requests_per_key", "0", "none or a whole number of at least 1"),
        ("model", "", "a catalogue name"),
        ("model", 5, "a catalogue name"),
        ("speculative", "eagle", "one of auto, off, ngram, local, remote"),
        ("speculative", True, "one of auto, off, ngram, local, remote"),
        ("num_draft_tokens", "0", "adaptive or a whole number from 1 to 16"),
        ("num_draft_tokens", "17", "adaptive or a whole number from 1 to 16"),
        ("num_draft_tokens", True, "adaptive or a whole number from 1 to 16"),
        ("draft_model", "", "none, or like model"),
        ("draft_replicas", "0", "a whole number of at least 1"),
        ("min_replicas", "-1", "none or a whole number of at least 0"),
        ("max_replicas", "0", "none or a whole number of at least 1"),
        ("ingress_min_replicas", "0", "none or a whole number of at least 1"),
        ("target_queue_depth", "0", "none or a number above 0"),
        ("draft_num_gpus", "0", "none, a number below 0.5"),
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


def test_the_default_method_hangs_on_the_device() -> None:
    cpu, gpu = parse_config({"device": "cpu", "num_draft_tokens": 3}), parse_config({"device": "cuda"})
    assert cpu.engine_config(MODEL).speculative == SpeculativeConfig(SpeculativeMethod.NGRAM, num_draft_tokens=3)
    assert gpu.engine_config(MODEL).speculative == SpeculativeConfig()
    assert gpu.engine_config(MODEL).scheduler.max_draft_tokens == 0
    with pytest.raises(ConfigError, match="num_draft_tokens does nothing with speculative=off, the default for device"):
        parse_config({"device": "cuda", "num_draft_tokens": 3}).engine_config(MODEL)


def test_speculation_reaches_the_engine() -> None:
    off = parse_config({"device": "cpu", "speculative": False}).engine_config(MODEL)  # as YAML reads off
    assert (off.speculative, off.scheduler.max_draft_tokens) == (SpeculativeConfig(), 0)
    ngram = parse_config({"device": "cpu", "speculative": "ngram", "num_draft_tokens": "5"}).engine_config(MODEL)
    assert ngram.speculative == SpeculativeConfig(SpeculativeMethod.NGRAM, num_draft_tokens=5)
    assert ngram.scheduler.max_draft_tokens == 256
    single = parse_config({"device": "cpu", "speculative": "ngram", "max_num_seqs": "1"}).engine_config(MODEL)
    assert (single.speculative.num_draft_tokens, single.scheduler.max_draft_tokens) == (8, 16)
    local = parse_config({"device": "cpu", "speculative": "local", "draft_model": "d"})
    path = Path("/models/d")
    assert local.engine_config(MODEL, path).speculative == SpeculativeConfig(
        SpeculativeMethod.LOCAL, draft_model_path=path
    )
    remote = parse_config({"device": "cpu", "speculative": "remote", "draft_model": "d"})
    assert remote.engine_config(MODEL).speculative == SpeculativeConfig(SpeculativeMethod.REMOTE)


def test_the_catalogues_draft_is_used_where_none_is_named() -> None:
    for method in ("local", "remote"):
        assert parse_config({"speculative": method}).draft_model == "smollm2-135m-draft"
        assert parse_config({"speculative": method, "draft_model": "none"}).draft_model == "smollm2-135m-draft"
        assert parse_config({"speculative": method, "draft_model": "d"}).draft_model == "d"
    for method in ("auto", "off", "ngram"):
        assert parse_config({"speculative": method}).draft_model is None


def test_a_remote_draft_has_a_record_of_its_own() -> None:
    arguments = {"speculative": "remote", "draft_model": "d", "max_num_seqs": "7", "token_budget": "70"}
    draft = replace(MODEL, max_position_embeddings=400)
    config = parse_config({**arguments, "device": "cpu", "draft_num_cpus": "2.5", "dtype": "bfloat16"})
    assert config.draft_config(draft) == EngineConfig(
        dtype=DType.BFLOAT16,
        scheduler=SchedulerConfig(max_num_seqs=7, token_budget=70, max_model_len=400),
        num_threads=2,
    )
    assert parse_config({**arguments, "device": "cpu"}).draft_config(draft).num_threads == 1
    shorter = parse_config({**arguments, "device": "cuda", "max_model_len": "300"}).draft_config(draft)
    assert (shorter.scheduler.max_model_len, shorter.num_threads) == (300, None)


def shares(**arguments: object) -> tuple[float, float, float, float | None]:
    """What Ray is told of engine and draft, and what they take of the memory of a GPU."""
    config = parse_config({"device": "cuda", **arguments})
    engine = config.engine_config(MODEL).cache.device_share
    draft = config.draft_config(MODEL).cache.device_share if config.speculative == "remote" else None
    return config.engine_num_gpus, config.draft_gpu_share, engine, draft


def test_engine_and_draft_share_a_gpu() -> None:
    remote = {"speculative": "remote", "draft_model": "d"}
    assert shares() == (1.0, 0.0, 1.0, None)
    assert shares(speculative="ngram") == (1.0, 0.0, 1.0, None)
    assert shares(**remote) == (0.75, 0.25, 0.75, 0.25)
    assert shares(**remote, draft_num_gpus="0.125") == (0.875, 0.125, 0.875, 0.125)
    assert shares(**remote, draft_num_gpus="1") == (1.0, 1.0, 1.0, 1.0)
    on_cpu = parse_config({"device": "cpu", **remote})
    assert (on_cpu.engine_num_gpus, on_cpu.draft_gpu_share) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"speculative": "remote", "model": "qwen3-0.6b"},
            "speculative=remote needs a draft_model for qwen3-0.6b; the catalogue has one for smollm2-135m$",
        ),
        ({"speculative": "local", "model": "m", "draft_model": "none"}, "speculative=local needs a draft_model for m;"),
        ({"draft_model": "d"}, "draft_model=d does nothing with speculative=auto: set speculative to local or remote"),
        ({"draft_model": "d", "speculative": "ngram"}, "draft_model=d does nothing with speculative=ngram"),
        ({"num_draft_tokens": "3", "speculative": "off"}, "num_draft_tokens does nothing with speculative=off"),
        ({"draft_max_replicas": "2"}, "draft_max_replicas is for speculative=remote, not auto"),
        ({"draft_replicas": "2"}, "draft_replicas is for speculative=remote, not auto"),
        ({"draft_num_cpus": "2", "speculative": "ngram"}, "draft_num_cpus is for speculative=remote, not ngram"),
        (
            {"draft_num_gpus": "0.2", "speculative": "local", "draft_model": "d"},
            "draft_num_gpus is for speculative=remote, not local",
        ),
        (
            {"draft_num_gpus": "0.5", "speculative": "remote", "draft_model": "d"},
            "draft_num_gpus must be none, a number below 0.5 .*, not 0.5",
        ),
    ],
)
def test_speculation_makes_sense_as_a_whole(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        parse_config(arguments)
    assert "\n" not in str(caught.value)


def test_a_share_of_a_gpu_needs_one() -> None:
    config = parse_config({"device": "cpu", "speculative": "remote", "draft_model": "d", "draft_num_gpus": "0.2"})
    with pytest.raises(ConfigError, match="draft_num_gpus is for device=cuda"):
        config.engine_config(MODEL)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_draft_tokens": 0},
        {"num_draft_tokens": 17},
        {"method": SpeculativeMethod.LOCAL},
        {"method": SpeculativeMethod.NGRAM, "draft_model_path": Path("d")},
    ],
)
def test_the_record_itself_is_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="draft"):
        SpeculativeConfig(**settings)
    for share in (0.0, 1.5):
        with pytest.raises(ConfigError, match="device_share"):
            CacheConfig(device_share=share)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SLIPSTREAM_CACHE", raising=False)
    assert cache_dir() == tmp_path / "xdg" / "slipstream"
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
