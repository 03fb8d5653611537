"""The `slipstream` command on a tiny model and on the default one."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from engine.config import CacheConfig, DType, EngineConfig, Quantization, SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.request import Request, SamplingParams
from engine.tokenizer import load_tokenizer
from slipstream_cli.app import main
from tests.tiny_models import write_tiny_model
from tests.tokenizer.vocabularies import byte_level_backend

PROSE = (
    "The lighthouse keeper climbed the stairs every evening at dusk, carrying a can of oil and a clean cloth. When the "
    "fog came in from the sea he would ring the bell, and the boats that were late would find their way by the sound."
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = write_tiny_model(tmp_path / "model", vocab_size=512)
    byte_level_backend().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "prose.txt"
    file.write_text(PROSE)
    return file


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status."""
    monkeypatch.setattr(sys, "argv", ["slipstream", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_its_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == version("slipstream-llm")


def continuation(path: Path, quantization: Quantization = Quantization.NONE) -> list[int]:
    config = EngineConfig(
        dtype=DType.FLOAT32,
        quantization=quantization,
        cache=CacheConfig(num_blocks=10),
        scheduler=SchedulerConfig(max_model_len=140),
        num_threads=1,
    )
    prompt = load_tokenizer(path).encode(PROSE)[:100]
    sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    [request] = LLMEngine.from_path(path, config).generate([Request("r", prompt, sampling)])
    return request.output_token_ids


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.W8A8])
def test_a_converted_model_says_what_the_original_says(
    model: Path, tmp_path: Path, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading it needs no argument, and the weights have the same bits as those quantised at load."""
    out = tmp_path / "out"
    assert run(monkeypatch, "convert", model, "--out", out, "--quantization", quantization) == 0
    assert continuation(out) == continuation(model, quantization)


def test_the_default_model_converted(
    default_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert run(monkeypatch, "convert", "smollm2-135m", "--out", out) == 0
    assert capsys.readouterr().out == f"{out}: 220 MB, int8\n"
    assert continuation(out) == continuation(default_model_path, Quantization.INT8)


def test_perplexity_of_several_formats(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("--quantization", "int8", "--quantization", "w8a8", "--kv-cache-dtype", "int8", "--compare")
    window = ("--context", "64", "--stride", "32", "--max-tokens", "90")
    options = ("--device", "cpu", "--dtype", "float32", "--num-threads", "1", "--json")
    assert run(monkeypatch, "eval", "perplexity", model, "--text", text, *wanted, *window, *options) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["quantization"], row["kv_cache_dtype"]) for row in rows] == [
        ("none", "auto"),
        ("int8", "int8"),
        ("w8a8", "int8"),
    ]
    assert rows[0]["rise_percent"] == 0
    for row in rows:
        assert row["num_scored_tokens"] == 89
        assert row["rise_percent"] == pytest.approx(100 * (row["perplexity"] / rows[0]["perplexity"] - 1))


def test_perplexity_as_a_table(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ("--quantization", "w8a8", "--device", "cpu", "--dtype", "float32", "--max-tokens", "40")
    assert run(monkeypatch, "eval", "perplexity", model, "--text", text, *arguments) == 0
    printed = capsys.readouterr().out
    assert "w8a8 (float32)" in printed
    assert "39" in printed
    assert "%" not in printed, "nothing to compare with"


def test_mistakes_are_one_line(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = tmp_path / "converted"
    assert run(monkeypatch, "convert", model, "--out", converted) == 0
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    capsys.readouterr()
    perplexity = ("eval", "perplexity")
    for arguments, line in (
        (("convert", model, "--out", converted), f"{converted}: is there already"),
        (("convert", model, "--out", tmp_path / "new", "--quantization", "none"), "quantization=none would convert"),
        (("convert", converted, "--out", tmp_path / "new"), f"{converted}: has been converted already, to int8"),
        (("convert", "nowhere", "--out", tmp_path / "new"), "model=nowhere is not known"),
        ((*perplexity, model, "--text", tmp_path / "absent"), f"text={tmp_path / 'absent'}: No such file"),
        ((*perplexity, model, "--text", binary), f"text={binary}: is not UTF-8: byte 0"),
        ((*perplexity, model, "--text", text, "--device", "tpu"), "device must be one of auto, cpu, cuda"),
        ((*perplexity, model, "--text", text, "--context", "9999"), "context must be between 2 and 2048"),
        ((*perplexity, converted, "--text", text, "--compare"), f"{converted}: holds no unquantised weights"),
        ((*perplexity, converted, "--text", text, "--quantization", "w8a8"), "quantization=w8a8, but the model's"),
    ):
        assert run(monkeypatch, *arguments) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith(f"slipstream: {line}")
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert not (tmp_path / "new").exists()


def test_help_fills_the_lines_of_a_docstrings_paragraphs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "eval", "perplexity", "--help") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    first = lines.index("A window slides over the text. Each token but the first is scored once, from")
    assert lines[first + 1] == "the tokens before it in its window: at least context - stride of them once the"
