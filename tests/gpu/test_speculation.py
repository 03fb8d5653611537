"""A thousand requests of every kind, drafted for by each proposer: not one token is another than without drafts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.loader.checkpoint import open_checkpoint
from engine.request import FinishReason, Request
from engine.speculative.draft_model import DraftModel
from engine.speculative.local import LocalProposer
from engine.speculative.ngram import NgramProposer
from engine.speculative.proposer import Proposer
from engine.speculative.speculation import Speculation
from tests.gpu.test_mixed_requests import SCALES, Outcomes, Scale, is_aborted, make_engine, make_requests, run_mixed
from tests.serve_app.draft_process import draft_process
from tests.serve_app.patient_proposer import PatientProposer
from tests.speculative.oracle import Oracle, RandomProposer
from tests.tiny_models import write_tiny_model

NUM_DRAFT_TOKENS = 4
MAX_DRAFT_TOKENS = 128
# Of what is drafted, the least that has to be accepted. A draft model that is the target itself is wrong behind a stop,
# and where penalties count.
ACCEPTANCE = {"oracle": 0.9, "right-until-2": 0.4, "random": 0.0, "ngram": 0.0, "local": 0.4, "remote": 0.3}


def grown(scale: Scale) -> Scale:
    """More requests, less time for each."""
    return replace(scale, num_requests=1000 if scale.num_requests > 100 else 52)


CASES = [
    pytest.param(grown(case.values[0]), marks=case.marks) if hasattr(case, "values") else grown(case) for case in SCALES
]


@contextmanager
def proposer_of(name: str, path: Path, scale: Scale, outputs: dict[str, list[int]]) -> Iterator[Proposer]:
    vocab_size = scale.model["vocab_size"]
    if name == "remote":
        with draft_process("draft", str(path), scale.device, scale.dtype) as (_, endpoint):
            proposer = PatientProposer(
                lambda _: [endpoint], NgramProposer(), vocab_size=vocab_size, target_name="target"
            )
            assert proposer.wait_for_connection(60.0)
            yield proposer
            proposer.close()
    elif name == "local":
        config = EngineConfig(
            device=scale.device,
            dtype=scale.dtype,
            cache=CacheConfig(num_blocks=4000),
            scheduler=SchedulerConfig(max_num_seqs=scale.max_num_seqs, max_model_len=1024, token_budget=512),
            num_threads=1,
            warm_up=False,
        )
        yield LocalProposer(DraftModel.from_checkpoint(open_checkpoint(path), config))
    elif name == "ngram":
        yield NgramProposer()
    elif name == "random":
        yield RandomProposer({}, vocab_size)
    else:
        yield Oracle(outputs, vocab_size, None if name == "oracle" else 2)


def compare(scale: Scale, drafted: Outcomes, exact: Outcomes, requests: list[Request]) -> None:
    for index in range(scale.num_requests):
        actual, expected = drafted[str(index)], exact[str(index)]
        if is_aborted(index):  # some tokens later or earlier
            count = min(len(actual.token_ids), len(expected.token_ids))
            assert actual.finish_reason is FinishReason.ABORT
            assert actual.token_ids[:count] == expected.token_ids[:count]
        else:
            assert actual == expected, f"request {index} says something else than without drafts"
    assert len(requests) == scale.num_requests


@pytest.mark.parametrize("name", list(ACCEPTANCE))
@pytest.mark.parametrize(
    "scale", CASES, ids=lambda scale: f"{scale.device}-{scale.dtype}-{scale.quantization}-{scale.cache_dtype}"
)
def test_no_token_is_another(scale: Scale, name: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, **scale.model)
    exact, _ = run_mixed(make_engine(path, scale, prefix_caching=True), make_requests(scale), seed=1)
    outputs = {key: outcome.token_ids for key, outcome in exact.items()}
    engine = make_engine(path, scale, prefix_caching=True, max_draft_tokens=MAX_DRAFT_TOKENS)
    with proposer_of(name, path, scale, outputs) as proposer:
        engine._speculation = Speculation(proposer, NUM_DRAFT_TOKENS, MAX_DRAFT_TOKENS, always=True)
        requests = make_requests(scale)
        drafted, peak = run_mixed(engine, requests, seed=2)
    assert peak >= scale.max_num_seqs / 8  # drafted for, they leave sooner
    compare(scale, drafted, exact, requests)
    stats = engine.stats().speculation
    assert stats is not None
    num_tokens = sum(map(len, outputs.values()))
    assert stats.num_drafted_tokens > (0.001 if name == "ngram" else 0.3) * num_tokens
    assert stats.acceptance_rate >= ACCEPTANCE[name]
    assert stats.acceptance_rate < 0.1 or name != "random"
    assert engine.stats().num_blocks_in_use == 0
