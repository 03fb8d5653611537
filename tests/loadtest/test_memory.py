"""Whether growth is told from noise."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loadtest.memory import LIMIT_BYTES_PER_MIN, MemoryWatch, Sample, trend
from loadtest.plot import plot_memory

MIB = 2**20


def samples(slope_bytes_per_min: float, noise_bytes: float = 0.0) -> list[Sample]:
    """Half an hour's, whose noise hangs together for about a minute, as that of allocators does."""
    draw = np.random.default_rng(5)
    noise = np.repeat(draw.normal(0, 1, 31), 12) * noise_bytes
    return [(s, int(400 * MIB + slope_bytes_per_min * s / 60 + noise[s // 5])) for s in range(0, 1800, 5)]


def test_growth_is_measured() -> None:
    line = trend(samples(2 * MIB))
    assert line is not None
    assert line.slope_bytes_per_min == pytest.approx(2 * MIB, rel=1e-3)
    assert line.margin_bytes_per_min < 0.01 * MIB
    assert (line.first_bytes, line.last_bytes == line.peak_bytes) == (400 * MIB, True)
    assert not line.is_flat
    assert line.surely_grows


def test_one_step_up_in_a_short_time_is_not_surely_growth() -> None:
    line = trend([(float(s), 400 * MIB + (s > 100) * 3 * MIB) for s in range(0, 120, 2)])
    assert line is not None
    assert (line.is_flat, line.surely_grows) == (False, False)


@pytest.mark.parametrize("slope", [0.0, 0.4 * MIB, -3 * MIB])
def test_noise_is_no_growth_and_within_the_margin(slope: float) -> None:
    line = trend(samples(slope, noise_bytes=10 * MIB))
    assert line is not None
    assert line.is_flat
    assert abs(line.slope_bytes_per_min - slope) < line.margin_bytes_per_min < LIMIT_BYTES_PER_MIN


def test_a_few_samples_say_nothing() -> None:
    assert trend(samples(0.0)[:39]) is None


def test_a_process_that_ends_is_told() -> None:
    command = [sys.executable, "-c", "print(flush=True); input()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdout is not None
    process.stdout.read(1)  # it is what it was told to be
    watch = MemoryWatch({"p": process.pid})
    watch.sample()
    [(_, resident_bytes)] = watch.samples["p"]
    assert resident_bytes > MIB
    assert watch.num_fds()["p"] >= 3
    process.communicate(b"\n")
    watch.sample()
    assert (watch.gone, len(watch.samples["p"]), watch.num_fds()) == ({"p"}, 1, {})


def test_plot(tmp_path: Path) -> None:
    plot_memory({"SERVE_REPLICA::a": samples(MIB), "b": samples(0)}, 300, tmp_path / "memory.svg")
    text = (tmp_path / "memory.svg").read_text()
    assert text.startswith("<?xml")
    assert text.count('id="line2d_') > 2
