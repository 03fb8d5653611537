"""Samples as padded batches, of about one length each."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tools.distil_draft.samples import Sample

POOLED = 32  # batches whose samples are sorted by length together: less padding, and still an order by chance


@dataclass(frozen=True)
class Batch:
    """token_ids: int64 [samples, longest], zeros behind each sample: attention is causal, so that no sample sees them.
    rows: int64 [N], places in the flattened batch that predict a token of an answer, sample by sample.
    targets: int64 [N], those tokens."""

    samples: Sequence[Sample]
    token_ids: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor


def epoch(samples: Sequence[Sample], max_tokens: int, draw: random.Random) -> Iterator[Batch]:
    """All samples once, up to `max_tokens` a batch with the padding."""
    order = list(samples)
    draw.shuffle(order)
    pools: list[list[Sample]] = [[]]
    room = POOLED * max_tokens
    for sample in order:
        if room < len(sample.token_ids):
            pools.append([])
            room = POOLED * max_tokens
        pools[-1].append(sample)
        room -= len(sample.token_ids)
    for pool in pools:
        groups = _groups(sorted(pool, key=lambda sample: len(sample.token_ids)), max_tokens)
        draw.shuffle(groups)
        yield from map(make_batch, groups)


def make_batch(samples: Sequence[Sample]) -> Batch:
    longest = max(len(sample.token_ids) for sample in samples)
    token_ids = torch.zeros((len(samples), longest), dtype=torch.int64)
    rows: list[int] = []
    targets: list[int] = []
    for place, sample in enumerate(samples):
        length, border = len(sample.token_ids), sample.num_prompt_tokens
        token_ids[place, :length] = torch.tensor(sample.token_ids)
        rows += range(place * longest + border - 1, place * longest + length - 1)
        targets += sample.token_ids[border:]
    return Batch(samples, token_ids, torch.tensor(rows), torch.tensor(targets))


def _groups(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Neighbours of a list that is sorted by length, in batches; one that is too long alone has a batch of its own."""
    groups: list[list[Sample]] = []
    for sample in samples:
        if groups and (len(groups[-1]) + 1) * len(sample.token_ids) <= max_tokens:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups
