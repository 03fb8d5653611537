"""What a CPU engine's plan says against the memory that its process then takes: the default model."""

import json
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.history import read_results
from benchmarks.memory import main

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

application = Typer()
application.command()(main)
# A tied head's second copy is 17 % of the bfloat16 weights, an int8 cache's scales are 6 %.
TOLERANCES = {
    "weights_bytes": 0.03,  # the libraries' own buffers: 1 to 5 MB of some 200
    "kv_cache_bytes": 0.005,
}


def test_the_plan_is_what_is_taken(default_model_path: Path, tmp_path: Path) -> None:
    formats = ("--quantization", "none,w8a8", "--kv-cache-dtype", "int8", "--context", "1024", "--max-num-seqs", "4")
    arguments = ("--model", str(default_model_path), *formats, "--results", str(tmp_path))
    outcome = CliRunner().invoke(application, arguments, env={"COLUMNS": "200"})
    assert outcome.exit_code == 0, outcome.output
    assert "weights, MiB" in outcome.stdout
    assert "graph, MiB" not in outcome.stdout, "not to be told apart on a CPU"
    (file,) = tmp_path.glob("memory-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["quantization"] for row in rows] == ["none", "w8a8"]
    for row in rows:
        predicted, measured = row["predicted"], row["measured"]
        assert measured["num_blocks"] == predicted["num_blocks"] == 4 * 1024 // 16 + 1
        for part, tolerance in TOLERANCES.items():
            assert measured[part] == pytest.approx(predicted[part], rel=tolerance), (row["quantization"], part)
    for result in read_results(file):
        assert result.figures["measured.weights_bytes"].value > 100e6
        assert dict(result.arguments)["max_model_len"] == "1024"
