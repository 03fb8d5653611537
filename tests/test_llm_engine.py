"""The step loop: how requests end, and that one request's failure is nobody else's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import CacheConfig, DType, EngineConfig, SchedulerConfig
from engine.errors import ConfigError, InvalidRequest, ModelError
from engine.llm_engine import LLMEngine
from engine.request import FinishReason, Request, RequestOutput, SamplingParams
from engine.runner.eager_forward import EagerForward
from tests.tiny_models import write_tiny_model

POISONED_TOKEN = 77


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in which one token has no numbers for an embedding."""
    path = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISONED_TOKEN] = float("nan")
    save_file(tensors, str(path / "model.safetensors"))
    return path


def make_engine(path: Path, num_blocks: int = 100, **scheduling: Any) -> LLMEngine:
    cache = CacheConfig(num_blocks=num_blocks)
    scheduler = SchedulerConfig(**{"max_model_len": 200} | scheduling)
    return LLMEngine.from_path(path, EngineConfig(dtype=DType.FLOAT32, cache=cache, scheduler=scheduler, num_threads=1))


def make_request(name: str = "r", prompt: list[int] | None = None, **sampling: Any) -> Request:
    return Request(name, prompt or [5, 6, 7], SamplingParams(**{"temperature": 0.0, "max_tokens": 8} | sampling))


def run(engine: LLMEngine, *requests: Request) -> dict[str, list[RequestOutput]]:
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    assert engine.stats().num_blocks_in_use == 0
    return outputs


def test_ends(path: Path) -> None:
    engine = make_engine(path)
    (free,) = engine.generate([make_request(ignore_eos=True)])
    tokens = free.output_token_ids
    assert (len(tokens), free.finish_reason) == (8, FinishReason.LENGTH)

    stop = tokens[4]
    first = tokens.index(stop)
    stopped = run(engine, make_request("s", stop_token_ids=(stop,)))["s"]
    assert [token for output in stopped for token in output.token_ids] == tokens[: first + 1]
    assert stopped[-1].finish_reason is FinishReason.STOP
    assert stopped[-1].stop_token_id == stop

    (later,) = engine.generate([make_request("m", stop_token_ids=(stop,), min_tokens=7)])
    assert stop not in later.output_token_ids[:7]
    assert len(later.output_token_ids) >= 7


def test_context_length_ends_a_request(path: Path) -> None:
    (request,) = make_engine(path).generate([make_request(prompt=[5] * 190, max_tokens=1000, ignore_eos=True)])
    assert request.num_tokens == 200
    assert request.finish_reason is FinishReason.LENGTH


def test_eos_of_the_model(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    (free,) = make_engine(path).generate([make_request(ignore_eos=True, max_tokens=30)])
    eos = free.output_token_ids[3]
    path = write_tiny_model(tmp_path / "eos", eos_token_id=[eos, 319])
    (ended, ignoring) = make_engine(path).generate(
        [make_request("a", max_tokens=30), make_request("b", max_tokens=30, ignore_eos=True)]
    )
    assert ended.output_token_ids == free.output_token_ids[: free.output_token_ids.index(eos) + 1]
    assert ignoring.output_token_ids == free.output_token_ids


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request(prompt=[5] * 200), "context length is 200 tokens, and the prompt has 200"),
        (make_request(prompt=[5, 320]), "between 0 and 319"),
        (make_request(prompt=[-1]), "between 0 and 319"),
        (make_request(logit_bias={400: 1.0}), "between 0 and 319"),
        (make_request(stop_token_ids=(320,)), "between 0 and 319"),
        (Request("r", [], SamplingParams()), "empty"),
    ],
)
def test_refused_requests(path: Path, request_: Request, message: str) -> None:
    engine = make_engine(path)
    with pytest.raises(InvalidRequest, match=message):
        engine.add(request_)
    assert not engine.has_work


def test_a_request_without_seed_gets_one(path: Path) -> None:
    engine = make_engine(path)
    first, second = (make_request(name, temperature=1.0, max_tokens=30, ignore_eos=True) for name in "ab")
    engine.generate([first, second])
    assert first.sampling.seed != second.sampling.seed
    again = make_request("c", temperature=1.0, max_tokens=30, ignore_eos=True, seed=first.sampling.seed)
    engine.generate([again])
    assert again.output_token_ids == first.output_token_ids != second.output_token_ids


def test_nan_fails_one_request_and_its_blocks_poison_nobody(path: Path) -> None:
    good = [make_request(str(i), [5 + i] * 40, ignore_eos=True, max_tokens=20) for i in range(3)]
    expected = [r.output_token_ids for r in make_engine(path).generate(good)]
    engine = make_engine(path, num_blocks=20, max_prefill_chunk=16)
    bad = [make_request(f"bad{i}", [9] * 30 + [POISONED_TOKEN] * (i + 1)) for i in range(3)]
    good = [make_request(str(i), [5 + i] * 40, ignore_eos=True, max_tokens=20) for i in range(3)]
    outputs = run(engine, *[request for pair in zip(bad, good, strict=True) for request in pair])
    for request in bad:
        assert [output.finish_reason for output in outputs[request.request_id]] == [FinishReason.ERROR]
        assert "NaN" in str(outputs[request.request_id][0].error)
    assert [request.output_token_ids for request in good] == expected
    # A prefix that was computed from NaN would be found again here, were it cached for good.
    assert run(engine, make_request("after", [9] * 30))["after"][-1].finish_reason is FinishReason.LENGTH


def test_out_of_memory_fails_the_step_and_the_engine_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(path)
    expected = engine.generate([make_request("x", max_tokens=8)])[0].output_token_ids
    first, second, late = make_request("a"), make_request("b"), make_request("c", max_tokens=8)
    engine.add(first)
    engine.add(second)
    engine.step()
    forward = engine._runner.forward.decoder.forward

    def exhausted(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(engine._runner.forward.decoder, "forward", exhausted)
    outputs = engine.step()
    assert {output.request_id: output.finish_reason for output in outputs} == dict.fromkeys("ab", FinishReason.ERROR)
    assert all("(2.00 GiB more were asked for): lower max_num_seqs" in str(output.error) for output in outputs)
    engine.check_integrity()
    monkeypatch.setattr(engine._runner.forward.decoder, "forward", forward)
    engine.generate([late])
    assert late.output_token_ids == expected


def test_out_of_memory_before_the_first_step_is_a_matter_of_configuration(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(EagerForward, "warm_up", exhausted)
    with pytest.raises(ConfigError, match=r"before the first step, with .* lower max_num_seqs"):
        LLMEngine.from_path(path, EngineConfig(num_threads=1))
    LLMEngine.from_path(path, EngineConfig(num_threads=1, warm_up=False))


def test_abort_frees_at_once(path: Path) -> None:
    engine = make_engine(path)
    running, waiting = make_request("a", [5] * 100, max_tokens=50), make_request("b")
    engine.add(running)
    engine.step()
    engine.add(waiting)
    for name in "ab":
        output = engine.abort(name)
        assert output is not None
        assert output.finish_reason is FinishReason.ABORT
        assert engine.abort(name) is None
    engine.check_integrity()
    assert engine.stats().num_blocks_in_use == 0
    assert not engine.has_work


def test_a_cache_too_small_says_what_to_change(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lower max_model_len, set kv_cache_dtype=int8, or give the cache 0\.00 GiB"):
        make_engine(path, num_blocks=5)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    tensors = load_file(path / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, str(path / "model.safetensors"))
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' is missing"):
        make_engine(path)
    save_file(tensors | {"model.norm.weight": norm[:10].clone()}, str(path / "model.safetensors"))
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor 'model\.norm\.weight' has shape \[10\]"):
        make_engine(path)
