"""One decoder for every architecture of the Llama family: the config says what a layer has, the device how it runs."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch

from engine.config import ModelConfig
from engine.model.layer_weights import LayerWeights
from engine.quantize.int8_weight import Weight


class Decoder(Protocol):
    """What loading and planning need of a decoder; how it is called is between it and its caller in engine.runner."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype

    def __init__(
        self,
        config: ModelConfig,
        embedding: torch.Tensor,
        layers: Sequence[Any],
        norm: torch.Tensor,
        lm_head: Weight,
        max_model_len: int,
    ) -> None: ...

    @staticmethod
    def pack(config: ModelConfig, weights: LayerWeights) -> Any:
        """One layer, ready for `__init__`; the given tensors may be dropped afterwards."""
        ...


AnyDecoder = TypeVar("AnyDecoder", bound=Decoder)
