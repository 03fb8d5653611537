"""The service that is loaded and disturbed: its processes, its health, and what it says of itself."""

import asyncio
import ctypes
import gc
import importlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

ANSWER_S = 2.0  # a process that is stopped or dead gives none
LOOK_S = 20.0  # to count what a process has
CHECKED_S = 3.0  # by then, engines and drafts that have become idle have looked through their books, or died of it
NUM_ONGOING = "num_requests_ongoing"  # in what an ingress reports of its load
CONTROLLER, PROXY = "controller", "proxy"
_RAYS_OWN = {CONTROLLER: "SERVE_CONTROLLER_ACTOR", PROXY: "SERVE_PROXY_ACTOR-"}  # how their actors' names begin


def is_replica(name: str) -> bool:
    """Whether a process of this name is one of ours, and not Ray's own."""
    return name.startswith("SERVE_REPLICA::")


class Cluster:
    """One application on a Ray cluster of its own, which ends with this process."""

    def __init__(self, application: str, url: str = "") -> None:
        """url: of one that runs already; else `start` sets it."""
        self.application = application
        self.url = url
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    def start(self, app: str, arguments: Mapping[str, str]) -> None:
        """Deploys `module:builder` with arguments as `serve run` takes them; returns when it is ready."""
        module, _, builder = app.partition(":")
        # More CPUs in Ray's books than there may be: what is scarce is cores. Metrics come often, as those that report
        # them are killed. Workers get the priority of everybody else, not Ray's lower one: what is measured are they.
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            _system_config={"metrics_report_interval_ms": 1000, "worker_niceness": 0},
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        build: Callable[[dict[str, str]], Any] = getattr(importlib.import_module(module), builder)
        serve.run(build(dict(arguments)), name=self.application, route_prefix=f"/{self.application}")
        self.url = f"http://127.0.0.1:{port}/{self.application}/v1"

    def processes(self, kind: str, limit_s: float = ANSWER_S) -> dict[str, int]:
        """The actors of a deployment, the controller or the proxies that are ready and answer; and their processes."""

        def pid(actor: object) -> int:
            replica = getattr(actor, "_replica_impl", None)  # neither a controller nor a proxy has one
            return os.getpid() if replica is None or replica._user_callable_initialized else 0

        return {name: found for name, found in self._call(kind, pid, limit_s).items() if found}

    def num_tasks(self, kind: str) -> dict[str, int]:
        """Tasks of asyncio in the same processes, on all their loops."""

        def count(_: object) -> int:
            return sum(isinstance(each, asyncio.Task) and not each.done() for each in gc.get_objects())

        return self._call(kind, count, LOOK_S)

    def num_objects(self, kind: str) -> dict[str, int]:
        """Objects of our classes in the same processes, other than those that they began with. What Python and the C
        library only kept for later use is given back first."""

        def count(_: object) -> int:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            return sum(type(each).__module__.startswith(("engine.", "serve_app.")) for each in gc.get_objects())

        return self._call(kind, count, LOOK_S)

    def _call(self, kind: str, function: Callable[[object], int], limit_s: float = ANSWER_S) -> dict[str, int]:
        prefix = _RAYS_OWN.get(kind, f"SERVE_REPLICA::{self.application}#{kind}#")
        found = {}
        for each in ray.util.list_named_actors(all_namespaces=True):
            name = each["name"]
            if name.startswith(prefix):
                with suppress(ray.exceptions.RayError, ValueError):  # dead, hung, or gone since the listing
                    actor = ray.get_actor(name, namespace=each["namespace"])
                    found[name] = ray.get(actor.__ray_call__.remote(function), timeout=limit_s)
        return found

    def all_processes(self, kinds: Iterable[str]) -> dict[str, int]:
        return {name: pid for kind in kinds for name, pid in self.processes(kind).items()}

    def expected(self, kind: str) -> int:
        """How many there should be."""
        if kind == CONTROLLER:
            return 1
        status = serve.status().applications[self.application].deployments.get(kind)
        return 0 if status is None else max(1, sum(status.replica_states.values()))

    def is_whole(self, kind: str, count: int) -> bool:
        """Whether so many are ready, and Serve knows it: only then are they sent anything."""
        return len(self.processes(kind)) >= count and (kind == CONTROLLER or self._num_running(kind) >= count)

    def _num_running(self, deployment: str) -> int:
        status = self._deployments().get(deployment)
        return 0 if status is None else status.replica_states.get("RUNNING", 0)

    def wait_until_whole(self, counts: Mapping[str, int], limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            if all(self.is_whole(kind, count) for kind, count in counts.items()) and self._is_healthy():
                return True
            time.sleep(0.5)
        return False

    def _is_healthy(self) -> bool:
        deployments = self._deployments()
        return bool(deployments) and all(each.status == "HEALTHY" for each in deployments.values())

    def _deployments(self) -> Mapping[str, Any]:
        """As Serve has them, by name; none while the controller is on its way back."""
        try:
            return serve.status().applications[self.application].deployments
        except Exception:
            return {}

    def left_over(self, limit_s: float = 40.0) -> str:
        """What the service holds although nobody asks for anything, so long after that; empty: nothing, and the books
        of all block pools are right. An engine whose ingress was killed notices after 30 s."""
        deadline_s = time.monotonic() + limit_s
        while held := self._held():
            if time.monotonic() > deadline_s:
                return held
            time.sleep(1.0)
        before = {kind: self.processes(kind, LOOK_S) for kind in ("engine", "draft")}
        time.sleep(CHECKED_S)
        checked_s = time.monotonic() + LOOK_S  # a busy machine may take longer over it
        while not all(stats.num_integrity_checks for stats in self._all("engine", "stats")):
            if time.monotonic() > checked_s:
                return "an engine has not checked its blocks"
            time.sleep(0.5)
        for kind, processes in before.items():
            if self.processes(kind, LOOK_S) != processes:
                return f"the {kind} replicas are not those that they were, now that they are idle"
        self._all("engine", "status")  # raises where one has died of its check
        return self._held()

    def num_connections(self) -> int:
        """Of clients, as the server has them."""
        port = urlsplit(self.url).port
        return sum(
            each.status == psutil.CONN_ESTABLISHED and each.laddr[1:] == (port,)
            for each in psutil.net_connections("tcp")
        )

    def num_requests(self) -> int:
        """In all engines."""
        return sum(stats.num_requests_running + stats.num_requests_waiting for stats in self._all("engine", "stats"))

    def _held(self) -> str:
        held = []
        for stats in self._all("engine", "stats"):
            if stats.num_requests_running or stats.num_requests_waiting or stats.num_blocks_in_use:
                requests = f"{stats.num_requests_running} running and {stats.num_requests_waiting} waiting requests"
                held.append(f"an engine has {requests} and {stats.num_blocks_in_use} blocks")
        for load in self._all("ingress", "record_autoscaling_stats"):
            if load[NUM_ONGOING]:
                held.append(f"an ingress has {load[NUM_ONGOING]:g} requests")
        return ", ".join(held)

    def _all(self, deployment: str, method: str) -> list[Any]:
        """What each replica of a deployment answers."""
        handle = self._handles.get(deployment)
        if handle is None:
            handle = self._handles[deployment] = serve.get_deployment_handle(deployment, self.application)
            handle._init(_run_router_in_separate_loop=True)  # there is no loop here, which fast Serve would take
        return list(handle.broadcast(method).results(timeout_s=30))


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
