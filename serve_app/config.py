"""The application's arguments, validated; the one place that reads the environment."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engine.config import (
    CacheConfig,
    Device,
    DType,
    EngineConfig,
    KVCacheDType,
    ModelConfig,
    Quantization,
    SchedulerConfig,
)
from engine.errors import ConfigError
from engine.loader.catalogue import DEFAULT_MODEL
from engine.quantize.formats import resolve_quantization

_BYTES_PER_GB = 10**9
# Calls that Serve lets a replica run beyond those that our own limits allow: acknowledgements, aborts and health
# questions are calls too, and the bound that turns clients away is `max_queued_requests`, not Serve's.
_CALL_HEADROOM = 1024


# A step that mixes a prompt's chunk in keeps the decoding requests waiting: 256 rows take a CPU about 0.3 s with the
# default model, and a GPU needs some thousand to be busy.
TOKEN_BUDGETS = {"cpu": 256, "cuda": 2048}


def _none_from_text(value: Any) -> Any:
    """Arguments of `serve run` are text; "none" stands for None."""
    return None if isinstance(value, str) and value.lower() in ("none", "null") else value


def _no_bool(value: Any) -> Any:
    """Keeps YAML's `true` from counting as 1."""
    if isinstance(value, bool):
        raise ValueError("a truth value is not a number")
    return value


_COUNT = "a whole number of at least 1"
_AtLeast1 = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
_AtLeast2 = Annotated[int, BeforeValidator(_no_bool), Field(ge=2)]
_AboveZero = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]
_Text = Annotated[str, Field(min_length=1)]
_NoneFromText = BeforeValidator(_none_from_text)

_Count = Annotated[_AtLeast1, Field(description=_COUNT)]
_OptionalCount = Annotated[_AtLeast1 | None, _NoneFromText, Field(description=f"none or {_COUNT}")]
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
    engine_replicas: _Count = 1
    ingress_replicas: _Count = 1
    engine_num_cpus: _Cpus = 0.5
    ingress_num_cpus: _Cpus = 0.25

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.kv_cache_memory_gb is not None and self.num_kv_blocks is not None:
            raise ConfigError("kv_cache_memory_gb and num_kv_blocks both size the KV cache: give one of them")
        self._cache_config()
        return self

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

    def engine_config(self, model: ModelConfig) -> EngineConfig:
        """The engine's own record. `device` must have been resolved (not auto).

        Raises:
            ConfigError: a setting does not go with the model or the device.
        """
        assert self.device != "auto"
        if self.num_threads is not None and self.device != "cpu":
            raise ConfigError("num_threads is for device=cpu: on a GPU it would do nothing")
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
            ),
            num_threads=self.num_threads,
        )

    @property
    def ingress_max_ongoing_requests(self) -> int:
        """HTTP requests in one ingress replica: those queued, those running, and those that only ask."""
        return self.max_queued_requests + 2 * self.engine_replicas * self.max_num_seqs + _CALL_HEADROOM

    @property
    def engine_max_ongoing_requests(self) -> int:
        """Calls in one engine replica: at most one group for each request of each ingress, and control."""
        return self.ingress_replicas * (self.max_queued_requests + 2 * self.max_num_seqs) + _CALL_HEADROOM


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
