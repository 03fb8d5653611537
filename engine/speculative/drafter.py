"""Who computes draft tokens with a model."""

from collections.abc import Sequence
from typing import Protocol

from engine.request import SamplingParams


class Drafter(Protocol):
    """A draft model that keeps a mirror (tokens and KV) of each request that it drafts for. For one thread."""

    @property
    def vocab_size(self) -> int: ...

    def open(
        self,
        key: str,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        sampling: SamplingParams,
        choice_index: int,
    ) -> None:
        """Start a mirror; one of the same key is replaced. `sampling` has a seed."""
        ...

    def accept(self, key: str, num_tokens: int, token_ids: Sequence[int]) -> bool:
        """The target's tokens from absolute position `num_tokens` on are `token_ids`; the mirror knows all before.

        Drafts that agree are kept, those that do not are dropped. False if the mirror is unknown or lacks tokens
        before.
        """
        ...

    def order(self, key: str, num_draft_tokens: int) -> None:
        """Have this many drafts behind the accepted tokens. Where there are more already, they stay."""
        ...

    def branch(self, key: str, num_branches: int, num_draft_tokens: int) -> None:
        """Prepare for the likeliest corrections of drafts that are there: have so many drafts behind each of these too.

        A drafter may do without. Until something of the mirror is accepted, further calls change nothing.
        """
        ...

    def drop(self, key: str) -> None:
        """Forget a mirror; an unknown one is passed over."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether a mirror lacks drafts that it can still get, or has yet to read its prompt."""
        ...

    def step(self) -> list[str]:
        """One forward pass for all mirrors that lack drafts. Returns the keys of those whose drafts grew."""
        ...

    def drafts(self, key: str) -> tuple[int, list[int]]:
        """Absolute position of the first draft, which is the number of accepted tokens, and the drafts from there."""
        ...

    def check_integrity(self) -> None:
        """Assert that whatever the mirrors hold is accounted for; cheap enough for every time that nothing is to do."""
        ...
