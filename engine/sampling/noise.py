"""Counter-based noise: Gumbel values that depend on nothing but their key.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the generator that Triton
ships too. The key is the seed, the counter (token id / 4, position, choice index, 0), and the token id's last two
bits choose among the four words that one counter yields.
"""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox_4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four 32-bit words for each counter. Words are int64 tensors that hold unsigned 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap where unsigned ones would not fit, which leaves both halves right after masking.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((second >> 32) & _MASK) ^ c1 ^ k0
        c1 = second & _MASK
        c2 = ((first >> 32) & _MASK) ^ c3 ^ k1
        c3 = first & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def gumbel_noise(token_ids: torch.Tensor, seed: int, choice_index: int, position: int) -> torch.Tensor:
    """Standard Gumbel noise of each token id (int64 [n]) at one position of one choice: float32 [n]."""
    zero = torch.zeros_like(token_ids)
    counter = (token_ids >> 2, zero + position, zero + choice_index, zero)
    words = torch.stack(philox_4x32(counter, (seed & _MASK, seed >> 32)))
    return _gumbel(words.gather(0, (token_ids & 3)[None])[0])


def gumbel_noise_of_vocabulary(vocab_size: int, seed: int, choice_index: int, position: int) -> torch.Tensor:
    """`gumbel_noise` of token ids 0 … vocab_size - 1 at a quarter of the work: float32 [vocab_size]."""
    quads = torch.arange(-(-vocab_size // 4))
    zero = torch.zeros_like(quads)
    words = philox_4x32((quads, zero + position, zero + choice_index, zero), (seed & _MASK, seed >> 32))
    return _gumbel(torch.stack(words, dim=1).flatten()[:vocab_size])


def _gumbel(words: torch.Tensor) -> torch.Tensor:
    # 23 bits and a half: every such value is exact in float32, and none is 0 or 1.
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))
