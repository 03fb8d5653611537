"""Sampling values that a model's authors recommend."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationDefaults:
    """What applies where a request says nothing; None: the model recommends nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
