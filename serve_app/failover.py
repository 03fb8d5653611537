"""What happens to a request whose engine replica is lost: the rules, and who hears of it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

SILENCE_LIMIT_S = 3.0  # without a frame or heartbeat, a replica counts as hung
MAX_FRUITLESS = 3  # replicas in a row that may die of a request without a token: it may be what they die of


class Loss(StrEnum):
    """Why a group has lost its replica."""

    FAILED = "failed"  # its call broke, or its engine has died
    SILENT = "silent"  # nothing was heard for SILENCE_LIMIT_S
    LEFT = "left"  # it drains: it has left the router's running set, while its call goes on
    REFUSED = "refused"  # it has taken nothing of the group


@dataclass(frozen=True)
class FailoverPolicy:
    """timeout_s: how long a request waits for a replica once it has lost one. across_fingerprints: whether an answer
    that has begun may be continued by an engine of another fingerprint, whose tokens may be others."""

    timeout_s: float = 60.0
    across_fingerprints: bool = False


class FailoverObserver(Protocol):
    """Called on the event loop: returns at once and never raises."""

    def on_attempt(self, num_streams: int) -> None:
        """So many have been sent to an engine replica."""

    def on_lost(self, loss: Loss, num_streams: int) -> None:
        """So many have lost theirs, and will be sent to another."""

    def on_recovered(self, seconds: float) -> None:
        """A request has a token again, so long after its last replica had been heard for the last time."""

    def on_stale_frame(self) -> None:
        """A frame of an earlier attempt was dropped."""


class NoFailoverObserver:
    """Where nobody wants to know."""

    def on_attempt(self, num_streams: int) -> None: ...

    def on_lost(self, loss: Loss, num_streams: int) -> None: ...

    def on_recovered(self, seconds: float) -> None: ...

    def on_stale_frame(self) -> None: ...
