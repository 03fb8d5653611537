"""The noise generator against its paper's test vectors, and its statistics."""

import pytest
import torch

from engine.sampling.noise import gumbel_noise, gumbel_noise_of_vocabulary, philox_4x32

# Known answers of philox4x32-10, published with Random123: (counter, key, words)
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    computed = philox_4x32(tuple(torch.tensor([word]) for word in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word) for word in computed) == words


def test_any_subset_of_ids_has_the_vocabulary_s_noise() -> None:
    whole = gumbel_noise_of_vocabulary(1003, seed=(1 << 62) + 5, choice_index=3, position=77)
    ids = torch.tensor([1002, 0, 5, 4, 3, 500])
    assert torch.equal(gumbel_noise(ids, (1 << 62) + 5, 3, 77), whole[ids])


def test_every_part_of_the_key_matters() -> None:
    keys = [(1, 0, 0), (2, 0, 0), (1 + (1 << 32), 0, 0), (1, 1, 0), (1, 0, 1), (1, 0, 4)]
    rows = [tuple(gumbel_noise_of_vocabulary(64, *key).tolist()) for key in keys]
    assert len(set(rows)) == len(rows)


def test_noise_is_gumbel() -> None:
    noise = torch.cat([gumbel_noise_of_vocabulary(20_000, 9, 0, position) for position in range(10)]).double()
    assert torch.isfinite(noise).all()
    # Quantiles of the standard Gumbel distribution: -log(-log(q)); the error of 200,000 samples is below 0.01.
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    assert torch.allclose(torch.quantile(noise, quantiles), -torch.log(-torch.log(quantiles)), atol=0.02)
    # Neighbouring ids share a counter: their words must not be related.
    pairs = noise.view(-1, 2) - noise.mean()
    assert abs(float((pairs[:, 0] * pairs[:, 1]).mean() / noise.var())) < 0.02
