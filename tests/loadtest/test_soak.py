"""What a soak asks for, and what passes."""

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest

from loadtest.chaos_clients import Answer
from loadtest.memory import Trend
from loadtest.soak import SoakOptions, SoakSummary, violations
from loadtest.traffic import Traffic, draw_request

FLAT, GROWING = Trend(1e5, 2e5, 1, 2, 2), Trend(2e6, 1e5, 1 << 20, 60 << 20, 60 << 20)
REPLICA = "SERVE_REPLICA::soak#engine#x"
GOOD = SoakSummary(
    options=SoakOptions(1800, 300, 150, 200, 0),
    arguments={},
    num_cores=2,
    load_average=2.0,
    requests={"stream": 1000, "turned away": 50},
    generated_tokens=1e6,
    wrong=0,
    errors=[],
    left_over="",
    gone=[],
    open_files={},
    memory={REPLICA: FLAT, "SERVE_CONTROLLER_ACTOR": GROWING},
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"requests": {"stream": 1000}}, "not saturated"),
        ({"wrong": 1}, "1 wrong answers"),
        ({"errors": ["status 500"], "requests": {"turned away": 1, "failed": 3}}, "3 requests failed, such as with s"),
        ({"left_over": "a block"}, "left over: a block"),
        ({"gone": [REPLICA]}, "ended meanwhile"),
        ({"memory": {"SERVE_CONTROLLER_ACTOR": FLAT}}, "too short a time"),
        ({"memory": {REPLICA: GROWING}}, "engine#x grows: +1.91 ± 0.10 MiB a minute, 1 to 60 MiB"),
    ],
)
def test_what_a_soak_must_not_show(change: dict[str, object], said: str) -> None:
    assert violations(GOOD) == []
    [line] = violations(replace(GOOD, **change))  # type: ignore[arg-type]
    assert said in line


def test_requests_are_of_every_kind_and_the_same_each_time() -> None:
    def drawn(seed: int) -> list[tuple[str, dict[str, object]]]:
        draw = random.Random(seed)
        return [draw_request(draw, 100, 50) for _ in range(300)]

    requests = drawn(1)
    assert requests == drawn(1) != drawn(2)
    bodies = [body for _, body in requests]
    assert {endpoint for endpoint, _ in requests} == {"completions", "chat/completions"}
    assert {body["stream"] for body in bodies} == {True, False}
    assert all(any(name in body for body in bodies) for name in ("n", "stop", "logprobs", "frequency_penalty"))
    assert len({body["user"] for body in bodies}) > 250
    assert any(body["temperature"] == -1 for body in bodies)


def event(content: object) -> str:
    return f"data: {json.dumps(content)}\n\n"


STREAM = event({"choices": [{"text": '"error"'}]})


@pytest.mark.parametrize(
    ("stream", "answer", "outcome"),
    [
        (True, lambda: httpx.Response(200, text=STREAM + "data: [DONE]\n\n"), "stream"),
        (True, lambda: httpx.Response(200, text=STREAM), "failed"),
        (True, lambda: httpx.Response(200, text=event({"error": {}}) + "data: [DONE]\n\n"), "failed"),
        (False, lambda: httpx.Response(200, json={}), "whole answer"),
        (False, lambda: httpx.Response(429, headers={"retry-after": "0"}), "turned away"),
        (False, lambda: httpx.Response(500), "failed"),
    ],
)
def test_outcomes(
    monkeypatch: pytest.MonkeyPatch, stream: bool, answer: Callable[[], httpx.Response], outcome: str
) -> None:
    monkeypatch.setattr("loadtest.traffic.MAX_RETRY_PAUSE_S", 0.0)
    monkeypatch.setattr("loadtest.traffic.LEAVES", 0.0)
    monkeypatch.setattr("loadtest.traffic.IS_KNOWN", 0.0)
    drawn = ("completions", {"stream": stream, "temperature": 0})
    monkeypatch.setattr("loadtest.traffic.draw_request", lambda *_: drawn)
    traffic = Traffic("http://test", [], 0)

    def respond(_: httpx.Request) -> httpx.Response:
        traffic.stopping = True
        return answer()

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond)) as client:
            await traffic._one(client)

    asyncio.run(run())
    assert traffic.counts.by_outcome == {outcome: 1}
    assert bool(traffic.counts.errors) == (outcome == "failed")


@pytest.mark.parametrize(("text", "num_wrong"), [("tide", 0), ("tied", 1)])
def test_known_answers_are_compared(monkeypatch: pytest.MonkeyPatch, text: str, num_wrong: int) -> None:
    monkeypatch.setattr("loadtest.traffic.IS_KNOWN", 1.0)
    traffic = Traffic("http://test", [({"prompt": "p"}, Answer(("tide",), (), ("length",), 1))], 0)

    def respond(_: httpx.Request) -> httpx.Response:
        traffic.stopping = True
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
        chunk = event({"choices": [choice], "usage": {"completion_tokens": 1}})
        return httpx.Response(200, text=chunk + "data: [DONE]\n\n")

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond)) as client:
            await traffic._one(client)

    asyncio.run(run())
    assert traffic.counts.by_outcome == {"known answer": 1}
    assert traffic.counts.wrong == num_wrong
