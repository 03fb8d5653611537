"""Who makes room for whom, where tenants hold unequal parts of the cache."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from engine.scheduler.ranking import Ranked

# How much more than the other the one that gives still holds afterwards. With 1, tenants of equal and ceaseless loads
# displaced nearly one request in two; with 2, hardly any, since the turns alone then decide between them.
_LEAST_RATIO = 2


def fair_victim(running: Sequence[Ranked]) -> Ranked:
    """Whom to preempt where somebody must be: the last request of the tenant that holds the most blocks."""
    richest = _richest(_blocks_held(running))
    return next(entry for entry in reversed(running) if entry.request.tenant == richest)


def fair_exchange(
    running: Sequence[Ranked], heads: Iterable[Ranked], num_blocks_for: Callable[[int], int]
) -> tuple[Ranked, list[Ranked]]:
    """For the tenant that waits and holds the fewest blocks: its next request, and who may be preempted for it.

    Args:
        running: the requests that hold blocks, in rank order.
        heads: the first waiting request of each tenant; at least one.
        num_blocks_for: blocks of a request with so many tokens.

    The victims, in the order in which to take them, are the last ones of the tenant that holds the most, and only as
    long as that one still holds twice what the other will. So an exchange is not taken back, and the first of the
    running requests is never a victim: its tenant would be left with nothing. Blocks count and not requests, since they
    are proportional to tokens.
    """
    num_held = _blocks_held(running)
    head = min(heads, key=lambda entry: num_held[entry.request.tenant])
    num_wanted = num_held[head.request.tenant] + num_blocks_for(head.request.num_tokens)
    richest = _richest(num_held)
    num_left, victims = num_held[richest], []
    for entry in reversed(running):
        if entry.request.tenant == richest:
            num_left -= len(entry.request.block_table)
            if num_left < _LEAST_RATIO * num_wanted:
                break
            victims.append(entry)
    return head, victims


def _blocks_held(running: Iterable[Ranked]) -> Counter[str]:
    num_held: Counter[str] = Counter()
    for entry in running:
        num_held[entry.request.tenant] += len(entry.request.block_table)
    return num_held


def _richest(num_held: Counter[str]) -> str:
    return max(num_held, key=num_held.__getitem__, default="")
