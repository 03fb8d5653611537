"""When requests are sent. Open loop: at times drawn in advance, however slow the answers are.

A closed loop sends a user's next request when the last is answered, so a slow server is asked less and its worst times
are sampled least (coordinated omission). The open loop never waits for an answer; what the client itself is late by is
measured as `send_delay_s`.
"""

import random
import time
from collections.abc import Callable, Iterator

from gevent.event import Event

CLOSED = "closed"
OPEN_LOOPS = ("poisson", "bursts", "gamma", "constant")


def arrival_gaps(kind: str, rate: float, draw: random.Random, burst_size: int, burstiness: float) -> Iterator[float]:
    """Seconds from one arrival to the next, without end; 1 / `rate` in the mean.

    `poisson`: independent arrivals. `bursts`: so many at one moment, the moments being Poisson. `gamma`: gaps with the
    shape `burstiness`, 1 being Poisson and less being burstier, as BurstGPT (Wang et al., 2024) finds them.
    """
    while True:
        match kind:
            case "poisson":
                yield draw.expovariate(rate)
            case "bursts":
                yield draw.expovariate(rate / burst_size)
                for _ in range(burst_size - 1):
                    yield 0.0
            case "gamma":
                yield draw.gammavariate(burstiness, 1 / (rate * burstiness))
            case "constant":
                yield 1 / rate
            case _:
                raise ValueError(f"no arrivals of this kind: {kind}")


def dispatch(gaps: Iterator[float], spawn: Callable[[float], object], stopping: Event) -> None:
    """Calls `spawn(due_s)` at each arrival until `stopping` is set; `due_s` is of time.perf_counter().

    `spawn` must not block. Where this greenlet is late, `due_s` is still the time that was drawn.
    """
    due_s = time.perf_counter()
    for gap in gaps:
        due_s += gap
        # Also without time to wait: other greenlets would never run in a client that cannot keep up.
        if stopping.wait(max(0.0, due_s - time.perf_counter())):
            return
        spawn(due_s)
