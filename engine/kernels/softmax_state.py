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
