"""What the HTTP handlers know about the service they belong to."""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from starlette.requests import Request

from serve_app.admission import Admitter
from serve_app.http.answer_observer import AnswerObserver
from serve_app.http.error_response import RefusedError, clipped
from serve_app.http.schema import SamplingDefaults
from serve_app.time_limits import TimeLimits


@dataclass(frozen=True)
class NoDefaults:
    """For a model that says nothing about how to sample from it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class Service:
    """Getters, because a replica may build its application before it has a model."""

    get_admitter: Callable[[], Admitter]
    get_defaults: Callable[[], SamplingDefaults]
    get_fingerprint: Callable[[], str | None]
    version: str
    observer: AnswerObserver
    time_limits: TimeLimits  # of each request
    # For rendering chat templates, one at a time (serve_app.http.chat).
    template_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "chat-template"))
    started_s: int = field(default_factory=lambda: int(time.time()))  # Unix time

    @property
    def system_fingerprint(self) -> str:
        given = self.get_fingerprint()
        if given is not None:
            return given
        digest = hashlib.sha256(f"{self.version}\n{self.get_admitter().model_name}".encode())
        return f"fp_{digest.hexdigest()[:10]}"

    def check_model(self, model: str | None) -> None:
        """Raises:
        RefusedError: 404, `model` is not the one served.
        """
        served = self.get_admitter().model_name
        if model is not None and model != served:
            message = f"the model {clipped(model)!r} does not exist; this service has {served!r}"
            raise RefusedError(404, message, param="model", code="model_not_found")


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
