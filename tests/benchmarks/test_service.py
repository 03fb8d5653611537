"""The service against its engine: what is sent, what counts, from arguments to a file."""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import service
from benchmarks.history import read_results
from benchmarks.service_clients import HOST, Answer, Clients, Outcome, Traffic
from serve_app.ports import free_port

FIRST_S, GAP_S = 0.2, 0.05


class ScriptedServer:
    """Streams as many tokens as are asked for: the first after FIRST_S, the others GAP_S apart, after a pause."""

    def __init__(self, port: int) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.written_s: list[tuple[float, float, float]] = []  # of requests: arrival, first token, last
        self.ends_early = False
        self.pause_s = 0.0
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(asyncio.start_server(self._serve, HOST, port))
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        arrived_s, written_s = time.monotonic(), []
        self.bodies.append(body)
        for place in range(body["max_tokens"]):
            await asyncio.sleep((GAP_S if place else FIRST_S) + self.pause_s * (place == 1))
            written_s.append(time.monotonic())
            start = b"" if place else b"HTTP/1.1 200 OK\r\n\r\n"
            writer.write(start + b'data: {"choices": [{"text": "x"}]}\n\n')
        if not self.ends_early:
            writer.write(b"data: [DONE]\n\n")
        self.written_s.append((arrived_s, written_s[0], written_s[-1]))
        writer.close()


@pytest.fixture
def server() -> Iterator[tuple[ScriptedServer, int]]:
    port = free_port(HOST)
    scripted = ScriptedServer(port)
    yield scripted, port
    scripted.stop()


@pytest.fixture
def clients(server: tuple[ScriptedServer, int]) -> Iterator[Clients]:
    clients = Clients(Traffic(server[1], 320, 7, 5), 2)
    yield clients
    clients.close()


def test_what_counts() -> None:
    answers = [Answer(10.0, 10.1, 12.0), Answer(11.0, 11.5, 14.0), Answer(11.0, 11.2, 13.0)]
    outcome = Outcome.of(answers, 8)
    assert outcome.output_tokens_per_s == pytest.approx(6.0)
    assert outcome.mean_concurrency == pytest.approx(7 / 4)
    assert (outcome.ttft_p50_s, outcome.ttft_p99_s) == (pytest.approx(0.2), pytest.approx(0.5))


def by_time(times: Iterable[tuple[float, ...]]) -> list[list[float]]:
    """Each kind of time in order: what holds for the times of each request holds for these."""
    return [sorted(each) for each in zip(*times, strict=True)]


def test_streams_are_timed(server: tuple[ScriptedServer, int], clients: Clients) -> None:
    """None of the three times is before what it tells of; and that of the first token is not that of the others."""
    scripted, _ = server
    scripted.pause_s = 1.0
    answers = clients.together(5)
    assert len(answers) == len(scripted.bodies) == 5
    for body in scripted.bodies:
        assert len(body["prompt"]) == 7
        assert max(body["prompt"]) < 320
        assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (5, True, True)
    sent_s, first_s, ended_s = by_time((answer.sent_s, answer.first_s, answer.ended_s) for answer in answers)
    arrived_s, first_written_s, last_written_s = by_time(scripted.written_s)
    for earlier_s, later_s in ((sent_s, arrived_s), (first_written_s, first_s), (last_written_s, ended_s)):
        assert all(earlier <= later for earlier, later in zip(earlier_s, later_s, strict=True))
    assert all(answer.first_s - answer.sent_s >= FIRST_S for answer in answers)
    assert max(answer.ended_s - answer.first_s for answer in answers) > 0.5


def test_arrivals_do_not_wait_for_answers(clients: Clients) -> None:
    """Ten a second, of which each takes 0.4 s or more."""
    answers = sorted(clients.arriving(10, 3.0), key=lambda answer: answer.sent_s)
    assert 15 < len(answers) < 50
    assert answers[-1].sent_s - answers[0].sent_s > 2
    assert any(later.sent_s < earlier.ended_s for earlier, later in pairwise(answers))


def test_half_an_answer_is_none(server: tuple[ScriptedServer, int], clients: Clients) -> None:
    server[0].ends_early = True
    with pytest.raises(RuntimeError, match="ended early"):
        clients.together(1)


def test_from_arguments_to_a_file(
    server: tuple[ScriptedServer, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a real engine of a tiny shape, and the scripted server in place of the service."""
    application = Typer()
    application.command()(service.main)
    ended: list[float] = []
    monkeypatch.setattr(service, "free_port", lambda _: server[1])
    monkeypatch.setattr(service, "serve_it", lambda *_: lambda: ended.append(time.monotonic()))
    options = ["--shape", "tiny", "--streams", "3", "--saturating-streams", "4", "--load", "0.5", "--seconds", "1"]
    options += ["--input", "6", "--output", "4", "--processes", "1", "--argument", "max_num_seqs=4"]
    options += ["--results", str(tmp_path)]

    def run_part(_module: str, part: str) -> Any:
        outcome = CliRunner().invoke(application, [*options, "--part", part])
        assert outcome.exit_code == 0, outcome.output
        return json.loads(outcome.stdout.splitlines()[-1])

    monkeypatch.setattr(service, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", ["service"])
    outcome = CliRunner().invoke(application, options)
    assert outcome.exit_code == 0, outcome.output
    assert len(ended) == 1
    (file,) = tmp_path.glob("service-*.json")
    record = json.loads(file.read_text())
    alone, together, saturated, arriving = record["rows"]
    assert alone["output_tokens_per_s"] > 0
    assert together["ratio"] == together["output_tokens_per_s"] / alone["output_tokens_per_s"]
    assert arriving["offered_requests_per_s"] == pytest.approx(0.5 * saturated["output_tokens_per_s"] / 4)
    assert [row["requests_at_once"] for row in (alone, together, saturated)] == [3, 3, 4]
    assert together["output_tokens_per_s"] < 3 * 4 / (FIRST_S + 2 * GAP_S)
    assert together["output_tokens_per_s"] == sorted(together["repeats"]["output_tokens_per_s"])[1]
    assert f"{together['ratio']:.2f}" in outcome.stdout
    results = read_results(file)
    assert [set(result.figures) for result in results] == [
        {"output_tokens_per_s"},
        {"output_tokens_per_s", "ratio", "ttft_p50_s", "ttft_p99_s"},
        {"output_tokens_per_s", "ttft_p50_s", "ttft_p99_s"},
        {"offered_requests_per_s", "output_tokens_per_s", "ttft_p50_s", "ttft_p99_s"},
    ]
    assert len({result.key for result in results}) == 4
