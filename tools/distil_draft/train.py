"""Training: the target's distributions of what it said, taught to the draft, for so many minutes or steps."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import orjson
import torch

from engine.config import Device, EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.runner.device import prepare_device
from engine.runner.memory import read_memory
from tools.distil_draft.batches import Batch, epoch
from tools.distil_draft.draft_directory import write_draft
from tools.distil_draft.initial import Initial, make_draft
from tools.distil_draft.llama import DraftShape, load_llama
from tools.distil_draft.loss import Agreement, Teacher, accumulate_gradients, measure_agreement
from tools.distil_draft.samples import Sample

RECORD = "training.json"  # beside the draft's directory
VALIDATION_SHARE = 0.02  # of the samples, and no more than
MAX_VALIDATION_TOKENS = 32_768
NUM_VALIDATIONS = 10
MAX_CURVE_POINTS = 400  # that are written
CACHE_SHARE = 0.4  # of the free memory, for what the target computed
WARM_UP = 0.03  # of the whole: the learning rate rises from 0
LOWEST_RATE = 0.05  # of the highest, in the end
MAX_GRADIENT_NORM = 1.0
SPARE_S = 2.0  # for writing the draft


@dataclass(frozen=True)
class TrainOptions:
    """minutes: from the call to the written draft, the target's loading included; steps: of the optimizer. What ends
    first counts, and the learning rate follows it; at least one is given. ce_weight: see `distillation_loss`."""

    minutes: float | None = None
    steps: int | None = None
    tokens_per_step: int = 16_384
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    ce_weight: float = 0.1
    initial: Initial = Initial.PROJECTED
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise ConfigError("training needs an end: give minutes, steps or both")
        if not 0 <= self.ce_weight <= 1:
            raise ConfigError(f"ce_weight must be between 0 and 1, not {self.ce_weight}")


@dataclass
class Record:
    """What is written about a training. `curve` and `validation`: with seconds since the training's beginning."""

    facts: dict[str, Any]
    curve: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)

    def write(self, file: Path) -> None:
        stride = -(-len(self.curve) // MAX_CURVE_POINTS) or 1
        thinned = replace(self, curve=self.curve[::-stride][::-1])  # with the last point
        file.write_bytes(orjson.dumps(asdict(thinned), option=orjson.OPT_INDENT_2) + b"\n")


class Clock:
    """How much of a training is over."""

    def __init__(self, options: TrainOptions, started_s: float) -> None:
        self._budget_s = math.inf if options.minutes is None else 60 * options.minutes
        self._steps = math.inf if options.steps is None else options.steps
        self._started_s = started_s
        self.reserved_s = SPARE_S  # for what comes behind the last step
        self.longest_step_s = 0.0

    @property
    def seconds(self) -> float:
        return perf_counter() - self._started_s

    def progress(self, step: int) -> float:
        """From 0 to 1."""
        budget_s = max(self._budget_s - self.reserved_s, 1e-3)
        return min(1.0, max(self.seconds / budget_s, step / max(self._steps, 1)))

    def is_over(self, step: int) -> bool:
        """Whether there is no room for one more step."""
        return step >= self._steps or self.seconds + self.longest_step_s + self.reserved_s > self._budget_s


def learning_rate(progress: float, highest: float) -> float:
    """A short rise, and half a cosine down to LOWEST_RATE."""
    if progress < WARM_UP:
        return highest * (progress + 1e-3) / (WARM_UP + 1e-3)
    fall = 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    return highest * (LOWEST_RATE + (1 - LOWEST_RATE) * fall)


class Training:
    """One draft, its teacher and its optimizer."""

    def __init__(
        self,
        target: Checkpoint,
        shape: DraftShape,
        samples: Sequence[Sample],
        options: TrainOptions,
        device: Device,
        start_from: Path | None,
    ) -> None:
        self.options = options
        self.device, computed = prepare_device(EngineConfig(device=device))
        self.dtype = torch.bfloat16 if computed is torch.bfloat16 else torch.float32  # float16 would need loss scaling
        if start_from is None:
            self.config: ModelConfig = shape.of(target.config)
            model = load_llama(target)
            self.draft = make_draft(model, self.config, options.initial, options.seed)
        else:
            model = load_llama(target)
            earlier = open_checkpoint(start_from)
            self.config, self.draft = earlier.config, load_llama(earlier)
        self.draft.to(self.device).train()
        self.teacher = Teacher(model, self.device, self.dtype, int(CACHE_SHARE * read_memory(self.device).free_bytes))
        self.samples, held_back = divide(samples, options.seed)
        self._validation = list(epoch(held_back, options.tokens_per_step, random.Random(0)))
        self._optimizer = torch.optim.AdamW(
            self.draft.parameters(),
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=options.weight_decay,
            fused=self.device.type == "cuda",
        )

    def batches(self) -> Iterator[Batch]:
        """Epochs without end."""
        draw = random.Random(self.options.seed)
        while True:
            yield from epoch(self.samples, self.options.tokens_per_step, draw)

    def step(self, batch: Batch, rate: float) -> torch.Tensor:
        """Returns the loss, on the device."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss = accumulate_gradients(self.draft, self.teacher, batch, self.device, self.dtype, self.options.ce_weight)
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), MAX_GRADIENT_NORM)
        self._optimizer.step()
        return loss

    def validate(self) -> Agreement:
        self.draft.eval()
        agreement = measure_agreement(self.draft, self.teacher, self._validation, self.device, self.dtype)
        self.draft.train()
        return agreement


def divide(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Those to train with and those to validate with, at least one of each.

    Raises:
        ConfigError: there are fewer than two.
    """
    usable = [sample for sample in samples if sample.num_output_tokens]
    if len(usable) < 2:
        raise ConfigError("there are no samples to train with: generate some first")
    random.Random(seed).shuffle(usable)
    count, tokens = 0, 0
    while count < max(1, int(VALIDATION_SHARE * len(usable))) and tokens < MAX_VALIDATION_TOKENS:
        tokens += len(usable[count].token_ids)
        count += 1
    return usable[count:], usable[:count]


def train(
    target: Checkpoint,
    shape: DraftShape,
    samples: Sequence[Sample],
    directory: Path,
    options: TrainOptions,
    *,
    device: Device = Device.CPU,
    start_from: Path | None = None,
    on_step: Callable[[float, dict[str, float]], None] = lambda _progress, _point: None,
    on_validation: Callable[[dict[str, float]], None] = lambda _point: None,
) -> Record:
    """Write a draft to `directory` and its record beside it; both are renewed at each validation.

    start_from: a draft to go on with, in place of a new one of `shape`. on_step(progress, point of the curve).

    Raises:
        ConfigError: shape, samples or target do not do.
    """
    clock = Clock(options, perf_counter())
    training = Training(target, shape, samples, options, device, start_from)
    record = Record(_facts(target, training))

    def validate(step: int) -> None:
        begun_s = clock.seconds
        point = {"step": step, "seconds": round(clock.seconds, 2)} | asdict(training.validate())
        record.validation.append(point)
        write_draft(directory, training.draft, training.config)
        record.write(directory.parent / RECORD)
        on_validation(point)
        clock.reserved_s = max(clock.reserved_s, SPARE_S + clock.seconds - begun_s)

    validate(0)
    step, num_tokens, latest = 0, 0, None
    for batch in training.batches():
        if clock.is_over(step):
            break
        begun_s, progress = clock.seconds, clock.progress(step)
        rate = learning_rate(progress, options.learning_rate)
        loss = training.step(batch, rate)
        step, num_tokens = step + 1, num_tokens + len(batch.targets)
        point = {"step": step, "tokens": num_tokens, "learning_rate": rate}
        if latest is not None:  # read one step late, so that the device need not wait for the host
            _observe(record, *latest, clock, on_step)
        latest = progress, point, loss
        clock.longest_step_s = max(0.9 * clock.longest_step_s, clock.seconds - begun_s)
        if progress * NUM_VALIDATIONS >= len(record.validation) and not clock.is_over(step):
            validate(step)
    if latest is not None:
        _observe(record, *latest, clock, on_step)
        validate(step)
    return record


def _observe(
    record: Record,
    progress: float,
    point: dict[str, float],
    loss: torch.Tensor,
    clock: Clock,
    on_step: Callable[[float, dict[str, float]], None],
) -> None:
    point |= {"loss": round(loss.item(), 5), "seconds": round(clock.seconds, 2)}
    record.curve.append(point)
    on_step(progress, point)


def _facts(target: Checkpoint, training: Training) -> dict[str, Any]:
    return {
        "target": target.path.name,
        "target_fingerprint": target.fingerprint,
        "options": asdict(training.options),
        "shape": asdict(training.config),
        "num_parameters": sum(parameter.numel() for parameter in training.draft.parameters()),
        "num_samples": len(training.samples),
        "num_output_tokens": sum(sample.num_output_tokens for sample in training.samples),
        "device": torch.cuda.get_device_name() if training.device.type == "cuda" else "CPU",
        "dtype": str(training.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
