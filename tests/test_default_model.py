"""The default model's text, against transformers reading the same file."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.config import CacheConfig, DType, EngineConfig, SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.request import Request, SamplingParams
from engine.tokenizer import Tokenizer, load_tokenizer

MAX_TOKENS = 64
NUM_THREADS = 1  # of transformers too, from the first engine on: beside other tests, more would wait for each other
pytestmark = pytest.mark.xdist_group("default_model")  # its weights are read once
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue to a child.",
    "Translate 'good morning' into Spanish.",
    "List three uses of a paperclip.",
    "What is 17 times 3?",
    "Tell me a joke about a cat.",
    "Who wrote Hamlet?",
    "Schreibe einen Satz über Berge.",
    "How do I boil an egg?",
]
TEXTS = [
    "Once upon a time, in a small village by the river,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics state that",
    "In 1969, astronauts of the Apollo 11 mission",
    "import numpy as np\n\nx = np.",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "Chapter 1\n\nIt was a cold night and",
    "Photosynthesis is the process by which",
    "🙂 Emoji are small pictures that",
]


@pytest.fixture(scope="module")
def tokenizer(default_model_path: Path) -> Tokenizer:
    return load_tokenizer(default_model_path)


@pytest.fixture(scope="module")
def reference(default_model_path: Path) -> Any:
    """The same weights as transformers dequantises and arranges them."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        default_model_path.parent, gguf_file=default_model_path.name, dtype=torch.float32
    ).eval()


@torch.no_grad()
def test_greedy_continuations_equal_transformers(
    default_model_path: Path, tokenizer: Tokenizer, reference: Any
) -> None:
    """20 prompts together, 64 tokens each. One pass over each finished text checks every token of it: the likeliest
    token after each prefix must be the one that we chose."""
    config = EngineConfig(
        dtype=DType.FLOAT32,
        cache=CacheConfig(num_blocks=400),
        scheduler=SchedulerConfig(max_model_len=512),
        num_threads=NUM_THREADS,
    )
    engine = LLMEngine.from_path(default_model_path, config)
    chats = [tokenizer.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    prompts = tokenizer.encode_batch(chats, add_special_tokens=False) + tokenizer.encode_batch(TEXTS)
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    requests = engine.generate([Request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)])
    assert len(requests) == 20
    for request in requests:
        sequence = torch.tensor([request.prompt_token_ids + request.output_token_ids])
        likeliest = reference(sequence).logits[0].argmax(-1)[request.num_prompt_tokens - 1 : -1]
        assert request.output_token_ids == likeliest.tolist()
    assert "Paris" in tokenizer.decode(requests[0].output_token_ids)


@torch.no_grad()
def test_logprobs_of_running_english(default_model_path: Path, tokenizer: Tokenizer, reference: Any) -> None:
    text = "The lighthouse keeper climbed the stairs every evening at dusk, carrying a can of oil and a clean cloth."
    ids = tokenizer.encode(text)
    config = EngineConfig(
        dtype=DType.FLOAT32,
        cache=CacheConfig(num_blocks=40),
        scheduler=SchedulerConfig(max_model_len=256),
        num_threads=NUM_THREADS,
    )
    engine = LLMEngine.from_path(default_model_path, config)
    expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0], dim=-1)
    for position in range(1, len(ids)):
        sampling = SamplingParams(temperature=0.0, max_tokens=1, logit_bias={ids[position]: 100.0}, logprobs=0)
        engine.add(Request(str(position), ids[:position], sampling))
        (output,) = engine.step()
        assert output.token_ids == (ids[position],)
        assert output.logprobs[0].logprob == pytest.approx(float(expected[position - 1, ids[position]]), abs=1e-3)
