"""A program and a GPU test, launched on a GPU that is not there: their kernels are compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
from engine.kernels.embed_rows import embed_rows

assert torch.cuda.is_available()
def rows(count, features, dtype=torch.bfloat16):
    return torch.randn(count, features, device="cuda").to(dtype)


table, hidden, weighted, squares = rows(50, 64), rows(7, 64), rows(7, 64), rows(7, 4, torch.float32)
assert table.is_cuda and table.device.type == "cuda"
ids = torch.arange(7, device="cuda")
embed_rows(ids, table, rows(1, 64, torch.float32)[0], 1e-5, hidden, weighted, squares)
print("computed", hidden.float().cpu().sum().item())
raise ValueError("the end")
"""


def pretend(output: Path, *arguments: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-W", "ignore", "-m", "tools.pretended_gpu", "--output", str(output), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "ended with ValueError" in done.stderr or arguments[0] == "pytest"
    return done.stdout


def test_a_program_and_a_test(tmp_path: Path) -> None:
    (tmp_path / "launches.py").write_text(PROGRAM)
    output = tmp_path / "kernels"
    said = pretend(output, "launches", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "computed 0.0" in said
    assert [cubin.stem for cubin in output.glob("*/*.cubin")] == ["_embed_rows"]
    said = pretend(output, "pytest", "--", "tests/kernels/test_embed_rows.py")
    assert len(list(output.glob("*/*.cubin"))) > 1
    assert "of them new" in said


def test_it_is_not_for_the_interpreter(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tools.pretended_gpu", "--output", str(tmp_path), "pytest"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set" in done.stderr
    assert not list(tmp_path.iterdir())


pytestmark = pytest.mark.timeout(500)
