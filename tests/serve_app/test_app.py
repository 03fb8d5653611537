import logging
import os
import socket
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException
from safetensors.torch import load_file, save_file

import serve_app
from engine.errors import ConfigError, ModelError
from engine.llm_engine import LLMEngine
from engine.loader.checkpoint import open_checkpoint
from engine.request import Request, SamplingParams
from serve_app.app import app, check_draft_model, check_model, load_draft, load_engine, logger
from serve_app.config import parse_config
from serve_app.draft_messages import MirrorOpening, Round
from serve_app.draft_mirrors import MirrorKeeper
from serve_app.launch import check_http_port, in_command_line, starts_ray_here
from tests.tiny_models import write_tiny_model


def test_the_package_exports_the_builder() -> None:
    """Not the module of the same name, by which Serve would be served a module."""
    assert serve_app.app is app


def test_not_in_the_command_line() -> None:
    assert not in_command_line()
    assert not starts_ray_here()


def test_in_a_program_a_wrong_argument_raises_one_line() -> None:
    with pytest.raises(RayServeException) as caught:
        app({"dtype": "fp8"})
    assert str(caught.value) == "slipstream: dtype must be one of auto, float32, bfloat16, float16, not 'fp8'"


def test_broken_model_is_named_before_a_replica_starts(tmp_path: Path) -> None:
    broken = tmp_path / "cut.gguf"
    broken.write_bytes(b"GGUF\x03\x00")
    with pytest.raises(RayServeException, match=r"^slipstream: .*cut\.gguf.*$"):
        app({"model": str(broken), "device": "cpu"})


def test_missing_tensor_is_named_before_a_replica_starts(tmp_path: Path) -> None:
    tensors = load_file(write_tiny_model(tmp_path) / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, str(tmp_path / "model.safetensors"))
    with pytest.raises(RayServeException, match=r"^slipstream: .*'model\.norm\.weight' is missing$"):
        app({"model": str(tmp_path), "device": "cpu"})


def test_model_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        check_model(parse_config({"model": str(tmp_path / "missing.gguf"), "device": "cpu"}))
    served = {"model": str(write_tiny_model(tmp_path)), "device": "cpu", "speculative": "remote"}
    with pytest.raises(ModelError, match=r"^draft_model=nope is not known"):
        check_model(parse_config({**served, "draft_model": "nope"}))


def speculating(tmp_path: Path, **draft: Any) -> dict[str, Any]:
    """Arguments with a target and a draft, which may differ from it."""
    arguments = {"device": "cpu", "speculative": "remote", "draft_model": str(tmp_path / "draft")}
    write_tiny_model(tmp_path / "target")
    write_tiny_model(tmp_path / "draft", num_hidden_layers=1, **draft)
    return {"model": str(tmp_path / "target"), **arguments}


def no_tokenizer(path: Path) -> Any:
    raise ModelError(f"{path}: no tokenizer")


def test_a_draft_of_another_vocabulary_is_refused_with_both_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.tokenizer.load_tokenizer", lambda _: None)
    arguments = speculating(tmp_path, vocab_size=321)
    with pytest.raises(RayServeException) as caught:
        app(arguments)
    assert str(caught.value) == (
        f"slipstream: draft model {tmp_path}/draft has a vocabulary of 321 tokens and {tmp_path}/target one of 320: "
        "a draft model must have the vocabulary of its target"
    )
    with pytest.raises(RayServeException, match="a vocabulary of 321 tokens"):
        app({**arguments, "speculative": "local"})


def test_the_default_models_draft_is_for_it_and_for_no_other(
    default_model_path: Path,  # noqa: ARG001 - fetched before
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_model(parse_config({"device": "cpu", "speculative": "remote"}))
    with pytest.raises(ModelError, match=r"smollm2-135m-draft: there is neither tokenizer\.json nor tokenizer\.model$"):
        check_model(parse_config({"device": "cpu", "model": "smollm2-135m-draft"}))
    monkeypatch.setattr("engine.tokenizer.load_tokenizer", lambda _: None)
    other = {"device": "cpu", "model": str(write_tiny_model(tmp_path)), "draft_model": "smollm2-135m-draft"}
    for method in ("local", "remote"):
        with pytest.raises(RayServeException, match="draft model smollm2-135m-draft has a vocabulary of 49152 tokens"):
            app({**other, "speculative": method})


def test_a_draft_without_a_tokenizer_is_taken_at_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.tokenizer.load_tokenizer", no_tokenizer)
    config = parse_config(speculating(tmp_path))
    target = open_checkpoint(tmp_path / "target")
    check_draft_model(config, tmp_path / "draft", target, no_tokenizer)  # type: ignore[arg-type]


def test_a_draft_of_other_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, same, other = FakeTokenizer("a b c <x>"), FakeTokenizer("a b c <y>"), FakeTokenizer("a b d <x>")
    config = parse_config(speculating(tmp_path))
    checkpoint = open_checkpoint(tmp_path / "target")
    monkeypatch.setattr("engine.tokenizer.load_tokenizer", lambda _: same)
    check_draft_model(config, tmp_path / "draft", checkpoint, target)  # type: ignore[arg-type]
    monkeypatch.setattr("engine.tokenizer.load_tokenizer", lambda _: other)
    with pytest.raises(ConfigError, match=r"draft has b'd' for token 2 and .*/target has b'c': a draft model must"):
        check_draft_model(config, tmp_path / "draft", checkpoint, target)  # type: ignore[arg-type]


def test_a_broken_draft_is_named_before_a_replica_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.tokenizer.load_tokenizer", lambda _: None)
    arguments = speculating(tmp_path)
    (tmp_path / "draft" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(RayServeException, match=r"^slipstream: .*draft/model\.safetensors"):
        app(arguments)


def test_a_draft_replica_drafts_as_the_model_itself_would_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "info", lambda _: None)
    directory = write_tiny_model(tmp_path)
    config = parse_config({"model": "m", "device": "cpu", "speculative": "remote", "draft_model": str(directory)})
    draft = load_draft(config)
    checkpoint = open_checkpoint(directory)
    assert (draft.model_name, draft.fingerprint) == (str(directory), checkpoint.fingerprint)
    keeper = MirrorKeeper(draft.drafter)
    prompt, sampling = [5, 6, 7], SamplingParams(seed=3, max_tokens=9, ignore_eos=True)
    keeper.apply((0, b"engine"), Round(1, [MirrorOpening("x", prompt, [], sampling, 0)], [], [("x", 4)]))
    drafts: list[int] = []
    while keeper.has_work:
        keeper.work()
        for _, reply in keeper.replies():
            drafts = reply.drafts[0].token_ids
    engine = LLMEngine.from_checkpoint(checkpoint, config.draft_config(checkpoint.config))
    [request] = engine.generate([Request("r", prompt, sampling)])
    assert drafts == request.output_token_ids


class FakeTokenizer:
    """Words as tokens; those in angle brackets are special."""

    def __init__(self, words: str) -> None:
        self._words = words.split()
        self.vocab_size = len(self._words)

    def is_special(self, token_id: int) -> bool:
        return self._words[token_id].startswith("<")

    def token_bytes(self, token_id: int) -> bytes:
        return self._words[token_id].encode()


def test_a_replicas_log_tells_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lines.append)
    arguments = {"model": str(write_tiny_model(tmp_path)), "device": "cpu", "num_threads": "1", "num_kv_blocks": "200"}
    load_engine(parse_config(arguments))
    text = "\n".join(lines)
    for phrase in (
        "importing libraries: ",
        "reading headers: ",
        "loading weights: 21/21 tensors, ",
        "199 blocks of 16: 3,184 tokens",
    ):
        assert text.count(phrase) == 1
    assert lines[-1].startswith("ready in ")


def test_a_replicas_log_is_written_as_it_starts(tmp_path: Path) -> None:
    """Serve holds lines back, by the thousand in its throughput-optimised mode."""
    written: list[str] = []
    target = logging.Handler()
    target.emit = lambda record: written.append(record.getMessage())  # type: ignore[method-assign]
    held_back = MemoryHandler(1000, target=target)
    level = logger.level
    logger.addHandler(held_back)
    logger.setLevel(logging.INFO)
    try:
        load_engine(parse_config({"model": str(write_tiny_model(tmp_path)), "device": "cpu", "num_kv_blocks": "200"}))
        assert written[-1].startswith("ready in ")
    finally:
        logger.removeHandler(held_back)
        logger.setLevel(level)


def test_busy_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr("serve_app.launch.HTTPOptions", lambda: type("O", (), {"host": "127.0.0.1", "port": port}))
        taken.listen()
        with pytest.raises(ConfigError, match=rf"port {port} on 127.0.0.1 is in use: .* process {os.getpid()}\)"):
            check_http_port()
    check_http_port()  # free again, although the connection may linger
