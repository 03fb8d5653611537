"""How fast a queue drains, for clients that are told when to come back."""

import math

MEMORY_S = 20.0  # how far back the average looks, counted while the queue was not empty


class DrainRate:
    """Places given back a second, averaged over the time in which there was anybody to wait.

    Idle time does not count: it says nothing about how fast the queue would drain. Older time counts exponentially
    less. The clock is the caller's.
    """

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._num_freed = 0.0
        self._busy_s = 0.0

    def pass_time(self, now_s: float, is_busy: bool) -> None:
        """Before each change of the queue. is_busy: whether anybody waited since the last one."""
        if is_busy and self._last_s is not None:
            elapsed_s = max(0.0, now_s - self._last_s)
            fading = math.exp(-elapsed_s / MEMORY_S)
            self._num_freed *= fading
            self._busy_s = self._busy_s * fading + MEMORY_S * (1.0 - fading)
        self._last_s = now_s

    def count(self, num_freed: int) -> None:
        self._num_freed += num_freed

    def seconds_for(self, num_places: float) -> float | None:
        """Until so many places are free; None: nothing has been measured yet."""
        if self._num_freed <= 0.0 or self._busy_s <= 0.0:
            return None
        return num_places * self._busy_s / self._num_freed
