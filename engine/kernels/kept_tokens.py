# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""The draw of one row among the tokens that top-k, top-p and min-p keep, without sorting the row.

Tokens are ordered by rank key: likeliest first, ties by token id. What the filters keep is a prefix of that order, and
whether a token belongs to it needs only the number and the weight of the tokens before it. So the winner among all
tokens is tried first, and where it is not kept, the winner among those before it, and so on: each is the winner of
all that remain, and the first that is kept is the winner among the kept ones. (Rejection from a shrinking set, as
FlashInfer samples without sorting; here the noise is fixed, and so the outcome does not depend on the way to it.)

A bound that every kept token reaches comes first: the tokens at or above it are written to a shortlist, which the
passes then walk through; where it does not hold them, as with top-p on a flat distribution, passes walk through the
row. Sums are of integers. So nothing here depends on more than the row.
"""

import triton
import triton.language as tl

from engine.kernels.token_scores import (
    LOWEST,
    MIN_P,
    TOP_K,
    TOP_P,
    id_of,
    load_double,
    noise_of,
    ordered,
    rank_key,
    scores,
    value_of,
    weights,
)

BLOCK = 64  # token ids that share a maximum: top-k gets a bound where it keeps fewer tokens than there are blocks
SHORTLIST = 2048  # tokens; also the tokens that a pass handles at once

_BLOCK = tl.constexpr(BLOCK)
_SHORTLIST = tl.constexpr(SHORTLIST)
_DIGIT_BITS = tl.constexpr(4)
_DIGITS = tl.constexpr(16)


@triton.jit
def _row_keys(row, ids, inside, ID_BITS: tl.constexpr):
    """Rank keys of tokens `ids` of a row, LOWEST where not `inside`."""
    logits, flags, position, parameters, token_states, biases, own_token, num_drafts = row
    raw = tl.load(logits + ids, mask=inside, other=0.0, cache_modifier=".cg")
    values = scores(raw, ids, inside, flags, position, parameters, token_states, biases, own_token, num_drafts)
    return tl.where(inside, rank_key(values, ids, ID_BITS), LOWEST)


@triton.jit
def _remaining_keys(row, shortlist, num_listed, tile, V: tl.constexpr, ID_BITS: tl.constexpr):
    """The rank keys of one tile: of the shortlist if it holds what remains, else of the row."""
    place = tile * _SHORTLIST + tl.arange(0, _SHORTLIST)
    if num_listed <= _SHORTLIST:
        keys = tl.load(shortlist + place, mask=place < num_listed, other=LOWEST, cache_modifier=".cg")
    else:
        keys = _row_keys(row, place, place < V, ID_BITS)
    return keys


@triton.jit
def _num_tiles(num_listed, V: tl.constexpr):
    return tl.where(num_listed <= _SHORTLIST, 1, (V + _SHORTLIST - 1) // _SHORTLIST)


@triton.jit
def _kth_maximum(maxima, k):
    """The k-th largest of int32 [n], by its digits in base 16 from the highest on; int64."""
    found = tl.full([], -(1 << 31), tl.int64)
    digits = tl.arange(0, _DIGITS).to(tl.int64)
    for turn in range(8):
        shift = 28 - 4 * turn
        thresholds = (found + (digits << shift)).to(tl.int32)
        counts = tl.sum((maxima[None, :] >= thresholds[:, None]).to(tl.int32), axis=1)
        found += (tl.sum((counts >= k).to(tl.int32), axis=0) - 1).to(tl.int64) << shift
    return found


@triton.jit
def _kth_key(row, shortlist, num_listed, k, V: tl.constexpr, ID_BITS: tl.constexpr):
    """The k-th largest rank key of what remains, in the same way."""
    turns: tl.constexpr = (32 + ID_BITS + _DIGIT_BITS - 1) // _DIGIT_BITS
    found = tl.full([], -(1 << (31 + ID_BITS)), tl.int64)
    digits = tl.arange(0, _DIGITS).to(tl.int64)
    for turn in range(turns):
        shift = (turns - 1 - turn) * _DIGIT_BITS
        thresholds = found + (digits << shift)
        counts = tl.zeros([_DIGITS], tl.int32)
        for tile in range(_num_tiles(num_listed, V)):
            keys = _remaining_keys(row, shortlist, num_listed, tile, V, ID_BITS)
            counts += tl.sum((keys[None, :] >= thresholds[:, None]).to(tl.int32), axis=1)
        found += (tl.sum((counts >= k).to(tl.int32), axis=0) - 1).to(tl.int64) << shift
    return found


@triton.jit
def _weight_above(row, shortlist, num_listed, key, maximum, V: tl.constexpr, ID_BITS: tl.constexpr):
    """The sum of the weights of the tokens before `key`."""
    total = tl.full([], 0, tl.int64)
    for tile in range(_num_tiles(num_listed, V)):
        keys = _remaining_keys(row, shortlist, num_listed, tile, V, ID_BITS)
        above = keys > key
        values = value_of(tl.where(above, keys >> ID_BITS, ordered(maximum)))
        total += tl.sum(tl.where(above, weights(values, maximum), 0), axis=0)
    return total


@triton.jit
def _winner_above(row, shortlist, num_listed, key, V: tl.constexpr, ID_BITS: tl.constexpr):
    """The rank key of the token with most score and noise among those before `key`; there is one."""
    _, _, position, parameters, _, _, _, _ = row
    best = tl.full([], LOWEST, tl.int64)
    winner = tl.full([], LOWEST, tl.int64)
    for tile in range(_num_tiles(num_listed, V)):
        keys = _remaining_keys(row, shortlist, num_listed, tile, V, ID_BITS)
        above = keys > key
        ids = tl.where(above, id_of(keys, ID_BITS), 0)
        noisy = rank_key(value_of(keys >> ID_BITS) + noise_of(ids, position, parameters), ids, ID_BITS)
        noisy = tl.where(above, noisy, LOWEST)
        best_here = tl.max(noisy, axis=0)
        winner_here = tl.max(tl.where(noisy == best_here, keys, LOWEST), axis=0)
        winner = tl.where(best_here > best, winner_here, winner)
        best = tl.maximum(best, best_here)
    return winner


@triton.jit
def _list_tokens(row, block, maxima, bound, blocks, shortlist, V: tl.constexpr, ID_BITS: tl.constexpr):
    """Write the rank keys of the tokens whose score is `bound` or more to the shortlist; returns how many there are.

    If they are more than it holds, the answer is some number above that. blocks: scratch for the blocks that hold them.
    """
    needed = maxima >= bound
    tl.store(blocks + tl.cumsum(needed.to(tl.int32), 0) - 1, block, mask=needed)
    num_blocks = tl.sum(needed.to(tl.int32), axis=0)
    tl.debug_barrier()  # one thread's stores are loaded by another
    per_tile: tl.constexpr = _SHORTLIST // _BLOCK
    lane = tl.arange(0, _SHORTLIST)
    num_listed = 0
    start = 0
    while (start < num_blocks) & (num_listed <= _SHORTLIST):
        index = start + lane // _BLOCK
        ids = tl.load(blocks + index, mask=index < num_blocks, other=0, cache_modifier=".cg") * _BLOCK + lane % _BLOCK
        keys = _row_keys(row, ids, (index < num_blocks) & (ids < V), ID_BITS)
        listed = (keys >> ID_BITS) >= bound
        place = num_listed + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(shortlist + place, keys, mask=listed & (place < _SHORTLIST))
        num_listed += tl.sum(listed.to(tl.int32), axis=0)
        start += per_tile
    tl.debug_barrier()
    return num_listed


@triton.jit
def _is_kept(row, shortlist, num_listed, key, top, top_p, min_p, total, V: tl.constexpr, ID_BITS: tl.constexpr):
    """Whether top-p and min-p keep a token. The likeliest one, `top`, always is."""
    kept = key == top
    maximum = value_of(top >> ID_BITS)
    if key != top:
        kept = tl.exp(value_of(key >> ID_BITS).to(tl.float64) - maximum.to(tl.float64)) >= min_p
        if kept & (top_p < 1.0):
            above = _weight_above(row, shortlist, num_listed, key, maximum, V, ID_BITS)
            kept = above.to(tl.float64) < top_p * total.to(tl.float64)
    return kept


@triton.jit
def kept_winner(
    row, winner, top, total, block_maxima, blocks, shortlist, V: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr, ID_BITS: tl.constexpr,
):  # fmt: skip
    """The rank key of the token with most score and noise among those that the seat's filters keep.

    row: pointers and scalars, see `_row_keys`. winner, top: rank keys of the token with most score and noise, and of
    the likeliest, among all. total: the weight of all tokens. block_maxima: int32 [NUM_BLOCKS], `ordered` scores.
    blocks: int32 [NUM_BLOCKS] and shortlist: int64 [SHORTLIST], scratch.
    """
    _, _, _, parameters, _, _, _, _ = row
    top_k = tl.load(parameters + TOP_K).to(tl.int32)
    top_p = load_double(parameters + TOP_P)
    min_p = load_double(parameters + MIN_P)
    maximum = value_of(top >> ID_BITS)
    block = tl.arange(0, PADDED_BLOCKS)
    maxima = tl.load(block_maxima + block, mask=block < NUM_BLOCKS, other=-(1 << 31), cache_modifier=".cg")

    # A score that every kept token reaches; for the winner itself to be tried, those before it are enough.
    bound = tl.full([], -(1 << 31) + 1, tl.int64)  # blocks past the row are below
    if top_k < V:
        if top_k < NUM_BLOCKS:
            bound = tl.maximum(bound, _kth_maximum(maxima, top_k))
    else:
        if min_p > 0.0:
            slack = 0.01 + tl.abs(maximum) * 1e-6  # far above the roundings of all that is compared
            bound = ordered(maximum + tl.log(min_p).to(tl.float32) - slack).to(tl.int64)
        bound = tl.maximum(bound, winner >> ID_BITS)
    num_listed = _list_tokens(row, block, maxima, bound, blocks, shortlist, V, ID_BITS)

    choice = winner
    below = (bound << ID_BITS) - 1
    if top_k < V:
        below = _kth_key(row, shortlist, num_listed, top_k, V, ID_BITS) - 1
        if top_p < 1.0:
            total = _weight_above(row, shortlist, num_listed, below, maximum, V, ID_BITS)
    if choice <= below:
        choice = _winner_above(row, shortlist, num_listed, below, V, ID_BITS)
    kept = _is_kept(row, shortlist, num_listed, choice, top, top_p, min_p, total, V, ID_BITS)
    while kept == 0:
        choice = _winner_above(row, shortlist, num_listed, choice, V, ID_BITS)
        kept = _is_kept(row, shortlist, num_listed, choice, top, top_p, min_p, total, V, ID_BITS)
    return choice
