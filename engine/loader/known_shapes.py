"""The shapes of the catalogue's models, so that their memory can be planned before anything is downloaded."""

from collections.abc import Mapping
from types import MappingProxyType

from engine.config import ModelConfig
from engine.loader.catalogue import CATALOGUE


def _shape(
    architecture: str,
    vocab: int,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    context: int,
    *,
    tied: bool,
) -> ModelConfig:
    """What memory hangs on; the rest of a config.json is left as it is by default."""
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        qk_norm=architecture == "Qwen3ForCausalLM",
    )


# By name in the catalogue, from the models' config.json. The model that ships with Slipstream has its file here.
KNOWN_SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "smollm2-135m": _shape("LlamaForCausalLM", 49_152, 576, 1536, 30, 9, 3, 64, 8192, tied=True),
        "tinyllama-1.1b": _shape("LlamaForCausalLM", 32_000, 2048, 5632, 22, 32, 4, 64, 2048, tied=False),
        "llama-3.2-1b": _shape("LlamaForCausalLM", 128_256, 2048, 8192, 16, 32, 8, 64, 131_072, tied=True),
        "qwen3-0.6b": _shape("Qwen3ForCausalLM", 151_936, 1024, 3072, 28, 16, 8, 128, 40_960, tied=True),
        "mistral-7b": _shape("MistralForCausalLM", 32_768, 4096, 14_336, 32, 32, 8, 128, 32_768, tied=False),
    }
)


def known_shape(model: str) -> ModelConfig | None:
    """Of a model of the catalogue, by its name there or on the hub; None of any other."""
    names = (entry.name for entry in CATALOGUE.values() if model in (entry.name, entry.hub_id))
    return next((KNOWN_SHAPES[name] for name in names if name in KNOWN_SHAPES), None)
