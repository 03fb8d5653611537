"""How much shared memory a product of many rows takes: known before it is compiled, so that a launch can choose."""

from engine.kernels.matrix import Matrix
from engine.kernels.target import GPU

_SUM_BYTES = 4  # float32, of each element of the result


def product_bytes(
    matrix: Matrix, gpu: GPU, block_m: int, block_n: int, block_k: int, num_stages: int, row_bytes: int | None = None
) -> int:
    """The most that a program of `ManyRows` takes on this GPU.

    row_bytes: of one value of the rows; None: as many as one of the weight, and two where that is int8 and the rows are
    not.

    The pipelined loop has a tile of the weight and one of the rows for each stage. Before Hopper it does without the
    last, whose operands are in registers. int8 weights that become 16-bit ones are exchanged between threads besides.
    Behind the loop, where that memory is free again, the sums may have to be exchanged on their way to where they are
    stored.

    Triton documents none of this. Of 956 kernels for compute capabilities 8.9 and 9.0 none took more with Triton 3.9,
    and of those for 8.9 with two stages or more, whose loop takes more than the sums, each took just so much. Triton
    3.6 gave the same for the ten that were tried. tests/precompile/test_shared_memory.py compiles some of them.
    """
    weight_bytes = matrix.rows.element_size()
    converts = weight_bytes == 1 and not matrix.rounds_inputs
    row_bytes = row_bytes or (2 if converts else weight_bytes)
    tiles = num_stages if gpu.capability >= (9, 0) else max(1, num_stages - 1)
    loop = tiles * (block_m * weight_bytes + block_n * row_bytes) * block_k
    if converts:
        loop += block_m * block_k * row_bytes
    return max(loop, block_m * block_n * _SUM_BYTES)
