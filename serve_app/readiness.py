"""Whether a request would be served now."""

import asyncio
import time
from dataclasses import dataclass

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.background import spawn
from serve_app.engine_client import EngineClient
from serve_app.messages import decode_status

FRESH_S = 2.0  # a frame this recent proves an engine alive
ANSWER_TIMEOUT_S = 3.0
MAX_ASKED = 8  # replicas; one healthy one is enough
SCALED_TO_ZERO = "scaled_to_zero"


@dataclass
class ReadinessState:
    """See serve_app.admission.Readiness."""

    ready: bool
    state: str


class ReadinessCheck:
    """Asks only when it is asked, and once for everyone who asks meanwhile: idle replicas are left alone."""

    def __init__(self, handle: DeploymentHandle[object], client: EngineClient) -> None:
        self._handle = handle
        self._client = client
        self._asking: asyncio.Task[ReadinessState] | None = None

    async def state(self) -> ReadinessState:
        if time.monotonic() - self._client.last_heard_s < FRESH_S:
            return ReadinessState(True, "ready")
        if self._asking is None or self._asking.done():
            self._asking = spawn(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> ReadinessState:
        replicas = self._client.running_replicas()
        if not replicas:
            return await asyncio.to_thread(self._state_without_replicas)
        questions = [asyncio.ensure_future(self._ask_replica(replica_id)) for replica_id in replicas[:MAX_ASKED]]
        reason = f"no engine replica answers within {ANSWER_TIMEOUT_S:g} s"
        try:
            for answer in asyncio.as_completed(questions, timeout=ANSWER_TIMEOUT_S):
                reason = await answer
                if not reason:
                    return ReadinessState(True, "ready")
        except TimeoutError:
            pass
        finally:
            for question in questions:
                question.cancel()
        return ReadinessState(False, reason)

    async def _ask_replica(self, replica_id: str) -> str:
        """Empty if the replica is healthy, else why not."""
        try:
            decode_status(await self._handle.status.remote(replica_id=replica_id))
        except Exception as error:
            return f"engine replica {replica_id} is not healthy: {str(error).splitlines()[-1]}"
        return ""

    def _state_without_replicas(self) -> ReadinessState:
        """Serve's word on a deployment that has no replica: by choice, starting, or failing."""
        application = serve.status().applications.get(self._handle.app_name)
        deployment = None if application is None else application.deployments.get(self._handle.deployment_name)
        if deployment is None:
            return ReadinessState(False, "the engine is not deployed")
        if deployment.status == "HEALTHY" and not deployment.replica_states:
            return ReadinessState(True, SCALED_TO_ZERO)
        state = f"the engine is {deployment.status.lower()}"
        lines = deployment.message.strip().splitlines()
        return ReadinessState(False, f"{state}: {lines[-1]}" if lines else state)
