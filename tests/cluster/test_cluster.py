"""The service on a cluster that grows under load, loses a node and shrinks again. The phases are one story, in order;
`python -m tests.cluster` shows it."""

from pathlib import Path

import pytest

from tests.cluster.isolation import NotPermittedError
from tests.cluster.launch import run_isolated
from tests.cluster.story import Report

# Two clusters at once are too much for a small machine.
pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("cluster")]


@pytest.fixture(scope="module")
def printed() -> list[str]:
    return []


@pytest.fixture(scope="module")
def report(default_model_path: Path, printed: list[str]) -> Report:  # noqa: ARG001 - its tokenizer, fetched outside
    def on_line(line: str) -> None:
        printed.append(line)
        print(line)

    try:
        return run_isolated(on_line)
    except NotPermittedError as error:
        pytest.skip(str(error))


def assert_passed(report: Report, printed: list[str], phase: str) -> None:
    assert phase in report.passed, f"{report.failures or 'not reached'}\n" + "\n".join(printed)


def test_replicas_pend_until_nodes_join_and_every_answer_is_right(report: Report, printed: list[str]) -> None:
    assert_passed(report, printed, "grow")


def test_a_lost_node_is_replaced_and_its_streams_go_on(report: Report, printed: list[str]) -> None:
    assert_passed(report, printed, "lose_a_node")


def test_nodes_leave_once_nobody_asks(report: Report, printed: list[str]) -> None:
    assert_passed(report, printed, "shrink")
