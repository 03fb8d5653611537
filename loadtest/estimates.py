"""Values with the confidence that repeats give them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Student's t, 97.5 %, for 1, 2, … degrees of freedom.
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def student_t(degrees: float) -> float:
    """The factor of a two-sided 95 % interval. Between whole degrees: that of the lower one, which is wider."""
    if degrees < 1:
        return math.inf
    return _T_975[min(int(degrees), len(_T_975)) - 1]


@dataclass(frozen=True)
class Estimate:
    """`value` is of all measured requests, `repeats` of each repeat alone (those that had any)."""

    value: float
    repeats: tuple[float, ...] = field(default=())

    @property
    def standard_error(self) -> float | None:
        """Of a mean of as many repeats; None with fewer than two."""
        count = len(self.repeats)
        if count < 2:
            return None
        mean = sum(self.repeats) / count
        return math.sqrt(sum((value - mean) ** 2 for value in self.repeats) / (count - 1) / count)

    @property
    def half_width(self) -> float | None:
        """Of the 95 % confidence interval around `value`; None with fewer than two repeats."""
        error = self.standard_error
        return None if error is None else student_t(len(self.repeats) - 1) * error

    def row(self) -> dict[str, Any]:
        """For JSON."""
        half_width = self.half_width
        return {
            "value": self.value,
            "half_width": half_width,
            "repeats": list(self.repeats),
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Estimate":
        return cls(row["value"], tuple(row["repeats"]))


@dataclass(frozen=True)
class Ratio:
    """Of two estimates. `low` and `high` bound it with 95 % confidence; None where the noise is not known."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_within_noise(self) -> bool | None:
        return None if self.low is None or self.high is None else self.low <= 1 <= self.high


def ratio(new: Estimate, base: Estimate) -> Ratio | None:
    """None where it has no meaning. The interval is Welch's, for the ratio's logarithm."""
    if not new.value > 0 or not base.value > 0:
        return None
    value = new.value / base.value
    errors: Sequence[float | None] = (new.standard_error, base.standard_error)
    if errors[0] is None or errors[1] is None:
        return Ratio(value)
    new_part, base_part = (errors[0] / new.value) ** 2, (errors[1] / base.value) ** 2
    variance = new_part + base_part
    if variance == 0:
        return Ratio(value, value, value)
    degrees = variance**2 / (new_part**2 / (len(new.repeats) - 1) + base_part**2 / (len(base.repeats) - 1))
    spread = math.exp(student_t(degrees) * math.sqrt(variance))
    return Ratio(value, value / spread, value * spread)
