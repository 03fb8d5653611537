"""What the client measures is what the server did, by the server's own clock."""

from collections.abc import Callable, Iterator

import gevent
import numpy as np
import pytest

from loadtest.load import CLIENT_FULL, Load
from loadtest.request_record import UNFINISHED, RequestRecord
from loadtest.settings import Settings
from loadtest.slo import parse_objectives
from loadtest.streaming_client import CHAT, COMPLETIONS, ServerError, StreamingClient, epoch_s
from loadtest.workloads import LengthLimits
from tests.loadtest.scripted_server import Script, ScriptedServer

LIMIT_S = 60.0  # for anything here, on a busy machine
ROUNDED_S = 1e-5  # seconds since the epoch have so few digits


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(Script()).running() as server:
        yield server


def make_settings(**changes: object) -> Settings:
    values = {
        "workload": "short_chat",
        "seed": 0,
        "endpoint": CHAT,
        "model": "",
        "limits": LengthLimits(),
        "extra_body": {},
        "wants_usage": True,
        "arrivals": "closed",
        "rate": 1.0,
        "burst_size": 1,
        "burstiness": 1.0,
        "think_time_s": 0.0,
        "max_in_flight": 1000,
        "warm_up_s": 0.0,
        "repeats": 2,
        "drain_s": 0.0,
        "silence_s": 30.0,
        "objectives": parse_objectives(""),
        "assertions": (),
        "max_error_share": 0.0,
    }
    return Settings(**(values | changes))  # type: ignore[arg-type]


def make_load(server: ScriptedServer, **changes: object) -> tuple[Load, list[RequestRecord]]:
    settings = make_settings(**changes)
    client = StreamingClient(server.url, "key", settings.silence_s, 1000, insecure=False)
    records: list[RequestRecord] = []
    return Load(settings, client, client.first_model(), 0, records.append), records


def wait_until(condition: Callable[[], bool]) -> None:
    with gevent.Timeout(LIMIT_S):
        while not condition():
            gevent.sleep(0.01)


def test_times_are_those_of_the_server(server: ScriptedServer) -> None:
    """Each chunk came after it was sent, and before the server, which waits for that, knew that the client had it."""
    load, records = make_load(server)
    server.script.num_heard = lambda: max((len(record.chunk_s) for record in [*load._under_way.values()]), default=0)
    for _ in range(6):
        load.send_one()
    assert all(record.is_answered and len(record.chunk_s) == 5 for record in records)
    for record, served in zip(records, server.served, strict=True):
        assert record.ttft_s == record.chunk_s[0]
        assert record.ttft_s >= server.script.ttft_s  # the role's chunk is no first token
        assert record.sent_s <= epoch_s(served.arrived_s) + ROUNDED_S
        for sent_s, at_s, heard_s in zip(served.chunk_s, record.chunk_s, served.heard_s, strict=True):
            assert epoch_s(sent_s) - ROUNDED_S <= record.sent_s + at_s <= epoch_s(heard_s) + ROUNDED_S
        assert record.itl_s == pytest.approx(np.diff(record.chunk_s))
    record = records[-1]
    assert record.tpot_s == pytest.approx((record.e2e_latency_s - record.ttft_s) / 4)  # type: ignore[operator]
    assert record.e2e_latency_s >= record.chunk_s[-1]


def test_tokens_are_the_servers_where_a_chunk_has_several(server: ScriptedServer) -> None:
    server.script.tokens_a_chunk = 3
    server.script.queue_time_s = 0.25
    load, records = make_load(server)
    load.send_one()
    server.script.has_usage = False
    load.send_one()
    assert [(r.output_tokens, r.is_usage, r.prompt_tokens) for r in records] == [(15, True, 7), (5, False, None)]
    assert [r.queue_time_s for r in records] == [0.25, None]
    assert records[0].tpot_s == pytest.approx((records[0].e2e_latency_s - records[0].chunk_s[0]) / 14)


def test_errors_by_kind(server: ScriptedServer) -> None:
    server.script.failures = {0: "429", 1: "event", 2: "cut", 3: "empty", 4: "stop", 6: "hang"}
    load, records = make_load(server)
    for _ in range(6):
        load.send_one()
    kinds = [record.error for record in records]
    cut = ["connection ended early", "no text", "stream without [DONE]"]
    assert kinds == ["http 429 overloaded", "error event generation_failed", *cut, ""]
    assert len(records[1].chunk_s) == 2
    load, records = make_load(server, silence_s=0.5)
    load.send_one()
    assert [record.error for record in records] == ["timeout"]
    with pytest.raises(ServerError, match="ConnectionRefused"):
        StreamingClient("http://127.0.0.1:9", "", 5, 1, insecure=False).first_model()
    with pytest.raises(ValueError, match=r"^--host must be an http"):
        StreamingClient("127.0.0.1:9", "", 5, 1, insecure=False)


def test_a_request_that_outlasts_the_run_is_unfinished(server: ScriptedServer) -> None:
    server.script.failures = {0: "hang"}
    load, records = make_load(server)
    sending = gevent.spawn(load.send_one)
    wait_until(lambda: any(len(record.chunk_s) == 2 for record in load._under_way.values()))
    load.drain(0.1)
    assert [(record.error, len(record.chunk_s)) for record in records] == [(UNFINISHED, 2)]
    assert 0 < records[0].e2e_latency_s < LIMIT_S
    sending.kill()
    assert len(records) == 1


def test_bodies(server: ScriptedServer) -> None:
    load, _ = make_load(server, limits=LengthLimits(output=9), extra_body={"ignore_eos": True})
    load.send_one()
    load, _ = make_load(server, endpoint=COMPLETIONS, wants_usage=False)
    load.send_one()
    chat, completion = (served.body for served in server.served)
    assert chat["model"] == "scripted"
    assert (chat["max_tokens"], chat["ignore_eos"], chat["stream"]) == (9, True, True)
    assert chat["stream_options"] == {"include_usage": True}
    assert completion["prompt"] == chat["messages"][0]["content"]
    assert "stream_options" not in completion


def test_a_slow_server_does_not_slow_the_arrivals(server: ScriptedServer) -> None:
    """No answer comes before 18 requests have been sent: a closed loop would send one."""
    server.script.may_answer = lambda: len(server.served) >= 18
    load, records = make_load(server, arrivals="constant", rate=20.0)
    sending = gevent.spawn(load.send_at_arrivals, 20.0)
    wait_until(server.script.may_answer)
    load.drain(LIMIT_S)
    sending.get(timeout=LIMIT_S)
    assert len(records) >= 18
    assert all(record.is_answered and record.send_delay_s >= -ROUNDED_S for record in records)
    due_s = np.sort([record.due_s for record in records])
    assert np.allclose(np.diff(due_s), 1 / 20, atol=1e-4)
    first_answer_s = min(record.ended_s for record in records)
    assert sum(record.sent_s < first_answer_s for record in records) >= 18


def test_arrivals_past_the_bound_are_errors(server: ScriptedServer) -> None:
    may_answer: list[bool] = []
    server.script.may_answer = lambda: bool(may_answer)
    load, records = make_load(server, arrivals="constant", rate=50.0, max_in_flight=3)
    sending = gevent.spawn(load.send_at_arrivals, 50.0)
    wait_until(lambda: len(records) > 5)
    load.stopping.set()
    may_answer.append(True)
    load.drain(LIMIT_S)
    sending.get(timeout=LIMIT_S)
    kinds = [record.error for record in records]
    assert kinds.count("") == 3
    assert kinds.count(CLIENT_FULL) == len(kinds) - 3 > 5
