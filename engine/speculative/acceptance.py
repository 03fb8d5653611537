"""How likely the target is to choose what was drafted for a request."""

# Among 0.4 to 0.6, 1 to 4 and 0.7 to 0.95 these predict best, within 1 %, what became of n-gram drafts of 4 tokens for
# the texts that engine.speculative.ngram was measured with.
PRIOR_PROBABILITY = 0.6
PRIOR_TRIALS = 1.0  # as many draft tokens as this does the prior count for
ROUND_DECAY = 0.9  # what a round is worth after the next one
TOKEN_DECAY = 2.0 ** (-1 / 64)  # and after an output token without drafts: half of it after 64


class AcceptanceEstimate:
    """Of one request: the probability that a draft token is accepted if those before it were. Always in (0, 1).

    The first draft token that is not accepted ends a round, and what those behind it would have come to stays unknown.
    So a round of d draft tokens with a accepted shows a successes, and one failure if a < d. The estimate is the mean
    of a beta distribution over these, in which older rounds count for less. Without drafts it goes back to the prior:
    a request whose drafts were bad gets another try now and then.
    """

    __slots__ = ("_failures", "_prior", "_successes")

    def __init__(self, prior: float = PRIOR_PROBABILITY) -> None:
        assert 0.0 < prior < 1.0, f"a prior of {prior} leaves nothing to learn"
        self._prior = prior
        self._successes = 0.0
        self._failures = 0.0

    @property
    def probability(self) -> float:
        return (self._successes + self._prior * PRIOR_TRIALS) / (self._successes + self._failures + PRIOR_TRIALS)

    def observe(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """A round has been verified. One without draft tokens tells nothing: see `pass_over`."""
        assert 0 <= num_accepted_tokens <= num_draft_tokens, f"{num_accepted_tokens} of {num_draft_tokens} accepted"
        if num_draft_tokens:
            self._successes = ROUND_DECAY * self._successes + num_accepted_tokens
            self._failures = ROUND_DECAY * self._failures + (num_accepted_tokens < num_draft_tokens)

    def pass_over(self, num_tokens: int = 1) -> None:
        """So many tokens have been output without drafts."""
        kept = TOKEN_DECAY**num_tokens
        self._successes *= kept
        self._failures *= kept
