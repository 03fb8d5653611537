"""A request as a draft model sees it."""

import math
from collections.abc import Sequence
from dataclasses import replace

from engine.request import Request, SamplingParams, TokenLogprobs

LIKELY_ACCEPTANCE = 0.8  # of a draft, where it has to be weighed against one that comes later


class Mirror:
    """A request's tokens, as far as the target has chosen them, and the drafts behind them.

    The drafts are chosen with the request's own parameters and noise: where the two models agree about the likeliest
    tokens, they then draw the same one. Penalties are left out, since what they count changes whenever drafts are
    dropped. `request` is never seen outside of the draft model; its output holds accepted tokens and drafts alike.

    A *branch* is a mirror that takes some token for accepted in place of a draft: should the target correct that draft
    to this token, the drafts behind it are there already.
    """

    def __init__(self, request: Request, *, is_branch: bool = False) -> None:
        self.request = request
        self.is_branch = is_branch
        self.num_accepted_tokens = request.num_tokens  # with the prompt
        self.num_ordered_tokens = 0  # drafts that are wanted behind those
        self.has_failed = False  # at its tokens as they are: there is nothing to draft
        self.branches: dict[tuple[int, int], Mirror] = {}  # by the position and the token where they leave
        self._others: dict[int, tuple[int, float]] = {}  # by position: the likeliest token but the draft; its logprob

    @classmethod
    def of(
        cls,
        key: str,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        sampling: SamplingParams,
        choice_index: int,
        *,
        may_branch: bool,
    ) -> "Mirror":
        """may_branch: note for each draft what else would have been likely."""
        own = replace(
            sampling,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            logprobs=2 if may_branch else None,
        )
        output = list(output_token_ids)
        return cls(Request(key, list(prompt_token_ids), own, choice_index, output_token_ids=output))

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

    def append(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """The next draft has been chosen."""
        request = self.request
        position = request.num_prompt_tokens + len(request.output_token_ids)
        request.append_output(token_id)
        if logprobs is not None:
            self._others[position] = next(other for other in logprobs.top if other[0] != token_id)

    def likeliest_corrections(self, count: int) -> list[tuple[int, int]]:
        """The likeliest pairs of a draft's position and the token that the target chooses there in its place.

        A correction is as likely as its token, and as all drafts before it being accepted.
        """
        start = self.num_accepted_tokens
        ranked = sorted(
            (-logprob - (position - start) * math.log(LIKELY_ACCEPTANCE), position, token_id)
            for position, (token_id, logprob) in self._others.items()
            if position >= start
        )
        return [(position, token_id) for _, position, token_id in ranked[:count]]

    def branch(self, position: int, token_id: int) -> "Mirror":
        """Start a branch. It has no blocks yet."""
        ours = self.request
        output = [*ours.token_ids(ours.num_prompt_tokens, position), token_id]
        request = Request(
            ours.request_id, ours.prompt_token_ids, ours.sampling, ours.choice_index, output_token_ids=output
        )
        request.stop_ids, request.is_chosen_by_device = ours.stop_ids, ours.is_chosen_by_device
        branch = self.branches[position, token_id] = Mirror(request, is_branch=True)
        return branch

    def accept(self, num_tokens: int, token_ids: Sequence[int]) -> bool:
        """See Drafter.accept. No token is pending.

        A branch that has come true takes the place of the drafts, with its request; those that cannot come true any
        more are gone. The blocks of such requests are the caller's to free.
        """
        if not self.request.num_prompt_tokens <= num_tokens <= self.num_accepted_tokens:
            return False
        known = self.request.token_ids(num_tokens, num_tokens + len(token_ids))
        pairs = enumerate(zip(known, token_ids, strict=False))
        agreeing = next((place for place, (ours, theirs) in pairs if ours != theirs), len(known))
        position = num_tokens + agreeing
        if agreeing < len(token_ids):
            branch = self.branches.get((position, token_ids[agreeing]))
            self.branches = {}
            if branch is not None:
                self.request, self._others = branch.request, branch._others
                return self.accept(num_tokens, token_ids)
            self._replace_from(position, token_ids[agreeing:])
        self.num_accepted_tokens = max(self.num_accepted_tokens, num_tokens + len(token_ids))
        self.branches = {at: branch for at, branch in self.branches.items() if at[0] >= self.num_accepted_tokens}
        self.has_failed = False
        return True

    def _replace_from(self, position: int, token_ids: Sequence[int]) -> None:
        """Everything from `position` on, drafts as a rule."""
        request = self.request
        request.output_token_ids[position - request.num_prompt_tokens :] = token_ids
        request.num_tokens = position + len(token_ids)
        request.num_computed_tokens = min(request.num_computed_tokens, position)
        self._others = {}
