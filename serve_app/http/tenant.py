"""On whose behalf a request is made."""

import hashlib

from starlette.requests import Request

from serve_app.http.schema import GenerationFields

SHARED = ""  # of all requests that say nothing about it


def tenant_of(request: Request, fields: GenerationFields) -> str:
    """An opaque id: of the API key, else of the user that the client names.

    Keys are not checked here, and leave this function only as a digest: what matters is who is who.
    """
    if key := request.headers.get("authorization", "").strip():
        return _digest("key", key)
    if user := fields.user or fields.safety_identifier:
        return _digest("user", user)
    return SHARED


def _digest(kind: str, name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=16, person=kind.encode()).hexdigest()
