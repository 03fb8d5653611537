"""Reports as figures: today's, those of older code, and the results that are kept."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks.history import Result, last_results, read_results

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
REPORT = {
    "time": "2026-11-26T10:00:00+00:00",
    "torch": "2.11",
    "hardware": "NVIDIA H100 80GB HBM3",
    "model": "tinyllama-1.1b (random weights)",
    "dtype": "bfloat16",
    "quantization": "none",
    "kv_cache_dtype": "auto",
    "ready_s": 2.0,
    "triton_cache": "warm Triton cache",
    "temperature": 0.0,
    "top_p": 1.0,
}
ROW = {"batch": 8, "input_tokens": 128, "output_tokens": 256, "step_time_s": 0.001, "output_tokens_per_s": 8000.0}


def write(file: Path, *rows: dict[str, Any], **changes: Any) -> Path:
    file.write_text(json.dumps(REPORT | changes | {"measurements": [ROW | row for row in rows]}))
    return file


def only(path: Path) -> Result:
    (result,) = read_results(path)
    return result


def test_a_row_has_what_its_report_says(tmp_path: Path) -> None:
    repeats = {"step_time_s": [0.0011, 0.001, 0.0009]}
    result = only(write(tmp_path / "new.json", {"repeats": repeats, "bandwidth_fraction": 0.7, "step_bytes": 2e9}))
    assert result.hardware == REPORT["hardware"]
    assert result.time == datetime(2026, 11, 26, 10, tzinfo=UTC)
    assert set(result.figures) == {"step_time_s", "output_tokens_per_s"}, "neither a start nor what follows from others"
    step, speed = result.figures["step_time_s"], result.figures["output_tokens_per_s"]
    assert (step.higher_is_better, speed.higher_is_better) == (False, True)
    assert step.spread == pytest.approx(0.2)
    assert speed.spread is None
    arguments = dict(result.arguments)
    assert (arguments["batch"], arguments["model"]) == ("8", "tinyllama-1.1b (random weights)")


def test_other_arguments_are_another_key(tmp_path: Path) -> None:
    key = only(write(tmp_path / "a.json", {})).key
    assert only(write(tmp_path / "b.json", {"step_time_s": 5.0}, torch="3", time="2027-01-01", ready_s=9.0)).key == key
    for change in ({"batch": 9}, {"input_tokens": 9}):
        assert only(write(tmp_path / "b.json", change)).key != key
    for change in ({"quantization": "int8"}, {"hardware": "NVIDIA H200"}, {"temperature": 0.8}, {"model": "other"}):
        assert only(write(tmp_path / "b.json", {}, **change)).key != key


def test_older_reports_are_the_same_in_other_words(tmp_path: Path) -> None:
    kept = {"hardware": REPORT["hardware"], "time": "2026-11-24"}
    row = {"shape": "tinyllama-1.1b", "weights": "bfloat16", "batch": 8, "input_tokens": 128, "output_tokens": 256}
    old = tmp_path / "old.json"
    old.write_text(json.dumps(kept | {"first_host": [row | {"temperature": 0, "decode_tok_s": 7000, "step_ms": 1.2}]}))
    result = only(old)
    assert result.key == only(write(tmp_path / "new.json", {})).key
    assert result.figures["step_time_s"].value == pytest.approx(0.0012)
    assert result.figures["output_tokens_per_s"].value == 7000
    assert result.figures["output_tokens_per_s"].higher_is_better


def test_the_last_of_a_key_is_found_among_reports(tmp_path: Path) -> None:
    for day, speed in (("20", 1.0), ("24", 2.0), ("28", 3.0)):
        write(tmp_path / f"{30 - int(day)}.json", {"output_tokens_per_s": speed}, time=f"2026-11-{day}T00:00:00+00:00")
    (tmp_path / "notes.json").write_text('["nothing"]')
    (tmp_path / "broken.json").write_text("{")
    new = write(tmp_path / "new.json", {"output_tokens_per_s": 9.0})
    (last,) = last_results(tmp_path, only(new).time, new)
    assert last.figures["output_tokens_per_s"].value == 2.0
    assert not last_results(tmp_path, datetime(2026, 1, 1, tzinfo=UTC), new)


@pytest.mark.parametrize("content", ["{", "[]", '{"measurements": [{"batch": 1}]}', '"text"'])
def test_what_is_no_report_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*file.json: [^\n]+$"):
        read_results(file)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_every_result_that_is_kept_can_be_read(path: Path) -> None:
    results = read_results(path)
    assert all(result.figures for result in results)
    text = path.read_text()
    assert all(result.hardware in text for result in results)
    assert all(result.hardware for result in results) == ('"hardware"' in text), "but for simulations"


def test_results_of_two_days_meet() -> None:
    """The same benchmark on the same kind of card, in a file of single reports and in one of several hosts."""
    newest = read_results(RESULTS / "engine-h100-2026-11-26.json")
    keys = {result.key for result in read_results(RESULTS / "engine-h100.json")}
    met = [dict(result.arguments) for result in newest if result.key in keys]
    assert {("tinyllama-1.1b (random weights)", "256"), ("smollm2-135m (random weights)", "1")} <= {
        (row["model"], row["batch"]) for row in met
    }
