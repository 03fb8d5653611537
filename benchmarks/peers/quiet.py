"""Whether the machine is left alone while a server is measured."""

import os
import time

import psutil

from benchmarks.peers.server import descendants

QUIET_PERCENT = 10.0  # of all cores: what others may use
LOOK_S = 1.0


def wait_until_quiet(limit_s: float) -> None:
    """Returns when the machine has been quiet for LOOK_S, or after limit_s: what follows is watched in any case."""
    deadline_s = time.monotonic() + limit_s
    while psutil.cpu_percent(LOOK_S) > QUIET_PERCENT and time.monotonic() < deadline_s:
        pass


class Watch:
    """Of what others use while this process and the descendants of `pid` work, from now on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._started = time.monotonic(), _busy_s(), self._own_s()

    def others_percent(self) -> float:
        """Of all cores, and with what the host of a virtual machine took from it."""
        seconds, busy_s, own_s = time.monotonic(), _busy_s(), self._own_s()
        began, busy_before_s, own_before_s = self._started
        others_s = (busy_s - busy_before_s) - (own_s - own_before_s)
        return max(0.0, 100 * others_s / ((seconds - began) * (os.cpu_count() or 1)))

    def _own_s(self) -> float:
        total_s = 0.0
        for process in descendants(self._pid) | {psutil.Process()}:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total_s += times.user + times.system
        return total_s


def _busy_s() -> float:
    """Of all cores together. Guests' time is part of `user` already."""
    times = psutil.cpu_times()._asdict()
    return sum(value for name, value in times.items() if name not in ("idle", "iowait", "guest", "guest_nice"))
