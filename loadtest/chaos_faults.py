"""Faults at random: processes of the service are killed, or stopped for a while."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from loadtest.cluster import Cluster

STOP_S = (4.0, 8.0)  # longer than the service takes for a sign of life, shorter than Serve takes to replace a replica
LOOK_S = 0.2
KILL, STOP = "kill", "stop"


@dataclass(frozen=True)
class Fault:
    """What was done to whom: the name of its actor ends with the id of its replica. `at_s`: time.monotonic()."""

    kind: str  # of process
    action: str
    actor: str
    at_s: float

    @property
    def name(self) -> str:
        return f"{self.kind} {self.action}"


class Faults:
    """One after another, every kind as often as the others. A deployment is left alone until it is whole again, so that
    somebody is there to take over."""

    def __init__(self, cluster: Cluster, counts: dict[str, int], actions: Sequence[str], pause_s: float, seed: int):
        """counts: of each kind of process, how many there are."""
        self.done: list[Fault] = []
        self.cluster = cluster
        self._counts = counts
        self._actions = actions
        self._pause_s = pause_s
        self._draw = random.Random(seed)
        self._stop = threading.Event()
        self._wakers: list[threading.Timer] = []

    def run(self) -> None:
        """Until `stop`; in a thread of its own."""
        plan = [(kind, action) for kind in self._counts for action in self._actions]
        for place in count():
            if place % len(plan) == 0:
                self._draw.shuffle(plan)
            if self._stop.wait(self._draw.uniform(0.5, 1.5) * self._pause_s):
                return
            self._strike(*plan[place % len(plan)])

    def stop(self) -> None:
        self._stop.set()

    @property
    def counts(self) -> Counter[str]:
        """By name."""
        return Counter(fault.name for fault in self.done)

    def wake_all(self) -> None:
        """No process stays stopped."""
        for waker in self._wakers:
            waker.join()

    def _strike(self, kind: str, action: str) -> None:
        while not self.cluster.is_whole(kind, self._counts[kind]):
            if self._stop.wait(LOOK_S):
                return
        processes = self.cluster.processes(kind)
        if not processes:  # all hung since
            return
        actor, pid = self._draw.choice(sorted(processes.items()))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if action == KILL else signal.SIGSTOP)
            if action == STOP:
                waker = threading.Timer(self._draw.uniform(*STOP_S), _continue, (pid,))
                waker.start()
                self._wakers.append(waker)
            self.done.append(Fault(kind, action, actor, time.monotonic()))


def _continue(pid: int) -> None:
    with suppress(ProcessLookupError):  # Serve may have replaced it
        os.kill(pid, signal.SIGCONT)
