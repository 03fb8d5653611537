"""Products with int8 weights as sums of integers, which have the same bits in any order.

A processor multiplies int8 by int8 faster than it multiplies anything else, so rows of floating-point numbers are cut
into int8 digits of base 256 as well: one for w8a8, which is what that format means, and three where only the weights
are quantised, which keeps 23 bits behind the row's largest value, about what float32 sums keep. A row's digits are rows
of one product. Measured on one core (AVX-512 VNNI), bfloat16 rows, µs:

| matrix, rows | int8 | w8a8 | bfloat16, oneDNN's layout | torch's _weight_int8pack_mm |
|---|---|---|---|---|
| 960 x 576, 1 / 8 / 64 | 115 / 180 / 700 | 93 / 112 / 310 | 95 / 95 / 580 | 74 / 171 / |
| 2048 x 5632, 1 / 8 / 64 | 540 / 1,680 / 11,060 | 500 / 860 / 4,180 | 1,400 / 1,400 / 10,540 | 770 / 2,540 / |
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812

from engine.quantize.int8_weight import LIMIT, SMALLEST_SCALE, Int8Weight
from engine.quantize.rotation import hadamard_matrix, rotation_block

_ROWS = 64  # of one product, which bounds what its digits and their sums take
_ZERO_POINT = 128  # digits are unsigned, as VNNI wants one of its operands; this one means nothing
_DIGITS = 3
# Constants as tensors: with Python's numbers, each of these small operations takes twice as long.
_LIMIT = torch.tensor(float(LIMIT))
_ZERO = torch.tensor(float(_ZERO_POINT))
_LARGEST = torch.tensor(float(LIMIT << 16))  # of three digits; a little more would fit, which leaves room for rounding
_ALL_ZEROS = torch.tensor(float(_ZERO_POINT << 16 | _ZERO_POINT << 8 | _ZERO_POINT))
# Sums of so many products of two int8 numbers are exact in float32, in any order.
_EXACT_TERMS = 1024

# Digits uint8 [R, in_features] to the sums, times the weight's scales: float32 [R, out_features].
ScaledSums = Callable[[torch.Tensor], torch.Tensor]


class Int8Linear:
    """y = (x · values) · scales + b for x [N, in_features], any N; rounded once, to x's dtype."""

    row_tile = 1

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._rotation: torch.Tensor | None = None
        if weight.rounds_inputs:
            self._rotation = hadamard_matrix(rotation_block(self.in_features), weight.device)
        self._sums = _onednn_sums(weight) if onednn_is_exact(weight.device.type) else _plain_sums(weight)
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if 0 < x.shape[0] <= _ROWS:
            return self._product(x)
        if x.shape[0] == 0:
            return x.new_empty((0, self.out_features))
        return torch.cat([self._product(rows) for rows in x.split(_ROWS)])

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        if self._rotation is not None:
            # One product of the same shape for each row, which keeps a row's bits.
            blocks = wide.view(x.shape[0], -1, self._rotation.shape[0])
            wide = torch.bmm(blocks, self._rotation.expand(x.shape[0], -1, -1)).view(x.shape)
        largest = wide.abs().amax(dim=-1, keepdim=True)
        if self._rotation is not None:
            scales = (largest / _LIMIT).clamp_(min=SMALLEST_SCALE)
            y = self._sums((wide / scales).round_().add_(_ZERO).to(torch.uint8))
        else:
            scales = (largest / _LARGEST).clamp_(min=SMALLEST_SCALE)
            numbers = (wide / scales).round_().add_(_ALL_ZEROS).to(torch.int32)
            # The bytes of a number, lowest first; the fourth is 0.
            digits = numbers.view(torch.uint8).view(*x.shape, 4).permute(2, 0, 1)[:_DIGITS].flatten(0, 1)
            low, middle, high = self._sums(digits).view(_DIGITS, x.shape[0], self.out_features).unbind(0)
            y = low.add_(middle, alpha=1 << 8).add_(high, alpha=1 << 16)
        y.mul_(scales)
        if self._bias is not None:
            y.add_(self._bias)
        return y.to(x.dtype)


def _onednn_sums(weight: Int8Weight) -> ScaledSums:
    """By the CPU's instructions for int8. A weight takes its own size, in a layout of oneDNN's."""
    packed = torch.ops.onednn.qlinear_prepack(weight.values.contiguous(), [_ROWS, weight.shape[1]])
    scales = weight.scales.contiguous()
    zeros = torch.zeros(len(scales), dtype=torch.int32)

    def sums(digits: torch.Tensor) -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            digits, 1.0, _ZERO_POINT, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return sums


def _plain_sums(weight: Int8Weight) -> ScaledSums:
    """The same bits from float32 products, for every other device: exact, but no faster than unquantised weights."""
    parts = [part.contiguous() for part in weight.values.float().split(_EXACT_TERMS, dim=1)]
    scales = weight.scales

    def sums(digits: torch.Tensor) -> torch.Tensor:
        inputs = (digits.float() - _ZERO_POINT).split(_EXACT_TERMS, dim=1)
        total = F.linear(inputs[0], parts[0])
        if len(parts) > 1:
            wide = total.double()
            for x, part in zip(inputs[1:], parts[1:], strict=True):
                wide += F.linear(x, part)
            total = wide.float()
        return total * scales

    return sums


@lru_cache
def onednn_is_exact(device_type: str) -> bool:
    """Whether oneDNN multiplies uint8 by int8 here without loss: instructions older than VNNI saturate at 16 bits."""
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    digits = torch.tensor([0, 255, 128, 127], dtype=torch.uint8)[:, None].expand(4, 256).contiguous()
    values = torch.tensor([-LIMIT, LIMIT], dtype=torch.int8)[:, None].expand(2, 256).repeat(16, 1)
    weight = Int8Weight(values, torch.ones(len(values)))
    try:
        return torch.equal(_onednn_sums(weight)(digits), _plain_sums(weight)(digits))
    except (AttributeError, RuntimeError):  # built without the operator, or without a kernel for this processor
        return False
