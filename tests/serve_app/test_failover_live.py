"""Engine replicas that are killed and stopped under streams, in the whole service: no client notices."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Barrier, Timer
from typing import Any

import httpx
import orjson
import pytest
import ray
from ray import serve

from engine.llm_engine import LLMEngine
from engine.request import RequestOutput, SamplingParams
from engine.stats import EngineStats
from serve_app.app import bind, load_engine, load_served_model
from serve_app.config import AppConfig, parse_config
from serve_app.draft_link import Resolve
from serve_app.failover import SILENCE_LIMIT_S
from tests.tiny_models import write_tiny_model

APPLICATION = "failover"
ARGUMENTS = {
    "device": "cpu",
    "engine_replicas": 2,
    "num_kv_blocks": 512,
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "num_threads": 1,
}
NUM_TOKENS = 300
BODIES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "frequency_penalty": 0.7, "repetition_penalty": 1.1},
    {"temperature": 0.9, "seed": 3, "logprobs": 2},
    {"temperature": 1.0, "seed": 4, "top_p": 0.95, "top_k": 200, "min_tokens": 250, "ignore_eos": False},
    {"temperature": 1.0, "seed": 5, "n": 2, "presence_penalty": 0.4},
    {"temperature": 0.8, "seed": 6, "stream": False},
]
LIMIT_S = 120.0  # for anything here, on a busy machine
pytestmark = pytest.mark.timeout(500)


def slow_marker(model: Path) -> Path:
    """While it exists, engines are slow: a fault then finds its streams in the middle of their answers."""
    return model / "slow"


def load_held_engine(config: AppConfig, find_drafts: Resolve | None = None) -> LLMEngine:
    """What bind() wants, with the configuration bound to it."""
    engine, marker = load_engine(config, find_drafts), slow_marker(Path(config.model))
    step = engine.step

    def held_step() -> list[RequestOutput]:
        if marker.exists():
            time.sleep(0.1)
        return step()

    engine.step = held_step  # type: ignore[method-assign]
    return engine


def deploy(model: Path, **changes: Any) -> None:
    """Random weights with the default model's tokenizer: the answers are nonsense, and differ with every token."""
    config = parse_config(ARGUMENTS | changes)
    engine_config = config.model_copy(update={"model": str(model)})
    load = partial(load_held_engine, engine_config)
    application = bind(config, load, partial(load_served_model, parse_config(ARGUMENTS)))
    serve.run(application, name=APPLICATION, route_prefix=f"/{APPLICATION}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), vocab_size=49152)


@pytest.fixture(scope="module")
def url(serve_cluster: str, default_model_path: Path, model: Path) -> Iterator[str]:  # noqa: ARG001 - its tokenizer
    deploy(model)
    yield f"{serve_cluster}/{APPLICATION}/v1/completions"
    serve.delete(APPLICATION)


def answer(url: str, fields: dict[str, Any], on_chunk: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """What a client makes of an answer: of each choice the text, the log-probabilities and the end; and the counts."""
    body = {"prompt": f"Once {fields}", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True} | fields
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    seen: dict[str, Any] = {"usage": None, "fingerprints": set()}
    with httpx.Client(timeout=2 * LIMIT_S) as client, client.stream("POST", url, json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines() if body["stream"] else [f"data: {response.read().decode()}"]
        for line in lines:
            if not line.startswith("data: {"):
                continue
            on_chunk()
            chunk = orjson.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            seen["usage"] = chunk["usage"]
            seen["fingerprints"].add(chunk["system_fingerprint"])
            for choice in chunk["choices"]:
                of_choice = seen.setdefault(choice["index"], {"text": "", "logprobs": [], "end": None})
                of_choice["text"] += choice["text"]
                of_choice["logprobs"] += (choice["logprobs"] or {}).get("token_logprobs", [])
                of_choice["end"] = choice["finish_reason"] or of_choice["end"]
    seen["usage"].pop("prompt_tokens_details")  # there are prefix hits the second time
    seen["usage"].pop("completion_tokens_details", None)  # of drafts, which are as many as pay at that time
    return seen


@pytest.fixture(scope="module")
def expected(url: str) -> list[dict[str, Any]]:
    return [answer(url, fields) for fields in BODIES]


def processes() -> dict[str, int]:
    """The engine replicas that answer, and their processes."""
    prefix = f"SERVE_REPLICA::{APPLICATION}#engine#"
    found = {}
    for each in ray.util.list_named_actors(all_namespaces=True):
        if each["name"].startswith(prefix):
            actor = ray.get_actor(each["name"], namespace=each["namespace"])
            with suppress(ray.exceptions.RayError):
                found[each["name"].removeprefix(prefix)] = ray.get(
                    actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60
                )
    return found


def is_healthy() -> bool:
    deployment = serve.status().applications[APPLICATION].deployments["engine"]
    return deployment.status == "HEALTHY" and deployment.replica_states == {"RUNNING": 2} and len(processes()) == 2


def stats_of(replica_id: str) -> EngineStats:
    handle = serve.get_deployment_handle("engine", APPLICATION)
    return handle.stats.remote(replica_id=replica_id).result(timeout_s=60)


def wait_until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not so after {limit_s:g} s"
        time.sleep(0.1)


def answers_under(url: str, model: Path, fault: Callable[[], None]) -> tuple[list[dict[str, Any]], float]:
    """The answers to all BODIES at once, with a fault when each stream has begun; and for how long nothing came."""
    slow_marker(model).touch()
    begun = Barrier(1 + sum(body.get("stream", True) for body in BODIES))
    last_s = [time.monotonic()]
    longest_s = [0.0]

    def reader() -> Callable[[], None]:
        seen = [0]

        def on_chunk() -> None:
            seen[0] += 1
            now_s = time.monotonic()
            longest_s[0], last_s[0] = max(longest_s[0], now_s - last_s[0]), now_s
            if seen[0] == 5:
                begun.wait(LIMIT_S)

        return on_chunk

    with ThreadPoolExecutor(len(BODIES)) as pool:
        calls = [pool.submit(answer, url, fields, reader()) for fields in BODIES]
        begun.wait(LIMIT_S)
        fault()
        slow_marker(model).unlink()
        return [call.result(timeout=2 * LIMIT_S) for call in calls], longest_s[0]


def busiest() -> str:
    return max(processes(), key=lambda replica_id: stats_of(replica_id).num_requests_running)


@ray.remote(num_cpus=0)
class HangingReader:
    """As an ingress that begins a call and is stopped then."""

    async def begin(self, replica_id: str) -> int:
        """Returns its process id when the engine has the request."""
        from serve_app.messages import Opening, Submission, SubmittedPrompt, decode_frame, encode  # not to be pickled

        sampling = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0.0)
        message = Submission("hanging", 0, [SubmittedPrompt([1, 2, 3], sampling, [("hanging", 0)])])
        handle = serve.get_deployment_handle("engine", APPLICATION)
        generate = handle.options(method_name="generate", stream=True)
        self._call = generate.remote(encode(message), replica_id=replica_id)
        assert isinstance(decode_frame(await anext(aiter(self._call))), Opening)
        return os.getpid()

    async def end(self) -> None:
        self._call.cancel()


def test_answers_differ(expected: list[dict[str, Any]]) -> None:
    assert len({each[0]["text"] for each in expected}) == len(BODIES)
    assert expected[4][0]["text"] != expected[4][1]["text"]
    assert all(len(each["fingerprints"]) == 1 for each in expected)
    assert expected[3][0]["end"] == "length"


def test_a_reader_that_hangs_at_the_end_of_its_answer_is_not_waited_for(url: str, model: Path) -> None:  # noqa: ARG001
    """Ray would let the engine's event loop wait for it, and with that all others."""
    wait_until(is_healthy)
    replica_id = busiest()
    reader = HangingReader.remote()
    slow_marker(model).touch()
    pid = ray.get(reader.begin.remote(replica_id), timeout=LIMIT_S)
    os.kill(pid, signal.SIGSTOP)
    slow_marker(model).unlink()
    try:
        wait_until(lambda: not stats_of(replica_id).num_requests_running)
        for _ in range(20):
            stats_of(replica_id)
            time.sleep(0.1)
    finally:
        os.kill(pid, signal.SIGCONT)
    ray.get(reader.end.remote(), timeout=LIMIT_S)
    ray.kill(reader)


def test_a_killed_replica(url: str, model: Path, expected: list[dict[str, Any]]) -> None:
    wait_until(is_healthy)
    killed: list[str] = []

    def kill() -> None:
        killed.append(busiest())
        assert stats_of(killed[0]).num_requests_running
        os.kill(processes()[killed[0]], signal.SIGKILL)

    answers, pause_s = answers_under(url, model, kill)
    assert answers == expected
    assert pause_s < LIMIT_S / 2
    wait_until(lambda: killed[0] not in processes() and is_healthy())


def test_a_stopped_replica_that_wakes_up(url: str, model: Path, expected: list[dict[str, Any]]) -> None:
    wait_until(is_healthy)
    stopped: list[str] = []

    def stop() -> None:
        stopped.append(busiest())
        assert stats_of(stopped[0]).num_requests_running
        pid = processes()[stopped[0]]
        os.kill(pid, signal.SIGSTOP)
        Timer(SILENCE_LIMIT_S + 2.0, os.kill, (pid, signal.SIGCONT)).start()  # by then its streams go on elsewhere

    answers, pause_s = answers_under(url, model, stop)
    assert answers == expected
    assert pause_s < LIMIT_S / 2

    def is_idle() -> bool:
        stats = stats_of(stopped[0])
        return not (stats.num_requests_running or stats.num_requests_waiting or stats.num_blocks_in_use)

    wait_until(is_idle)  # it was told when it woke up
    assert answers_under(url, model, lambda: None)[0] == expected
