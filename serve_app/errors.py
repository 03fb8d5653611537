"""Errors of the service, beside the engine's own; serve_app.http turns each into an OpenAI-shaped answer."""

from enum import StrEnum

from engine.errors import SlipstreamError


class Overload(StrEnum):
    """Why a request was turned away; a label of the metric that counts them."""

    QUEUE_FULL = "queue_full"  # of the ingress replica
    KEY_LIMIT = "key_limit"  # of the ingress replica: its key has as many requests there as it may
    ENGINE_FULL = "engine_full"  # the queues of the engine replicas that were asked


class TimeLimit(StrEnum):
    """Which time was over; a label of the metric that counts them."""

    QUEUE = "queue"  # for the first token
    REQUEST = "request"  # for the whole answer


class OverloadedError(SlipstreamError):
    """There are more requests than can be served (HTTP 429). `retry_after_s` is when a place is likely."""

    def __init__(self, message: str, retry_after_s: float = 1.0, reason: Overload = Overload.QUEUE_FULL) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class TimedOutError(SlipstreamError):
    """A request's time was over: in the queue HTTP 429, else 504, or an error event once the stream has begun.
    `retry_after_s` is for 429."""

    def __init__(self, message: str, limit: TimeLimit, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.limit = limit
        self.retry_after_s = retry_after_s


class UnavailableError(SlipstreamError):
    """No engine can take the request now (HTTP 503)."""


class GenerationError(SlipstreamError):
    """The engine failed this request (HTTP 500, or an error event once the stream has begun)."""


class DraftDeadError(SlipstreamError):
    """The draft server's thread has stopped or hangs."""
