# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Asks for the weights of the next product while this one still waits for its input, so that they lie in the
second-level cache by then. Changes no result.

It pays where the next kernel asks for little before its own wait (tiles of many rows, which go through shared memory)
or needs little in all (small models). One row of TinyLlama has nothing to gain: its kernels have weights in registers
by then, and more requests only hold up those that count.
"""

import torch
import triton
import triton.language as tl

from engine.kernels.configurations import MAX_FEW_ROWS, Kernel, configuration_for
from engine.kernels.matrix import Matrix
from engine.kernels.product import weight_pointer

MAX_BYTES = 4_000_000  # at 32 rows on an H100, 1 and 2 MB gave less, and 8 MB held up the kernels in between
MAX_ROWS = 128  # beyond, the products are not bound by the memory
_UNIT = 16  # bytes that the instruction counts in


def upcoming(kernel: Kernel, rows: int, matrix: Matrix) -> torch.Tensor | None:
    """What `kernel` will read of a weight in a step of so many rows, if it pays to ask for it early."""
    weight = weight_pointer(matrix, configuration_for(kernel, rows, matrix))
    is_small = weight.nbytes <= MAX_BYTES
    return weight if is_small or MAX_FEW_ROWS < rows <= MAX_ROWS else None


def shares(weight: torch.Tensor, programs: int, num_warps: int) -> tuple[int, int]:
    """Bytes that each thread of `programs` programs asks for, and where the last share begins."""
    num_bytes = min(MAX_BYTES, weight.nbytes) // _UNIT * _UNIT
    share = triton.cdiv(num_bytes, programs * num_warps * 32 * _UNIT) * _UNIT
    return share, num_bytes - share


@triton.jit
def prefetch(weight, share, last, THREADS: tl.constexpr):
    """Ask for this program's part: `share` bytes a thread, none of which begins behind byte `last`."""
    offset = (tl.program_id(0) * THREADS + tl.arange(0, THREADS)) * share
    address = weight.to(tl.int64) + tl.minimum(offset, last)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",  # an output, because Triton wants one
        "=r,l,r",
        [address, tl.full([THREADS], 0, tl.int32) + share],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
