"""How many draft tokens each request gets, for the most tokens per second of all of them together."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MIN_GAIN = 1.03  # the promised rate over that without drafts: both are estimates, and drafts must never cost speed


def choose_num_draft_tokens(
    acceptance: Sequence[float],
    limit: int,
    row_limit: int,
    step_s: Callable[[Ints], Floats | None],
    drafting_s: Callable[[int, Ints], Floats] | None,
) -> list[int]:
    """Draft tokens for each decoding request in the next step: all 0 unless drafts make it faster by MIN_GAIN.

    A request with acceptance a and k draft tokens is expected to keep 1 + a + ... + a^k tokens. Each further draft
    token of a request gains less than the one before, and every one costs a row. So the best ones for any number of
    rows are those that gain the most, and only the number is left to find. Drafting lasts as long as the request with
    the most draft tokens needs, so the number is looked for under each such maximum. Where drafting takes longer for
    more requests, that is counted, but no request is passed over for it in favour of a smaller gain.

    acceptance: for each request, the probability that a draft token is accepted if those before it were; 0 for a
    request that is to have none. limit: the most draft tokens for one request. row_limit: the most rows of the step, of
    which each request and each draft token takes one. step_s: seconds [N] of steps with so many rows [N], never
    decreasing, or None while nobody knows: then there are no drafts. drafting_s: seconds [N] of drafting up to so many
    tokens for each of so many requests [N]; None if it takes no time.
    """
    num_requests = len(acceptance)
    nothing = [0] * num_requests
    most = min(limit * num_requests, row_limit - num_requests)
    if most <= 0:
        return nothing
    steps_s = step_s(np.arange(num_requests, num_requests + most + 1))
    if steps_s is None:
        return nothing
    probabilities = np.array(acceptance, dtype=np.float64)
    best_rate = MIN_GAIN * num_requests / steps_s[0]
    if ((num_requests + probabilities.max() * np.arange(most + 1)) / steps_s).max() <= best_rate:
        return nothing  # not even if each draft token gained what the best one does, and drafting took no time

    gains = np.power.outer(probabilities, np.arange(1, limit + 1)).ravel()
    order = np.argsort(-gains)
    gains, requests, depths = gains[order], order // limit, order % limit + 1
    best: Ints | None = None
    for max_depth in range(1, limit + 1) if drafting_s is not None else (limit,):
        chosen = (depths <= max_depth).nonzero()[0][:most]
        seconds = steps_s[1 : len(chosen) + 1]
        if drafting_s is not None:
            seconds = seconds + drafting_s(max_depth, (depths[chosen] == 1).cumsum())
        rates = (num_requests + gains[chosen].cumsum()) / seconds
        place = rates.argmax()
        if rates[place] > best_rate:
            best_rate, best = rates[place], chosen[: place + 1]
    return nothing if best is None else np.bincount(requests[best], minlength=num_requests).tolist()
