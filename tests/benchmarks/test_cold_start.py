"""What a start is made of, from arguments to a file."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import cold_start
from benchmarks.history import read_results
from benchmarks.service_clients import Answer
from benchmarks.shapes import SHAPES
from engine.loader.checkpoint import open_checkpoint

LOADERS: list[Callable[[object], object]] = []


class ScriptedClients:
    """Answers as a service does whose engine is loaded for the first request."""

    def __init__(self, *_: object) -> None:
        self.is_first = True

    def together(self, num_streams: int) -> list[Answer]:
        sent_s = cold_start.time.monotonic()
        if self.is_first:
            LOADERS.pop()(None)
        self.is_first = False
        return [Answer(sent_s, cold_start.time.monotonic(), cold_start.time.monotonic())] * num_streams

    def close(self) -> None:
        pass


def test_the_model_that_is_written_can_be_loaded(tmp_path: Path) -> None:
    cold_start.write_model("tiny", "cpu", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.num_layers == SHAPES["tiny"].num_layers
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"bfloat16"}


def test_from_arguments_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real engines of a tiny shape, in this process; Serve is scripted."""
    application = Typer()
    application.command()(cold_start.main)
    options = ["--shape", "tiny", "--repeats", "2", "--results", str(tmp_path)]

    def run_part(_module: str, part: str, *given: str) -> dict[str, float]:
        outcome = CliRunner().invoke(application, [*options, "--part", part, *given])
        assert outcome.exit_code == 0, outcome.output
        return json.loads(outcome.stdout.splitlines()[-1])

    def serve_it(_shape: str, _config: object, _port: int, load: Callable[[object], object]) -> Callable[[], None]:
        LOADERS.append(load)
        return lambda: None

    monkeypatch.setattr(cold_start, "run_part", run_part)
    monkeypatch.setattr(cold_start, "serve_it", serve_it)
    monkeypatch.setattr(cold_start, "Clients", ScriptedClients)
    monkeypatch.setattr(cold_start, "SETTLE_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["cold_start"])
    outcome = CliRunner().invoke(application, options)
    assert outcome.exit_code == 0, outcome.output
    (file,) = tmp_path.glob("cold-start-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["subject"] for row in rows] == ["engine", "engine", "service", "service"]
    phases = ("process_s", "imports_s", "headers_s", "weights_s", "memory_s", "steps_s")
    for row in rows:
        assert 0 < sum(row[name] for name in phases) <= row["ready_s"]
    for row in rows[2:]:
        assert row["ready_s"] <= row["first_token_s"]
    assert f"{rows[3]['first_token_s']:.2f}" in outcome.stdout
    results = read_results(file)
    assert len({result.key for result in results}) == 4
    assert not any(figure.higher_is_better for result in results for figure in result.figures.values())
