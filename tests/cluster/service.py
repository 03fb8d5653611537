"""The service on the cluster: its engines take a GPU each in Ray's books, and compute on the CPU."""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import ray
from ray import serve

from engine.stats import EngineStats
from loadtest.cluster import ServiceMetrics
from serve_app import replica_counts
from serve_app.app import bind, load_served_model
from serve_app.config import parse_config
from tests.cluster.fake_nodes import MAX_WORKERS
from tests.serve_app.slow_engine import load_slow_engine

APPLICATION = "cluster"
NUM_ENGINES = MAX_WORKERS
TARGET_QUEUE_DEPTH = 3
PORT = 8000  # in a network of its own, everything is free
URL = f"http://127.0.0.1:{PORT}"
_ASK_S = 30.0
# Replicas that nobody needs stay for minutes where they have a prefix cache to lose.
_PACE_S = {"HOLD_S": 3.0, "IDLE_S": 2.0}


@dataclass(frozen=True)
class EngineReplica:
    """One that answers."""

    replica_id: str
    node_id: str
    stats: EngineStats


@dataclass(frozen=True)
class View:
    """What can be seen from outside at one moment."""

    num_pending: int  # engine replicas that have been asked for and do not run yet
    num_running: int
    gpu_nodes: frozenset[str]  # ids of those that are alive; they were looked for first

    @property
    def num_engines(self) -> int:
        return self.num_pending + self.num_running

    def __str__(self) -> str:
        nodes = ", ".join(sorted(node_id[-2:] for node_id in self.gpu_nodes)) or "none"
        return f"engines: {self.num_pending} pending, {self.num_running} running; GPU nodes: {nodes}"


def deploy(model: Path) -> None:
    """As on a cluster with GPUs (`device=cuda`), but for what the replicas load. There is no engine at first."""
    for name, seconds in _PACE_S.items():
        setattr(replica_counts, name, seconds)
    scaling = {"min_replicas": 0, "max_replicas": NUM_ENGINES, "target_queue_depth": TARGET_QUEUE_DEPTH}
    config = parse_config({"device": "cuda", "max_model_len": 512, "max_num_seqs": 32, **scaling})
    assert config.engine_num_gpus == 1
    # Every node has the same address here, on which one proxy fits.
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
    application = bind(config, partial(load_slow_engine, model), partial(load_served_model, config))
    serve.run(application, name=APPLICATION, route_prefix="/")


def view() -> View:
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    states = serve.status().applications[APPLICATION].deployments["engine"].replica_states
    return View(states.get("STARTING", 0), states.get("RUNNING", 0), frozenset(node["NodeID"] for node in nodes))


def engines() -> list[EngineReplica]:
    """Those that answer within _ASK_S, and what they say of themselves."""
    prefix = f"SERVE_REPLICA::{APPLICATION}#engine#"
    handle = serve.get_deployment_handle("engine", APPLICATION)
    found = []
    for each in ray.util.list_named_actors(all_namespaces=True):
        if each["name"].startswith(prefix):
            replica_id = each["name"].removeprefix(prefix)
            with suppress(Exception):  # not up yet, or gone
                actor = ray.get_actor(each["name"], namespace=each["namespace"])
                asked = actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
                stats = handle.stats.remote(replica_id=replica_id).result(timeout_s=_ASK_S)
                found.append(EngineReplica(replica_id, ray.get(asked, timeout=_ASK_S), stats))
    return found


def readiness() -> str:
    return str(httpx.get(f"{URL}/ready", timeout=_ASK_S).json()["state"])


def num_resumed() -> int:
    """Streams that have lost their replica and went on elsewhere, whoever noticed first: the call (`failed`), the
    ingress (`silent`), or Serve's controller, which takes a dead replica off the list (`left`)."""
    metrics = ServiceMetrics()
    metrics.read()
    return int(metrics.total("resumed_streams_total"))
