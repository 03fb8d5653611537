"""Which engine replica takes a call: the one it names, else the less busy of two."""

import random

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.replica_registry import ReplicaGoneError, publish_replicas

REPLICA_ID_ARGUMENT = "replica_id"  # the keyword argument of a handle call that names a replica


class EngineRouter(RequestRouter):
    """Serve makes one for each handle to the engine, in the process that holds the handle.

    Routes by name where a call has one: acknowledgements, aborts, and groups that the ingress has placed. Calls
    without a name (no replica was up when they were made) go to the less busy of two picked at random. Serve's
    first-come-first-served mixin must not be used: it hands a replica to whichever call has waited longest, so a
    call could go to one that it did not name.
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
        if not named and not pending_request.future.done():
            pending_request.future.set_exception(ReplicaGoneError(f"engine replica {name} has left"))
        # The routing task sees that the call is settled only when it is handed candidates; it takes none then.
        return [named or candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._publish()

    def _publish(self) -> None:
        ids = [replica_id.unique_id for replica_id in self.curr_replicas]
        publish_replicas(self._deployment_id.app_name, self._deployment_id.name, ids)
