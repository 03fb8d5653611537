"""Which number format a model's matrices are computed in."""

from engine.config import ModelConfig, Quantization
from engine.errors import ConfigError

# A sum of so many products of two int8 numbers fits int32, whatever they are.
MAX_INPUT_FEATURES = (2**31 - 1) // 128**2


def resolve_quantization(model: ModelConfig, wanted: Quantization) -> Quantization:
    """The format to compute in: what is wanted, or, where nothing is, what the checkpoint holds.

    Raises:
        ConfigError: the model cannot be computed in that format.
    """
    stored = model.stored_quantization
    if Quantization.NONE not in (stored, wanted) and wanted is not stored:
        raise ConfigError(
            f"quantization={wanted}, but the model's weights are stored as {stored}: leave quantization out, or give "
            "the model that they were converted from"
        )
    chosen = stored if wanted is Quantization.NONE else wanted
    widest = max(model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim)
    if chosen is not Quantization.NONE and widest > MAX_INPUT_FEATURES:
        raise ConfigError(
            f"quantization={chosen} sums at most {MAX_INPUT_FEATURES} products in int32, and the model's matrices have "
            f"{widest} columns: use quantization=none"
        )
    return chosen
