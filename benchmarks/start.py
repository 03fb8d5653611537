"""Starting an engine under a benchmark: bars on a terminal, and whether Triton's kernels were compiled already."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from engine.runner.memory import MemoryPlan
from engine.runner.start_up import Phase, Stage, StartUp

_errors = Console(stderr=True)


class ShownStartUp(StartUp):
    """A bar for each phase that counts, a line when a phase is over, the memory plan in the end."""

    def __init__(self, bars: Progress) -> None:
        super().__init__()
        self._bars = bars
        self._tasks: dict[Phase, TaskID] = {}

    def _show_progress(self, stage: Stage) -> None:
        if stage.phase not in self._tasks:
            self._tasks[stage.phase] = self._bars.add_task(stage.phase)
        self._bars.update(self._tasks[stage.phase], completed=stage.done, total=stage.total)

    def _show_end(self, stage: Stage) -> None:
        self._say(stage.summary())

    def _show_ready(self, memory: MemoryPlan, ready_s: float) -> None:
        for line in memory.lines():
            self._say(line)
        self._say(f"ready in {ready_s:.2f} s")

    def _say(self, line: str) -> None:
        self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def shown_start_up() -> Iterator[ShownStartUp]:
    """On standard error, for the length of a `with` block."""
    with Progress(console=_errors, transient=True) as bars:
        yield ShownStartUp(bars)


def num_compiled() -> int:
    """Kernels in Triton's cache on this machine."""
    import triton  # only where there is a GPU

    return sum(1 for _ in Path(triton.knobs.cache.dir).glob("*/*.cubin"))


def cache_state(compiled_before: int, compiled_after: int) -> str:
    """What Triton's cache was like, judged by the kernels that the start had to compile."""
    added = compiled_after - compiled_before
    if not added:
        return "warm Triton cache"
    return f"{'cold' if not compiled_before else 'partly warm'} Triton cache, {added} kernels compiled"
