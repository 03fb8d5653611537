"""Results of benchmarks as figures that can be compared, from today's reports and from those of older code.

A report is a JSON object with lists of rows; files that keep several reports nest them. Whatever a report says about
all of its rows (card, model, formats) holds for each. What a row is told apart by are its arguments; its figures are
known by their names.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Arguments = tuple[tuple[str, str], ...]

HIGHER_IS_BETTER = ("_per_s", "_tok_s", "ratio", "mean_acceptance_length", "equals_exact")  # ends of names
LOWER_IS_BETTER = ("_s", "_ms", "_us", "_bytes", "gpu_hours")
# Neither arguments nor figures: what identifies a run, what follows from a figure beside it, and what only explains.
IGNORED = frozenset(
    {
        *("time", "measured_at", "torch", "triton", "what", "hardware", "repeats"),
        *("bytes_per_s", "bandwidth_fraction", "gb_per_s", "kv_gb_per_s", "kv_fraction", "tflop_per_s", "step_bytes"),
        *("peak_bytes_per_s", "weight_bytes_per_step", "predicted", "num_blocks", "kv_cache_bytes", "other_bytes"),
        *("free_bytes", "free_at_work_bytes", "num_steps", "num_preemptions", "drafted_share", "good_part"),
        *("most_replicas", "mean_concurrency"),
    }
)
# What older reports did not say, because there was nothing else; and what they called otherwise, with its factor.
DEFAULTS = {"quantization": "none", "kv_cache_dtype": "auto", "temperature": "0", "top_p": "1", "dtype": "bfloat16"}
OLD_NAMES = {
    "decode_tok_s": ("output_tokens_per_s", 1.0),
    "total_tok_s": ("total_tokens_per_s", 1.0),
    "step_ms": ("step_time_s", 1e-3),
    "ttft_ms": ("ttft_s", 1e-3),
}
RANDOM = " (random weights)"


@dataclass(frozen=True)
class Figure:
    """repeats: all runs of which `value` is the middle one; empty where only that was kept."""

    value: float
    higher_is_better: bool
    repeats: tuple[float, ...] = ()

    @property
    def spread(self) -> float | None:
        """From the lowest to the highest run, as a part of the value; None with fewer than two."""
        if len(self.repeats) < 2 or not self.value:
            return None
        return (max(self.repeats) - min(self.repeats)) / abs(self.value)


@dataclass(frozen=True)
class Result:
    """One row. part: the name of the list that it stood in, such as "measurements"."""

    hardware: str
    part: str
    arguments: Arguments
    time: datetime
    figures: Mapping[str, Figure]

    @property
    def key(self) -> tuple[str, str, Arguments]:
        return self.hardware, self.part, self.arguments


def read_results(path: Path) -> list[Result]:
    """All rows of a file, oldest first.

    Raises:
        ValueError: it is not JSON, or holds no figures.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    results = sorted(_results(content, "", {}), key=lambda result: result.time)
    if not results:
        raise ValueError(f"{path}: holds no figures of a benchmark")
    return results


def last_results(folder: Path, before: datetime, without: Path) -> list[Result]:
    """Of each key the newest row in a folder's files that is no newer than `before`. What is no report is left out."""
    newest: dict[tuple[str, str, Arguments], Result] = {}
    for path in sorted(folder.glob("*.json")):
        if path.resolve() == without.resolve():
            continue
        try:
            found = read_results(path)
        except ValueError:
            continue
        for result in found:
            known = newest.get(result.key)
            if result.time <= before and (known is None or known.time <= result.time):
                newest[result.key] = result
    return list(newest.values())


def _results(content: Any, part: str, inherited: dict[str, Any]) -> Iterator[Result]:
    """part: the list that `content` stands in."""
    if isinstance(content, list):
        for item in content:
            yield from _results(item, part, inherited)
        return
    if not isinstance(content, dict):
        return
    lists = {
        name: value
        for name, value in content.items()
        if isinstance(value, list) and any(isinstance(item, dict) for item in value)
    }
    own = {name: value for name, value in content.items() if name not in lists}
    known = inherited | _shared(own)
    if part and not lists:
        result = _result(part, inherited, own)
        if result.figures:
            yield result
    for name, value in lists.items():
        yield from _results(value, name, known)


def _shared(own: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says about its rows: all but its own figures, such as how long the start took."""
    flat = _flat(own)
    return {name: value for name, value in flat.items() if name in ("hardware", "time") or _is_argument(name, value)}


def _result(part: str, inherited: Mapping[str, Any], own: Mapping[str, Any]) -> Result:
    repeats = own.get("repeats") or {}
    figures: dict[str, Figure] = {}
    arguments = dict(DEFAULTS)
    for name, value in (dict(inherited) | _flat(own)).items():
        if _is_argument(name, value):
            arguments |= _argument(name, value)
        elif name not in IGNORED and isinstance(value, int | float):
            new_name, factor = OLD_NAMES.get(name, (name, 1.0))
            higher = name.endswith(HIGHER_IS_BETTER)
            runs = tuple(factor * float(run) for run in repeats.get(name, ()))
            figures[new_name] = Figure(factor * float(value), higher, runs)
    return Result(
        hardware=str(inherited.get("hardware", own.get("hardware", ""))),
        part="measurements" if part.endswith("_host") or part == "others" else part,
        arguments=tuple(sorted(arguments.items())),
        time=_time(own.get("time") or inherited.get("time")),
        figures=figures,
    )


def _is_argument(name: str, value: Any) -> bool:
    if name in IGNORED or name == "triton_cache" or isinstance(value, list | dict) or value is None:
        return False
    return not name.endswith((*HIGHER_IS_BETTER, *LOWER_IS_BETTER))


def _argument(name: str, value: Any) -> dict[str, str]:
    """In the words of today's reports."""
    if name == "weights":
        return {"quantization": "none" if value == "bfloat16" else str(value)}
    if name == "shape":
        return {"model": f"{value}{RANDOM}"}
    return {name: f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)}


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of objects beside others, as "measured.weights_bytes", but for those that are for other ends."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and name not in IGNORED:
            flat |= {f"{name}.{inner}": part for inner, part in value.items() if inner not in IGNORED}
        elif not isinstance(value, dict):
            flat[name] = value
    return flat


def _time(text: str | None) -> datetime:
    """A date alone is its beginning; no time is the oldest."""
    if not text:
        return datetime.min.replace(tzinfo=UTC)
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)
