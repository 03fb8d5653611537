"""Which engine replica takes a call: the one it names, else the less busy of two.

Serve makes one router for each handle, in the process that holds the handle. The routers also publish which
replicas run, so that the ingress can place requests itself (`running_replicas`).
"""

import random
from typing import Any

from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

REPLICA_ID_ARGUMENT = "replica_id"  # the keyword argument of a handle call that names a replica

_running: dict[tuple[str, str], tuple[str, ...]] = {}  # (application, deployment): replica ids


class ReplicaGoneError(RayServeException):
    """The call names a replica that has left; it was sent nowhere."""


def running_replicas(app_name: str, deployment_name: str) -> tuple[str, ...]:
    """Ids of the replicas that this process's handles may call now; empty before the first is up."""
    return _running.get((app_name, deployment_name), ())


class EngineRouter(RequestRouter):
    """Routes by name where a call has one: acknowledgements, aborts, and groups that the ingress has placed.

    Calls without a name (no replica was up when they were made) go to the less busy of two picked at random.
    Serve's first-come-first-served mixin must not be used: it hands a found replica to whichever call waits
    longest, so a named call could go elsewhere.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Serve retries a full replica without a pause
        name = pending_request.kwargs.get(REPLICA_ID_ARGUMENT)
        if name is None:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == name]
        if not named:
            if not pending_request.future.done():
                pending_request.future.set_exception(ReplicaGoneError(f"engine replica {name} has left"))
            # The routing task looks at the future only when it is handed candidates; it takes none of them.
            return [candidate_replicas]
        return [named]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._publish()

    def _publish(self) -> None:
        key: tuple[str, str] = (self._deployment_id.app_name, self._deployment_id.name)
        ids: Any = (replica_id.unique_id for replica_id in self.curr_replicas)
        _running[key] = tuple(sorted(ids))
