"""What a draft is worth to the engine: acceptance and speed on held-out prompts, and that no token changes."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from time import perf_counter

from engine.config import (
    EngineConfig,
    SchedulerConfig,
    SpeculativeConfig,
    SpeculativeMethod,
)
from engine.llm_engine import LLMEngine
from engine.loader.checkpoint import Checkpoint
from engine.request import Request, SamplingParams
from engine.stats import SpeculationStats
from engine.tokenizer import Tokenizer
from tools.distil_draft.generate import cache_for, encode_prompts
from tools.distil_draft.prompts import Prompt, Split, draw_prompts
from tools.distil_draft.templates import Tag

NUM_DRAFT_TOKENS = 4
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(temperature=0.8, top_p=0.95),
}
METHODS = (SpeculativeMethod.OFF, SpeculativeMethod.NGRAM, SpeculativeMethod.LOCAL)
DRAWN_FOR_EACH = 20  # prompts for each that is wanted of a tag: far more than are needed


@dataclass(frozen=True)
class Cell:
    """One method on the prompts of one tag. `acceptance_rate`, `mean_acceptance_length`: over rounds that had drafts.
    `tokens_per_pass`: of a request, over all passes of the target that gave it tokens, those without drafts too.
    `speed_ratio`: tokens per second over those of exact mode with the same prompts."""

    tag: Tag
    sampling: str
    method: SpeculativeMethod
    num_output_tokens: int
    num_rounds: int
    acceptance_rate: float
    mean_acceptance_length: float
    tokens_per_pass: float
    tokens_per_s: float
    speed_ratio: float


def held_out_prompts(per_tag: int, seed: int) -> dict[Tag, list[Prompt]]:
    """So many of each tag."""
    drawn = draw_prompts(Split.HELD_OUT, DRAWN_FOR_EACH * per_tag, seed)
    by_tag = {tag: [prompt for prompt in drawn if prompt.tag is tag][:per_tag] for tag in Tag}
    assert all(len(prompts) == per_tag for prompts in by_tag.values())
    return by_tag


def evaluate(
    target: Checkpoint,
    tokenizer: Tokenizer,
    draft: Path,
    config: EngineConfig,
    *,
    per_tag: int,
    max_tokens: int,
    batch: int,
    seed: int,
    methods: Sequence[SpeculativeMethod] = METHODS,
    adaptive: bool = False,
    on_cell: Callable[[Cell], None] = lambda _cell: None,
) -> list[Cell]:
    """Each method on the same requests, up to `batch` at once. `config`: device, formats and threads count.

    adaptive: as many drafts as pay, as in a service, in place of NUM_DRAFT_TOKENS in every step.

    Raises:
        ModelError, ConfigError: target or draft cannot be used.
        AssertionError: a token differs from exact mode's.
    """
    prompts = {tag: encode_prompts(tokenizer, some) for tag, some in held_out_prompts(per_tag, seed).items()}
    longest = max(len(ids) for some in prompts.values() for ids in some)
    exact: dict[tuple[Tag, str], tuple[float, list[list[int]]]] = {}
    cells = []
    for method in dict.fromkeys((SpeculativeMethod.OFF, *methods)):  # first what the others are compared with
        engine = _start(target, config, _speculative(method, draft, adaptive), batch, longest + max_tokens)
        names = count()
        _run(engine, prompts[Tag.CHAT][:1], SamplingParams(temperature=0.8, seed=0, max_tokens=8), names)  # warms up
        for tag, some in prompts.items():
            for name, sampling in SAMPLINGS.items():
                sampling = replace(sampling, seed=seed, max_tokens=max_tokens)
                cell, outputs = _measure(engine, some, sampling, names, tag, name, method)
                speed, expected = exact.setdefault((tag, name), (cell.tokens_per_s, outputs))
                assert outputs == expected, f"{method} changed the output of a {tag} prompt, {name}"
                cells.append(replace(cell, speed_ratio=cell.tokens_per_s / speed))
                on_cell(cells[-1])
        engine.close()
        del engine
        gc.collect()  # the next one plans with the memory that is free
    return cells


def _speculative(method: SpeculativeMethod, draft: Path, adaptive: bool) -> SpeculativeConfig:
    path = draft if method is SpeculativeMethod.LOCAL else None
    if adaptive:
        return SpeculativeConfig(method, draft_model_path=path)
    return SpeculativeConfig(method, NUM_DRAFT_TOKENS, path, always=method is not SpeculativeMethod.OFF)


def _start(
    target: Checkpoint, config: EngineConfig, speculative: SpeculativeConfig, batch: int, max_model_len: int
) -> LLMEngine:
    scheduler = SchedulerConfig(
        max_num_seqs=batch, max_model_len=max_model_len, max_draft_tokens=batch * NUM_DRAFT_TOKENS
    )
    # Without prefix caching, or the second sampling would not have to prefill.
    cache = replace(cache_for(batch, max_model_len + speculative.num_draft_tokens), enable_prefix_caching=False)
    config = replace(config, scheduler=scheduler, cache=cache, speculative=speculative)
    engine = LLMEngine.from_checkpoint(target, config)
    while engine.prepare_next():  # as a service does when it is idle
        pass
    return engine


def _run(
    engine: LLMEngine, prompts: Sequence[list[int]], sampling: SamplingParams, names: Iterator[int]
) -> list[Request]:
    """All prompts; as many at once as the engine takes."""
    return engine.generate([Request(str(next(names)), ids, sampling) for ids in prompts])


def _measure(
    engine: LLMEngine,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    names: Iterator[int],
    tag: Tag,
    sampling_name: str,
    method: SpeculativeMethod,
) -> tuple[Cell, list[list[int]]]:
    before = engine.stats()
    started_s = perf_counter()
    requests = _run(engine, prompts, sampling, names)
    seconds = perf_counter() - started_s
    after = engine.stats()
    num_output_tokens = after.output_tokens - before.output_tokens
    speculation = _difference(before.speculation, after.speculation)
    cell = Cell(
        tag,
        sampling_name,
        method,
        num_output_tokens,
        speculation.num_rounds,
        speculation.acceptance_rate,
        speculation.mean_acceptance_length,
        num_output_tokens / (num_output_tokens - speculation.num_accepted_tokens),
        num_output_tokens / seconds,
        speed_ratio=1.0,
    )
    return cell, [request.output_token_ids for request in requests]


def _difference(before: SpeculationStats | None, after: SpeculationStats | None) -> SpeculationStats:
    if before is None or after is None:
        return SpeculationStats()
    return SpeculationStats(
        after.num_rounds - before.num_rounds,
        after.num_drafted_tokens - before.num_drafted_tokens,
        after.num_accepted_tokens - before.num_accepted_tokens,
    )
