"""How much shared memory a product of many rows takes: known before it is compiled, so that a launch can choose."""

from engine.kernels.matrix import Matrix
from engine.kernels.target import GPU

_SUM_BYTES = 4  # float32, of each element of the result


def product_bytes(matrix: Matrix, gpu: GPU, block_m: int, block_n: int, block_k: int, num_stages: int) -> int:
    """The most that a program of `ManyRows` takes on this GPU. Rows that meet int8 weights are taken to have 16 bits.

    The pipelined loop has a tile of the weight and one of the rows in each of its stages. Before Hopper the last stage
    reads its operands into registers, and so does without. int8 weights of 16-bit rows besides change hands between
    threads once they are converted. Behind the loop, where its memory is free again, the sums may go from the tensor
    cores' layout to the one in which they are stored.

    Compiled by Triton 3.9 for compute capability 8.9 and 9.0, no kernel takes more, and as long as there are two stages
    and the loop takes more than the sums, most take exactly so much (tests/precompile/test_shared_memory.py).
    """
    weight_bytes = matrix.rows.element_size()
    converts = weight_bytes == 1 and not matrix.rounds_inputs
    row_bytes = 2 if converts else weight_bytes
    tiles = num_stages if gpu.capability >= (9, 0) else max(1, num_stages - 1)
    loop = tiles * (block_m * weight_bytes + block_n * row_bytes) * block_k
    if converts:
        loop += block_m * block_k * row_bytes
    return max(loop, block_m * block_n * _SUM_BYTES)
