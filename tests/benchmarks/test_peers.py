"""Peers side by side: who takes part, how servers start and end, what is measured, what is written down."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import torch
from click.testing import Result
from typer import Typer
from typer.testing import CliRunner

from benchmarks.history import read_results
from benchmarks.peers import model_files, quiet
from benchmarks.peers.__main__ import main
from benchmarks.peers.agreement import Answers, compare, reference_of
from benchmarks.peers.catalogue import PEERS, Subject, parse_programs, parse_subjects
from benchmarks.peers.model_files import ModelFiles, main_type
from benchmarks.peers.peer import AbsentError, FileKind, Place
from benchmarks.peers.quiet import Watch
from benchmarks.peers.rounds import Bench, Outcome
from benchmarks.peers.server import descendants, running
from benchmarks.peers.workload import Client, Sample, Traffic
from engine.loader.checkpoint import open_checkpoint
from engine.model.expected_tensors import expected_tensors
from loadtest.request_record import RequestRecord
from serve_app.ports import free_port
from tests.benchmarks.fake_peer import GAP_S, PROMPT_TOKENS, FakePeer, FakeSlipstream, LenientPeer
from tests.loader.files import tiny_weights, write_gguf

TRAFFIC = Traffic("short_chat", 0, 16, 5, (1, 3), 2)


@pytest.fixture(autouse=True)
def fake_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "LOOK_S", 0.01)
    for peer in (FakePeer, FakeSlipstream, LenientPeer):
        monkeypatch.setitem(PEERS, peer.name, peer)


def place_in(folder: Path, port: int = 0) -> Place:
    return Place("127.0.0.1", port, "cpu", 2, 512, 3, folder)


def run_fakes(
    folder: Path, text: str, rounds: int = 1, start_timeout_s: float = 30.0, attempts: int = 1
) -> list[Outcome]:
    lines: list[str] = []
    bench = Bench(ModelFiles(folder, folder), place_in(folder), TRAFFIC, start_timeout_s, 0.0, attempts, lines.append)
    outcomes = [bench.prepare(subject) for subject in parse_subjects(text, {})]
    bench.run(outcomes, rounds)
    return outcomes


def run_command(tmp_path: Path, model: Path, *options: str) -> tuple[Result, list[Path]]:
    application = Typer()
    application.command()(main)
    fixed = ["--model", str(model), "--folder", str(tmp_path), "--results", str(tmp_path / "results")]
    outcome = CliRunner().invoke(application, [*fixed, *options])
    return outcome, sorted((tmp_path / "results").glob("*.json"))


def test_who_takes_part(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    programs = parse_programs([f"vllm={tmp_path / 'python'}"])
    subjects = parse_subjects("slipstream, vllm:float16,llama-server", programs)
    assert [subject.title for subject in subjects] == ["slipstream:plain", "vllm:float16", "llama-server:stored"]
    assert [s.peer.program for s in subjects] == [sys.executable, str(tmp_path / "python"), "llama-server"]
    for text, problem in (
        ("vlm", "'vlm' is not a peer; known are slipstream"),
        ("vllm:Q8_0", "vllm has no format 'Q8_0'; it has bfloat16"),
        ("vllm,vllm:bfloat16", "twice"),
    ):
        with pytest.raises(ValueError, match=problem):
            parse_subjects(text, {})
    for text, problem in (("vlm=/bin/sh", "not like peer="), (f"vllm={tmp_path / 'none'}", "no such program")):
        with pytest.raises(ValueError, match=problem):
            parse_programs([text])


@pytest.mark.parametrize(
    "name", ["vllm", "sglang", "llama-server", "llama-cpp-python", "ray-serve-llm", "transformers"]
)
def test_commands_say_model_port_and_length(name: str, tmp_path: Path) -> None:
    """Ray Serve says them in a file; transformers takes a model's own length."""
    peer = PEERS[name]("/env/bin/python")
    launch = peer.launch(Path("/models/m"), peer.formats[0], place_in(tmp_path, 1234))
    words = list(launch.command)
    if words[-1].endswith(".yaml"):
        words += Path(words[-1]).read_text().replace('"', " ").replace(",", " ").split()
    assert "/models/m" in words
    assert "1234" in words
    assert name == "transformers" or {"512", "1536"} & set(words)  # llama-server's is that of three slots
    assert peer.reads is FileKind.GGUF or "bfloat16" in words
    assert words[0].startswith("/env/bin/")


def test_an_absent_peer_is_named() -> None:
    for name, problem in (
        ("vllm", "not installed: its interpreter has no vllm"),
        ("ray-serve-llm", "not installed: its interpreter has no vllm"),
        ("llama-server", "not installed: there is no .* on the path"),
    ):
        program = sys.executable if name != "llama-server" else "no-llama-server-of-this-name"
        with pytest.raises(AbsentError, match=problem):
            PEERS[name](program).versions()
    with pytest.raises(AbsentError, match="its program does not run: FileNotFoundError"):
        PEERS["vllm"]("/no/python").versions()


def test_a_server_that_dies_is_one_line_with_the_end_of_its_log(tmp_path: Path) -> None:
    dead, alive = run_fakes(tmp_path, "fake:dies,fake", rounds=2)
    assert dead.failed == "ended with status 3 before it was ready: loading the model | boom: no such model"
    assert (dead.samples, dead.start_s) == ({}, [])
    assert not alive.failed
    assert {streams: len(samples) for streams, samples in alive.samples.items()} == {1: 2, 3: 2}


def test_a_server_has_a_deadline(tmp_path: Path) -> None:
    before = descendants(psutil.Process().pid)
    (outcome,) = run_fakes(tmp_path, "fake:never", start_timeout_s=1.0)
    assert outcome.failed == "was not ready after 1 s: its log is empty"
    assert descendants(psutil.Process().pid) <= before


def test_all_that_a_server_started_ends_with_it(tmp_path: Path) -> None:
    peer = FakePeer(sys.executable)
    place = place_in(tmp_path, free_port("127.0.0.1"))
    client = Client(place.url, peer, "m")
    log = tmp_path / "log"
    with running(peer.launch(tmp_path, "offspring", place), log, client.is_ready, 30.0) as server:
        child = psutil.Process(int(log.read_text()))
        assert child.ppid() == server.pid
    assert not psutil.pid_exists(server.pid)
    assert not child.is_running()


def test_what_is_measured(tmp_path: Path) -> None:
    plain, uncounted = run_fakes(tmp_path, "fake,fake:no-usage")
    for outcome in (plain, uncounted):
        assert outcome.start_s[0] > 0
        for streams, (sample,) in outcome.samples.items():
            assert sample.tokens_per_answer == 5
            assert GAP_S / 2 < sample.tpot_p50_s < sample.itl_p99_s + GAP_S
            count = max(streams, TRAFFIC.num_requests)
            assert sample.output_tokens_per_s <= 5 * count / (5 * GAP_S * count / streams)
    assert [o.samples[1][0].is_usage for o in (plain, uncounted)] == [True, False]
    assert [o.samples[1][0].prompt_tokens for o in (plain, uncounted)] == [PROMPT_TOKENS, None]


def test_a_disturbed_level_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least disturbed time counts, and a quiet one is the last."""
    percents = iter([60.0, 30.0, 50.0, 5.0])
    monkeypatch.setattr(Watch, "others_percent", lambda _: next(percents))
    asked: list[Sequence[Any]] = []
    measure = Client.measure
    monkeypatch.setattr(Client, "measure", lambda self, *each: (asked.append(each[0]), measure(self, *each))[1])
    (outcome,) = run_fakes(tmp_path, "fake", attempts=3)
    assert outcome.others_percent == {1: [30.0], 3: [5.0]}
    assert {streams: len(samples) for streams, samples in outcome.samples.items()} == {1: 1, 3: 1}
    texts = [prompt.messages[0]["content"] for batch in asked for prompt in batch]
    assert len(asked) == 2 + 3 + 1  # with a warm-up at each level
    assert len(set(texts)) == len(texts)


def test_what_others_use_is_seen() -> None:
    """What this process uses is others' only where it is not counted as its own."""
    own, strange = Watch(psutil.Process().pid), Watch(psutil.Process().pid)
    strange._own_s = lambda: 0.0  # type: ignore[method-assign]
    strange._started = (*strange._started[:2], 0.0)
    started_s, until_s = time.monotonic(), time.process_time() + 0.4
    while time.process_time() < until_s:
        pass
    seen_percent, all_percent = own.others_percent(), strange.others_percent()
    all_s = (time.monotonic() - started_s) * (os.cpu_count() or 1)
    assert (all_percent - seen_percent) / 100 * all_s == pytest.approx(0.4, abs=0.15)


def test_streams_without_a_done_are_whole_only_for_peers_that_say_none(tmp_path: Path) -> None:
    strict, lenient, refusing = run_fakes(tmp_path, "fake:no-done,lenient:no-done,fake:refuses")
    assert strict.failed == "2 of 2 requests failed: stream without [DONE]"
    assert not lenient.failed
    assert len(lenient.samples[3]) == 1
    assert refusing.failed == "2 of 2 requests failed: http 429 overloaded"


def test_the_arithmetic() -> None:
    def record(sent_s: float, chunk_s: Sequence[float], end_s: float, tokens: int) -> RequestRecord:
        return RequestRecord("w", 0.0, sent_s, list(chunk_s), end_s, 7, tokens, True)

    sample = Sample.of([record(10.0, [0.5, 0.6, 0.8], 0.9, 3), record(10.5, [0.25, 0.75], 1.5, 2)])
    assert sample.output_tokens_per_s == pytest.approx(5 / 2.0)
    assert sample.ttft_p50_s == pytest.approx(0.375)
    assert sample.tpot_p50_s == pytest.approx((0.2 + 1.25) / 2)
    assert sample.itl_p99_s == pytest.approx(np.percentile([0.1, 0.2, 0.5], 99))
    assert (sample.tokens_per_answer, sample.prompt_tokens) == (2.5, 7)
    with pytest.raises(ValueError, match="no answer had two tokens"):
        Sample.of([record(0.0, [1.0], 1.0, 1)])


def test_rounds_and_levels_share_no_prompt() -> None:
    batches = [TRAFFIC.prompts(number, level) for number in range(2) for level in range(2)]
    assert [len(batch) for batch in batches] == [2, 3, 2, 3]
    texts = [prompt.messages[0]["content"] for batch in batches for prompt in batch]
    assert len(set(texts)) == 10
    assert batches[0] == TRAFFIC.prompts(0, 0)
    assert {prompt.max_tokens for batch in batches for prompt in batch} == {5}


class Letters:
    """A tokenizer whose tokens are letters."""

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        assert not add_special_tokens
        return [[ord(letter) for letter in text] for text in texts]


def test_agreement_is_counted_in_tokens() -> None:
    found = compare(Answers(("abcd ", "ab"), (1, 1)), Answers(("abcd", "axyz"), (1, 1)), "other", Letters())  # type: ignore[arg-type]
    assert (found.num_equal, found.num_answers, found.mean_tokens, found.mean_of) == (1, 2, 2.5, 4.0)
    assert str(found) == "1 of 2, 2 of 4 tokens"
    titles = ["slipstream-ngram:bfloat16", "slipstream:bfloat16", "slipstream:float32"]
    assert reference_of("F32", titles) == "slipstream:float32"
    assert reference_of("Q4_1", titles) == "slipstream:bfloat16"
    assert reference_of("F32", titles[:1]) is None


@pytest.mark.parametrize(("name", "tolerance"), [("F32", 0.0), ("BF16", 2**-8), ("F16", 2**-10), ("Q8_0", 2**-6)])
def test_gguf_files_of_other_types(tmp_path: Path, name: str, tolerance: float) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", weights=tiny_weights())
    files = ModelFiles(source, tmp_path / "made")
    made = files.path(FileKind.GGUF, name)
    assert made == files.path(FileKind.GGUF, name)  # found again
    assert main_type(made) == files.shown_format(name) == name
    before, after = open_checkpoint(source), open_checkpoint(made)
    assert after.config == before.config
    for tensor in expected_tensors(before.config):
        values = before.load(tensor).float()
        assert torch.allclose(
            after.load(tensor).float(), values, rtol=tolerance, atol=tolerance * float(values.abs().max())
        )
    assert gguf.GGUFReader(made).fields.keys() >= gguf.GGUFReader(source).fields.keys()


def test_a_directory_of_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has no tokenizer; saving those has tests of its own."""
    saved: list[tuple[Path, ...]] = []
    monkeypatch.setattr(model_files, "save_gguf_tokenizer", lambda *paths: saved.append(paths))
    source = write_gguf(tmp_path / "tiny.gguf", weights=tiny_weights())
    made = ModelFiles(source, tmp_path / "made").path(FileKind.DIRECTORY, "bfloat16")
    before, after = open_checkpoint(source), open_checkpoint(made)
    assert after.config == before.config
    for name in expected_tensors(before.config):
        assert torch.equal(after.load(name), before.load(name).float())
    assert [paths[0] for paths in saved] == [source]


def test_a_directory_is_no_gguf_file(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path, tmp_path)
    assert files.path(FileKind.DIRECTORY, "bfloat16") == files.path(FileKind.ANY, "int8") == tmp_path
    with pytest.raises(AbsentError, match="give one with --gguf"):
        files.path(FileKind.GGUF, "Q8_0")
    given = ModelFiles(tmp_path, tmp_path, Path("given.gguf"))
    assert given.path(FileKind.GGUF, "stored") == Path("given.gguf")


def test_from_arguments_to_a_table_and_a_file(tmp_path: Path, default_model_path: Path) -> None:
    options = ["--peers", "slipstream,vllm,fake,fake:dies", "--streams", "1,2", "--requests", "2", "--rounds", "2"]
    outcome, (file,) = run_command(tmp_path, default_model_path, *options, "--output", "6", "--quiet-timeout", "0")
    assert outcome.exit_code == 0, outcome.output
    lines = outcome.stdout.splitlines()
    speeds = [line.split(" | ") for line in lines if line.startswith(("| slipstream | plain |", "| fake | plain |"))]
    assert [cells[2] for cells in speeds[:4]] == ["1", "1", "2", "2"]
    assert "skipped: vllm: not installed: its interpreter has no vllm" in lines
    assert "failed: fake:dies: ended with status 3" in outcome.stdout
    assert "slipstream:plain: all 4 answers" in outcome.stdout
    record: dict[str, Any] = json.loads(file.read_text())
    assert [row["subject"] for row in record["peers"]] == [
        "slipstream:plain",
        "vllm:bfloat16",
        "fake:plain",
        "fake:dies",
    ]
    assert record["peers"][2]["agreement"]["equal_answers"] == 4
    results = read_results(file)
    assert len({result.key for result in results}) == len(results) == 4
    for result in results:
        figure = result.figures["output_tokens_per_s"]
        assert (len(figure.repeats), figure.higher_is_better) == (2, True)
        assert set(result.figures) == {"output_tokens_per_s", "ttft_p50_s", "tpot_p50_s", "itl_p99_s"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--peers", "nobody"], "'nobody' is not a peer"),
        (["--streams", "1,x"], "'1,x' is not like 1,8"),
        (["--workload", "poems"], "'poems' is not a workload"),
        (["--peers", "vllm"], "no peer was measured"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    tmp_path: Path, default_model_path: Path, options: list[str], problem: str
) -> None:
    outcome, files = run_command(tmp_path, default_model_path, *options)
    assert (outcome.exit_code, files) == (2, [])
    assert problem in outcome.stderr.splitlines()[-1]


def test_a_subject_has_a_title() -> None:
    assert Subject(FakePeer("python"), "plain").title == "fake:plain"
