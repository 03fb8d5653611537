"""Configuration of a model and of an engine: frozen records, validated where they are made."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from engine.errors import ConfigError

MAX_DRAFT_TOKENS = 16  # for one request in one step
# Past that even an acceptance of 0.8 gains 0.1 tokens.
DEFAULT_DRAFT_TOKENS = 8


class Device(StrEnum):
    """Where the weights and the KV cache live."""

    CPU = "cpu"
    CUDA = "cuda"


class DType(StrEnum):
    """Number format of activations, and of weights and KV cache where these are not quantised."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantization(StrEnum):
    """Number format of the matrices that are multiplied, see engine.quantize."""

    NONE = "none"  # as the checkpoint has them: the engine's dtype, or what they were converted to
    INT8 = "int8"  # weights in int8, one scale for each output channel
    W8A8 = "w8a8"  # the same weights; in the layers, the rows that they are multiplied with are rounded to int8 too


class KVCacheDType(StrEnum):
    """Number format of the KV cache."""

    AUTO = "auto"  # the engine's dtype
    INT8 = "int8"  # with one scale for each head of each token


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021), half-split layout as in Hugging Face checkpoints.

    `scaling` is None, "linear" (positions divided by `factor`), "llama3" (wavelength-dependent interpolation of
    Llama 3.1, which also reads the three fields behind `factor`) or "factors" (each frequency divided by its
    entry of `frequency_factors`, head_dim / 2 of them, as GGUF files store it).
    """

    theta: float = 10_000.0
    scaling: str | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    frequency_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one decoder-only transformer, whatever file it was read from."""

    architecture: str  # a name in engine.loader.architectures, e.g. "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None  # a token attends to itself and the `sliding_window - 1` before it
    eos_token_ids: tuple[int, ...] = ()
    stored_quantization: Quantization = Quantization.NONE  # of the matrices in the checkpoint


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache. `num_blocks` None: as many as `memory_bytes` (None: a device default) holds."""

    block_size: int = 16
    num_blocks: int | None = None
    memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    dtype: KVCacheDType = KVCacheDType.AUTO
    device_share: float = 1.0  # of a GPU's memory that this process may take, where both sizes are None

    def __post_init__(self) -> None:
        if not 0.0 < self.device_share <= 1.0:
            raise ConfigError(f"device_share must be above 0 and at most 1, not {self.device_share}")
        if self.block_size < 2 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two from 2 on, not {self.block_size}")
        if self.num_blocks is not None and self.num_blocks < 2:
            raise ConfigError(f"num_blocks must be at least 2 (one is the null block), not {self.num_blocks}")


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one engine step."""

    max_num_seqs: int = 256  # requests that may run at once
    token_budget: int = 2048  # rows of one step: decode tokens and prefill chunks together
    max_prefill_chunk: int | None = None  # longest chunk of one prompt in one step; None: the budget alone
    max_model_len: int = 2048  # prompt and output tokens of one request
    max_draft_tokens: int = 0  # rows of one step for tokens that are proposed and not chosen yet
    priority_aging_s: float = 60.0  # one level of priority counts as much as having arrived this much earlier
    fair_quantum_tokens: int | None = None  # served of one tenant before the next one's turn; None: half the budget

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "token_budget", "max_model_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_draft_tokens < 0:
            raise ConfigError(f"max_draft_tokens must be 0 or more, not {self.max_draft_tokens}")
        for name in ("max_prefill_chunk", "fair_quantum_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0.0 <= self.priority_aging_s < math.inf:
            raise ConfigError(f"priority_aging_s must be 0 or more and finite, not {self.priority_aging_s}")

    @property
    def max_logit_rows(self) -> int:
        """Rows of one step behind which a token may be sampled."""
        return min(self.max_num_seqs + self.max_draft_tokens, self.token_budget)


class SpeculativeMethod(StrEnum):
    """Who proposes draft tokens."""

    OFF = "off"
    NGRAM = "ngram"  # the request's own text, see engine.speculative.ngram
    LOCAL = "local"  # a draft model in the engine's process
    REMOTE = "remote"  # a draft model elsewhere; the proposer is handed to the engine


@dataclass(frozen=True)
class SpeculativeConfig:
    """Speculative decoding (Leviathan et al. 2023), here by equality of tokens: see engine.speculative."""

    method: SpeculativeMethod = SpeculativeMethod.OFF
    num_draft_tokens: int = DEFAULT_DRAFT_TOKENS  # at most, of each request in each step: as many of them as pay off
    draft_model_path: Path | None = None  # of the local draft model: a directory or a GGUF file
    always: bool = False  # for measuring: num_draft_tokens in each step, whether they pay off or not

    def __post_init__(self) -> None:
        if not 1 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS:
            raise ConfigError(f"num_draft_tokens must be 1 to {MAX_DRAFT_TOKENS}, not {self.num_draft_tokens}")
        if (self.method is SpeculativeMethod.LOCAL) != (self.draft_model_path is not None):
            raise ConfigError(f"draft_model_path goes with the method {SpeculativeMethod.LOCAL}, and only with it")


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine needs beside the checkpoint itself."""

    device: Device = Device.CPU
    dtype: DType | None = None  # None: bfloat16 where the device computes in it, else float32
    quantization: Quantization = Quantization.NONE
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    num_threads: int | None = None  # CPU threads; None: every core this process may run on
    warm_up: bool = True  # compile and record the usual steps before the engine is ready, not when they first come
