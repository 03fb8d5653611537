"""No product takes more shared memory than is foretold. In processes of their own, since kernels are interpreted in
this one, and since a process compiles for one kind of GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json
import sys

import torch
import triton

from engine.kernels.configurations import ManyRows, fitted
from engine.kernels.int8_rows import Int8Rows
from engine.kernels.matrix import Matrix
from engine.kernels.product_residual import product_residual
from engine.kernels.row_norm import max_parts
from engine.kernels.shared_memory import product_bytes
from engine.kernels.target import aimed_at
from engine.precompile.gpus import GPUS
from engine.precompile.recorded_kernels import recorded

ROWS, OUTPUTS, FEATURES = 512, 256, 2048
FORMATS = {"bf16": (torch.bfloat16, False), "int8": (torch.int8, False), "w8a8": (torch.int8, True)}


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(weight_format, configuration):
    '''Returns what is foretold.'''
    dtype, rounds = FORMATS[weight_format]
    scales = empty(OUTPUTS, dtype=torch.float32)
    matrix = Matrix(empty(OUTPUTS, FEATURES, dtype=dtype), None, scales if dtype == torch.int8 else None, rounds)
    x = empty(ROWS, FEATURES, dtype=dtype if rounds else torch.bfloat16)
    x = Int8Rows(x, empty(ROWS, dtype=torch.float32)) if rounds else x
    residual, squares = empty(ROWS, OUTPUTS), empty(ROWS, max_parts(OUTPUTS), dtype=torch.float32)
    product_residual(x, matrix, residual, scales, 1e-5, residual, residual, squares, configuration=configuration)
    c = fitted(configuration, ROWS, matrix)
    return product_bytes(matrix, gpu.gpu, c.block_m, c.block_n, c.block_k, c.num_stages)


gpu = GPUS[sys.argv[1]]
foretold, taken = [], []
with aimed_at(gpu.gpu), recorded(gpu) as kernels:
    for weight_format, *numbers in json.loads(sys.argv[2]):
        foretold.append(launch(weight_format, ManyRows(*numbers)))
assert len(kernels) == len(foretold)
for kernel in kernels:
    taken.append(triton.compile(kernel.source, target=kernel.target, options=kernel.options).metadata.shared)
print(json.dumps([foretold, taken, gpu.gpu.shared_bytes]))
"""


@pytest.mark.parametrize(
    ("gpu", "cases"),
    [
        (
            "l4",  # which has no room for the first three as they are
            [
                ("bf16", 128, 128, 128, 8, 3),
                ("int8", 128, 128, 128, 8, 3),
                ("bf16", 64, 16, 256, 4, 4),
                ("w8a8", 64, 64, 128, 4, 4),
            ],
        ),
        ("h100", [("bf16", 64, 16, 256, 4, 4), ("int8", 64, 64, 128, 4, 4)]),
    ],
)
def test_products_take_what_is_foretold(gpu: str, cases: list[tuple[str, int]], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, gpu, json.dumps(cases)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    foretold, taken, shared_bytes = json.loads(ended.stdout)
    for bound, used in zip(foretold, taken, strict=True):
        assert 0.9 * bound <= used <= bound <= shared_bytes
