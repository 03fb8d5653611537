"""`GET` endpoints about the service itself: models, health, readiness, version."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serve_app.http.error_response import json_response
from serve_app.http.limits import READINESS_TIMEOUT_S
from serve_app.http.service import Service, service_of


async def list_models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_model(service_of(request))]})


async def get_model(request: Request) -> Response:
    service = service_of(request)
    service.check_model(request.path_params["model"])
    return json_response(_model(service))


async def health(_request: Request) -> Response:
    """This process answers. Whether an engine does is `/ready`'s business."""
    return json_response({"status": "alive"})


async def ready(request: Request) -> Response:
    """200 where a request would be served: an engine is alive, or there is none by choice and one would start."""
    try:
        admitter = service_of(request).get_admitter()
        readiness = await asyncio.wait_for(admitter.readiness(), READINESS_TIMEOUT_S)
    except TimeoutError:
        return json_response({"ready": False, "state": f"no answer within {READINESS_TIMEOUT_S:g} s"}, 503)
    is_ready = readiness.ready or readiness.state == "scaled_to_zero"
    return json_response({"ready": is_ready, "state": readiness.state}, 200 if is_ready else 503)


async def version(request: Request) -> Response:
    return json_response({"version": service_of(request).version})


def _model(service: Service) -> dict[str, Any]:
    admitter = service.get_admitter()
    return {
        "id": admitter.model_name,
        "object": "model",
        "created": service.started_s,
        "owned_by": "slipstream",
        "max_model_len": admitter.max_model_len,
    }
