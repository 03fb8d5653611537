"""Logits of every architecture against transformers, in float32."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.batch import ScheduledChunk
from engine.config import CacheConfig, Device, DType, EngineConfig, SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.request import Request, SamplingParams
from engine.runner.step_rows import StepRows

COMMON: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "llama-tied": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-3": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 50}),
    "mistral-head-dim": (transformers.MistralConfig, transformers.MistralForCausalLM, {"head_dim": 24}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 32}),
}
LENGTH = 600  # more than two splits of the attention, and many blocks


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random transformers model and the directory that it was saved to."""
    config_class, model_class, changes = MODELS[request.param]
    torch.manual_seed(1)
    model = model_class(config_class(**COMMON | changes)).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:  # fresh models have zeros and ones there, which hide mistakes
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "embed" in name:
            parameter.data *= 20
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return model, path


@pytest.fixture(params=[Device.CPU, pytest.param(Device.CUDA, marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    return request.param


def make_engine(path: Path, device: Device, **scheduling: Any) -> LLMEngine:
    return LLMEngine.from_path(
        path,
        EngineConfig(
            device=device,
            dtype=DType.FLOAT32,
            num_threads=1,
            cache=CacheConfig(block_size=16, num_blocks=200),
            scheduler=SchedulerConfig(max_model_len=1024, **scheduling),
        ),
    )


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


@torch.no_grad()
def test_logits_of_every_position(pair: tuple[Any, Path]) -> None:
    model, path = pair
    prompt = torch.randint(0, 500, (LENGTH,), generator=torch.Generator().manual_seed(2)).tolist()
    reference = model(torch.tensor([prompt])).logits[0]
    forward = make_engine(path, Device.CPU)._runner.forward
    forward.kv_cache._data[:, :, 1:].fill_(float("nan"))
    request = Request("r", prompt, SamplingParams(seed=1))
    request.block_table = [*range(5, 44)]
    rows = []
    for start, stop in ((0, 1), (1, 17), (17, 300), (300, 301), (301, LENGTH)):
        chunks = [ScheduledChunk(request, start, stop - start)]
        batch = forward.make_input(chunks, StepRows.of(chunks, 16))
        batch = replace(batch, logit_rows=torch.arange(stop - start))
        rows.append(forward.decoder.forward(batch, forward.kv_cache))
    assert relative_error(torch.cat(rows), reference) < 1e-4


@torch.no_grad()
def test_decoded_logits_with_chunked_prefill_and_prefix_hit(
    pair: tuple[Any, Path], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = pair
    engine = make_engine(path, device, token_budget=64, max_prefill_chunk=37)
    recorded: list[torch.Tensor] = []
    launch = engine._runner.forward.launch

    def recording_launch(chunks: Sequence[ScheduledChunk], num_further: int) -> Any:
        outcome = launch(chunks, num_further)
        outcome.choices()  # waits
        recorded.extend(outcome.logits.cpu())
        return outcome

    monkeypatch.setattr(engine._runner.forward, "launch", recording_launch)
    prompt = torch.randint(0, 500, (150,), generator=torch.Generator().manual_seed(3)).tolist()
    sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=0)
    for name, num_cached in (("first", 0), ("again", 144)):
        recorded.clear()
        (request,) = engine.generate([Request(name, prompt, sampling)])
        assert request.num_cached_tokens == num_cached
        sequence = prompt + request.output_token_ids
        reference = model(torch.tensor([sequence])).logits[0, len(prompt) - 1 : -1]
        assert len(recorded) == 20
        assert relative_error(torch.stack(recorded), reference) < 1e-4
        assert request.output_token_ids == reference.argmax(-1).tolist()
    engine.check_integrity()
