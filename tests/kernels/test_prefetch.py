"""Weights that are fetched into the cache early: which, how much of them, and that nothing else changes."""

import pytest
import torch

from engine.kernels.configurations import MAX_FEW_ROWS
from engine.kernels.matrix import Matrix, pack
from engine.kernels.prefetch import MAX_BYTES, MAX_ROWS, shares, upcoming
from engine.kernels.product_residual import product_residual
from engine.kernels.row_norm import max_parts
from tests.kernels.products import DEVICES


def matrix_of(out_features: int, in_features: int, device: str = "cpu") -> Matrix:
    rows = torch.randn(out_features, in_features, device=device).bfloat16()
    return Matrix(rows, pack(rows))


def test_small_weights_are_always_wanted_and_large_ones_where_they_go_through_shared_memory() -> None:
    small, large = matrix_of(64, 128), matrix_of(2048, 1024 + 16)
    assert large.rows.nbytes > MAX_BYTES > small.rows.nbytes
    for rows in (1, MAX_FEW_ROWS, MAX_FEW_ROWS + 1, MAX_ROWS, MAX_ROWS + 1):
        read = small.packed if rows <= MAX_FEW_ROWS else small.rows
        assert upcoming("product_residual", rows, small) is read
    assert upcoming("product_residual", MAX_FEW_ROWS, large) is None
    assert upcoming("product_residual", MAX_FEW_ROWS + 1, large) is large.rows
    assert upcoming("product_residual", MAX_ROWS, large) is large.rows
    assert upcoming("product_residual", MAX_ROWS + 1, large) is None


@pytest.mark.parametrize("num_bytes", [16, 4096, 70_000, 1_234_567, MAX_BYTES, 3 * MAX_BYTES])
@pytest.mark.parametrize("programs", [1, 36, 128, 704])
def test_shares_cover_the_weight_and_stay_inside(num_bytes: int, programs: int) -> None:
    weight = torch.empty(num_bytes, dtype=torch.int8)
    wanted = min(num_bytes, MAX_BYTES) // 16 * 16
    share, last = shares(weight, programs, 4)
    assert share % 16 == last % 16 == 0
    begins = {min(thread * share, last) for thread in range(programs * 128)}
    covered = {place for begin in begins for place in range(begin, begin + share, 16)}
    assert covered == set(range(0, wanted, 16))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 20])
def test_a_fetch_changes_no_bit(device: str, rows: int) -> None:
    matrix, ahead = matrix_of(96, 128, device), torch.randn(1000, 64, device=device).bfloat16()
    x, residual = (torch.randn(rows, size, device=device).bfloat16() for size in (128, 96))
    results = []
    for wanted in (None, ahead):
        out, weighted = torch.full_like(residual, torch.nan), torch.full_like(residual, torch.nan)
        squares = torch.full((rows, max_parts(96)), torch.nan, device=device)
        product_residual(x, matrix, residual, torch.ones(96, device=device), 1e-5, out, weighted, squares, ahead=wanted)
        results.append((out, weighted))
    assert all(torch.isfinite(tensor).all() for tensor in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
