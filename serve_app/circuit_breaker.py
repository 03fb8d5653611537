"""When it is worth waiting for somebody who may be dead, hung or slow."""

MAX_MISSES = 3
MIN_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0


class CircuitBreaker:
    """After `max_misses` waits in vain in a row, no waiting for a pause; then one more try. Each try that fails doubles
    the pause, up to `max_pause_s`; one that succeeds ends it. Times are seconds of any one clock."""

    def __init__(
        self, max_misses: int = MAX_MISSES, min_pause_s: float = MIN_PAUSE_S, max_pause_s: float = MAX_PAUSE_S
    ) -> None:
        self._max_misses = max_misses
        self._min_pause_s = min_pause_s
        self._max_pause_s = max_pause_s
        self._num_misses = 0
        self._pause_s = 0.0
        self._closed_from_s = -float("inf")

    def may_wait(self, now_s: float) -> bool:
        return now_s >= self._closed_from_s

    def on_answer(self) -> None:
        """Something came while it was waited for."""
        self._num_misses = 0
        self._pause_s = 0.0

    def on_miss(self, now_s: float) -> None:
        """Nothing came."""
        self._num_misses += 1
        if self._num_misses >= self._max_misses:
            self._pause_s = min(max(2 * self._pause_s, self._min_pause_s), self._max_pause_s)
            self._closed_from_s = now_s + self._pause_s
