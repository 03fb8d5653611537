# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""What becomes of a logit before it competes: bias, penalties, mask, temperature, noise; and how scores are ordered.

Everything here is elementwise, with the roundings of engine.sampling.sampler: float32, one operation after another.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Fields of a seat's parameters, int64 each; those marked f hold the bits of a float64.
FLAGS = tl.constexpr(0)
TEMPERATURE = tl.constexpr(1)  # f
TOP_K = tl.constexpr(2)  # between 1 and vocab_size
TOP_P = tl.constexpr(3)  # f
MIN_P = tl.constexpr(4)  # f
REPETITION = tl.constexpr(5)  # f
PRESENCE = tl.constexpr(6)  # f
FREQUENCY = tl.constexpr(7)  # f
SEED = tl.constexpr(8)
CHOICE_INDEX = tl.constexpr(9)
MASKED_UNTIL = tl.constexpr(10)  # tokens before this position may not be ones that stop the request
NUM_LOGPROBS = tl.constexpr(11)  # of the likeliest tokens, at most vocab_size; -1: not even the chosen one's
SEAT_FIELDS = 16  # a row is one line of 128 bytes

# Flags; a seat with none of them is plainly greedy.
SAMPLED = tl.constexpr(1)
FILTERED = tl.constexpr(2)  # sampled, and top-k, top-p or min-p may leave tokens out
ADJUSTED = tl.constexpr(4)  # the seat's row of token states is in use
COUNTED = tl.constexpr(8)  # and chosen tokens are counted in it

# A token's state, int32: bit 0 says that it is in the prompt, bit 1 that it stops the request, then the place of its
# bias (0: none), then how often it is in the output.
IN_PROMPT = 1
STOPS = 2
BIAS_SHIFT = 2
BIAS_PLACES = 1 << 10
COUNT_SHIFT = 12
MAX_COUNT = (1 << 20) - 1

_STOPS = tl.constexpr(STOPS)
_BIAS_SHIFT = tl.constexpr(BIAS_SHIFT)
_BIAS_PLACES = tl.constexpr(BIAS_PLACES)
_COUNT_SHIFT = tl.constexpr(COUNT_SHIFT)
_MAX_COUNT = tl.constexpr(MAX_COUNT)
_WEIGHT_ONE = tl.constexpr(float(1 << 40))

LOWEST = tl.constexpr(-(1 << 63))  # below every rank key


@dataclass(frozen=True)
class SeatTensors:
    """What the device knows of the request in each seat.

    parameters: int64 [seats, SEAT_FIELDS]; token_states: int32 [seats, vocab_size], read only for seats that are
    ADJUSTED; biases: float32 [seats, BIAS_PLACES].
    """

    parameters: torch.Tensor
    token_states: torch.Tensor
    biases: torch.Tensor


def seat_tensors(max_seats: int, vocab_size: int, device: torch.device) -> SeatTensors:
    """Plainly greedy seats. Allocated once, since a graph keeps the addresses: the states take as much as the logits of
    `max_seats` rows."""
    parameters = torch.zeros((max_seats, SEAT_FIELDS), dtype=torch.int64, device=device)
    parameters[:, NUM_LOGPROBS.value] = -1
    return SeatTensors(
        parameters,
        torch.zeros((max_seats, vocab_size), dtype=torch.int32, device=device),
        torch.zeros((max_seats, BIAS_PLACES), device=device),
    )


def id_bits(vocab_size: int) -> int:
    """Bits of a rank key that hold the token id."""
    return max(1, (vocab_size - 1).bit_length())


@triton.jit
def ordered(values):
    """float32 to int32 that compare alike: -0 is 0, and NaN lies beyond infinity on either side."""
    bits = tl.where(values == 0, 0, values.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(order):
    """The float32 of an `ordered` int32 or int64."""
    order = order.to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def rank_key(values, ids, ID_BITS: tl.constexpr):
    """int64 that are larger for larger values and, where these are equal, for lower ids: no two are equal."""
    return (ordered(values).to(tl.int64) << ID_BITS) | ((1 << ID_BITS) - 1 - ids).to(tl.int64)


@triton.jit
def id_of(key, ID_BITS: tl.constexpr):
    """The token id in a rank key, int32."""
    return ((1 << ID_BITS) - 1 - (key & ((1 << ID_BITS) - 1))).to(tl.int32)


@triton.jit
def load_double(pointer):
    """A float64 field of a seat's parameters."""
    return tl.load(pointer).to(tl.float64, bitcast=True)


@triton.jit
def scores(raw, ids, inside, flags, position, parameters, token_states, biases, own_token, num_drafts):
    """float32 logits of tokens `ids` as they compete: adjusted as the seat wants it and divided by the temperature.

    position: of the token that is to be chosen. The pointers are to the seat's own rows. own_token: pointer to the
    row's token; it and those before it, `num_drafts` in all, are output that the states do not know of.
    """
    values = raw
    if flags & ADJUSTED:
        state = tl.load(token_states + ids, mask=inside, other=0, cache_modifier=".cg")
        place = (state >> _BIAS_SHIFT) & (_BIAS_PLACES - 1)
        values = values + tl.load(biases + place, mask=inside & (place > 0), other=0.0)
        count = (state >> _COUNT_SHIFT) & _MAX_COUNT
        for place in range(num_drafts):
            count += (ids == tl.load(own_token - place, cache_modifier=".cg")).to(tl.int32)
        repetition = load_double(parameters + REPETITION).to(tl.float32)
        repeated = tl.where(values > 0, tl.div_rn(values, tl.zeros_like(values) + repetition), values * repetition)
        seen = ((state & 1) != 0) | (count > 0)
        values = tl.where(seen, repeated, values)  # a penalty of 1 changes nothing
        frequency = load_double(parameters + FREQUENCY).to(tl.float32)
        presence = load_double(parameters + PRESENCE).to(tl.float32)
        values = tl.where(count > 0, values - (frequency * count.to(tl.float32) + presence), values)
        masked = ((state & _STOPS) != 0) & (position < tl.load(parameters + MASKED_UNTIL))
        values = tl.where(masked, float("-inf"), values)
    if flags & SAMPLED:
        temperature = load_double(parameters + TEMPERATURE).to(tl.float32)
        values = tl.div_rn(values, tl.zeros_like(values) + temperature)
    return values


@triton.jit
def gumbel(words):
    """Standard Gumbel noise from random words, as engine.sampling.noise has it."""
    uniform = ((words >> 9).to(tl.float32) + 0.5) * (2.0**-23)
    return -tl.log(-tl.log(uniform))


@triton.jit
def noise_words(quads, position, parameters):
    """Four random words for each four token ids: those of ids 4 q … 4 q + 3 for each q of `quads`."""
    nothing = quads * 0
    position = nothing + position.to(tl.int32)
    choice_index = nothing + tl.load(parameters + CHOICE_INDEX).to(tl.int32)
    return tl.philox(tl.load(parameters + SEED), quads, position, choice_index, nothing)


@triton.jit
def noise_of_run(first_quad, QUADS: tl.constexpr, position, parameters):
    """Noise of 4 QUADS consecutive token ids, from 4 first_quad on."""
    first, second, third, fourth = noise_words(first_quad + tl.arange(0, QUADS), position, parameters)
    return gumbel(tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth)))


@triton.jit
def noise_of(ids, position, parameters):
    """Noise of any token ids, at four times the work."""
    first, second, third, fourth = noise_words(ids >> 2, position, parameters)
    last_bits = ids & 3
    words = tl.where(last_bits == 0, first, tl.where(last_bits == 1, second, tl.where(last_bits == 2, third, fourth)))
    return gumbel(words)


@triton.jit
def weights(values, maximum):
    """exp(value - maximum) in units of 2^-40, int64: sums of these are exact, whatever their order."""
    return (tl.exp(values - maximum) * _WEIGHT_ONE).to(tl.int64)


@triton.jit
def total_weight(sums, maxima, maximum):
    """The sum of `weights` of parts, each relative to a maximum of its own, relative to one `maximum`."""
    decay = tl.exp(maxima.to(tl.float64) - maximum.to(tl.float64))
    return tl.sum(tl.where(sums > 0, sums.to(tl.float64) * decay, 0.0).to(tl.int64), axis=0)


@triton.jit
def log_sum_exp(total, maximum):
    """float64 log of the sum of exponentials whose `weights` relative to `maximum` sum to `total`."""
    return maximum.to(tl.float64) + tl.log(total.to(tl.float64) / _WEIGHT_ONE)
