"""Objectives for each request (goodput), and assertions about a whole run (exit code)."""

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass

from loadtest.request_record import RequestRecord

_OBJECTIVES = {
    "ttft_s": lambda record: record.ttft_s,
    "tpot_s": lambda record: record.tpot_s,
    "max_itl_s": lambda record: max(record.itl_s, default=None),
    "e2e_latency_s": lambda record: record.e2e_latency_s,
}
_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_ASSERTION = re.compile(r"([a-z0-9_]+(?:\.[a-z0-9]+)?)\s*(<=|>=|<|>)\s*([0-9.]+(?:e-?[0-9]+)?)")


@dataclass(frozen=True)
class Objectives:
    """Limits that an answer must keep, all of them. Without limits, every answer does."""

    limits_s: Mapping[str, float]

    def are_met(self, record: RequestRecord) -> bool:
        """An answer to which a limit does not apply (one token has no tpot_s) keeps it."""
        if not record.is_answered:
            return False
        values = ((_OBJECTIVES[name](record), limit_s) for name, limit_s in self.limits_s.items())
        return all(value is None or value <= limit_s for value, limit_s in values)


def parse_objectives(text: str) -> Objectives:
    """From `ttft_s=0.5,tpot_s=0.05`. Raises ValueError."""
    limits_s = {}
    for part in filter(None, re.split(r"[,\s]+", text)):
        name, _, value = part.partition("=")
        if name not in _OBJECTIVES:
            raise ValueError(f"no objective {name!r}: one of {', '.join(_OBJECTIVES)}")
        try:
            limits_s[name] = float(value)
        except ValueError:
            raise ValueError(f"not seconds: {part!r}") from None
    return Objectives(limits_s)


@dataclass(frozen=True)
class Assertion:
    """Such as `ttft_s.p95 < 0.5`."""

    name: str
    comparison: str
    bound: float

    def violation(self, values: Mapping[str, float]) -> str:
        """What is wrong, or nothing. A value that was not measured is wrong."""
        if (value := values.get(self.name)) is None:
            return f"{self} was asserted, but {self.name} was not measured"
        return "" if _COMPARISONS[self.comparison](value, self.bound) else f"{self} was asserted, but it is {value:.4g}"

    def __str__(self) -> str:
        return f"{self.name} {self.comparison} {self.bound:g}"


def parse_assertions(text: str) -> tuple[Assertion, ...]:
    """From `ttft_s.p95<0.5, goodput>2`. Raises ValueError."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _ASSERTION.fullmatch(part)
        if match is None:
            raise ValueError(f"not an assertion: {part!r}; such as ttft_s.p95<0.5")
        found.append(Assertion(match[1], match[2], float(match[3])))
    return tuple(found)
