"""Errors of the service, beside the engine's own; serve_app.http turns each into an OpenAI-shaped answer."""

from engine.errors import SlipstreamError


class OverloadedError(SlipstreamError):
    """Every queue is full (HTTP 429). `retry_after_s` is when a slot is likely."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(SlipstreamError):
    """No engine can take the request now (HTTP 503)."""


class GenerationError(SlipstreamError):
    """The engine failed this request (HTTP 500, or an error event once the stream has begun)."""


class DraftDeadError(SlipstreamError):
    """The draft server's thread has stopped or hangs."""
