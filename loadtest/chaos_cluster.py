"""The service that a chaos run disturbs: its processes, its health, and what it says of itself."""

import importlib
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import ray
from ray import serve

ANSWER_S = 2.0  # a process that is stopped or dead gives none
CONTROLLER = "controller"
_CONTROLLER_ACTOR = "SERVE_CONTROLLER_ACTOR"


@dataclass(frozen=True)
class EngineState:
    """What one engine replica still holds."""

    num_requests: int
    num_blocks_in_use: int


class Cluster:
    """One application on a Ray cluster of its own, which ends with this process."""

    def __init__(self, application: str) -> None:
        self.application = application
        self.url = ""

    def start(self, app: str, arguments: Mapping[str, str]) -> None:
        """Deploys `module:builder` with arguments as `serve run` takes them; returns when it is ready."""
        module, _, builder = app.partition(":")
        # More CPUs in Ray's books than there may be: what is scarce is cores. Metrics come often, as those that report
        # them are killed.
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            _system_config={"metrics_report_interval_ms": 1000},
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        build: Callable[[dict[str, str]], Any] = getattr(importlib.import_module(module), builder)
        serve.run(build(dict(arguments)), name=self.application, route_prefix=f"/{self.application}")
        self.url = f"http://127.0.0.1:{port}/{self.application}/v1"

    def processes(self, kind: str) -> dict[str, int]:
        """Of one deployment, or the controller: the actors that answer, and their processes."""
        prefix = f"SERVE_REPLICA::{self.application}#{kind}#"
        found = {}
        for each in ray.util.list_named_actors(all_namespaces=True):
            name = each["name"]
            if name.startswith(prefix) or (kind == CONTROLLER and name == _CONTROLLER_ACTOR):
                with suppress(ray.exceptions.RayError, ValueError):  # dead, hung, or gone since the listing
                    actor = ray.get_actor(name, namespace=each["namespace"])
                    call = actor.__ray_call__.remote(lambda _: os.getpid())
                    found[name] = ray.get(call, timeout=ANSWER_S)
        return found

    def expected(self, kind: str) -> int:
        """How many there should be."""
        if kind == CONTROLLER:
            return 1
        status = serve.status().applications[self.application].deployments.get(kind)
        return 0 if status is None else max(1, sum(status.replica_states.values()))

    def is_whole(self, kind: str, count: int) -> bool:
        return len(self.processes(kind)) >= count

    def wait_until_whole(self, counts: Mapping[str, int], limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            if all(self.is_whole(kind, count) for kind, count in counts.items()) and self._is_healthy():
                return True
            time.sleep(0.5)
        return False

    def _is_healthy(self) -> bool:
        try:
            application = serve.status().applications[self.application]
        except Exception:  # the controller is on its way back
            return False
        return all(deployment.status == "HEALTHY" for deployment in application.deployments.values())

    def engine_states(self) -> list[EngineState]:
        """Of each engine replica; an engine whose books are wrong has died of it."""
        results = serve.get_deployment_handle("engine", self.application).broadcast("stats").results(timeout_s=30)
        return [
            EngineState(stats.num_requests_running + stats.num_requests_waiting, stats.num_blocks_in_use)
            for stats in results
        ]


class ServiceMetrics:
    """Counters of the service, as far as they were exported before their processes died."""

    _LINE = re.compile(r"^ray_slipstream_(\w+){(.*)} (\S+)$", re.MULTILINE)

    def __init__(self) -> None:
        self._latest: dict[tuple[str, str], float] = {}  # (name, labels): the largest value seen

    def read(self) -> None:
        for node in ray.nodes():
            with suppress(httpx.HTTPError):
                url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
                for name, labels, value in self._LINE.findall(httpx.get(url, timeout=5).text):
                    key = (name, labels)
                    self._latest[key] = max(self._latest.get(key, 0.0), float(value))

    def total(self, name: str) -> float:
        return sum(value for (each, _), value in self._latest.items() if each == name)

    def by(self, name: str, label: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for (each, labels), value in self._latest.items():
            if each == name and (match := re.search(rf'{label}="([^"]*)"', labels)):
                found[match[1]] = found.get(match[1], 0.0) + value
        return found

    def quantile(self, name: str, part: float) -> float | None:
        """Upper end of the bucket that holds it; None without any value."""
        buckets = sorted((float(limit), count) for limit, count in self.by(f"{name}_bucket", "le").items())
        if not buckets or not buckets[-1][1]:
            return None
        return next(limit for limit, count in buckets if count >= part * buckets[-1][1])
