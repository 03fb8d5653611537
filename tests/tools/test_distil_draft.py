"""From a target's answers to a draft that the engine uses, with tiny models; and each step's promises."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import orjson
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.main import get_command
from typer.testing import CliRunner

from engine.config import (
    CacheConfig,
    DType,
    EngineConfig,
    SchedulerConfig,
    SpeculativeConfig,
    SpeculativeMethod,
)
from engine.errors import ConfigError, ModelError
from engine.llm_engine import LLMEngine
from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.request import Request, SamplingParams
from tests.tiny_models import write_tiny_model
from tools.distil_draft import __main__ as command_module
from tools.distil_draft import loss as loss_module
from tools.distil_draft import train as train_module
from tools.distil_draft.__main__ import app
from tools.distil_draft.batches import epoch, make_batch
from tools.distil_draft.card import model_card
from tools.distil_draft.evaluate import evaluate
from tools.distil_draft.generate import generate, sampling_of
from tools.distil_draft.initial import Initial, make_draft
from tools.distil_draft.llama import DraftShape, load_llama
from tools.distil_draft.loss import Teacher, accumulate_gradients, distillation_loss
from tools.distil_draft.prompts import Split, draw_prompts
from tools.distil_draft.samples import Sample, SampleStore, read_samples
from tools.distil_draft.train import RECORD, Clock, TrainOptions, learning_rate, train

CPU = torch.device("cpu")
SHAPE = DraftShape(hidden_size=32, intermediate_size=48, num_layers=1)


class LetterTokenizer:
    """One token a character, for models with the vocabulary of tests.tiny_models."""

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)[:40]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        assert not add_special_tokens
        return [[3 + ord(character) % 300 for character in text[:40]] for text in texts]


def write_target(directory: Path, **norm: float) -> Path:
    """A tiny model with a tied embedding that is small enough for the layers to have a say: else the likeliest token
    would be the last one again. norm: `weight` of the last norm, the same for all features."""
    path = write_tiny_model(directory, tie_word_embeddings=True)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 0.2
    weights["model.norm.weight"] *= 4
    if norm:
        weights["model.norm.weight"].fill_(norm["weight"])
    save_file(weights, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def samples(target: Path) -> list[Sample]:
    """What the tiny target says to a few prompts, each token of it chosen greedily."""
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = [[5 + i, 7, 9 + i] * (1 + i % 3) for i in range(24)]
    requests = start(target).generate([Request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)])
    return [
        Sample(i, (*request.prompt_token_ids, *request.output_token_ids), request.num_prompt_tokens)
        for i, request in enumerate(requests)
    ]


def start(path: Path, speculative: SpeculativeConfig | None = None) -> LLMEngine:
    config = EngineConfig(
        dtype=DType.FLOAT32,
        cache=CacheConfig(num_blocks=400, block_size=8),
        scheduler=SchedulerConfig(max_num_seqs=8, max_model_len=200, max_draft_tokens=50),
        speculative=speculative or SpeculativeConfig(),
        num_threads=1,
    )
    return LLMEngine.from_path(path, config)


# --- answers


def generated(target: Path, directory: Path, num_samples: int, deadline_s: float = float("inf")) -> list[int]:
    """Fill a store; returns how many answers each step ended."""
    ended: list[int] = []
    generate(
        start(target),
        LetterTokenizer(),  # type: ignore[arg-type]
        draw_prompts(Split.TRAIN, 10, seed=0),
        SampleStore(directory, {}, shard_samples=4),
        num_samples=num_samples,
        max_tokens=6,
        width=8,
        deadline_s=deadline_s,
        on_progress=lambda count, _tokens: ended.append(count),
    )
    return ended


def test_generation_goes_on_where_it_stopped(target: Path, tmp_path: Path) -> None:
    assert sum(generated(target, tmp_path / "all", 25)) == 25
    assert sum(generated(target, tmp_path / "parts", 10)) == 10
    (tmp_path / "parts/00009.safetensors").write_bytes(b"of a process that died before the manifest knew it")
    assert sum(generated(target, tmp_path / "parts", 25)) == 15
    complete = read_samples(tmp_path / "all")
    assert [sample.sample_id for sample in complete] == list(range(25))
    assert read_samples(tmp_path / "parts") == complete
    assert generated(target, tmp_path / "parts", 25) == []
    assert generated(target, tmp_path / "late", 25, deadline_s=perf_counter()) == []
    params = sampling_of(3, 10, max_tokens=6)
    prompt = list(complete[3].token_ids[: complete[3].num_prompt_tokens])
    (request,) = start(target).generate([Request("alone", prompt, params)])
    assert complete[3].token_ids == (*prompt, *request.output_token_ids)


# --- training


def test_the_target_is_the_one_that_the_engine_computes(target: Path, samples: list[Sample]) -> None:
    """The likeliest token behind each position of a greedy answer is the one that the engine chose."""
    model = load_llama(open_checkpoint(target)).eval()
    batch = make_batch(samples)
    with torch.no_grad():
        likeliest = model(batch.token_ids).logits.argmax(-1).flatten()[batch.rows]
    assert torch.equal(likeliest, batch.targets)


@pytest.mark.parametrize("norm", [{"weight": 5.0}, {}])
def test_nothing_is_lost_at_the_targets_own_size(tmp_path: Path, norm: dict[str, float]) -> None:
    """All directions, layers and neurons: a rotation. It gives the same logits where the last norm is even, and mostly
    the same likeliest tokens where it nearly is."""
    checkpoint = open_checkpoint(write_target(tmp_path / "target", **norm))
    model = load_llama(checkpoint)
    config = DraftShape(hidden_size=64, intermediate_size=144, num_layers=2).of(checkpoint.config)
    token_ids = torch.randint(5, 320, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model(token_ids).logits
        ours = make_draft(model, config, Initial.PROJECTED, seed=0)(token_ids).logits
        others = make_draft(model, config, Initial.RANDOM, seed=0)(token_ids).logits
    assert (theirs.argmax(-1) == token_ids).float().mean() < 0.2
    if norm:
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= (1.0 if norm else 0.8)
    assert (others.argmax(-1) == theirs.argmax(-1)).float().mean() < 0.2


def test_batches_hold_every_sample_once_and_keep_their_size(samples: list[Sample]) -> None:
    batches = list(epoch(samples, 100, random.Random(0)))
    assert sorted(sample.sample_id for batch in batches for sample in batch.samples) == list(range(24))
    assert all(batch.token_ids.numel() <= 100 for batch in batches)
    for batch in batches:
        before = batch.token_ids.flatten()[batch.rows + 1]
        assert torch.equal(before, batch.targets)
        assert len(batch.rows) == sum(sample.num_output_tokens for sample in batch.samples)


def test_gradients_in_pieces_are_those_of_the_whole(
    target: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the loss written down plainly; the second time the target's states come from the cache."""
    monkeypatch.setitem(loss_module.PIECE_BYTES, "cpu", 4 * 320 * 7)
    checkpoint = open_checkpoint(target)
    model = load_llama(checkpoint)
    draft = make_draft(model, SHAPE.of(checkpoint.config), Initial.PROJECTED, seed=0)
    batch = make_batch(samples[:5])
    ours = draft(batch.token_ids).logits.flatten(0, 1)[batch.rows].log_softmax(-1)
    theirs = model(batch.token_ids).logits.flatten(0, 1)[batch.rows].log_softmax(-1).detach()
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    entropy = -ours[torch.arange(len(ours)), batch.targets].mean()
    expected = 0.75 * divergence + 0.25 * entropy
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}
    teacher = Teacher(model, CPU, torch.float32, cache_bytes=1 << 20)
    for _ in range(2):
        draft.zero_grad()
        loss = accumulate_gradients(draft, teacher, batch, CPU, torch.float32, ce_weight=0.25)
        torch.testing.assert_close(loss, expected.detach())
        for name, parameter in draft.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_the_loss_is_nothing_for_equal_distributions() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(4)
    assert distillation_loss(logits, logits + 3, ids, ce_weight=0).item() == pytest.approx(0, abs=1e-5)
    assert distillation_loss(logits, -logits, ids, ce_weight=0) > 1
    assert distillation_loss(logits, -logits, ids, ce_weight=1) == -logits.log_softmax(-1).diagonal().sum()


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(progress / 100, 1.0) for progress in range(101)]
    assert rates[0] < 0.1
    assert max(rates) == rates[3] == 1.0
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[100] == pytest.approx(0.05)


def test_a_trained_draft_serves_the_engine(target: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Two steps from the target's projection: the directory loads here and in transformers, no token changes, and
    training again gives the same bits."""
    checkpoint = open_checkpoint(target)
    options = TrainOptions(steps=2, tokens_per_step=150, initial=Initial.PROJECTED)
    directory = tmp_path / "draft"
    record = train(checkpoint, SHAPE, samples, directory, options)
    assert [point["step"] for point in record.curve] == [1, 2]
    assert [point["step"] for point in record.validation] == [0, 2]
    assert orjson.loads((tmp_path / RECORD).read_bytes())["curve"] == record.curve
    assert record.curve[1]["tokens"] > 0
    train(checkpoint, SHAPE, samples, tmp_path / "again", options)
    assert (directory / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()

    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=3, max_tokens=30, ignore_eos=True)
    prompts = [list(sample.token_ids) for sample in samples[:6]]
    outputs = []
    for speculative in (None, SpeculativeConfig(SpeculativeMethod.LOCAL, 4, directory, always=True)):
        for choice in (sampling, replace(sampling, temperature=0.0)):
            engine = start(target, speculative)
            requests = engine.generate([Request(str(i), ids, choice) for i, ids in enumerate(prompts)])
            outputs.append([request.output_token_ids for request in requests])
        stats = engine.stats().speculation
    assert outputs[2:] == outputs[:2]
    assert stats is not None
    assert stats.num_drafted_tokens > 100

    token_ids = torch.arange(10, 40).view(1, 30)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(token_ids).logits, load_llama(open_checkpoint(directory))(token_ids).logits, atol=1e-5, rtol=1e-5
        )


def test_training_teaches(target: Path, samples: list[Sample], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(target)
    options = TrainOptions(steps=60, tokens_per_step=400, learning_rate=5e-3, initial=Initial.EMBEDDING)
    record = train(checkpoint, SHAPE, samples, tmp_path / "draft", options)
    assert record.curve[-1]["loss"] < 0.5 * record.curve[0]["loss"]
    going_on = train(
        checkpoint, SHAPE, samples, tmp_path / "more", replace(options, steps=1), start_from=tmp_path / "draft"
    )
    assert going_on.curve[0]["loss"] < 1.5 * record.curve[-1]["loss"]


def test_training_ends_in_time(
    target: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which each look takes a tenth of a second."""
    ticks = itertools.count()
    monkeypatch.setattr(train_module, "perf_counter", lambda: next(ticks) / 10)
    options = TrainOptions(minutes=8 / 60, tokens_per_step=400)
    record = train(open_checkpoint(target), SHAPE, samples, tmp_path / "draft", options)
    assert 4 < next(ticks) / 10 <= 8
    assert len(record.curve) > 5
    assert record.validation[-1]["step"] == record.curve[-1]["step"], "what was learnt last is written"
    assert record.curve[-1]["learning_rate"] < 0.3 * options.learning_rate


def test_a_clock_leaves_room_for_a_step_and_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "perf_counter", lambda: 130.0)
    clock = Clock(TrainOptions(minutes=1, steps=10), 100.0)
    assert not clock.is_over(0)
    assert clock.is_over(10)
    assert clock.progress(9) == 0.9
    assert clock.progress(1) == pytest.approx(30 / 58, abs=0.01)
    clock.longest_step_s = 20
    assert not clock.is_over(0)
    clock.reserved_s = 11
    assert clock.is_over(0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (DraftShape(30, 48, 1), "multiple of the target's 4 heads"),
        (DraftShape(32, 145, 1), "intermediate_size must be between 1 and the target's 144"),
        (DraftShape(32, 48, 3), "num_layers must be between 1 and the target's 2"),
    ],
)
def test_a_shape_that_is_no_part_of_the_target(target: Path, shape: DraftShape, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape.of(open_checkpoint(target).config)


def test_an_end_and_samples_are_needed(target: Path, samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give minutes, steps or both"):
        TrainOptions()
    with pytest.raises(ConfigError, match="generate some first"):
        train(open_checkpoint(target), SHAPE, samples[:1], tmp_path / "draft", TrainOptions(steps=1))


# --- evaluation


def test_evaluation_of_one_method_as_a_service_drafts(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, configs = LLMEngine.from_checkpoint, []

    def started(checkpoint: Checkpoint, config: EngineConfig) -> LLMEngine:
        configs.append(config.speculative)
        return start(checkpoint, config)

    monkeypatch.setattr(LLMEngine, "from_checkpoint", started)
    tokenizer: Any = LetterTokenizer()
    settings: dict[str, Any] = {"per_tag": 1, "max_tokens": 20, "batch": 1, "seed": 0, "adaptive": True}
    config, methods = EngineConfig(dtype=DType.FLOAT32, num_threads=1), [SpeculativeMethod.LOCAL]
    cells = evaluate(open_checkpoint(target), tokenizer, target, config, methods=methods, **settings)
    assert [cell.method for cell in cells] == [SpeculativeMethod.OFF] * 6 + [SpeculativeMethod.LOCAL] * 6
    assert configs == [SpeculativeConfig(), SpeculativeConfig(SpeculativeMethod.LOCAL, draft_model_path=target)]


def test_evaluation_and_card(target: Path, samples: list[Sample], tmp_path: Path) -> None:
    """A target that drafts for itself has every draft accepted; that no token changes is asserted inside."""
    checkpoint = open_checkpoint(target)
    config = EngineConfig(dtype=DType.FLOAT32, num_threads=1)
    settings: dict[str, Any] = {"per_tag": 2, "max_tokens": 20, "batch": 2, "seed": 0}
    tokenizer: Any = LetterTokenizer()
    cells = evaluate(checkpoint, tokenizer, target, config, **settings)
    assert len(cells) == 3 * 3 * 2
    own = [cell for cell in cells if cell.method is SpeculativeMethod.LOCAL]
    assert all(cell.acceptance_rate == 1 for cell in own)
    assert all(cell.mean_acceptance_length > 3.5 for cell in own)
    assert all(cell.tokens_per_pass > 3 for cell in own)
    exact = [cell for cell in cells if cell.method is SpeculativeMethod.OFF]
    assert all((cell.num_rounds, cell.tokens_per_pass, cell.speed_ratio) == (0, 1, 1) for cell in exact)
    assert {cell.num_output_tokens for cell in exact} <= set(range(2, 41))

    train(checkpoint, SHAPE, samples, tmp_path / "draft", TrainOptions(steps=0))
    training = orjson.loads((tmp_path / RECORD).read_bytes())
    evaluation = settings | {
        "hardware": "a CPU",
        "dtype": "float32",
        "num_draft_tokens": 4,
        "cells": [cell.__dict__ for cell in cells],
    }
    card = model_card("tiny-draft", training, {"seed": 0, "max_tokens": 12}, evaluation)
    assert "license: apache-2.0" in card
    assert "| edit | greedy | local | 100% |" in card
    assert "Not measured yet." in model_card("tiny-draft", training, {"seed": 0, "max_tokens": 12}, None)


# --- the command


def test_the_command_trains_and_exports(target: Path, samples: list[Sample], tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "models/tiny-draft"
    settings = {"target": open_checkpoint(target).fingerprint, "seed": 0, "max_tokens": 12}
    store = SampleStore(work / "samples", settings)
    for sample in samples:
        store.add(sample)
    store.flush()
    shape = ["--hidden-size", "32", "--intermediate-size", "48", "--layers", "1"]
    run("train", f"--work={work}", f"--model={target}", "--steps=1", "--tokens-per-step=200", *shape)
    printed = run("export", f"--work={work}", f"--out={out}")
    assert "model.safetensors 0.0" in printed
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "training.json", "README.md"}
    assert open_checkpoint(out).config.num_layers == 1
    assert (out / "README.md").stat().st_mode == (out / "model.safetensors").stat().st_mode
    with pytest.raises(ModelError, match="is there already"):
        run("export", f"--work={work}", f"--out={out}")
    with pytest.raises(ConfigError, match="is there already"):
        run("all", f"--work={work}", f"--out={out}", f"--model={target}")
    with pytest.raises(ConfigError, match="train one first"):
        run("export", f"--work={tmp_path / 'empty'}", f"--out={tmp_path / 'other'}")
    other = write_tiny_model(tmp_path / "other-target", seed=1, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="what another model said"):
        run("train", f"--work={work}", f"--model={other}", "--steps=1", *shape)


def test_the_command_shows_prompts() -> None:
    printed = run("prompts", "--count=3", "--split=held-out")
    assert printed.count("--- ") == 3


def run(*arguments: str) -> str:
    outcome = CliRunner().invoke(app, arguments)
    if outcome.exception is not None:
        raise outcome.exception
    return outcome.stdout


def test_all_steps_in_order_with_arguments_that_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, ...]] = []
    monkeypatch.setattr(command_module, "_step", lambda *arguments: steps.append(arguments))
    run("all", f"--work={tmp_path}", f"--out={tmp_path / 'out'}", "--device=cuda", "--train-minutes=3", "--per-tag=4")
    assert [name for name, *_ in steps] == ["generate", "train", "evaluate", "export"]
    commands: Any = get_command(app)
    parsed = {name: commands.commands[name].make_context(name, arguments).params for name, *arguments in steps}
    assert (parsed["train"]["minutes"], parsed["evaluate"]["per_tag"]) == (3, 4)
    assert {parsed[name]["device"] for name in ("generate", "train", "evaluate")} == {"cuda"}
    assert {values["work"] for values in parsed.values()} <= {tmp_path, str(tmp_path)}


def test_a_step_that_fails_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(SystemExit) as ended:
        command_module._step("export")
    assert ended.value.code == 1
