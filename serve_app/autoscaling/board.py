"""What the policies of one application tell each other.

Each deployment has a policy of its own, and Serve shows it only that deployment. They all run in Serve's controller,
so they meet in the process: by way of `sys.modules`, since each comes pickled by value, with globals of its own.
"""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_PLACE = "_slipstream_autoscaling_boards"


@dataclass(frozen=True)
class Note:
    """A number and when it was written, on the controller's monotonic clock."""

    value: float
    written_s: float


class Board:
    """Of one application: notes by name. Without locks: Serve's controller calls the policies one after another."""

    def __init__(self, application: str) -> None:
        boards: dict[str, Any] = sys.modules.setdefault(_PLACE, ModuleType(_PLACE)).__dict__
        self._notes: dict[str, tuple[float, float]] = boards.setdefault(f"of {application}", {})

    def write(self, name: str, value: float, now_s: float) -> None:
        self._notes[name] = (value, now_s)

    def read(self, name: str) -> Note | None:
        found = self._notes.get(name)
        return None if found is None else Note(*found)
