"""`slipstream compile`, in processes of its own: kernels are interpreted in this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels.pdl import INTERPRETED
from engine.precompile.kernel_directory import MANIFEST
from slipstream_cli.app import main
from tests.tiny_models import TINY_CONFIG

MAIN = "from slipstream_cli.app import main; main()"
ELF_MACHINE_CUDA = 190
# The fewest kernels: steps of one row, and of up to eight.
SETTINGS = ("--gpu", "h100", "--max-num-seqs", 1, "--token-budget", 1, "--max-model-len", 64)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Without weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG))
    return directory


def compile_kernels(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-W", "ignore", "-c", MAIN, "compile", *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280)


def architecture(cubin: Path) -> int:
    """Such as 90: a byte of the flags in its ELF header, another one from version 8 of the format on."""
    header = cubin.read_bytes()[:64]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == ELF_MACHINE_CUDA
    return header[48] if header[8] < 8 else header[49]


def test_it_compiles_once_and_for_the_gpu(model: Path, tmp_path: Path) -> None:
    kernels, elsewhere = tmp_path / "kernels", Path("/opt/kernels")
    first = compile_kernels(model, *SETTINGS, "--runtime-path", elsewhere, TRITON_CACHE_DIR=str(kernels))
    assert first.returncode == 0, first.stderr
    cubins = set(kernels.glob("*/*.cubin"))
    assert {architecture(cubin) for cubin in cubins} == {90}
    assert {"_norm_qkv_rope", "_product_residual", "attention_kernel", "_choose"} <= {cubin.stem for cubin in cubins}
    assert f"{len(cubins)} kernels, {len(cubins)} of them new" in first.stdout
    [engine] = json.loads((kernels / MANIFEST).read_text())["engines"]
    assert (engine["gpu"], engine["num_kernels"], engine["max_model_len"]) == ("h100", len(cubins), 64)
    group = json.loads(next(kernels.glob("*/__grp__*.json")).read_text())
    assert all(Path(file).is_relative_to(elsewhere) for file in group["child_paths"].values())

    second = compile_kernels(model, *SETTINGS, "--output", kernels)
    assert f"{len(cubins)} kernels, 0 of them new" in second.stdout, second.stderr
    assert set(kernels.glob("*/*.cubin")) == cubins


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "h101"), "gpu must be one of h100, "),
        (("--gpu", "h100", "--max-model-len", "4096"), "max_model_len must be at most 2048"),
        pytest.param(
            ("--gpu", "h100"), "TRITON_INTERPRET is set", marks=pytest.mark.skipif(not INTERPRETED, reason="it is not")
        ),
    ],
)
def test_mistakes_end_in_one_line(
    model: Path,
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["slipstream", "compile", str(model), *arguments])
    with pytest.raises(SystemExit, match="1"):
        main()
    printed = capsys.readouterr()
    assert not printed.out
    [line] = printed.err.splitlines()
    assert line.startswith("slipstream: ")
    assert words in line
