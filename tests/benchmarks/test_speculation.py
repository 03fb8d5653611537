"""The comparison of speeds with and without drafts, from arguments to a file."""

import json
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.shapes import SHAPES
from benchmarks.speculation import main

application = Typer()
application.command()(main)


@pytest.mark.parametrize("method", ["local", "remote"])
def test_synthetic_acceptance(tmp_path: Path, method: str) -> None:
    arguments = ["--shape", "tiny", "--draft-shape", "tiny", "--methods", method, "--batch", "2", "--output", "20"]
    arguments += ["--input", "8", "--acceptance", "1.0", "--repeats", "1", "--results", str(tmp_path)]
    outcome = CliRunner().invoke(application, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "synthetic acceptance" in outcome.stdout
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in rows] == ["exact", method, method, method]
    assert all(row["equals_exact"] for row in rows)
    _, fixed, *limited = rows
    assert [row["num_draft_tokens"] for row in (fixed, *limited)] == ["4", "up to 4", "up to 8"]
    if method == "local":  # a remote draft may be late, and n-grams take its place
        assert 4.4 < fixed["mean_acceptance_length"] <= 5


def test_vocabularies_have_to_agree(tmp_path: Path) -> None:
    assert SHAPES["tiny"].vocab_size != SHAPES["draft-4x512"].vocab_size
    arguments = ["--shape", "tiny", "--draft-shape", "draft-4x512", "--results", str(tmp_path)]
    outcome = CliRunner().invoke(application, arguments)
    assert outcome.exit_code == 2
    assert "another vocabulary" in outcome.output
