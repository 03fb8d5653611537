"""A request as a draft model sees it."""

from collections.abc import Sequence
from dataclasses import replace

from engine.request import Request, SamplingParams


class Mirror:
    """A request's tokens, as far as the target has chosen them, and the drafts behind them.

    The drafts are chosen with the request's own parameters and noise: where the two models agree about the likeliest
    tokens, they then draw the same one. Penalties are left out, since what they count changes whenever drafts are
    dropped. `request` is never seen outside of the draft model; its output holds accepted tokens and drafts alike.
    """

    def __init__(
        self,
        key: str,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        sampling: SamplingParams,
        choice_index: int,
    ) -> None:
        plain = replace(sampling, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logprobs=None)
        self.request = Request(
            key, list(prompt_token_ids), plain, choice_index, output_token_ids=list(output_token_ids)
        )
        self.num_accepted_tokens = self.request.num_tokens  # with the prompt
        self.num_ordered_tokens = 0  # drafts that are wanted behind those
        self.has_failed = False  # at its tokens as they are: there is nothing to draft

    @property
    def num_drafts(self) -> int:
        """With one that is being chosen."""
        return self.request.num_tokens - self.num_accepted_tokens

    @property
    def lacks_drafts(self) -> bool:
        return self.num_drafts < self.num_ordered_tokens and not self.has_failed

    @property
    def drafts(self) -> list[int]:
        return self.request.token_ids(self.num_accepted_tokens, self.request.num_tokens)

    def accept(self, num_tokens: int, token_ids: Sequence[int]) -> bool:
        """See Drafter.accept. No token is pending."""
        request = self.request
        if not request.num_prompt_tokens <= num_tokens <= self.num_accepted_tokens:
            return False
        known = request.token_ids(num_tokens, num_tokens + len(token_ids))
        agreeing = next(
            (i for i, (ours, theirs) in enumerate(zip(known, token_ids, strict=False)) if ours != theirs), len(known)
        )
        if agreeing < len(token_ids):
            first = num_tokens + agreeing - request.num_prompt_tokens
            request.output_token_ids[first:] = token_ids[agreeing:]
            request.num_tokens = request.num_prompt_tokens + len(request.output_token_ids)
            request.num_computed_tokens = min(request.num_computed_tokens, num_tokens + agreeing)
        self.num_accepted_tokens = max(self.num_accepted_tokens, num_tokens + len(token_ids))
        self.has_failed = False
        return True
