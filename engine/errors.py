"""Exceptions that reach users; a broken invariant of our own is an `assert` instead."""


class SlipstreamError(Exception):
    """Base of every error a user can cause or must act on. `str(error)` is one line that says what to do."""


class ModelError(SlipstreamError):
    """A model that cannot be loaded: the message names the file and the field."""


class ConfigError(SlipstreamError):
    """An engine setting that cannot be honoured: the message names the setting and what is accepted."""


class InvalidRequest(SlipstreamError, ValueError):  # noqa: N818 - named for what the client sent
    """A request that cannot be served. `param` names the offending field, in the words of the HTTP API; `code` is for
    programs, where OpenAI has one ("context_length_exceeded", "unsupported_parameter", ...)."""

    def __init__(self, message: str, param: str | None = None, *, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineFullError(SlipstreamError):
    """The engine's queue is full; it may take requests again as soon as others have ended."""


class EngineDeadError(SlipstreamError):
    """The engine thread has stopped; nothing more can be served by this process."""
