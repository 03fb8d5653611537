"""`slipstream plan`: tables and JSON for cards that are not there."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.precompile.gpus import GPUS
from engine.runner.memory import COMPILED_BYTES
from slipstream_cli import model as cli_model
from tests.slipstream_cli.test_cli import run
from tests.tiny_models import TINY_CONFIG


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Without weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG))
    return directory


def rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> list[Any]:
    assert run(monkeypatch, "plan", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_a_model_of_the_catalogue_needs_no_download(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> Path:
        raise AssertionError("nothing is to be fetched")

    monkeypatch.setattr(cli_model, "resolve_model", refuse)
    assert run(monkeypatch, "plan", "tinyllama-1.1b", "--gpu", "H100") == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if "/auto" in line or "/int8" in line]
    assert [line[:2] for line in lines] == [
        [f"{weights}/{kv}", context]
        for weights in ("none", "int8", "w8a8")
        for kv in ("auto", "int8")
        for context in ("512", "2,048")
    ]
    # 2.069 GB of weights and 512 tokens of KV, at 3.35 TB/s; 22 layers x 2 x 4 heads x 64 x 2 bytes a token.
    assert lines[0][-1] == f"{3.35e12 / (2.0690e9 + 512 * 22_528):,.0f}"
    assert lines[0][-4:-1] == ["22,528", "131,072", "256*"]
    assert "a bound, not a prediction" in printed


def test_every_field_for_machines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    formats = ("--quantization", "none", "--quantization", "w8a8", "--kv-cache-dtype", "int8")
    found = rows(monkeypatch, capsys, "mistral-7b", "--gpu", "l4", *formats, "--max-model-len", 4096)
    assert [(row["quantization"], row["kv_cache_dtype"], row["max_model_len"]) for row in found] == [
        ("none", "int8", 4096),
        ("w8a8", "int8", 4096),
    ]
    for row in found:
        parts = ("weights", "workspace", "sampler", "graph", "draft", "kv_cache", "other", "free")
        assert sum(row[f"{part}_bytes"] for part in parts) == 22 << 30
        assert row["num_requests"] == row["num_tokens"] // 4096
        assert row["kv_bytes_per_token"] == 2 * 32 * 8 * (128 + 4)
        assert row["most_tokens_per_s"] == pytest.approx(300e9 / row["step_bytes"])
        assert row["problem"] is None
    assert found[1]["num_requests"] > 1.5 * found[0]["num_requests"]


def test_a_draft_model_and_a_cpu(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ("--quantization", "none", "--kv-cache-dtype", "auto", "--max-model-len", 512, "--max-num-seqs", 4)
    (with_draft,) = rows(monkeypatch, capsys, model, "--gpu", "l4", *one, "--draft-model", model)
    assert with_draft["draft_bytes"] > COMPILED_BYTES, "its own kernels are counted in"
    (on_cpu,) = rows(monkeypatch, capsys, model, "--gpu", "cpu", *one)
    assert on_cpu["most_tokens_per_s"] is None
    assert on_cpu["num_requests"] == 4
    assert run(monkeypatch, "plan", model, "--gpu", "l4", *one, "--draft-model", model) == 0
    assert " draft " in capsys.readouterr().out


def test_what_does_not_fit_is_a_row_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    formats = ("--quantization", "none", "--kv-cache-dtype", "auto", "--max-num-seqs", 8)
    lengths = ("--max-model-len", 512, "--max-model-len", 131_072)
    assert run(monkeypatch, "plan", "llama-3.2-1b", "--gpu", "l4", *formats, *lengths) == 0
    fitting = capsys.readouterr().out
    assert "does not fit" not in fitting
    wide = ("--token-budget", 200_000)
    assert run(monkeypatch, "plan", "mistral-7b", "--gpu", "l4", *formats, *wide, "--json") == 1
    printed = capsys.readouterr()
    assert all("lower token_budget (now 200000)" in row["problem"] for row in json.loads(printed.out)["rows"])
    assert printed.err.startswith("slipstream: mistral-7b fits in no way: the workspace of a step does not fit")
    assert printed.err.count("\n") == 1
    longest = ("--max-model-len", 512, "--max-model-len", 32_768)
    assert run(monkeypatch, "plan", "mistral-7b", "--gpu", "l4", *formats, *longest, "--token-budget", 40_000) == 0
    printed = capsys.readouterr()
    assert "\ndoes not fit: the KV cache holds" in printed.out
    assert "lower max_model_len, set kv_cache_dtype=int8" in printed.out


def test_mistakes_are_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ((model, "--gpu", "h101"), f"gpu must be one of {', '.join(GPUS)}, cpu, not 'h101'"),
        ((model, "--gpu", "h100", "--max-model-len", 4096), "max_model_len must be at most 2048"),
        (("nowhere", "--gpu", "h100"), "model=nowhere is not known"),
        ((model, "--gpu", "h100", "--draft-model", "qwen3-0.6b"), "vocabulary"),
    ):
        assert run(monkeypatch, "plan", *arguments) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("slipstream: ")
        assert words in printed.err
        assert printed.err.count("\n") == 1


def test_the_help_names_every_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "plan", "--help") == 0
    assert ", ".join(GPUS) in capsys.readouterr().out
