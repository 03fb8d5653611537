"""The ingress replica: HTTP in front, engine replicas behind."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from engine.loader.generation_defaults import GenerationDefaults
from engine.tokenizer import Tokenizer
from serve_app.admitter import BatchAdmitter
from serve_app.engine_client import EngineClient
from serve_app.failover import FailoverPolicy
from serve_app.http import build_http_app
from serve_app.load_meter import IngressMeter
from serve_app.metrics import IngressMetrics
from serve_app.placement import PlacementRule
from serve_app.queue_places import QueuePlaces
from serve_app.readiness import ReadinessCheck
from serve_app.time_limits import TimeLimits


@dataclass(frozen=True)
class ServedModel:
    """What the ingress needs of a model: everything but its weights."""

    name: str
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    max_model_len: int
    vocab_size: int


@dataclass(frozen=True)
class IngressLimits:
    """What one ingress replica lets in, and for how long."""

    max_queued_requests: int
    max_queued_requests_per_key: int | None
    time: TimeLimits


@serve.ingress()
class Ingress:
    """A Serve deployment. `load` reads the model's small files, in the replica. rule: see EngineClient."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it, on the loop that will serve
        self,
        engine: DeploymentHandle[object],
        load: Callable[[], ServedModel],
        limits: IngressLimits,
        failover: FailoverPolicy,
        rule: PlacementRule | None,
    ) -> None:
        model = load()
        self._replica_id: str = serve.get_replica_context().replica_id.unique_id
        self._metrics = IngressMetrics()
        self._client = EngineClient(engine, self._replica_id, failover, self._metrics, rule, self._metrics)
        self._admitter = BatchAdmitter(
            self._client,
            ReadinessCheck(engine, self._client),
            model.tokenizer,
            model_name=model.name,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            places=QueuePlaces(limits.max_queued_requests, limits.max_queued_requests_per_key),
        )
        self._defaults = model.defaults
        self._time_limits = limits.time
        self._meter = IngressMeter()

    def __serve_build_asgi_app__(self) -> Starlette:
        return build_http_app(
            self._admitter,
            version=package_version(),
            defaults=self._defaults,
            system_fingerprint=lambda: self._client.fingerprint,
            sends_request_id=False,  # Serve's proxy gives each request its id, and answers with it
            replica_id=self._replica_id,
            observer=self._metrics,
            time_limits=self._time_limits,
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve calls it where the number of replicas may vary."""
        return self._meter.report(
            max(self._client.num_unfinished, self._admitter.num_unplaced), self._admitter.num_unplaced
        )

    async def __del__(self) -> None:
        if hasattr(self, "_client"):  # else the constructor has failed
            await self._client.close()


def package_version() -> str:
    try:
        return version("slipstream-llm")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"
