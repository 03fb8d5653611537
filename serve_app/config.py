"""The application's arguments, validated; the one place that reads the environment."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from engine.config import (
    DEFAULT_DRAFT_TOKENS,
    MAX_DRAFT_TOKENS,
    CacheConfig,
    Device,
    DType,
    EngineConfig,
    KVCacheDType,
    ModelConfig,
    Quantization,
    SchedulerConfig,
    SpeculativeConfig,
    SpeculativeMethod,
)
from engine.errors import ConfigError
from engine.loader.catalogue import CATALOGUE, DEFAULT_MODEL
from engine.quantize.formats import resolve_quantization
from serve_app.failover import FailoverPolicy
from serve_app.placement import HOME_REQUESTS, PlacementRule
from serve_app.replica_counts import (
    CPU_QUEUE_DEPTH,
    DRAFT_QUEUE_DEPTH,
    GPU_QUEUE_DEPTH_PER_SEQ,
    INGRESS_QUEUE_DEPTH,
    ReplicaCount,
    replica_count,
)
from serve_app.time_limits import TimeLimits

_BYTES_PER_GB = 10**9
# Calls that Serve lets a replica run beyond those that our own limits allow: acknowledgements, aborts and health
# questions are calls too, and the bound that turns clients away is `max_queued_requests`, not Serve's.
_CALL_HEADROOM = 1024


# A step that mixes a prompt's chunk in keeps the decoding requests waiting: 256 rows take a CPU about 0.3 s with the
# default model, and a GPU needs some thousand to be busy.
TOKEN_BUDGETS = {"cpu": 256, "cuda": 2048}
# Drafts from a request's own text: on a CPU they gain up to a factor of 3 and, by policy, cost nothing. On a GPU they
# cost a full batch 1 to 2 %. Measured in docs/speculative.md.
DEFAULT_METHODS = {"cpu": SpeculativeMethod.NGRAM, "cuda": SpeculativeMethod.OFF}
DRAFT_GPU_SHARE = 0.25  # of a card that engine and draft share; the draft models in use are a fifth of their target


def _none_from_text(value: Any) -> Any:
    """Arguments of `serve run` are text; "none" stands for None."""
    return None if isinstance(value, str) and value.lower() in ("none", "null") else value


def _no_bool(value: Any) -> Any:
    """Keeps YAML's `true` from counting as 1."""
    if isinstance(value, bool):
        raise ValueError("a truth value is not a number")
    return value


def _off_from_false(value: Any) -> Any:
    """YAML reads `off` as false."""
    return "off" if value is False else value


_COUNT = "a whole number of at least 1"
_AtLeast1 = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
_AtLeast2 = Annotated[int, BeforeValidator(_no_bool), Field(ge=2)]
_AboveZero = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]
_Text = Annotated[str, Field(min_length=1)]
_NoneFromText = BeforeValidator(_none_from_text)

_Count = Annotated[_AtLeast1, Field(description=_COUNT)]
_OptionalCount = Annotated[_AtLeast1 | None, _NoneFromText, Field(description=f"none or {_COUNT}")]
_OptionalSeconds = Annotated[_AboveZero | None, _NoneFromText, Field(description="none or a number of seconds above 0")]
_AtLeast0 = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
_OptionalCountFrom0 = Annotated[
    _AtLeast0 | None, _NoneFromText, Field(description="none or a whole number of at least 0")
]
_OptionalDepth = Annotated[_AboveZero | None, _NoneFromText, Field(description="none or a number above 0")]
_MOST = MAX_DRAFT_TOKENS
_WITH_DRAFT_MODEL = ("local", "remote")
_Cpus = Annotated[_AboveZero, Field(description="a number above 0, such as 0.5")]


class AppConfig(BaseModel):
    """Arguments of the application: `serve run serve_app:app name=value …`, or `args` in a Serve config file.

    A field's description says what it accepts, in the words of the error message.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: _Text = Field(DEFAULT_MODEL, description="a catalogue name, a path to a directory or GGUF file, or a hub id")
    served_model_name: Annotated[_Text | None, _NoneFromText] = Field(
        None, description="none (the value of model) or a name"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="one of auto, cpu, cuda")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="one of auto, float32, bfloat16, float16"
    )
    quantization: Literal["none", "int8", "w8a8"] = Field("none", description="one of none, int8, w8a8")
    kv_cache_dtype: Literal["auto", "int8"] = Field("auto", description="one of auto, int8")
    max_model_len: _OptionalCount = None  # None: the model's context length
    max_num_seqs: _Count = 256
    token_budget: _OptionalCount = None  # None: as TOKEN_BUDGETS says
    max_prefill_chunk: _OptionalCount = None
    block_size: _AtLeast1 = Field(16, description="a power of two, such as 16")
    kv_cache_memory_gb: Annotated[_AboveZero | None, _NoneFromText] = Field(
        None, description="none or a number of gigabytes (10^9 bytes) above 0"
    )
    num_kv_blocks: Annotated[_AtLeast2 | None, _NoneFromText] = Field(
        None, description="none or a whole number of at least 2"
    )
    enable_prefix_caching: bool = Field(True, description="true or false")
    num_threads: _OptionalCount = None  # None: every core that the replica may run on
    max_queued_requests: _Count = 1024  # in each ingress replica, waiting for their first token
    max_queued_requests_per_key: _OptionalCount = None  # of those; None: see serve_app.queue_places
    max_waiting_requests: _Count = 1024  # in each engine replica, beside max_num_seqs that run
    queue_timeout_s: _OptionalSeconds = 120.0
    request_timeout_s: _OptionalSeconds = None
    failover_timeout_s: _AboveZero = Field(60.0, description="a number of seconds above 0")
    failover_across_fingerprints: bool = Field(False, description="true or false")
    engine_replicas: _Count = 1
    min_replicas: _OptionalCountFrom0 = None  # of the engine; None, as well as max_replicas: as many as engine_replicas
    max_replicas: _OptionalCount = None
    target_queue_depth: _OptionalDepth = None
    ingress_replicas: _Count = 1
    ingress_min_replicas: _OptionalCount = None
    ingress_max_replicas: _OptionalCount = None
    ingress_target_queue_depth: _OptionalDepth = None
    engine_num_cpus: _Cpus = 0.5
    ingress_num_cpus: _Cpus = 0.25
    proxy: Literal["auto", "haproxy", "ray"] = Field("auto", description="one of auto, haproxy, ray")
    speculative: Annotated[Literal["auto", "off", "ngram", "local", "remote"], BeforeValidator(_off_from_false)] = (
        Field("auto", description="one of auto, off, ngram, local, remote")
    )
    draft_model: Annotated[_Text | None, _NoneFromText] = Field(
        None, validate_default=True, description="none, or like model: a catalogue name, a path or a hub id"
    )
    num_draft_tokens: Literal["adaptive"] | Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=_MOST)] = Field(
        "adaptive", description=f"adaptive or a whole number from 1 to {_MOST}"
    )
    draft_replicas: _Count = 1
    draft_min_replicas: _OptionalCountFrom0 = None
    draft_max_replicas: _OptionalCount = None
    draft_target_queue_depth: _OptionalDepth = None
    draft_num_cpus: _Cpus = 0.5
    draft_num_gpus: Annotated[_AboveZero | None, _NoneFromText] = Field(
        None, description="none, a number below 0.5 (a share of the engine's GPU) or 1 (a GPU of its own)"
    )

    @field_validator("draft_model")
    @classmethod
    def _catalogue_draft(cls, draft_model: str | None, info: ValidationInfo) -> str | None:
        """Left out where one is needed, it is the catalogue's for the model."""
        if draft_model is not None or info.data.get("speculative") not in _WITH_DRAFT_MODEL:
            return draft_model
        entry = CATALOGUE.get(info.data.get("model", ""))
        return None if entry is None else entry.draft_model

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.kv_cache_memory_gb is not None and self.num_kv_blocks is not None:
            raise ConfigError("kv_cache_memory_gb and num_kv_blocks both size the KV cache: give one of them")
        self._cache_config()
        self._check_speculation()
        self._check_replica_counts()
        return self

    def _check_speculation(self) -> None:
        has_model = self.speculative in _WITH_DRAFT_MODEL
        if has_model and self.draft_model is None:
            served = ", ".join(entry.name for entry in CATALOGUE.values() if entry.draft_model)
            raise ConfigError(
                f"speculative={self.speculative} needs a draft_model for {self.model}; "
                f"the catalogue has one for {served}"
            )
        if not has_model and self.draft_model is not None:
            raise ConfigError(
                f"draft_model={self.draft_model} does nothing with speculative={self.speculative}: "
                "set speculative to local or remote"
            )
        if self.speculative == "off" and self.num_draft_tokens != "adaptive":
            raise ConfigError("num_draft_tokens does nothing with speculative=off: set it to ngram, local or remote")
        scaling = ("draft_replicas", "draft_min_replicas", "draft_max_replicas", "draft_target_queue_depth")
        for name in (*scaling, "draft_num_cpus", "draft_num_gpus"):
            if self.speculative != "remote" and getattr(self, name) != AppConfig.model_fields[name].default:
                raise ConfigError(f"{name} is for speculative=remote, not {self.speculative}")
        share = self.draft_num_gpus
        if share is not None and not (share < 0.5 or share == 1):
            # With a half or more, the rests of two engines would count as one GPU, and Ray would give both the same.
            description = AppConfig.model_fields["draft_num_gpus"].description
            raise ConfigError(f"draft_num_gpus must be {description}, not {share:g}")

    def _check_replica_counts(self) -> None:
        assert self.ingress_count.fewest >= 1
        if self.engine_count.is_fixed and not self.draft_count.is_fixed:
            raise ConfigError(
                "draft replicas are as many as the engine replicas need, whose number is fixed: set max_replicas, "
                "or draft_replicas in place of draft_min_replicas and draft_max_replicas"
            )

    @property
    def speculative_method(self) -> SpeculativeMethod:
        """`device` must have been resolved."""
        assert self.device != "auto"
        return DEFAULT_METHODS[self.device] if self.speculative == "auto" else SpeculativeMethod(self.speculative)

    @property
    def engine_count(self) -> ReplicaCount:
        """Engine replicas. Their target depth hangs on the device: `device` must have been resolved for it to hold."""
        on_cpu = self.device == "cpu"
        depth = CPU_QUEUE_DEPTH if on_cpu else max(1.0, GPU_QUEUE_DEPTH_PER_SEQ * self.max_num_seqs)
        return replica_count(self, "engine", depth)

    @property
    def ingress_count(self) -> ReplicaCount:
        return replica_count(self, "ingress", INGRESS_QUEUE_DEPTH)

    @property
    def draft_count(self) -> ReplicaCount:
        """Draft replicas, of which there are any with speculative=remote only."""
        return replica_count(self, "draft", DRAFT_QUEUE_DEPTH)

    @property
    def draft_gpu_share(self) -> float:
        """What a remote draft counts as on a GPU; 0 on a CPU. `device` must have been resolved."""
        assert self.device != "auto"
        if self.device == "cpu" or self.speculative != "remote":
            return 0.0
        return DRAFT_GPU_SHARE if self.draft_num_gpus is None else self.draft_num_gpus

    @property
    def engine_num_gpus(self) -> float:
        """What an engine counts as: a whole GPU, or what a draft that shares it leaves. These are Ray's books alone;
        the memory is shared out by CacheConfig.device_share, and the time by the driver."""
        return (self.device == "cuda") - (self.draft_gpu_share if self.draft_gpu_share < 1 else 0.0)

    @property
    def time_limits(self) -> TimeLimits:
        return TimeLimits(self.queue_timeout_s, self.request_timeout_s)

    @property
    def failover_policy(self) -> FailoverPolicy:
        return FailoverPolicy(self.failover_timeout_s, self.failover_across_fingerprints)

    @property
    def placement_rule(self) -> PlacementRule | None:
        """None: where a prompt goes does not hang on what it begins with."""
        if not self.enable_prefix_caching or self.engine_count.most == 1:
            return None
        return PlacementRule(self.block_size, home_requests=HOME_REQUESTS if self.ingress_count.most > 1 else 0.0)

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.model

    def _cache_config(self) -> CacheConfig:
        gigabytes = self.kv_cache_memory_gb
        return CacheConfig(
            block_size=self.block_size,
            num_blocks=self.num_kv_blocks,
            memory_bytes=None if gigabytes is None else int(gigabytes * _BYTES_PER_GB),
            enable_prefix_caching=self.enable_prefix_caching,
            dtype=KVCacheDType(self.kv_cache_dtype),
            device_share=1.0 if self.device == "auto" else self.engine_num_gpus or 1.0,
        )

    def resolve_max_model_len(self, model: ModelConfig) -> int:
        """Tokens of prompt and output together that a request may have.

        Raises:
            ConfigError: more than the model was made for.
        """
        limit = model.max_position_embeddings
        if self.max_model_len is not None and self.max_model_len > limit:
            raise ConfigError(
                f"max_model_len must be at most {limit}, the context length of {self.model}, not {self.max_model_len}"
            )
        return self.max_model_len or limit

    def engine_config(self, model: ModelConfig, draft_model_path: Path | None = None) -> EngineConfig:
        """The engine's own record. `device` must have been resolved (not auto). draft_model_path: where the
        draft model lies on this node, for speculative=local.

        Raises:
            ConfigError: a setting does not go with the model or the device.
        """
        assert self.device != "auto"
        if self.num_threads is not None and self.device != "cpu":
            raise ConfigError("num_threads is for device=cpu: on a GPU it would do nothing")
        if self.draft_num_gpus is not None and self.device != "cuda":
            raise ConfigError("draft_num_gpus is for device=cuda: there is no GPU to be shared")
        method = self.speculative_method
        speculates = method is not SpeculativeMethod.OFF
        if self.num_draft_tokens != "adaptive" and not speculates:
            raise ConfigError(
                f"num_draft_tokens does nothing with speculative=off, the default for device={self.device}: set "
                "speculative to ngram, local or remote"
            )
        speculative = SpeculativeConfig(
            method=method,
            num_draft_tokens=DEFAULT_DRAFT_TOKENS if self.num_draft_tokens == "adaptive" else self.num_draft_tokens,
            draft_model_path=draft_model_path,
        )
        return EngineConfig(
            device=Device(self.device),
            dtype=None if self.dtype == "auto" else DType(self.dtype),
            quantization=resolve_quantization(model, Quantization(self.quantization)),
            cache=self._cache_config(),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                token_budget=self.token_budget or TOKEN_BUDGETS[self.device],
                max_prefill_chunk=self.max_prefill_chunk,
                max_model_len=self.resolve_max_model_len(model),
                # All of one request's, or one for each: with more requests than that, drafts would not pay off.
                max_draft_tokens=max(self.max_num_seqs, MAX_DRAFT_TOKENS) if speculates else 0,
            ),
            speculative=speculative,
            num_threads=self.num_threads,
        )

    def draft_config(self, model: ModelConfig) -> EngineConfig:
        """The record of a remote draft model, in its own process; its KV cache has the default size of its share.

        Raises:
            ConfigError: a setting does not go with the model or the device.
        """
        assert self.speculative == "remote"
        limit = model.max_position_embeddings
        return EngineConfig(
            device=Device(self.device),
            dtype=None if self.dtype == "auto" else DType(self.dtype),
            quantization=resolve_quantization(model, Quantization.NONE),
            cache=CacheConfig(block_size=self.block_size, device_share=self.draft_gpu_share or 1.0),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                token_budget=self.token_budget or TOKEN_BUDGETS[self.device],
                max_model_len=min(self.max_model_len or limit, limit),
            ),
            num_threads=max(1, int(self.draft_num_cpus)) if self.device == "cpu" else None,
        )

    @property
    def ingress_max_ongoing_requests(self) -> int:
        """HTTP requests in one ingress replica: those queued, those running, and those that only ask."""
        return self.max_queued_requests + 2 * self.engine_count.most * self.max_num_seqs + _CALL_HEADROOM

    @property
    def engine_max_ongoing_requests(self) -> int:
        """Calls in one engine replica: at most one group for each request of each ingress, and control."""
        return self.ingress_count.most * (self.max_queued_requests + 2 * self.max_num_seqs) + _CALL_HEADROOM


def parse_config(args: Mapping[str, Any]) -> AppConfig:
    """Arguments as they come from the command line (text) or a YAML file (typed).

    Raises:
        ConfigError: a wrong name or value; one line that says what is accepted.
    """
    accepted = sorted(AppConfig.model_fields)
    for name in args:
        if name not in AppConfig.model_fields:
            close = difflib.get_close_matches(str(name), accepted, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ";"
            if name in ("host", "port"):
                hint = f"; a Serve config file has it, as http_options.{name};"
            raise ConfigError(f"unknown argument '{name}'{hint} accepted: {', '.join(accepted)}")
    try:
        return AppConfig(**args)
    except pydantic.ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        description = AppConfig.model_fields[name].description
        raise ConfigError(f"{name} must be {description}, not {args[name]!r}") from None


def cache_dir() -> Path:
    """Where models are kept on this node: SLIPSTREAM_CACHE, else `slipstream` in the user's cache directory."""
    if own := os.environ.get("SLIPSTREAM_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache").absolute() / "slipstream"
