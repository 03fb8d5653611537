"""What tests of the contract share: a Triton decoder behind its CUDA graphs, whose steps a test schedules by hand."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from engine.batch import ScheduledChunk
from engine.config import KVCacheDType, Quantization, SchedulerConfig
from engine.loader.checkpoint import open_checkpoint
from engine.model.kv_cache import KVCache
from engine.model.triton_decoder import TritonDecoder
from engine.model.weights import load_decoder
from engine.request import Request, SamplingParams
from engine.runner.graph_forward import GraphForward
from engine.runner.step_buckets import Bucket
from tests.tiny_models import write_tiny_model

NO_NUMBERS = 0  # a token whose embedding is NaN; padding rows hold it too
INTERPRETER_TOLERANCE = 1e-5  # of float32: the interpreter multiplies with numpy, whose order depends on the shape

# Large enough for several splits of keys and tiles of rows, small enough to run thousands of steps in a second.
CARD_MODEL: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True)
class Scale:
    """How much is tested: everything on the device, a little under the interpreter.

    contexts: tokens that a compared row sees, itself included, ascending. batches: rows of decoding steps. chunks: the
    longest chunks of prefills. longest_neighbour: tokens of the requests beside the compared ones.
    """

    device: str
    dtype: torch.dtype
    model: dict[str, Any]
    limits: SchedulerConfig
    block_size: int
    num_blocks: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    chunks: tuple[int, ...]
    longest_neighbour: int
    num_replays: int


INTERPRETER = Scale(
    device="cpu",
    dtype=torch.float32,
    model={"num_hidden_layers": 1, "vocab_size": 96},
    limits=SchedulerConfig(max_num_seqs=8, token_budget=16, max_model_len=32),
    block_size=4,
    num_blocks=80,
    contexts=(1, 6),
    batches=(4,),
    chunks=(4, 9),
    longest_neighbour=5,
    num_replays=4,
)
CARD = Scale(
    device="cuda",
    dtype=torch.bfloat16,
    model=CARD_MODEL,
    limits=SchedulerConfig(max_num_seqs=256, token_budget=1024, max_model_len=1024),
    block_size=16,
    num_blocks=6000,
    contexts=(1, 63, 64, 65, 255, 256, 257, 511, 512, 513),  # 256 keys are a split, 64 a tile of it
    batches=(2, 7, 8, 9, 16, 17, 33, 64, 100, 256),
    chunks=(1, 13, 64, 500, 1000),
    longest_neighbour=300,
    num_replays=1000,
)


class Comparisons:
    """Compares bits, or what the interpreter can promise, and counts, so that no test passes by comparing nothing."""

    def __init__(self, device: str) -> None:
        self.num_done = 0
        self._is_exact = device == "cuda"

    def check(self, actual: torch.Tensor, expected: torch.Tensor, *what: object) -> None:
        assert actual.shape == expected.shape, what
        assert actual.dtype == expected.dtype, what
        assert actual.numel() > 0, what
        assert torch.isfinite(actual).all(), what
        if self._is_exact:
            assert torch.equal(actual, expected), what
        else:
            assert (actual - expected).norm() <= INTERPRETER_TOLERANCE * expected.norm(), what
        self.num_done += 1


class Subject:
    """The decoder of a random model. Its KV cache holds NaN wherever nothing has been written.

    The graphs are captured when a step first needs them; what a step returns was always computed by a graph.
    """

    def __init__(self, directory: Path, scale: Scale, quantization: Quantization, cache_dtype: KVCacheDType) -> None:
        self.scale = scale
        checkpoint = open_checkpoint(write_tiny_model(directory, **scale.model))
        device, limits = torch.device(scale.device), scale.limits
        decoder = load_decoder(
            TritonDecoder, checkpoint, device, scale.dtype, limits.max_model_len, quantization=quantization
        )
        decoder._embedding = decoder._embedding.clone()  # on the CPU it is the file itself
        decoder._embedding[NO_NUMBERS] = float("nan")

        def make_kv_cache() -> KVCache:
            cache = KVCache(checkpoint.config, scale.num_blocks, scale.block_size, scale.dtype, device, cache_dtype)
            floats = cache._data if cache._scales is None else cache._scales
            floats[:, :, 1:].fill_(float("nan"))
            return cache

        self.forward = GraphForward(decoder, make_kv_cache, limits)
        self._free_blocks = iter(range(1, scale.num_blocks))
        self.num_graph_steps = 0

    @property
    def vocab_size(self) -> int:
        return self.forward.decoder.config.vocab_size

    @property
    def buckets(self) -> list[Bucket]:
        """Those that some step has used."""
        return list(self.forward._buckets._made.values())

    def request(self, token_ids: Sequence[int]) -> Request:
        """A request with blocks of its own, which nobody has written to."""
        request = Request("", list(token_ids), SamplingParams(seed=1))
        num_blocks = -(-len(token_ids) // self.scale.block_size)
        request.block_table = list(islice(self._free_blocks, num_blocks))
        assert len(request.block_table) == num_blocks, "the scale's num_blocks are too few"
        return request

    def launch(self, chunks: Sequence[ScheduledChunk]) -> dict[Request, torch.Tensor]:
        """Run a step of known tokens. Returns the logits of those that sample: float32 [vocab_size] each."""
        rows = self._launch_once(chunks)
        bucket = self.forward._last
        assert bucket is not None
        if self.scale.device == "cuda":
            graph = bucket.graph
            while graph is None:  # that was the bucket's first step, or its second, which is captured
                first, rows = rows, self._launch_once(chunks)
                graph = bucket.graph
                for request, row in rows.items():
                    assert torch.equal(row.nan_to_num(), first[request].nan_to_num()), "replayed: other bits"
            self.num_graph_steps += 1
        return rows

    def prefill(self, requests: Sequence[Request]) -> None:
        """Compute all their tokens, in as few steps as the budget allows for one request after the other."""
        budget = self.scale.limits.token_budget
        for request in requests:
            for start in range(0, request.num_tokens, budget):
                self.launch([ScheduledChunk(request, start, min(budget, request.num_tokens - start))])

    def _launch_once(self, chunks: Sequence[ScheduledChunk]) -> dict[Request, torch.Tensor]:
        outcome = self.forward.launch(chunks)
        outcome.choices()  # waits: the next step but one is staged where this one is
        logits = outcome.logits.clone()
        return {chunk.request: row for chunk, row in zip([c for c in chunks if c.samples], logits, strict=True)}

    def kv(self, request: Request, num_tokens: int) -> list[torch.Tensor]:
        """What the cache holds of the first tokens: [layers, 2, num_tokens, …]; of an int8 cache the scales too."""
        cache = self.forward.kv_cache
        parts = [cache._data] if cache._scales is None else [cache._data, cache._scales]
        return [part[:, :, request.block_table].flatten(2, 3)[:, :, :num_tokens] for part in parts]


def last_row(request: Request) -> ScheduledChunk:
    """The request's last token, as it is decoded."""
    return ScheduledChunk(request, request.num_tokens - 1, 1)


@dataclass(frozen=True)
class Neighbours:
    """Requests to stand beside the compared ones. Each kind of `poisoned` has NaN for logits in a way of its own.

    healthy: all but the last token of each is in the cache, and `expected` has the logits that its prefill ended with.
    """

    healthy: list[Request]
    poisoned: list[Request]
    expected: dict[Request, torch.Tensor]

    @classmethod
    def of(cls, subject: Subject, count: int) -> "Neighbours":
        """At least `count` in all."""
        draw = random.Random(3)
        scale = subject.scale

        def request(first_token: int) -> Request:
            length = draw.randrange(1, scale.longest_neighbour + 1)
            return subject.request([first_token, *(draw.randrange(1, subject.vocab_size) for _ in range(length))])

        healthy = [request(1) for _ in range(-(-count // 3))]
        expected: dict[Request, torch.Tensor] = {}
        for one in healthy:
            expected |= subject.launch([ScheduledChunk(one, 0, one.num_tokens)])
        # Nothing of these has been computed: their earlier KV is NaN. Some are NaN from their embedding on.
        unwritten = [request(1) for _ in healthy]
        embedded = [subject.request([NO_NUMBERS]) for _ in healthy]
        return cls(healthy, [each for pair in zip(unwritten, embedded, strict=True) for each in pair], expected)

    def take(self, count: int) -> list[Request]:
        """Two thirds of them poisoned; of one or two, all."""
        some = self.poisoned[: count - count // 3]
        return some + self.healthy[: count - len(some)]

    def check(self, rows: dict[Request, torch.Tensor], comparisons: Comparisons, *what: object) -> None:
        """The healthy ones among a step's rows have their bits, and the poisoned ones are what they should be."""
        for request in self.poisoned:
            assert request not in rows or rows[request].isnan().all(), "poison without effect"
        for request in self.healthy:
            if request in rows:
                comparisons.check(rows[request], self.expected[request], "neighbour", *what)


def tensors_of(record: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a dataclass and of those that it holds, with the names of their fields."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, torch.Tensor):
            yield field.name, value
        elif is_dataclass(value):
            yield from tensors_of(value)
