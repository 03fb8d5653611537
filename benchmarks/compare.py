"""What a benchmark's new results changed: `python -m benchmarks.compare NEW.json [OLD.json]`.

Without OLD, each figure is compared with the last one in benchmarks/results that has the same card, benchmark and
arguments.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.history import Arguments, Figure, Result, last_results, read_results

# What machines of a kind differ by with the same code, however well each repeats itself: GPUs by this much; of CPUs,
# what seven runs of one request in half an hour on a shared machine did to either side (both docs/performance.md).
GPU_NOISE = 0.05
CPU_NOISE = 0.25
LEAST_NOISE = 0.01  # where both ran on the very same machine, and said how far apart their runs were
EXACT = ("equals_exact",)  # must not change at all


class Verdict(StrEnum):
    """What became of a figure."""

    SAME = ""
    BETTER = "better"
    WORSE = "WORSE"


@dataclass(frozen=True)
class Change:
    """One figure, of both. noise: a part that means nothing; is_measured: whether it is what repeated runs differed by,
    and not a default."""

    arguments: Arguments
    name: str
    old: Figure
    new: Figure
    noise: float
    is_measured: bool

    @property
    def ratio(self) -> float:
        return self.new.value / self.old.value if self.old.value else float("inf") if self.new.value else 1.0

    @property
    def verdict(self) -> Verdict:
        """Noise counts alike in both directions: twice as fast and half as fast are as far from 1."""
        ratio = self.ratio
        far = ratio - 1 if ratio >= 1 else 1 / ratio - 1 if ratio > 0 else float("inf")
        if far <= self.noise:
            return Verdict.SAME
        return Verdict.BETTER if (ratio > 1) == self.new.higher_is_better else Verdict.WORSE


def compare(new: list[Result], old: list[Result], *, same_machine: bool = False) -> tuple[list[Change], list[Result]]:
    """Changes of all figures that are in both; and the new rows that the old ones have nothing for."""
    by_key = {result.key: result for result in old}  # of several, the newest
    changes: list[Change] = []
    alone: list[Result] = []
    for result in {result.key: result for result in new}.values():
        before = by_key.get(result.key)
        shared = [] if before is None else [name for name in result.figures if name in before.figures]
        if before is None or not shared:
            alone.append(result)
            continue
        for name in shared:
            pair = before.figures[name], result.figures[name]
            changes.append(Change(result.arguments, name, *pair, *noise_of(name, *pair, result.hardware, same_machine)))
    return changes, alone


def noise_of(name: str, old: Figure, new: Figure, hardware: str, same_machine: bool) -> tuple[float, bool]:
    """The larger spread of repeated runs, but no less than what machines of the kind differ by, which no repetition on
    one of them shows; and whether it was measured."""
    if name in EXACT:
        return 0.0, False
    default = CPU_NOISE if hardware.endswith("threads") else GPU_NOISE
    spreads = [figure.spread for figure in (old, new) if figure.spread is not None]
    least = LEAST_NOISE if same_machine and spreads else default
    spread = max(spreads, default=0.0)
    return max(spread, least), spread >= least


def telling(changes: list[Change]) -> list[str]:
    """Names of the arguments that differ among the rows: the others are said once."""
    rows = [dict(change.arguments) for change in changes]
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if len({row.get(name) for row in rows}) > 1]


def table_of(changes: list[Change], *, only_moved: bool) -> Table:
    names = telling(changes)
    table = Table(title="new against old; noise in brackets is a default, not measured")
    for name in (*names, "figure"):
        table.add_column(name)
    for name in ("old", "new", "new/old", "noise", "moved"):
        table.add_column(name, justify="right")
    for change in changes:
        if only_moved and change.verdict is Verdict.SAME:
            continue
        arguments = dict(change.arguments)
        noise = f"{change.noise:.1%}"
        colour = {Verdict.SAME: "", Verdict.BETTER: "green", Verdict.WORSE: "red"}[change.verdict]
        table.add_row(
            *(arguments.get(name, "") for name in names),
            change.name,
            f"{change.old.value:,.6g}",
            f"{change.new.value:,.6g}",
            f"{change.ratio:.3f}",
            noise if change.is_measured else f"({noise})",
            change.verdict.value,
            style=colour,
        )
    return table


def main(
    new: Annotated[Path, typer.Argument(help="a report of a benchmark")],
    old: Annotated[Path | None, typer.Argument(help="what it is compared with; left out: the last results")] = None,
    results: Annotated[Path, typer.Option(help="where those are looked for")] = Path("benchmarks/results"),
    only_moved: Annotated[bool, typer.Option("--only-moved", help="leave out what stayed within the noise")] = False,
    same_machine: Annotated[
        bool,
        typer.Option("--same-machine", help="both ran on the very same one: repeated runs then say all of the noise"),
    ] = False,
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="exit status 1 if a figure got worse by more than noise")
    ] = False,
) -> None:
    """Compare results, figure by figure. Exit status 2: there is nothing to compare."""
    try:
        rows = read_results(new)
        before = read_results(old) if old is not None else last_results(results, rows[-1].time, new)
    except ValueError as error:
        _refuse(str(error))
    changes, alone = compare(rows, before, same_machine=same_machine)
    if not changes:
        _refuse(f"{old or results} has no older results of this benchmark with these arguments on {cards_of(rows)}")
    console = Console()
    console.print(table_of(changes, only_moved=only_moved))
    moved = {verdict: sum(change.verdict is verdict for change in changes) for verdict in Verdict}
    console.print(
        f"{cards_of(rows)}: {len(changes)} figures, {moved[Verdict.WORSE]} worse, "
        f"{moved[Verdict.BETTER]} better, {moved[Verdict.SAME]} within noise; "
        f"{len(alone)} new rows have no counterpart",
        highlight=False,
    )
    if fail_on_regression and moved[Verdict.WORSE]:
        raise typer.Exit(1)


def cards_of(rows: list[Result]) -> str:
    return ", ".join(sorted({row.hardware for row in rows})) or "no machine (a simulation)"


def _refuse(line: str) -> None:
    Console(stderr=True).print(f"compare: {line}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
