"""An engine and a draft model in a server of its own: the tokens are those of the engine alone, whatever befalls it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.config import CacheConfig, DType, EngineConfig, SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.loader.checkpoint import open_checkpoint
from engine.speculative.draft_model import DraftModel
from engine.speculative.ngram import NgramProposer
from engine.speculative.speculation import Speculation
from serve_app import draft_link
from serve_app.draft_client import RemoteProposer
from serve_app.draft_mirrors import MirrorKeeper
from serve_app.draft_server import DraftServer, LoadedDraft
from serve_app.draft_transport import Endpoint
from tests.serve_app.patient_proposer import PatientProposer
from tests.speculative.test_verification import make_engine, make_requests, run
from tests.tiny_models import write_tiny_model

NUM_DRAFT_TOKENS = 3


@contextmanager
def server_of(path: Path) -> Iterator[DraftServer]:
    config = EngineConfig(
        dtype=DType.FLOAT32,
        cache=CacheConfig(num_blocks=300, block_size=8),
        scheduler=SchedulerConfig(max_model_len=200),
        num_threads=1,
    )
    model = DraftModel.from_checkpoint(open_checkpoint(path), config, may_branch=True)
    server = DraftServer(LoadedDraft(model, "draft", "fp"), MirrorKeeper(model))
    server.start()
    try:
        yield server
    finally:
        server.shutdown()


@contextmanager
def speculating(path: Path, endpoints: list[Endpoint]) -> Iterator[tuple[LLMEngine, RemoteProposer]]:
    proposer = PatientProposer(lambda _: list(endpoints), NgramProposer(), vocab_size=320, target_name="target")
    engine = make_engine(path)
    engine._speculation = Speculation(proposer, NUM_DRAFT_TOKENS, 100, always=True)
    try:
        yield engine, proposer
    finally:
        engine.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def expected(path: Path) -> dict[str, list[object]]:
    return run(make_engine(path), make_requests())


@pytest.mark.parametrize("same", [True, False])
def test_the_same_tokens(path: Path, tmp_path: Path, expected: dict[str, list[object]], same: bool) -> None:
    draft = path if same else write_tiny_model(tmp_path, seed=4)
    with server_of(draft) as server, speculating(path, [server.ipc]) as (engine, proposer):
        assert proposer.wait_for_connection(60.0)
        requests = make_requests()
        assert run(engine, requests) == expected
        stats = proposer.stats()
        assert stats.remote_proposals > 50
        assert stats.garbage == 0
        assert stats.missed_rounds == 0
        drafted = sum(request.num_drafted_tokens for request in requests)
        accepted = sum(request.num_accepted_tokens for request in requests)
        assert drafted > 100
        assert accepted > 0.6 * drafted if same else accepted < 0.3 * drafted
        deadline_s = time.monotonic() + 60
        while server.num_mirrors:  # the last requests that ended are told of
            assert time.monotonic() < deadline_s, "mirrors are left"
            time.sleep(0.01)


def test_a_server_that_goes_in_the_middle(
    path: Path, expected: dict[str, list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another that comes: streams go on through both, with the same tokens."""
    monkeypatch.setattr(draft_link, "CONNECT_S", 0.1)
    endpoints: list[Endpoint] = []
    with speculating(path, endpoints) as (engine, proposer):
        for _ in range(2):
            with server_of(path) as server:
                endpoints[:] = [server.ipc]
                assert proposer.wait_for_connection(60.0)
                requests = make_requests()
                for request in requests:
                    engine.add(request)
                for _ in range(6):
                    engine.step()
                assert sum(request.num_accepted_tokens for request in requests) > 10
            while engine.has_work:
                engine.step()
            assert not proposer.stats().is_connected
            for request in requests:
                tokens = [entry[0] for entry in expected[request.request_id] if isinstance(entry, tuple)]
                assert request.output_token_ids == tokens
        assert proposer.stats().reconnects == 1
