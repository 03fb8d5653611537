"""Locust as people run it: a process, its files, its exit code."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loadtest.compare import compare, differences
from loadtest.results import Results, read_results
from tests.loadtest.scripted_server import Script, ScriptedServer

ROOT = Path(__file__).parent.parent.parent
NEAR_S = 0.25  # on a busy machine; how exact the times are: see test_streaming_client.py


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(Script(tokens_a_chunk=2)).running() as server:
        yield server


def run_locust(url: str, *arguments: str, exit_code: int = 0, cwd: Path = ROOT) -> str:
    """Its standard output and error together."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest/locustfile.py"), "--host", url, "--headless"]
    done = subprocess.run(
        [*command, "--only-summary", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == exit_code, done.stdout
    return done.stdout


def test_a_closed_loop_to_files_and_a_comparison(server: ScriptedServer, tmp_path: Path) -> None:
    """From another folder, as people do; then the same again with a slower server."""
    server.script.failures = {12: "429"}
    closed = ("-u", "4", "-r", "100", "--max-error-share", "0.5")
    goals = ("--slo", "ttft_s=30,tpot_s=30", "--assert", "ttft_s.p50>0.09,goodput>1")
    output = run_locust(
        server.url + "/v1", *closed, *goals, "-t", "4s", "--warm-up", "1", "--report", "out/fast", cwd=tmp_path
    )
    assert re.search(r"^METRIC\s+ttft\s+\d", output, re.MULTILINE)
    assert re.search(r"^METRIC\s+goodput\s+\d", output, re.MULTILINE)
    fast = read_results(tmp_path / "out/fast.json")
    check_against(server, fast)
    check_statistics(output, fast)
    assert fast.violations == []
    assert json.loads((tmp_path / "out/fast.json").read_text())["settings"]["objectives"] == {
        "ttft_s": 30,
        "tpot_s": 30,
    }

    page = (tmp_path / "out/fast.html").read_text()
    assert page.count("<svg") == 5
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|@import|url\((?!#)', page)  # nothing to be loaded
    assert "http 429 overloaded" in page or not fast.summary.errors

    server.script.gap_s = 0.2
    goals = ("--assert", "tpot_s.p50<0.01")
    run_locust(
        server.url, *closed, *goals, "-t", "3s", "--warm-up", "0.5", "--report", "slow", exit_code=1, cwd=tmp_path
    )
    slow = read_results(tmp_path / "slow.json")
    assert any("tpot_s.p50 < 0.01 was asserted" in violation for violation in slow.violations)
    check_comparison(fast, slow)


def check_against(server: ScriptedServer, results: Results) -> None:
    """What was measured, with what the server noted of the same requests."""
    summary = results.summary
    first_s = min(record.sent_s for record in results.records)
    assert 0.5 < summary.duration_s < max(record.ended_s for record in results.records) - first_s
    assert 0 < summary.num_requests < len(results.records)  # warm-up is kept in the file, and not measured
    gaps = np.concatenate([np.diff(served.chunk_s) for served in server.served if len(served.chunk_s) == 5])
    waits = [served.chunk_s[0] - served.arrived_s for served in server.served if served.chunk_s]
    values = summary.plain()
    assert values["itl_s.p50"] == pytest.approx(float(np.median(gaps)), abs=NEAR_S / 5)
    assert server.script.ttft_s <= values["ttft_s.p50"] == pytest.approx(float(np.median(waits)), abs=NEAR_S)
    assert values["output_tokens.mean"] == 10
    assert values["output_tokens_per_s"] == pytest.approx(10 * values["requests_per_s"], rel=0.5)
    assert values["concurrency.mean"] == pytest.approx(4, rel=0.3)
    assert len(summary.values["ttft_s.mean"].repeats) == 3


def check_statistics(output: str, results: Results) -> None:
    """Locust's rows are of what ended since the warm-up; the total is of requests alone."""
    ended = [record for record in results.records if record.ended_s >= results.summary.started_s]
    [posts] = re.findall(
        r"^POST\s+/v1/chat/completions short_chat\s+(\d+)\s", output.split("percentiles")[0], re.MULTILINE
    )
    [total] = re.findall(r"^\s+Aggregated\s+(\d+)\s", output.split("percentiles")[0], re.MULTILINE)
    assert posts == total
    assert abs(int(total) - len(ended)) <= 4  # one a user: the clock is read a moment before the reset
    assert len(ended) + 4 < len(results.records)


def check_comparison(fast: Results, slow: Results) -> None:
    """Seconds give little confidence, so the verdicts are tested elsewhere; the ratio is clear."""
    rows = {row.name: row.cells for row in compare({"fast": fast, "slow": slow})}
    assert float(rows["itl_s.p50"][1].ratio.split()[0].removeprefix("×")) > 2
    assert differences({"fast": fast, "slow": slow}) == []


def test_an_open_loop_on_two_processes(server: ScriptedServer, tmp_path: Path) -> None:
    """The rate is that of all together; the answers take longer than the run may wait for arrivals."""
    server.script.ttft_s = 1.0
    arrivals = ("--arrivals", "constant", "--rate", "20", "-u", "2", "-r", "100", "--warm-up", "0.5")
    run_locust(server.url, *arrivals, "--processes", "2", "-t", "3s", "--report", "open", cwd=tmp_path)
    results = read_results(tmp_path / "open.json")
    assert results.settings["processes"] == 2
    due_s = np.array([record.due_s for record in results.records])
    half_seconds = np.bincount(((due_s - due_s.min()) * 2).astype(int))
    assert np.median(half_seconds) == pytest.approx(10, abs=1)  # of both: they begin and end when they are told to
    assert results.summary.plain()["concurrency.mean"] > 10
    assert len({json.dumps(served.body["messages"]) for served in server.served}) == len(server.served)


def test_what_cannot_be_measured_fails(server: ScriptedServer) -> None:
    assert "ended within its warm-up" in run_locust(server.url, "-t", "1s", "--warm-up", "60", exit_code=1)
    assert "ConnectionRefused" in run_locust("http://127.0.0.1:9", "-t", "5s", exit_code=1)
