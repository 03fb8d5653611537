"""Who hears how long answers take."""

import time
from typing import Protocol

from engine.request import FinishReason
from serve_app.errors import Overload, TimeLimit


class AnswerObserver(Protocol):
    """Hears of each choice of each request, in seconds since the request was read. Called on the event loop, many
    times a second: it returns at once and never raises."""

    def on_first_token(self, seconds: float) -> None: ...

    def on_later_tokens(self, seconds: float) -> None:
        """seconds: since the tokens before."""

    def on_end(self, reason: FinishReason, seconds: float) -> None:
        """Once for each choice: also when the client has left, or the engine has failed."""

    def on_rejected(self, reason: Overload, num_choices: int) -> None:
        """A request of so many choices was turned away. Of these, nothing else is heard."""

    def on_timed_out(self, limit: TimeLimit, num_choices: int) -> None:
        """The time of so many choices of a request was over, before an engine took them or after."""


class NoObserver:
    """Where nobody wants to know."""

    def on_first_token(self, seconds: float) -> None: ...

    def on_later_tokens(self, seconds: float) -> None: ...

    def on_end(self, reason: FinishReason, seconds: float) -> None: ...

    def on_rejected(self, reason: Overload, num_choices: int) -> None: ...

    def on_timed_out(self, limit: TimeLimit, num_choices: int) -> None: ...


class ChoiceTimer:
    """Times one choice and tells the observer."""

    __slots__ = ("_arrival_s", "_has_ended", "_last_s", "_observer")

    def __init__(self, observer: AnswerObserver, arrival_s: float) -> None:
        """arrival_s: time.monotonic() when the request had been read."""
        self._observer = observer
        self._arrival_s = arrival_s
        self._last_s: float | None = None  # the last tokens
        self._has_ended = False

    def on_tokens(self) -> None:
        now_s = time.monotonic()
        if self._last_s is None:
            self._observer.on_first_token(now_s - self._arrival_s)
        else:
            self._observer.on_later_tokens(now_s - self._last_s)
        self._last_s = now_s

    def on_end(self, reason: FinishReason) -> None:
        """The first reason counts."""
        if not self._has_ended:
            self._has_ended = True
            self._observer.on_end(reason, time.monotonic() - self._arrival_s)
