"""The HTTP side of the service: a Starlette application over any Admitter, free of Ray."""

from collections.abc import Callable
from typing import cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from engine.errors import SlipstreamError
from serve_app.admission import Admitter
from serve_app.http import status
from serve_app.http.answer_observer import AnswerObserver, NoObserver
from serve_app.http.chat import chat_completions
from serve_app.http.completions import completions
from serve_app.http.error_response import handle_client_gone, handle_error, handle_routing_error
from serve_app.http.middleware import RequestGuard
from serve_app.http.schema import SamplingDefaults
from serve_app.http.service import NoDefaults, Service
from serve_app.time_limits import NO_LIMITS, TimeLimits


def build_http_app(
    admitter: Admitter | Callable[[], Admitter],
    *,
    version: str,
    defaults: SamplingDefaults | Callable[[], SamplingDefaults] = NoDefaults,
    system_fingerprint: str | Callable[[], str | None] | None = None,
    sends_request_id: bool = True,
    replica_id: str | None = None,
    observer: AnswerObserver | None = None,
    time_limits: TimeLimits = NO_LIMITS,
) -> Starlette:
    """The application. What is given as a function is called for each request, so that a replica may build the
    application before it has a model.

    `defaults` are the model's own generation settings, for fields that clients leave out. Responses carry
    `system_fingerprint`; None: a digest of version and model name. `sends_request_id` False: a proxy does. Where
    there is a `replica_id`, responses carry it too. `observer` hears how long answers take, `time_limits` are of each
    request.
    """
    service = Service(
        get_admitter=_getter(admitter),
        get_defaults=defaults if callable(defaults) else lambda: defaults,
        get_fingerprint=system_fingerprint if callable(system_fingerprint) else lambda: system_fingerprint,
        version=version,
        observer=observer or NoObserver(),
        time_limits=time_limits,
    )
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", status.list_models),
            Route("/v1/models/{model:path}", status.get_model),
            Route("/health", status.health),
            Route("/ready", status.ready),
            Route("/version", status.version),
        ],
        middleware=[Middleware(RequestGuard, sends_id=sends_request_id, replica_id=replica_id)],
        exception_handlers={
            HTTPException: handle_routing_error,
            SlipstreamError: handle_error,
            ClientDisconnect: handle_client_gone,
        },
    )
    app.router.redirect_slashes = False  # an OpenAI client does not expect to be sent elsewhere
    app.state.service = service
    return app


def _getter(admitter: Admitter | Callable[[], Admitter]) -> Callable[[], Admitter]:
    if hasattr(admitter, "admit"):
        return lambda: cast(Admitter, admitter)
    return admitter
