"""The part of sampling that every row has, and all that a plain greedy row needs: it may run inside a CUDA graph."""

import torch

from engine.request import Request

# What the request of a row without a choice is told.
NOT_NUMBERS = "the model produced values that are not numbers (NaN or infinite logits)"


def greedy_choices(logits: torch.Tensor) -> torch.Tensor:
    """Of each row of logits [S, vocab_size]: whether it holds numbers only, and its first maximum. int64 [S, 2]."""
    # NaN is the maximum of its row in torch, so that one look at the maxima finds NaN and infinity.
    maxima, likeliest = logits.max(dim=-1)
    return torch.stack((torch.isfinite(maxima), likeliest), dim=1)


def is_plain_greedy(request: Request) -> bool:
    """True if `greedy_choices` is the whole answer at every step of this request."""
    sampling = request.sampling
    return (
        sampling.is_greedy
        and sampling.logprobs is None
        and not sampling.logit_bias
        and sampling.min_tokens == 0
        and sampling.repetition_penalty == 1.0
        and sampling.presence_penalty == sampling.frequency_penalty == 0.0
    )
