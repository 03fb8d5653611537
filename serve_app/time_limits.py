"""How long a request may take."""

import math
from dataclasses import dataclass

from serve_app.errors import TimedOutError, TimeLimit


@dataclass(frozen=True)
class TimeLimits:
    """Of one request, in seconds since it had been read; None: no limit."""

    queue_timeout_s: float | None = None  # to its first token
    request_timeout_s: float | None = None  # to its last one

    def next_timeout_s(self, has_begun: bool) -> float:
        """When its time is over; has_begun: it has a token."""
        limits_s = (self.request_timeout_s, None if has_begun else self.queue_timeout_s)
        return min((limit_s for limit_s in limits_s if limit_s is not None), default=math.inf)

    def error(self, has_begun: bool, retry_after_s: float) -> TimedOutError:
        """What to tell the client when the next time-out has passed."""
        timeout_s = self.next_timeout_s(has_begun)
        if timeout_s == self.request_timeout_s:
            message = f"the request took longer than this service allows, {timeout_s:g} s"
            return TimedOutError(message, TimeLimit.REQUEST)
        message = f"the request waited for {timeout_s:g} s and was not served; try again later"
        return TimedOutError(message, TimeLimit.QUEUE, retry_after_s)


NO_LIMITS = TimeLimits()
