"""The default model and the draft model that ships for it."""

from pathlib import Path

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig, SpeculativeMethod
from engine.llm_engine import LLMEngine
from engine.loader.catalogue import CATALOGUE, DEFAULT_MODEL
from engine.loader.shipped import shipped_model
from engine.request import Request, SamplingParams
from engine.stats import SpeculationStats
from engine.tokenizer import load_tokenizer

NUM_DRAFT_TOKENS = 4
GREEDY, SAMPLED = SamplingParams(temperature=0.0, max_tokens=40), SamplingParams(temperature=0.8, seed=1, max_tokens=40)
QUESTIONS = {
    "Why do leaves fall in autumn?": GREEDY,
    "Write a Python function that adds numbers.": GREEDY,
    "How do I make a cup of tea?": SAMPLED,
}


def answers(path: Path, speculative: SpeculativeConfig) -> tuple[list[list[int]], SpeculationStats | None]:
    tokenizer = load_tokenizer(path)
    chats = [tokenizer.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    prompts = tokenizer.encode_batch(chats, add_special_tokens=False)
    num_requests = len(QUESTIONS)
    limits = SchedulerConfig(
        max_num_seqs=num_requests, max_model_len=128, max_draft_tokens=NUM_DRAFT_TOKENS * num_requests
    )
    config = EngineConfig(cache=CacheConfig(num_blocks=40), scheduler=limits, speculative=speculative, num_threads=1)
    engine = LLMEngine.from_path(path, config)
    requests = [Request(*each) for each in zip(QUESTIONS, prompts, QUESTIONS.values(), strict=True)]
    outputs = [request.output_token_ids for request in engine.generate(requests)]
    return outputs, engine.stats().speculation


def test_its_drafts_are_right_often_and_change_nothing(default_model_path: Path) -> None:
    name = CATALOGUE[DEFAULT_MODEL].draft_model
    assert name is not None
    draft = SpeculativeConfig(SpeculativeMethod.LOCAL, NUM_DRAFT_TOKENS, shipped_model(name), always=True)
    outputs, stats = answers(default_model_path, draft)
    assert outputs == answers(default_model_path, SpeculativeConfig())[0]
    assert stats is not None
    assert stats.num_rounds > 15
    assert stats.mean_acceptance_length > 1.5
