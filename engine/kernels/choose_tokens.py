# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Chooses the next token of each row of logits on the device: what engine.sampling.sampler does on the host.

Two kernels, whatever the rows want. The first cuts each row into chunks of CHUNK token ids, one program each; the
second, one program a row, takes the best of its chunks, and goes back to the row only where a filter may leave tokens
out (`kept_tokens`). The scores are those of the host; maxima are of integer keys that no two tokens share, and sums of
weights are of integers, so that a row's outcome depends on its own logits, seat and position and on nothing else.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.kept_tokens import BLOCK, SHORTLIST, kept_winner
from engine.kernels.pdl import launch_dependents, supports_pdl, wait_for_producers
from engine.kernels.token_scores import (
    BIAS_PLACES,
    COUNT_SHIFT,
    COUNTED,
    FILTERED,
    FLAGS,
    LOWEST,
    NUM_LOGPROBS,
    SAMPLED,
    SEAT_FIELDS,
    TOP_K,
    TOP_P,
    SeatTensors,
    id_bits,
    id_of,
    load_double,
    log_sum_exp,
    noise_of_run,
    ordered,
    rank_key,
    scores,
    total_weight,
    value_of,
    weights,
)

CHUNK = 4096
MAX_TOP = 20  # likeliest tokens whose logprobs a row may ask for

_MAX_TOP = tl.constexpr(MAX_TOP)
_BLOCK = tl.constexpr(BLOCK)
_BIAS_PLACES = tl.constexpr(BIAS_PLACES)
_SEAT_FIELDS = tl.constexpr(SEAT_FIELDS)
_COUNT_ONE = tl.constexpr(1 << COUNT_SHIFT)
_NOT_FINITE = tl.constexpr((1 << 63) - 1)  # above every rank key

# What a chunk leaves behind, int64 each.
BEST = tl.constexpr(0)  # rank key of its best token, by noisy score where the row is sampled
BEST_SCORE = tl.constexpr(1)  # the same token's rank key without noise
TOP_SCORE = tl.constexpr(2)  # rank key of the likeliest token
WEIGHT = tl.constexpr(3)  # of its tokens relative to the likeliest
RAW_TOP = tl.constexpr(4)  # the last two of the raw logits
RAW_WEIGHT = tl.constexpr(5)
CHUNK_FIELDS = 8
_CHUNK_FIELDS = tl.constexpr(CHUNK_FIELDS)


@dataclass(frozen=True)
class ChoiceWorkspace:
    """What the two kernels leave each other, for up to `max_rows` rows; one for all graphs of a stream.

    chunks: int64 [max_rows, num_chunks, CHUNK_FIELDS]; tops: int64 [max_rows, num_chunks, MAX_TOP], the rank keys of
    the likeliest raw logits; block_maxima, blocks: int32 [max_rows, num_chunks CHUNK / BLOCK]; shortlist: int64
    [max_rows, SHORTLIST]. All may hold anything between launches.
    """

    chunks: torch.Tensor
    tops: torch.Tensor
    block_maxima: torch.Tensor
    blocks: torch.Tensor
    shortlist: torch.Tensor


def choice_workspace(max_rows: int, vocab_size: int, device: torch.device) -> ChoiceWorkspace:
    """Allocate once. About 35 KB a row for 128,000 tokens."""
    num_chunks = triton.cdiv(vocab_size, CHUNK)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((max_rows, *shape), dtype=dtype, device=device)

    return ChoiceWorkspace(
        chunks=empty(num_chunks, CHUNK_FIELDS, dtype=torch.int64),
        tops=empty(num_chunks, MAX_TOP, dtype=torch.int64),
        block_maxima=empty(num_chunks * CHUNK // BLOCK, dtype=torch.int32),
        blocks=empty(num_chunks * CHUNK // BLOCK, dtype=torch.int32),
        shortlist=empty(SHORTLIST, dtype=torch.int64),
    )


@dataclass(frozen=True)
class HostTokens:
    """Where the host finds the tokens of steps: those of earlier ones while those of the next are written.

    tokens: int64 [turns, max_rows, 2], in pinned memory. turn: int32 [1], on the device, of this step: see
    `step_inputs`.
    """

    tokens: torch.Tensor
    turn: torch.Tensor


@dataclass(frozen=True)
class DraftRows:
    """Where rows of logits stand behind draft tokens, which count as output of their seats.

    token_ids: int64 [N], of all rows of the step. rows: int64 [S], which of them each row of logits is behind.
    num_drafts: int32 [S], how many drafts the last tokens up to there are.
    """

    token_ids: torch.Tensor
    rows: torch.Tensor
    num_drafts: torch.Tensor


@dataclass(frozen=True)
class Choices:
    """Where the outcome goes, for up to `max_rows` rows.

    tokens: int64 [max_rows, 2], whether the row holds numbers only (no NaN, no +inf, not -inf for all that may come)
    and the token id, 0 if not. logprob_ids: int32 and logprobs: float32 [max_rows, 1 + MAX_TOP], of rows that ask: the
    chosen token's first, then as many of the likeliest as they ask for, likeliest first, ties by id. host: where the
    tokens go as well; an event that is recorded behind the launch says when they are there.
    """

    tokens: torch.Tensor
    logprob_ids: torch.Tensor
    logprobs: torch.Tensor
    host: HostTokens | None = None


@triton.jit
def _drafts_of(row, token_ids, rows, num_drafts):
    """A pointer to the row's own token, and how many drafts end there."""
    own_token, count = rows, tl.full([], 0, tl.int32)
    if token_ids is not None:
        own_token = token_ids + tl.load(rows + row, cache_modifier=".cg")
        count = tl.load(num_drafts + row, cache_modifier=".cg")
    return own_token, count


@triton.jit
def _score_chunks(
    logits, seats, positions, token_ids, rows, num_drafts, parameters, token_states, biases,
    chunks, tops, block_maxima,
    V: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ID_BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait_for_producers(PDL)
    row = (tl.program_id(0) // NUM_CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % NUM_CHUNKS
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < V
    raw = tl.load(logits + row * V + ids, mask=inside, other=float("-inf"), cache_modifier=".cg")
    seat = tl.load(seats + row, cache_modifier=".cg").to(tl.int64)
    parameters += seat * _SEAT_FIELDS
    token_states += seat * V
    biases += seat * _BIAS_PLACES
    flags = tl.load(parameters + FLAGS, mask=seat >= 0, other=0)
    num_logprobs = tl.load(parameters + NUM_LOGPROBS, mask=seat >= 0, other=-1).to(tl.int32)
    position = tl.load(positions + row, cache_modifier=".cg") + 1
    out = chunks + (row * NUM_CHUNKS + chunk) * _CHUNK_FIELDS

    poisoned = tl.max(((raw != raw) | (raw == float("inf"))).to(tl.int32), axis=0)
    own_token, drafts = _drafts_of(row, token_ids, rows, num_drafts)
    values = scores(raw, ids, inside, flags, position, parameters, token_states, biases, own_token, drafts)
    keys = tl.where(inside, rank_key(values, ids, ID_BITS), LOWEST)
    if flags & SAMPLED:
        noisy = values + noise_of_run(chunk * (CHUNK // 4), CHUNK // 4, position, parameters)
        noisy_keys = tl.where(inside, rank_key(noisy, ids, ID_BITS), LOWEST)
        best = tl.max(noisy_keys, axis=0)
        if flags & FILTERED:
            top = tl.max(keys, axis=0)
            maximum = value_of(top >> ID_BITS)
            maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
            tl.store(out + BEST_SCORE, tl.max(tl.where(noisy_keys == best, keys, LOWEST), axis=0))
            tl.store(out + TOP_SCORE, top)
            tl.store(out + WEIGHT, tl.sum(tl.where(inside, weights(values, maximum), 0), axis=0))
            blocks: tl.constexpr = CHUNK // _BLOCK
            block_orders = tl.reshape(tl.where(inside, ordered(values), -(1 << 31)), [blocks, _BLOCK])
            place = (row * NUM_CHUNKS + chunk) * blocks + tl.arange(0, blocks)
            tl.store(block_maxima + place, tl.max(block_orders, axis=1))
    else:
        best = tl.max(keys, axis=0)
    tl.store(out + BEST, tl.where(poisoned != 0, _NOT_FINITE, best))
    if num_logprobs >= 0:
        raw = tl.load(logits + row * V + ids, mask=inside, other=float("-inf"), cache_modifier=".cg")  # fewer registers
        remaining = tl.where(inside, rank_key(raw, ids, ID_BITS), LOWEST)
        top = tl.max(remaining, axis=0)
        maximum = value_of(top >> ID_BITS)
        maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
        tl.store(out + RAW_TOP, top)
        tl.store(out + RAW_WEIGHT, tl.sum(tl.where(inside, weights(raw, maximum), 0), axis=0))
        for index in range(num_logprobs):
            top = tl.max(remaining, axis=0)
            tl.store(tops + (row * NUM_CHUNKS + chunk) * _MAX_TOP + index, top)
            remaining = tl.where(remaining == top, LOWEST, remaining)


@triton.jit
def _store_logprobs(
    logits, token, num_logprobs, chunks, tops, ids_out, logprobs_out,
    NUM_CHUNKS: tl.constexpr, PADDED_CHUNKS: tl.constexpr, ID_BITS: tl.constexpr,
):  # fmt: skip
    """Of one row: the chosen token's log-probability and those of the likeliest."""
    chunk = tl.arange(0, PADDED_CHUNKS)
    there = chunk < NUM_CHUNKS
    raw_tops = tl.load(chunks + chunk * _CHUNK_FIELDS + RAW_TOP, mask=there, other=LOWEST, cache_modifier=".cg")
    sums = tl.load(chunks + chunk * _CHUNK_FIELDS + RAW_WEIGHT, mask=there, other=0, cache_modifier=".cg")
    maximum = value_of(tl.max(raw_tops, axis=0) >> ID_BITS)
    base = log_sum_exp(total_weight(sums, value_of(raw_tops >> ID_BITS), maximum), maximum)
    chosen = tl.load(logits + token, cache_modifier=".cg").to(tl.float64)
    tl.store(ids_out, token)
    tl.store(logprobs_out, (chosen - base).to(tl.float32))
    lane = tl.arange(0, PADDED_CHUNKS * 32)
    there = (lane // 32 < NUM_CHUNKS) & (lane % 32 < num_logprobs)
    remaining = tl.load(tops + lane // 32 * _MAX_TOP + lane % 32, mask=there, other=LOWEST, cache_modifier=".cg")
    for index in range(num_logprobs):
        top = tl.max(remaining, axis=0)
        tl.store(ids_out + 1 + index, id_of(top, ID_BITS))
        tl.store(logprobs_out + 1 + index, (value_of(top >> ID_BITS).to(tl.float64) - base).to(tl.float32))
        remaining = tl.where(remaining == top, LOWEST, remaining)


@triton.jit(do_not_specialize=["max_rows"])
def _choose(
    logits, seats, positions, token_ids, rows, num_drafts, parameters, token_states, biases,
    chunks, tops, block_maxima, blocks, shortlist,
    tokens_out, ids_out, logprobs_out, host_tokens, turn, max_rows,
    V: tl.constexpr, NUM_CHUNKS: tl.constexpr, PADDED_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    SHORTLIST: tl.constexpr, PADDED_BLOCKS: tl.constexpr, ID_BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait_for_producers(PDL)
    row = tl.program_id(0).to(tl.int64)
    seat = tl.load(seats + row, cache_modifier=".cg").to(tl.int64)
    parameters += seat * _SEAT_FIELDS
    token_states += seat * V
    biases += seat * _BIAS_PLACES
    logits += row * V
    chunks += row * NUM_CHUNKS * _CHUNK_FIELDS
    chunk = tl.arange(0, PADDED_CHUNKS)
    fields = chunks + chunk * _CHUNK_FIELDS
    there = chunk < NUM_CHUNKS
    bests = tl.load(fields + BEST, mask=there, other=LOWEST, cache_modifier=".cg")
    flags = tl.load(parameters + FLAGS, mask=seat >= 0, other=0)
    num_logprobs = tl.load(parameters + NUM_LOGPROBS, mask=seat >= 0, other=-1).to(tl.int32)
    best = tl.max(bests, axis=0)
    finite = (best != _NOT_FINITE) & (value_of(best >> ID_BITS) != float("-inf"))
    if finite & ((flags & FILTERED) != 0):
        position = tl.load(positions + row, cache_modifier=".cg") + 1
        best_scores = tl.load(fields + BEST_SCORE, mask=there, other=LOWEST, cache_modifier=".cg")
        top_scores = tl.load(fields + TOP_SCORE, mask=there, other=LOWEST, cache_modifier=".cg")
        sums = tl.load(fields + WEIGHT, mask=there, other=0, cache_modifier=".cg")
        top = tl.max(top_scores, axis=0)
        total = total_weight(sums, value_of(top_scores >> ID_BITS), value_of(top >> ID_BITS))
        winner = tl.max(tl.where(bests == best, best_scores, LOWEST), axis=0)
        best = top
        # Where only the likeliest token is kept, there is nothing to look for.
        alone = load_double(parameters + TOP_P) * total.to(tl.float64) <= weights(0.0, 0.0).to(tl.float64)
        if (tl.load(parameters + TOP_K) > 1) & (alone == 0):
            row_blocks: tl.constexpr = NUM_CHUNKS * CHUNK // _BLOCK
            own_token, drafts = _drafts_of(row, token_ids, rows, num_drafts)
            best = kept_winner(
                (logits, flags, position, parameters, token_states, biases, own_token, drafts),
                winner, top, total,
                block_maxima + row * row_blocks, blocks + row * row_blocks, shortlist + row * SHORTLIST,
                V, row_blocks, PADDED_BLOCKS, ID_BITS,
            )  # fmt: skip
    token = tl.where(finite, id_of(best, ID_BITS), 0)
    column = tl.arange(0, 2)
    outcome = tl.where(column == 0, finite.to(tl.int64), token.to(tl.int64))
    tl.store(tokens_out + row * 2 + column, outcome)
    if host_tokens is not None:
        own_turn = tl.load(turn, cache_modifier=".cg").to(tl.int64)
        tl.store(host_tokens + (own_turn * max_rows + row) * 2 + column, outcome)
    if finite & ((flags & COUNTED) != 0):
        tl.debug_barrier()  # every thread has read the states
        state = tl.load(token_states + token, cache_modifier=".cg")
        tl.debug_barrier()
        tl.store(token_states + token, state + _COUNT_ONE)
    if finite & (num_logprobs >= 0):
        _store_logprobs(
            logits, token, num_logprobs, chunks, tops + row * NUM_CHUNKS * _MAX_TOP,
            ids_out + row * (_MAX_TOP + 1), logprobs_out + row * (_MAX_TOP + 1),
            NUM_CHUNKS, PADDED_CHUNKS, ID_BITS,
        )  # fmt: skip


def choose_tokens(
    logits: torch.Tensor,
    seats: torch.Tensor,
    positions: torch.Tensor,
    tensors: SeatTensors,
    workspace: ChoiceWorkspace,
    out: Choices,
    drafts: DraftRows | None = None,
    pdl: bool = True,
) -> None:
    """The next token of each row of logits float32 [S, vocab_size], which are not changed.

    seats: int32 [S], the seat of each row's request; negative for a row that is to be chosen greedily, such as one of
    nobody. A seat that is COUNTED has one row at most, and its chosen token is counted in its token states. positions:
    int64 [S], of each row's own token; the chosen one comes behind it. drafts: None where no row is behind a draft.
    pdl: False starts it only when the kernels before it are done. Launches that share a workspace must not overlap.
    """
    num_rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    assert logits.dtype == torch.float32
    assert seats.dtype == torch.int32
    assert seats.shape == positions.shape == (num_rows,)
    assert tensors.token_states.shape[1] == vocab_size
    assert workspace.chunks.shape[0] >= num_rows
    assert workspace.chunks.shape[1] == num_chunks
    assert all(t.shape[0] >= num_rows for t in (out.tokens, out.logprob_ids, out.logprobs))
    assert all(t.is_contiguous() for t in (logits, seats, positions, out.tokens, out.logprob_ids, out.logprobs))
    host = out.host
    if host is not None:
        assert host.tokens.dtype == torch.int64
        assert host.tokens.shape[2] == 2
        assert host.tokens.shape[1] >= num_rows
        assert host.tokens.is_contiguous()
        assert host.turn.dtype == torch.int32
        assert host.turn.shape == (1,)
    use_pdl = pdl and supports_pdl(logits.device)
    draft_rows: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None] = (None, positions, None)
    if drafts is not None:
        assert drafts.token_ids.dtype == drafts.rows.dtype == torch.int64
        assert drafts.num_drafts.dtype == torch.int32
        assert drafts.rows.shape == drafts.num_drafts.shape == (num_rows,)
        assert all(t.is_contiguous() for t in (drafts.token_ids, drafts.rows, drafts.num_drafts))
        draft_rows = (drafts.token_ids, drafts.rows, drafts.num_drafts)
    seat_state = (tensors.parameters, tensors.token_states, tensors.biases)
    options = {
        "V": vocab_size,
        "NUM_CHUNKS": num_chunks,
        "CHUNK": CHUNK,
        "ID_BITS": id_bits(vocab_size),
        "PDL": use_pdl,
        "num_warps": 16,
        "enable_fp_fusion": False,  # penalties round as the host rounds them
        **({"launch_pdl": True} if use_pdl else {}),
    }
    _score_chunks[(num_rows * num_chunks,)](
        logits, seats, positions, *draft_rows, *seat_state,
        workspace.chunks, workspace.tops, workspace.block_maxima,
        maxnreg=64,  # two programs a processor, and eight registers spilled; 102 without the limit
        **options,
    )  # fmt: skip
    _choose[(num_rows,)](
        logits, seats, positions, *draft_rows, *seat_state,
        workspace.chunks, workspace.tops, workspace.block_maxima, workspace.blocks, workspace.shortlist,
        out.tokens, out.logprob_ids, out.logprobs,
        *(None, None, 0) if host is None else (host.tokens, host.turn, host.tokens.shape[1]),
        PADDED_CHUNKS=triton.next_power_of_2(num_chunks),
        SHORTLIST=SHORTLIST,
        PADDED_BLOCKS=triton.next_power_of_2(num_chunks * CHUNK // BLOCK),
        **options,
    )  # fmt: skip
