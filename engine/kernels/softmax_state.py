# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""The one place where softmaxes are computed and where they meet, for decode and prefill alike.

A state is (maximum, total, weighted): the largest score of some keys, in units of log2; the sum of 2^(score - maximum)
over them; and their values weighted likewise. All float32: [M, 1], [M, 1] and [M, D] for M rows, or transposed.

Kernels that use these are compiled with `enable_fp_fusion=False`: a multiply-add that is fused in one kernel and not in
another would give one row two results.
"""

import triton
import triton.language as tl

from engine.kernels.arithmetic import multiply, round_to


@triton.jit
def empty_state(M: tl.constexpr, D: tl.constexpr):
    """The state of rows that have seen no key."""
    return tl.full([M, 1], float("-inf"), tl.float32), tl.zeros([M, 1], tl.float32), tl.zeros([M, D], tl.float32)


@triton.jit
def empty_columns(M: tl.constexpr, D: tl.constexpr):
    """The same, transposed: query rows then lie along the threads of a warp, and each thread, which has few of them,
    computes the factors of few. Compiled the other way, merging took three times as many exponentials."""
    return tl.full([1, M], float("-inf"), tl.float32), tl.zeros([1, M], tl.float32), tl.zeros([D, M], tl.float32)


@triton.jit
def finite(maximum):
    """A row that has seen no key is at -inf, and -inf - -inf would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def visible_scores(
    products, key_scale, scale_log2, token, query_position, seen, SCALED: tl.constexpr, WINDOW: tl.constexpr
):
    """Scores in units of log2, -inf where hidden; with T tiles side by side all shapes but [M] begin with T.

    products: queries times keys, float32 [M, K]. key_scale: float32 [K], read only if SCALED. token: [K], the keys'
    positions, and seen: [K], which of them are there at all. query_position: [M].
    """
    AXIS: tl.constexpr = len(token.shape) - 1  # noqa: N806
    if SCALED:
        scores = products * tl.expand_dims(key_scale * scale_log2, AXIS)
    else:
        scores = products * scale_log2
    token = tl.expand_dims(token, AXIS)
    visible = tl.expand_dims(seen, AXIS) & (token <= query_position[:, None])
    if WINDOW > 0:
        visible = visible & (token > query_position[:, None] - WINDOW)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def tile_state(scores, value, value_scale, SCALED: tl.constexpr):
    """The states of key tiles, each from nothing; with T tiles side by side all shapes begin with T.

    scores: float32 [M, K], -inf where hidden. value: [K, D]. value_scale: float32 [K], read only if SCALED: values are
    value * value_scale. The scale goes to the weights, before they are rounded for the product with the values; the
    total sums them rounded without it, by a product with ones: the order of `tl.sum` depends on the shape and the
    layout of its operand, the order along K of `tl.dot` does not.
    """
    AXIS: tl.constexpr = len(scores.shape) - 1  # noqa: N806
    maximum = tl.max(scores, axis=AXIS)
    weights = tl.exp2(scores - tl.expand_dims(finite(maximum), AXIS))
    rounded = round_to(weights, value.dtype)
    M: tl.constexpr = scores.shape[AXIS - 1]  # noqa: N806
    K: tl.constexpr = scores.shape[AXIS]  # noqa: N806
    D: tl.constexpr = value.shape[AXIS]  # noqa: N806
    sums = tl.zeros([M, 16], tl.float32)
    ones = tl.full([K, 16], 1.0, value.dtype)
    products = tl.zeros([M, D], tl.float32)
    if AXIS == 2:
        T: tl.constexpr = scores.shape[0]  # noqa: N806
        sums = tl.zeros([T, M, 16], tl.float32)
        ones = tl.full([T, K, 16], 1.0, value.dtype)
        products = tl.zeros([T, M, D], tl.float32)
    total = tl.max(multiply(rounded, ones, sums), axis=AXIS)
    if SCALED:
        rounded = round_to(weights * tl.expand_dims(value_scale, AXIS - 1), value.dtype)
    return tl.expand_dims(maximum, AXIS), tl.expand_dims(total, AXIS), multiply(rounded, value, products)


@triton.jit
def merge_states(maximum, total, weighted, next_maximum, next_total, next_weighted):
    """The state of both sets of keys. Not associative in its bits: always merge in ascending order of position.

    Merging the empty state changes nothing (the factors are then exactly 1 and 0), so it is free to skip tiles and
    splits that a row cannot see.
    """
    both = tl.maximum(maximum, next_maximum)
    decay = tl.exp2(maximum - finite(both))
    next_decay = tl.exp2(next_maximum - finite(both))
    total = total * decay + next_total * next_decay
    weighted = weighted * decay + next_weighted * next_decay
    return both, total, weighted


@triton.jit
def only(stack):
    """The [X, N] of [1, N, X]."""
    return tl.trans(tl.reshape(stack, [stack.shape[1], stack.shape[2]]))


@triton.jit
def halves(stack):
    """The two [X, N] of [2, N, X]; each thread holds both of an element."""
    return tl.split(tl.permute(stack, [2, 1, 0]))


@triton.jit
def quarters(stack):
    """The four [X, N] of [4, N, X], likewise."""
    even, odd = tl.split(tl.permute(tl.reshape(stack, [2, 2, stack.shape[1], stack.shape[2]]), [3, 2, 0, 1]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def merge_stack(maximum, total, weighted, maxima, totals, stack):
    """`merge_states` with T = 1, 2 or 4 states in ascending order: maxima and totals [T, M, 1], stack [T, M, D]; the
    state is transposed."""
    if stack.shape[0] == 1:
        a, b, c = only(maxima), only(totals), only(stack)
        maximum, total, weighted = merge_states(maximum, total, weighted, a, b, c)
    elif stack.shape[0] == 2:
        a0, a1 = halves(maxima)
        b0, b1 = halves(totals)
        c0, c1 = halves(stack)
        maximum, total, weighted = merge_states(maximum, total, weighted, a0, b0, c0)
        maximum, total, weighted = merge_states(maximum, total, weighted, a1, b1, c1)
    else:
        a0, a1, a2, a3 = quarters(maxima)
        b0, b1, b2, b3 = quarters(totals)
        c0, c1, c2, c3 = quarters(stack)
        maximum, total, weighted = merge_states(maximum, total, weighted, a0, b0, c0)
        maximum, total, weighted = merge_states(maximum, total, weighted, a1, b1, c1)
        maximum, total, weighted = merge_states(maximum, total, weighted, a2, b2, c2)
        maximum, total, weighted = merge_states(maximum, total, weighted, a3, b3, c3)
    return maximum, total, weighted


@triton.jit
def attended(total, weighted):
    """The attention output of a state; zero for rows without keys. Adding zero turns -0 into 0: which of the two an
    underflow leaves depends on how many empty states were merged."""
    return weighted / tl.where(total == 0.0, 1.0, total) + 0.0
