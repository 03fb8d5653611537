"""The benchmark's command, from arguments to files."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.engine import main
from benchmarks.start import cache_state

application = Typer()
application.command()(main)


def run(results: Path, *arguments: str) -> Any:
    fixed = ["--shape", "tiny", "--input", "8", "--output", "6", "--repeats", "1", "--results", str(results)]
    outcome = CliRunner().invoke(application, [*fixed, *arguments])
    assert outcome.exit_code == 0, outcome.output
    assert "tok/s" in outcome.stdout
    (file,) = results.glob("*.json")
    return json.loads(file.read_text())


def test_batches(tmp_path: Path) -> None:
    report = run(tmp_path, "--batch", "1,3", "--quantization", "int8", "--kv-cache-dtype", "int8")
    assert (report["quantization"], report["kv_cache_dtype"], report["triton_cache"]) == ("int8", "int8", "")
    assert 0 < report["load_s"] <= report["ready_s"]
    one, three = report["measurements"]
    assert (one["batch"], three["batch"]) == (1, 3)
    assert one["bandwidth_fraction"] is None
    per_request = (three["step_bytes"] - one["step_bytes"]) / 2
    assert per_request == 11 * 2 * 2 * 2 * (16 + 4)  # mean context, layers, keys and values, heads, bytes of a head


def test_requests(tmp_path: Path) -> None:
    report = run(tmp_path, "--batch", "2", "--requests", "5", "--temperature", "0.8", "--top-p", "0.9")
    assert (report["temperature"], report["top_p"]) == (0.8, 0.9)
    (row,) = report["requests"]
    assert (row["requests"], row["max_num_seqs"]) == (5, 2)
    assert row["output_tokens_per_s"] * row["total_s"] == pytest.approx(5 * 6)
    assert row["num_steps"] >= 3 * 6, "no more than two ran together"


def test_requests_want_one_size(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(application, ["--shape", "tiny", "--requests", "5", "--results", str(tmp_path)])
    assert outcome.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_shape_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(application, ["--shape", "tinny", "--results", str(tmp_path)])
    assert outcome.exit_code == 2
    assert "'tinny' is not one of tinyllama-1.1b" in outcome.output


def test_numbers_are_not_cut_where_there_is_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    outcome = CliRunner().invoke(
        application, ["--shape", "tiny", "--batch", "1", "--output", "4", "--repeats", "1", "--results", str(tmp_path)]
    )
    assert outcome.exit_code == 0
    assert "…" not in outcome.output


def test_what_is_said_of_tritons_cache() -> None:
    assert cache_state(0, 40) == "cold Triton cache, 40 kernels compiled"
    assert cache_state(40, 50) == "partly warm Triton cache, 10 kernels compiled"
    assert cache_state(40, 40) == "warm Triton cache"
