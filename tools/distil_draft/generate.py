"""The target answers the prompts, with the engine that is to be sped up."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from time import perf_counter

from engine.config import CacheConfig
from engine.llm_engine import LLMEngine
from engine.request import FinishReason, Request, SamplingParams
from engine.tokenizer import Tokenizer
from tools.distil_draft.prompts import Prompt
from tools.distil_draft.samples import Sample, SampleStore

# A draft must foresee greedy and sampled text. Of every three answers to a prompt one is greedy.
GREEDY_EVERY = 3
TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
TOP_P = 0.95
ENCODED_TOGETHER = 256


def sampling_of(sample_id: int, num_prompts: int, max_tokens: int) -> SamplingParams:
    """How a sample is chosen. Sample i answers prompt i modulo their number; later rounds have other seeds."""
    turn, place = divmod(sample_id, num_prompts)
    if turn < GREEDY_EVERY and place % GREEDY_EVERY == turn:
        return SamplingParams(temperature=0.0, seed=sample_id, max_tokens=max_tokens)
    temperature = TEMPERATURES[(place // GREEDY_EVERY + turn) % len(TEMPERATURES)]
    return SamplingParams(temperature=temperature, top_p=TOP_P, seed=sample_id, max_tokens=max_tokens)


def cache_for(width: int, max_model_len: int) -> CacheConfig:
    """Room for `width` requests of the greatest length, and no more: the device may have other work."""
    cache = CacheConfig()
    return replace(cache, num_blocks=1 + width * -(-max_model_len // cache.block_size))


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each: chats in the model's template, texts as they are."""
    texts = [
        tokenizer.render_chat([{"role": role, "content": content} for role, content in prompt.messages])
        if prompt.is_chat
        else prompt.messages[0][1]
        for prompt in prompts
    ]
    return tokenizer.encode_batch(texts, add_special_tokens=False)


def generate(
    engine: LLMEngine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    store: SampleStore,
    *,
    num_samples: int,
    max_tokens: int,
    width: int,
    deadline_s: float,
    on_progress: Callable[[int, int], None],
) -> None:
    """Fill the store up to `num_samples`, as far as time goes. What was begun is finished, so that long answers are not
    fewer for the lack of time.

    width: answers at once, of which as many again wait in the engine, so that none of its rows is ever free.
    deadline_s: of `perf_counter`; nothing is begun behind it. on_progress(samples, output tokens) that a step ended.
    """
    waiting = _requests(tokenizer, prompts, store.sample_ids, num_samples, max_tokens)
    live: dict[str, tuple[int, Request]] = {}
    while True:
        if perf_counter() < deadline_s:
            for sample_id, request in islice(waiting, 2 * width - len(live)):
                engine.add(request)
                live[request.request_id] = sample_id, request
        if not live:
            break
        ended = tokens = 0
        for output in engine.step():
            if output.finish_reason is None:
                continue
            sample_id, request = live.pop(output.request_id)
            if output.finish_reason is not FinishReason.ERROR:  # else the next run tries again
                ids = (*request.prompt_token_ids, *request.output_token_ids)
                store.add(Sample(sample_id, ids, request.num_prompt_tokens))
                ended, tokens = ended + 1, tokens + len(request.output_token_ids)
        if ended:
            on_progress(ended, tokens)
    store.flush()


def _requests(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], done: set[int], num_samples: int, max_tokens: int
) -> Iterator[tuple[int, Request]]:
    """Those that are not done, encoded some at a time."""
    wanted = (sample_id for sample_id in range(num_samples) if sample_id not in done)
    while ids := list(islice(wanted, ENCODED_TOGETHER)):
        encoded = encode_prompts(tokenizer, [prompts[sample_id % len(prompts)] for sample_id in ids])
        for sample_id, prompt_token_ids in zip(ids, encoded, strict=True):
            sampling = sampling_of(sample_id, len(prompts), max_tokens)
            yield sample_id, Request(str(sample_id), prompt_token_ids, sampling)
