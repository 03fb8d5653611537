"""A minute of the chaos run, two streams an engine; its own Ray cluster, in a process of its own."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from loadtest.chaos import EXCUSED_S, UNEXCUSED, ChaosOptions, Summary, causes, main, violations
from loadtest.chaos_clients import Broken, make_bodies
from loadtest.chaos_faults import KILL, Fault
from loadtest.memory import Trend

ROOT = Path(__file__).parents[2]
COMMAND = [
    *(sys.executable, "-m", "loadtest.chaos", "--app", "tests.serve_app.chaos_app:app"),
    *("--duration", "60", "--streams", "4", "--max-tokens", "400", "--pause", "2"),
    *("--recovery-limit", "40"),  # of a busy machine
    *("--kinds", "engine,draft,ingress,controller", "speculative=remote", "draft_model=the same"),
]
GOOD = Summary(
    duration_s=60.0,
    completed=50,
    wrong=[],
    hung=0,
    error_events=[],
    broken={"ingress kill": 2},
    healed=2,
    unhealed=0,
    faults={"engine kill": 2, "engine stop": 2},
    resumed={"failed": 4.0, "silent": 4.0},
    stale_frames=1.0,
    recovery_p50_s=1.0,
    recovery_p99_s=5.0,
    longest_pause_s=6.0,
    load_average=1.0,
    left_over="",
    memory={"engine": Trend(1e5, 1e5, 100, 110, 120)},
)
OPTIONS = ChaosOptions(kinds=("engine",), min_faults=2, min_resumed=8, calm_s=60)


@pytest.mark.timeout(600)
@pytest.mark.xdist_group("cluster")  # two clusters at once are too much for a small machine
def test_a_minute_of_faults(tmp_path: Path, default_model_path: Path) -> None:  # noqa: ARG001 - its tokenizer
    output = tmp_path / "summary.json"
    command = [*COMMAND, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads(output.read_text())
    assert summary["completed"] >= 4
    assert summary["violations"] == []


def test_what_passes() -> None:
    assert violations(GOOD, OPTIONS) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wrong": ["at character 3"]}, "1 wrong answers, such as at character 3"),
        ({"hung": 1}, "1 hung requests"),
        ({"unhealed": 1}, "1 that no retry healed"),
        ({"error_events": ["lost"]}, "such as lost"),
        ({"broken": {"no fault of its ingress": 1}}, "1 broken connections"),
        ({"faults": {"engine kill": 2, "engine stop": 1}}, "only 1 of 2: engine stop"),
        ({"resumed": {"failed": 7.0}}, "only 7 streams"),
        ({"recovery_p99_s": 15.0}, "within 15 s"),
        ({"left_over": "4 blocks"}, "left over: 4 blocks"),
        ({"memory": {"engine": Trend(1.3e6, 2e5, 2 << 20, 5 << 20, 5 << 20)}}, "engine grows: +1.24 ± 0.19 MiB a min"),
        ({"memory": {}}, "too short a calm"),
    ],
)
def test_what_does_not_pass(change: dict[str, object], said: str) -> None:
    [line] = violations(replace(GOOD, **change), OPTIONS)  # type: ignore[arg-type]
    assert said in line


def test_requests_differ_and_are_the_same_each_time() -> None:
    bodies = make_bodies(10, 50, seed=3)
    assert bodies == make_bodies(10, 50, seed=3) != make_bodies(10, 50, seed=4)
    assert len({body["prompt"] for body in bodies}) == 10
    assert {body["temperature"] == 0 for body in bodies} == {True, False}


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        (Broken(101.0, "abc"), "ingress kill"),
        (Broken(101.0, None), "ingress kill"),
        (Broken(101.0, "other"), UNEXCUSED),
        (Broken(99.0, "abc"), UNEXCUSED),
        (Broken(100.0 + EXCUSED_S, None), UNEXCUSED),
    ],
)
def test_what_excuses_a_broken_connection(broken: Broken, cause: str) -> None:
    faults = [Fault("engine", KILL, "SERVE_REPLICA::chaos#engine#other", 100.0)]
    faults.append(Fault("ingress", KILL, "SERVE_REPLICA::chaos#ingress#abc", 100.0))
    assert causes([broken], faults) == {cause: 1}


def test_a_calm_in_which_memory_could_not_settle_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="first 120 s"):
        main(calm=5.0)
