"""How people are told how far an engine's start is, and how long each phase of it took."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter
from typing import TYPE_CHECKING

from engine.runner.out_of_memory import gib

if TYPE_CHECKING:
    from engine.runner.memory import MemoryPlan


class Phase(StrEnum):
    """In the order that they come in."""

    IMPORTS = "importing libraries"
    HEADERS = "reading headers"
    DRAFT = "loading the draft model"
    WEIGHTS = "loading weights"
    MEMORY = "planning memory"
    STEPS = "compiling and capturing steps"


UNITS = {Phase.WEIGHTS: "tensors", Phase.STEPS: "kinds of steps"}  # what a phase counts, if it counts


@dataclass
class Stage:
    """How far a phase is: `done` of `total` units; `num_bytes` where it fills memory; `seconds` once it is over."""

    phase: Phase
    done: int = 0
    total: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def counts(self) -> str:
        """Such as "120/201 tensors"; empty where nothing is counted."""
        unit = UNITS.get(self.phase)
        return "" if unit is None else f"{self.done}/{self.total} {unit}" if self.total else f"no {unit}"

    def summary(self) -> str:
        """One line for when it is over."""
        parts = [self.counts(), gib(self.num_bytes) if self.num_bytes else "", f"{self.seconds:.2f} s"]
        return f"{self.phase}: {', '.join(part for part in parts if part)}"


class StartUp:
    """Follows one start, from when it is made. This one tells nobody; others show what `_show…` are called with.

    seconds: of each phase that is over. ready_s and memory: once the engine is ready.
    """

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = {}
        self.ready_s: float | None = None
        self.memory: MemoryPlan | None = None
        self._began_s = perf_counter()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[tuple[Stage, Callable[[int, int], None]]]:
        """A phase, for the length of a `with` block. Gives its stage, and what to call with (done, in all)."""
        stage = Stage(phase)
        began_s = perf_counter()

        def advance(done: int, total: int) -> None:
            stage.done, stage.total = done, total
            self._show_progress(stage)

        yield stage, advance
        stage.seconds = self.seconds[phase] = perf_counter() - began_s
        self._show_end(stage)

    def ready(self, memory: "MemoryPlan") -> None:
        """The engine can take requests."""
        self.memory = memory
        self.ready_s = perf_counter() - self._began_s
        self._show_ready(memory, self.ready_s)

    def _show_progress(self, stage: Stage) -> None:
        """After each unit."""

    def _show_end(self, stage: Stage) -> None:
        """After each phase."""

    def _show_ready(self, memory: "MemoryPlan", ready_s: float) -> None:
        """At the end."""


class LoggedStartUp(StartUp):
    """Lines for a log: at a phase's first unit, every `interval_s` from then, and at its end; then the memory plan."""

    def __init__(self, write: Callable[[str], None], interval_s: float = 10.0) -> None:
        super().__init__()
        self._write = write
        self._interval_s = interval_s
        self._spoken: tuple[Phase, float] | None = None  # the last line of progress

    def _show_progress(self, stage: Stage) -> None:
        now_s = perf_counter()
        if self._spoken is None or self._spoken[0] is not stage.phase or now_s - self._spoken[1] >= self._interval_s:
            self._spoken = stage.phase, now_s
            self._write(f"{stage.phase}: {stage.counts()}")

    def _show_end(self, stage: Stage) -> None:
        self._write(stage.summary())

    def _show_ready(self, memory: "MemoryPlan", ready_s: float) -> None:
        for line in memory.lines():
            self._write(line)
        self._write(f"ready in {ready_s:.2f} s")
