# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Embeddings of the rows' tokens, ready for the first norm."""

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import halvings, round_to
from engine.kernels.pdl import launch_dependents, supports_pdl, wait_for_producers
from engine.kernels.row_norm import NormedRows, sum_of_squares


@triton.jit
def _embed_rows(
    token_ids_ptr,
    embedding_ptr,
    norm_ptr,
    hidden_ptr,
    weighted_ptr,
    squares_ptr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_HALVINGS: tl.constexpr,
    PART_STRIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    k = tl.arange(0, COLUMNS)
    mask = k < K
    norm = tl.load(norm_ptr + k, mask=mask, other=0.0)
    wait_for_producers(PDL)
    row = tl.program_id(0)
    token_id = tl.load(token_ids_ptr + row, cache_modifier=".cg").to(tl.int64)
    x = tl.load(embedding_ptr + token_id * K + k, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    tl.store(hidden_ptr + row * K + k, x, mask=mask)
    tl.store(weighted_ptr + row * K + k, round_to(wide * norm, x.dtype), mask=mask)
    total = sum_of_squares(tl.reshape(wide, [COLUMNS, 1]), COLUMNS, 1, TILE_HALVINGS)
    tl.store(squares_ptr + row * PART_STRIDE + tl.arange(0, 1), total)


def embed_rows(
    token_ids: torch.Tensor,
    embedding: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    hidden: torch.Tensor,
    weighted: torch.Tensor,
    squares: torch.Tensor,
    *,
    pdl: bool = True,
) -> NormedRows:
    """hidden [N, K] = embedding [V, K] of the tokens (integers [N]), and the same on its way into `norm` float32 [K].

    weighted, squares: where the returned rows' parts go. pdl: False starts it only when the kernels before it are done.
    """
    rows, features = hidden.shape
    assert token_ids.shape == (rows,)
    assert weighted.shape == (rows, features)
    assert embedding.shape[1] == features == norm.shape[0]
    assert all(t.is_contiguous() for t in (token_ids, embedding, norm, hidden, weighted))
    columns = max(16, triton.next_power_of_2(features))
    use_pdl = pdl and supports_pdl(hidden.device)
    _embed_rows[(rows,)](
        token_ids,
        embedding,
        norm,
        hidden,
        weighted,
        squares,
        K=features,
        COLUMNS=columns,
        TILE_HALVINGS=halvings(columns // 16),
        PART_STRIDE=squares.stride(0),
        PDL=use_pdl,
        num_warps=4,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if use_pdl else {}),
    )
    return NormedRows(weighted, squares, 1, eps)
