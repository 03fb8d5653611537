# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""The one place where partial softmaxes meet, for decode and prefill alike.

A state is (maximum, total, weighted): the largest score of the keys seen so far, in units of log2; the sum of
2^(score - maximum) over them; and their values weighted likewise. All float32: [M], [M] and [M, D].

Kernels that use these are compiled with `enable_fp_fusion=False`: a multiply-add that is fused in one kernel and not in
another would give one row two results.
"""

import triton
import triton.language as tl


@triton.jit
def empty_state(M: tl.constexpr, D: tl.constexpr):
    """The state of rows that have seen no key."""
    return tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, D], tl.float32)


@triton.jit
def finite(maximum):
    """A row that has seen no key is at -inf, and -inf - -inf would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def merge_states(maximum, total, weighted, next_maximum, next_total, next_weighted):
    """The state of both sets of keys. Not associative in its bits: always merge in ascending order of position.

    Merging the empty state changes nothing (the factors are then exactly 1 and 0), so it is free to skip splits that a
    row cannot see.
    """
    both = tl.maximum(maximum, next_maximum)
    decay = tl.exp2(maximum - finite(both))
    next_decay = tl.exp2(next_maximum - finite(both))
    total = total * decay + next_total * next_decay
    weighted = weighted * decay[:, None] + next_weighted * next_decay[:, None]
    return both, total, weighted


@triton.jit
def attended(total, weighted):
    """The attention output of a state; zero for rows without keys. Adding zero turns -0 into 0: which of the two an
    underflow leaves depends on how many empty states were merged."""
    return weighted / tl.where(total == 0.0, 1.0, total)[:, None] + 0.0


@triton.jit
def _load_state(
    maxima,
    totals,
    weighted,
    place,
    mask,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A state that another program left; empty where `mask` is false. Past the first-level cache, which does not see
    other processors' stores."""
    dims = tl.arange(0, BLOCK_DIM)
    return (
        tl.load(maxima + place, mask=mask, other=float("-inf"), cache_modifier=".cg"),
        tl.load(totals + place, mask=mask, other=0.0, cache_modifier=".cg"),
        tl.load(
            weighted + place[:, None] * HEAD_DIM + dims[None, :],
            mask=mask[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
            cache_modifier=".cg",
        ),
    )


@triton.jit
def merged_state(
    maxima,
    totals,
    weighted,
    place,
    row,
    num_rows,
    split_stride,
    num_splits,
    M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """All splits of a tile, merged in ascending order. place: [M], where the first split's state is."""
    a, b, c = empty_state(M, BLOCK_DIM)
    if M * BLOCK_DIM <= 2048:
        # Four at a time, so that their loads are under way together.
        for split in range(0, num_splits, 4):
            at = place + split * split_stride
            a0, b0, c0 = _load_state(maxima, totals, weighted, at, row < num_rows, HEAD_DIM, BLOCK_DIM)
            at += split_stride
            rows = tl.where(split + 1 < num_splits, num_rows, 0)
            a1, b1, c1 = _load_state(maxima, totals, weighted, at, row < rows, HEAD_DIM, BLOCK_DIM)
            at += split_stride
            rows = tl.where(split + 2 < num_splits, num_rows, 0)
            a2, b2, c2 = _load_state(maxima, totals, weighted, at, row < rows, HEAD_DIM, BLOCK_DIM)
            at += split_stride
            rows = tl.where(split + 3 < num_splits, num_rows, 0)
            a3, b3, c3 = _load_state(maxima, totals, weighted, at, row < rows, HEAD_DIM, BLOCK_DIM)
            a, b, c = merge_states(a, b, c, a0, b0, c0)
            a, b, c = merge_states(a, b, c, a1, b1, c1)
            a, b, c = merge_states(a, b, c, a2, b2, c2)
            a, b, c = merge_states(a, b, c, a3, b3, c3)
    else:
        for split in range(num_splits):
            at = place + split * split_stride
            a0, b0, c0 = _load_state(maxima, totals, weighted, at, row < num_rows, HEAD_DIM, BLOCK_DIM)
            a, b, c = merge_states(a, b, c, a0, b0, c0)
    return a, b, c
