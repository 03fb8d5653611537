"""A row's logits and its KV have the same bits whatever they are computed beside, in whatever pieces, and how often.

On the device every compared row comes out of a captured graph. Under the interpreter a small version of the same tests
shows that they test something.
"""

import random
from dataclasses import dataclass
from itertools import product

import pytest
import torch

from engine.batch import ScheduledChunk
from engine.config import KVCacheDType, Quantization
from engine.request import Request
from tests.gpu.contract import (
    CARD,
    INTERPRETER,
    NO_NUMBERS,
    Comparisons,
    Neighbours,
    Scale,
    Subject,
    last_row,
    tensors_of,
)

Case = tuple[Scale, Quantization, KVCacheDType]

# Numpy's, about rows that are NaN.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")

CASES: list[Case] = [
    (CARD, Quantization.NONE, KVCacheDType.AUTO),
    (CARD, Quantization.INT8, KVCacheDType.AUTO),
    (CARD, Quantization.W8A8, KVCacheDType.AUTO),
    (CARD, Quantization.NONE, KVCacheDType.INT8),
    (CARD, Quantization.W8A8, KVCacheDType.INT8),
]
NUM_COMPANY = 7  # rows of others around a chunk of a prefill
MOST_CHUNKS = 64  # of a prompt, but for the longest
BYTES = (0xFF, 0x7F, 0x00)  # NaN and -1; numbers near the largest; zeros


@dataclass(frozen=True)
class Alone:
    """A text decoded token by token, alone: the logits of every position, [tokens, vocab_size], and the KV."""

    token_ids: list[int]
    logits: torch.Tensor
    kv: list[torch.Tensor]


@pytest.fixture(
    scope="module",
    params=[
        (INTERPRETER, Quantization.NONE, KVCacheDType.AUTO),
        *(pytest.param(case, marks=pytest.mark.gpu) for case in CASES),
    ],
    ids=lambda case: f"{case[0].device}-{case[1]}-{case[2]}",
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("model"), *request.param)


@pytest.fixture(scope="module")
def alone(subject: Subject) -> Alone:
    draw = random.Random(1)
    length = subject.scale.contexts[-1]
    token_ids = [draw.randrange(1, subject.vocab_size) for _ in range(length)]
    request = subject.request(token_ids)
    request.prompt_token_ids = token_ids[:1]
    request.num_tokens = 1
    logits = []
    for token_id in [*token_ids[1:], None]:
        logits.append(subject.launch([last_row(request)])[request])
        if token_id is not None:
            request.append_output(token_id)
    assert {bucket.layout.num_rows for bucket in subject.buckets} == {1}
    return Alone(token_ids, torch.stack(logits), subject.kv(request, length))


@pytest.fixture(scope="module")
def neighbours(subject: Subject, alone: Alone) -> Neighbours:  # noqa: ARG001 - which has the decoder to itself
    return Neighbours.of(subject, max(NUM_COMPANY, subject.scale.batches[-1]))


@pytest.fixture
def comparisons(subject: Subject) -> Comparisons:
    return Comparisons(subject.scale.device)


def check_kv(subject: Subject, request: Request, alone: Alone, comparisons: Comparisons, *what: object) -> None:
    for actual, expected in zip(subject.kv(request, request.num_tokens), alone.kv, strict=True):
        comparisons.check(actual, expected[:, :, : request.num_tokens], "KV", *what)


def test_rows_differ(subject: Subject, alone: Alone) -> None:
    """Equal rows would prove nothing if all rows were alike."""
    assert torch.isfinite(alone.logits).all()
    assert len(alone.logits) == subject.scale.contexts[-1]
    scaled = alone.logits / alone.logits.norm(dim=1, keepdim=True)
    likeness = scaled @ scaled.T - torch.eye(len(scaled), device=scaled.device)
    assert likeness.abs().max() < 0.999


def test_prefills(subject: Subject, alone: Alone, neighbours: Neighbours, comparisons: Comparisons) -> None:
    """Prompts that end at each context, whole and in chunks, by themselves and between rows of others."""
    scale = subject.scale
    company = [last_row(request) for request in neighbours.take(NUM_COMPANY)]
    done: set[tuple[int, int]] = set()
    for context, chunk in product(scale.contexts, scale.chunks):
        if context > MOST_CHUNKS * chunk and context != scale.contexts[-1]:
            continue
        for before, after in ([], []), (company[:2], company[2:]):
            request = subject.request(alone.token_ids[:context])
            for start in range(0, context, chunk):
                piece = ScheduledChunk(request, start, min(chunk, context - start))
                rows = subject.launch([*before, piece, *after])
            what = (context, chunk, len(after))
            comparisons.check(rows[request], alone.logits[context - 1], *what)
            check_kv(subject, request, alone, comparisons, *what)
            neighbours.check(rows, comparisons, *what)
            done.add((context, chunk))
    assert {context for context, _ in done} == set(scale.contexts)
    assert {chunk for context, chunk in done if context == scale.contexts[-1]} == set(scale.chunks)
    assert comparisons.num_done >= 2 * len(done) * (1 + len(alone.kv))


def test_batches(subject: Subject, alone: Alone, neighbours: Neighbours, comparisons: Comparisons) -> None:
    """Rows of every context, first, last and in the middle of batches of every size, beside rows that are NaN."""
    scale = subject.scale
    requests = [subject.request(alone.token_ids[:context]) for context in scale.contexts]
    subject.prefill(requests)
    places: set[tuple[int, int, int]] = set()
    for size in scale.batches:
        width = min(len(requests), max(1, size // 2))
        for first in range(0, len(requests), width):
            group = requests[first : first + width]
            batch = group + neighbours.take(size - len(group))
            assert len(batch) == size
            shuffled = random.Random(size).sample(batch, size)
            for turned in (batch, batch[size // 2 :] + batch[: size // 2], batch[::-1], shuffled):
                rows = subject.launch([last_row(request) for request in turned])
                neighbours.check(rows, comparisons, size)
                assert any(row.isnan().all() for row in rows.values())
                for request in group:
                    context, place = request.num_tokens, turned.index(request)
                    comparisons.check(rows[request], alone.logits[context - 1], context, size, place)
                    places.add((size, context, place))
    for request in requests:
        check_kv(subject, request, alone, comparisons)
    for size in scale.batches:
        assert {place for each, _, place in places if each == size} >= {0, size - 1}
        assert {context for each, context, _ in places if each == size} == set(scale.contexts)
    assert comparisons.num_done > len(places)


def test_prefills_beside_batches(
    subject: Subject, alone: Alone, neighbours: Neighbours, comparisons: Comparisons
) -> None:
    """Steps of everything: a prompt's end, decoding rows, and a long chunk of NaN."""
    scale = subject.scale
    requests = [subject.request(alone.token_ids[:context]) for context in scale.contexts]
    subject.prefill(requests)
    quarter = scale.limits.token_budget // 4
    poison = subject.request([NO_NUMBERS] * quarter)
    last_chunk = ScheduledChunk(poison, 0, quarter)
    company = [last_row(each) for each in neighbours.take(min(20, quarter - 1))]
    for request in requests:
        context = request.num_tokens
        # Computed once more: its end as a chunk, beside all the others' last rows.
        end = min(context, quarter)
        others = [last_row(each) for each in requests if each is not request]
        chunks = [*company, ScheduledChunk(request, context - end, end), *others, last_chunk]
        for order in (chunks, chunks[::-1]):
            rows = subject.launch(order)
            neighbours.check(rows, comparisons, context)
            assert rows[poison].isnan().all()
            for each in requests:
                comparisons.check(rows[each], alone.logits[each.num_tokens - 1], context, each.num_tokens)
            check_kv(subject, request, alone, comparisons, context)
    assert comparisons.num_done >= 2 * len(requests) * len(requests)


def test_replays(subject: Subject, alone: Alone, neighbours: Neighbours, comparisons: Comparisons) -> None:
    """One step over and over, with garbage in everything that may hold anything between steps."""
    scale, forward = subject.scale, subject.forward
    requests = [subject.request(alone.token_ids[:context]) for context in scale.contexts]
    subject.prefill(requests)
    ending, decoding = requests[-1], requests[:-1]
    length = min(ending.num_tokens - 1, scale.limits.token_budget // 4)
    prefill = ScheduledChunk(ending, ending.num_tokens - length, length)
    chunks = [prefill, *map(last_row, decoding + neighbours.take(3))]
    subject.launch(chunks)  # captured by now
    bucket = forward._last
    assert bucket is not None
    scratch = [
        tensor
        for record in (forward.decoder._space, bucket.inputs, forward._sampler._workspace)
        for name, tensor in tensors_of(record)
        if name != "places"  # a constant
    ]
    assert len(scratch) > 25
    expected = torch.stack([alone.logits[request.num_tokens - 1] for request in requests])
    for replay in range(scale.num_replays):
        for tensor in scratch:
            _fill(tensor, replay)
        if replay == 0:
            assert forward.decoder._space.hidden.isnan().all()
            assert (forward.decoder._space.attention.entries == -1).all()
        rows = subject.launch(chunks)
        assert forward._last is bucket
        comparisons.check(torch.stack([rows[request] for request in requests]), expected, replay)
        if replay % 100 == 0:
            neighbours.check(rows, comparisons, replay)
    for request in requests:
        check_kv(subject, request, alone, comparisons)
    assert comparisons.num_done > scale.num_replays


def _fill(tensor: torch.Tensor, replay: int) -> None:
    """Some bytes everywhere; in every fourth replay random ones."""
    content = tensor.view(torch.uint8)
    kind = replay % (len(BYTES) + 1)
    if kind < len(BYTES):
        content.fill_(BYTES[kind])
    else:
        content.random_(256)


def test_steps_went_through_graphs(subject: Subject, alone: Alone, neighbours: Neighbours) -> None:  # noqa: ARG001
    """What the tests above compared: each of their steps was replayed from a graph, in buckets of every size."""
    if subject.scale.device != "cuda":
        assert not subject.num_graph_steps
        return
    assert subject.num_graph_steps >= len(alone.logits)
    assert all(bucket.graph is not None for bucket in subject.buckets)
