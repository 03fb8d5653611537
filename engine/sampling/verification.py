"""Which draft tokens are kept: those that the target chooses itself, up to the first that it does not.

What the target chooses is a function of its logits, the sampling parameters and the position, with noise from a
counter. A draft that equals it is that choice, however it was come by.
"""

from collections.abc import Sequence

from engine.batch import SampledToken


def is_accepted(token: SampledToken, draft_token_id: int) -> bool:
    """Whether a draft is what the target chose in its place."""
    return token.error is None and token.token_id == draft_token_id


def num_accepted(tokens: Sequence[SampledToken], draft_token_ids: Sequence[int]) -> int:
    """How many leading drafts are accepted. tokens: chosen behind the last known token and behind each draft."""
    for place, draft_token_id in enumerate(draft_token_ids):
        if not is_accepted(tokens[place], draft_token_id):
            return place
    return len(draft_token_ids)
