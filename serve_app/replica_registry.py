"""Which engine replicas run, as this process's routers know it.

A module apart from the routers: Serve pickles a router's module by value, so that what it defines exists twice in
the process, the router's copy and the importable one.
"""

from collections.abc import Iterable

from ray.serve.exceptions import RayServeException

_running: dict[tuple[str, str], tuple[str, ...]] = {}  # (application, deployment): replica ids


class ReplicaGoneError(RayServeException):
    """The call names a replica that has left; it was sent nowhere."""


def publish_replicas(app_name: str, deployment_name: str, replica_ids: Iterable[str]) -> None:
    """Called by routers, on their own thread."""
    _running[app_name, deployment_name] = tuple(sorted(replica_ids))


def running_replicas(app_name: str, deployment_name: str) -> tuple[str, ...]:
    """Ids of the replicas that this process's handles may call now; empty before the first is up."""
    return _running.get((app_name, deployment_name), ())
