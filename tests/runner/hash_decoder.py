"""A decoder whose model is a hash function, and whose KV remembers what was written where.

It reads nothing but what the device is given, so that a wrong token, position, slot, seat or block table shows in
the tokens that come out.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from engine.cache.block_manager import BlockManager
from engine.cache.block_pool import BlockPool
from engine.config import SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.model.triton_decoder import TritonInput
from engine.runner.graph_forward import GraphForward
from engine.runner.model_runner import ModelRunner
from engine.sampling.sampler import Sampler
from engine.scheduler.scheduler import Scheduler
from engine.speculative.speculation import Speculation

VOCAB_SIZE = 97
POISON = 96  # who has computed this token gets no numbers for logits
_PRIME = 1_000_003


def weigh(position: int, token: int) -> int:
    """What KV remembers of a token."""
    return (position + 3) * (token + 7) * 31 % _PRIME


def next_token(kv: list[int]) -> int:
    """A token from the KV of every position so far."""
    return sum((place + 1) * value for place, value in enumerate(kv)) % _PRIME % (VOCAB_SIZE - 1)


def expected_output(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token([weigh(position, token) for position, token in enumerate(tokens)]))
    return tokens[len(prompt) :]


@dataclass
class HashDecoder:
    """Stands in for a TritonDecoder."""

    block_size: int
    num_blocks: int
    num_failures_due: int = 0
    num_calls: int = 0

    device = torch.device("cpu")
    dtype = torch.float32
    config = SimpleNamespace(vocab_size=VOCAB_SIZE)

    def __post_init__(self) -> None:
        self.kv = [-1] * (self.num_blocks * self.block_size)

    def reserve(self, _max_rows: int, max_logit_rows: int) -> None:
        self._logits = torch.zeros(max_logit_rows, VOCAB_SIZE)

    def logits(self, num_rows: int) -> torch.Tensor:
        return self._logits[:num_rows]

    def forward(self, step: TritonInput, _kv_cache: Any) -> torch.Tensor:
        self.num_calls += 1
        seats, positions = step.row_request.tolist(), step.positions.tolist()
        token_ids, slots = step.token_ids.tolist(), step.slot_mapping.tolist()
        if self.num_failures_due:
            self.num_failures_due -= 1
            step.block_tables.zero_()
            raise torch.OutOfMemoryError("CUDA out of memory")
        for seat, position, token, slot in zip(seats, positions, token_ids, slots, strict=True):
            assert (seat < 0) == (slot < self.block_size), "a request writes to the null block, or nobody elsewhere"
            self.kv[slot] = weigh(position, token) if token != POISON else _PRIME
        logits = self._logits[: len(step.logit_rows)].zero_()
        for place, row in enumerate(step.logit_rows.tolist()):
            if seats[row] < 0:
                continue
            table = step.block_tables[seats[row]].tolist()
            size = self.block_size
            kv = [self.kv[table[p // size] * size + p % size] for p in range(positions[row] + 1)]
            logits[place, next_token(kv)] = 1.0
            if _PRIME in kv:
                logits[place, 5] = float("nan")
        return logits


def make_engine(
    num_blocks: int = 200,
    block_size: int = 2,
    prefix_caching: bool = True,
    speculation: Speculation | None = None,
    **limits: Any,
) -> tuple[LLMEngine, HashDecoder]:
    config = SchedulerConfig(**{"max_model_len": 100, "max_num_seqs": 20, "token_budget": 40} | limits)
    decoder = HashDecoder(block_size, num_blocks)
    kv_cache = SimpleNamespace(num_blocks=num_blocks, block_size=block_size)
    forward = GraphForward(decoder, lambda: kv_cache, config)  # type: ignore[arg-type, return-value]
    blocks = BlockManager(BlockPool(num_blocks, block_size, prefix_caching))
    sampler = Sampler(())
    engine = LLMEngine(
        ModelRunner(forward, sampler),
        Scheduler(config, blocks),
        blocks,
        sampler,
        vocab_size=VOCAB_SIZE,
        max_model_len=config.max_model_len,
        fingerprint="hash",
        speculation=speculation,
    )
    return engine, decoder
