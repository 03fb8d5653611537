"""Each method from the configuration alone; and drafts that are no drafts for this model."""

from pathlib import Path

import pytest

from engine.config import (
    CacheConfig,
    DType,
    EngineConfig,
    KVCacheDType,
    Quantization,
    SchedulerConfig,
    SpeculativeConfig,
    SpeculativeMethod,
)
from engine.errors import ConfigError, ModelError
from engine.llm_engine import LLMEngine
from engine.request import Request, SamplingParams
from engine.runner.start_up import Phase, StartUp
from tests.speculative.test_verification import make_requests, run
from tests.tiny_models import write_tiny_model


def start(path: Path, speculative: SpeculativeConfig, start_up: StartUp | None = None, **formats: object) -> LLMEngine:
    config = EngineConfig(
        dtype=DType.BFLOAT16,
        cache=CacheConfig(num_blocks=400, block_size=8, dtype=formats.get("kv", KVCacheDType.AUTO)),  # type: ignore[arg-type]
        quantization=formats.get("quantization", Quantization.NONE),  # type: ignore[arg-type]
        scheduler=SchedulerConfig(max_model_len=200, max_draft_tokens=100),
        speculative=speculative,
        num_threads=1,
    )
    return LLMEngine.from_path(path, config, start_up)


def repeating() -> list[Request]:
    """Prompts that say things twice, so that their answers do."""
    sampling = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    return [Request(str(i), [*range(5, 25), *range(5, 15), i], sampling) for i in range(3)]


FORMATS = [{}, {"quantization": Quantization.INT8, "kv": KVCacheDType.INT8}, {"quantization": Quantization.W8A8}]


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("method", [SpeculativeMethod.NGRAM, SpeculativeMethod.LOCAL])
def test_every_format_and_method(
    tmp_path: Path, method: SpeculativeMethod, always: bool, formats: dict[str, object]
) -> None:
    path = write_tiny_model(tmp_path / "target", tie_word_embeddings=True)
    draft = path if method is SpeculativeMethod.LOCAL else None
    start_up = StartUp()
    engine = start(path, SpeculativeConfig(method, 3, draft, always), start_up, **formats)
    assert (Phase.DRAFT in start_up.seconds) == (method is SpeculativeMethod.LOCAL)
    plain = start(path, SpeculativeConfig(), **formats)
    assert plain.stats().speculation is None
    for requests, expected in ((make_requests(), make_requests()), (repeating(), repeating())):
        assert run(engine, requests) == run(plain, expected)
    stats = engine.stats().speculation
    assert stats is not None
    if always:  # else it is a matter of time
        assert stats.num_drafted_tokens > 100
        assert stats.num_accepted_tokens > 50


def test_a_draft_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path, other = write_tiny_model(tmp_path / "target"), write_tiny_model(tmp_path / "other", vocab_size=300)
    with pytest.raises(ConfigError, match=r"other has a vocabulary of 300 tokens and its target one of 320"):
        start(path, SpeculativeConfig(SpeculativeMethod.LOCAL, draft_model_path=other))
    with pytest.raises(ModelError):
        start(path, SpeculativeConfig(SpeculativeMethod.LOCAL, draft_model_path=tmp_path / "nowhere"))
