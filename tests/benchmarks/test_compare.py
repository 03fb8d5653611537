"""What moved by more than noise, and the exit status."""

from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.compare import CPU_NOISE, GPU_NOISE, LEAST_NOISE, Change, Verdict, compare, main
from benchmarks.history import Figure, read_results
from tests.benchmarks.test_history import RESULTS, ROW, write

application = Typer()
application.command()(main)


def run(*arguments: object) -> tuple[int, str]:
    """Exit status and what was printed."""
    outcome = CliRunner().invoke(application, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    return outcome.exit_code, outcome.output


def change(ratio: float, noise: float, higher_is_better: bool = True) -> Verdict:
    return Change((), "x", Figure(2.0, higher_is_better), Figure(2.0 * ratio, higher_is_better), noise, True).verdict


def test_what_counts_as_moved() -> None:
    assert change(1.04, 0.05) is change(0.96, 0.05) is Verdict.SAME
    assert change(1.06, 0.05) is change(0.9, 0.05, higher_is_better=False) is Verdict.BETTER
    assert change(0.9, 0.05) is change(1.06, 0.05, higher_is_better=False) is Verdict.WORSE
    assert change(0.0, 10.0) is Verdict.WORSE
    assert Change((), "x", Figure(0.0, False), Figure(1.0, False), 0.05, True).verdict is Verdict.WORSE
    assert Change((), "x", Figure(0.0, False), Figure(0.0, False), 0.0, True).verdict is Verdict.SAME


def noise(
    tmp_path: Path, old: dict[str, Any], new: dict[str, Any], *, same_machine: bool = False
) -> tuple[float, bool]:
    """Of the time of a step."""
    files = [write(tmp_path / f"{name}.json", row) for name, row in (("new", new), ("old", old))]
    changes, alone = compare(*(read_results(file) for file in files), same_machine=same_machine)
    assert not alone
    (found,) = (each for each in changes if each.name == "step_time_s")
    return found.noise, found.is_measured


def test_noise_is_what_repeated_runs_differ_by(tmp_path: Path) -> None:
    wide, narrow = ({"repeats": {"step_time_s": [0.001, 0.001 * (1 + by)]}} for by in (0.3, 0.002))
    assert noise(tmp_path, {}, {}) == (GPU_NOISE, False)
    assert noise(tmp_path, {}, wide) == noise(tmp_path, wide, narrow) == (pytest.approx(0.3), True)
    assert noise(tmp_path, narrow, narrow) == (GPU_NOISE, False), "two cards differ by more than one by itself"
    assert noise(tmp_path, narrow, narrow, same_machine=True) == (LEAST_NOISE, False)
    assert noise(tmp_path, wide, narrow, same_machine=True) == (pytest.approx(0.3), True)
    assert noise(tmp_path, {}, {}, same_machine=True) == (GPU_NOISE, False), "nobody knows how far apart runs were"


def test_a_shared_processor_is_noisier_than_a_card(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.json", {}, hardware="AMD EPYC, 2 threads") for name in ("new", "old")]
    changes, _ = compare(*(read_results(file) for file in files))
    assert {each.noise for each in changes} == {CPU_NOISE}


def test_an_output_that_changed_is_no_noise(tmp_path: Path) -> None:
    old, new = (write(tmp_path / f"{name}.json", {"equals_exact": name == "old"}) for name in ("old", "new"))
    status, printed = run(new, old, "--fail-on-regression")
    assert status == 1
    assert "1 worse" in printed


def test_the_command_compares_with_the_last_result(tmp_path: Path) -> None:
    write(tmp_path / "older.json", {"step_time_s": 0.5}, time="2026-11-20")
    write(tmp_path / "last.json", {}, time="2026-11-25")
    write(tmp_path / "other.json", {"step_time_s": 0.7}, time="2026-11-26", hardware="NVIDIA H200")
    new = write(
        tmp_path / "new.json",
        {"step_time_s": 0.0012, "output_tokens_per_s": 8100.0, "repeats": {"step_time_s": [0.0012, 0.0012]}},
        {"batch": 99},
    )
    folder = ("--results", tmp_path)
    status, printed = run(new, *folder)
    assert status == 0
    (step,) = (line for line in printed.splitlines() if "step_time_s" in line)
    assert [cell.strip() for cell in step.strip("│").split("│")] == [
        *("step_time_s", "0.001", "0.0012", "1.200", "(5.0%)", "WORSE")
    ]
    assert "output_tokens_per_s" in printed
    assert "2 figures, 1 worse, 0 better, 1 within noise; 1 new rows have no counterpart" in printed
    assert "output_tokens_per_s" not in run(new, *folder, "--only-moved")[1]
    assert run(new, *folder, "--fail-on-regression")[0] == 1
    slower = write(tmp_path / "slower.json", ROW | {"step_time_s": 0.002}, time="2026-11-26T09:00:00+00:00")
    assert run(new, slower, "--fail-on-regression")[0] == 0, "what got better is no regression"


def test_nothing_to_compare_is_no_success(tmp_path: Path) -> None:
    new = write(tmp_path / "new.json", {})
    for arguments in ((new, "--results", tmp_path), (new, write(tmp_path / "old.json", {"batch": 2}))):
        status, printed = run(*arguments)
        assert status == 2
        assert "has no older results of this benchmark with these arguments on NVIDIA H100 80GB HBM3" in printed
        assert printed.count("\n") == 1
    assert run(tmp_path / "absent.json")[0] == 2


def test_the_results_that_are_kept() -> None:
    """26 November against what was there before: TinyLlama in bfloat16 stayed, w8a8 of 32 requests got slower."""
    status, printed = run(RESULTS / "engine-h100-2026-11-26.json", "--fail-on-regression")
    assert status == 1
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]
    moved = {(*cells[:3], cells[3]): (cells[-3], cells[-1]) for cells in lines}
    speed = "output_tokens_per_s"
    assert moved["32", "tinyllama-1.1b (random weights)", "none", speed] == ("1.000", "")
    assert moved["32", "tinyllama-1.1b (random weights)", "w8a8", speed] == ("0.837", "WORSE")
