"""Matrices in int8 with one scale for each output channel."""

from dataclasses import dataclass

import torch

from engine.config import Quantization
from engine.quantize.rotation import rotate, rotation_block

LIMIT = 127  # the range is symmetric, so that no zero point is needed
SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal
_PIECE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Int8Weight:
    """w ≈ values · scales: values int8 [out_features, in_features] in [-127, 127], scales float32 [out_features].

    `rounds_inputs` (w8a8): it stands for a matrix whose columns are rotated, see engine.quantize.rotation, and the rows
    that it is multiplied with are rotated and rounded too (`round_inputs`), so that a product is a sum of integers.
    Else rows keep their format, in which every value of int8 is exact.
    """

    values: torch.Tensor
    scales: torch.Tensor
    rounds_inputs: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __getitem__(self, rows: torch.Tensor | slice) -> "Int8Weight":
        """Some output channels: indices int64, or a range."""
        return Int8Weight(self.values[rows], self.scales[rows], self.rounds_inputs)

    def contiguous(self) -> "Int8Weight":
        return Int8Weight(self.values.contiguous(), self.scales.contiguous(), self.rounds_inputs)


Weight = torch.Tensor | Int8Weight


def quantize_weight(weight: torch.Tensor, rounds_inputs: bool = False) -> Int8Weight:
    """Round a matrix [out_features, in_features], of any floating-point format, to the nearest of 255 steps a channel.

    The scale is max|w| / 127, computed in float32 from the values as they are given; a channel of zeros gets 1.
    """
    if weight.device.type == "cpu":  # pieces whose temporaries stay in the cache: a tenth of the time
        pieces = weight.split(max(1, _PIECE_ELEMENTS // weight.shape[1]))
    else:
        pieces = (weight,)
    parts = []
    for piece in pieces:
        if rounds_inputs:  # divided by a power of two: rotate(x) · rotate(w) is x · w times the size of a block
            piece = rotate(piece) / rotation_block(weight.shape[1])
        parts.append(quantize_rows(piece))
    values, scales = (torch.cat(column) for column in zip(*parts, strict=True))
    return Int8Weight(values, scales, rounds_inputs)


def inputs_are_rounded(name: str, quantization: Quantization) -> bool:
    """Whether the rows that the named matrix is multiplied with are rounded. Logits are compared with each other, which
    needs more digits than a layer does: the head's are not."""
    return quantization is Quantization.W8A8 and name != "lm_head.weight"


def round_inputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What w8a8 multiplies instead of x [N, in_features]: rotated values int8, and scales float32 [N]."""
    return quantize_rows(rotate(x))


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x ≈ values · scale over the last dimension: values int8 [..., D], scales float32 [...].

    Half to even, as hardware rounds; the scale is max|x| / 127 in float32, and 1 for a row of zeros (or of values so
    small that the scale would lose digits, below 1e-36: they become zeros). A row that holds NaN or infinity has a
    scale that is NaN or infinite.
    """
    wide = x.float()
    scales = wide.abs().amax(dim=-1) / LIMIT
    scales = torch.where(scales < SMALLEST_SCALE, 1.0, scales)
    return torch.round(wide / scales[..., None]).to(torch.int8), scales


def stack_weights(parts: list[Weight]) -> Weight:
    """Matrices of one kind, one below the other."""
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if tensors:
        assert len(tensors) == len(parts), "all are quantised or none"
        return torch.cat(tensors)
    quantized = [part for part in parts if isinstance(part, Int8Weight)]
    return Int8Weight(
        torch.cat([part.values for part in quantized]),
        torch.cat([part.scales for part in quantized]),
        quantized[0].rounds_inputs,
    )
