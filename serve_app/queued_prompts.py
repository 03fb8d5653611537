"""Which prompts of an ingress may still wait in their engine replicas."""

from collections.abc import Iterable

from serve_app.group import Group, PlacedPrompt
from serve_app.rebalancing import MAX_MOVES, Queued

QueuedPrompt = Queued[tuple[Group, PlacedPrompt]]


def queues_of(groups: Iterable[Group], tokens_per_request: float) -> dict[str, list[QueuedPrompt]]:
    """By replica, the prompts without a token that may move, the latest last.

    An engine that computes a long prompt has begun it, and nothing says so here; but it begins the earliest first.
    """
    found: dict[str, list[QueuedPrompt]] = {}
    for group in groups:
        if not group.is_open or group.replica_id is None:
            continue
        for item in group.prompts:
            num_live = sum(not stream.finished for stream in item.streams)
            if num_live and not item.num_received and item.num_moves < MAX_MOVES:
                queued = Queued((group, item), num_live, item.num_held_tokens / tokens_per_request)
                found.setdefault(group.replica_id, []).append(queued)
    for queue in found.values():
        queue.sort(key=lambda queued: queued.item[1].admitted_s)
    return found
