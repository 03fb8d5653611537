"""Chooses the next token of each row.

Rows are handled one at a time wherever a sum or a logarithm is taken: each computation then has the shape of one
row, whatever the batch, and so the same bits.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from engine.batch import SampledToken
from engine.request import Request, SamplingParams, TokenLogprobs
from engine.sampling.greedy import NOT_NUMBERS, greedy_choices, is_plain_greedy
from engine.sampling.noise import gumbel_noise, gumbel_noise_of_vocabulary
from engine.sampling.verification import is_accepted

# The likeliest tokens that are looked at before a whole vocabulary is sorted: 0.5 ms against 4 ms for 49,152 on one
# core. Where the filters do not decide within them, the sort decides; the outcome is the same.
SHORTLIST = 1024


class Sampler:
    """Applies each request's parameters in the one order: bias, penalties, temperature, top-k, top-p, min-p, noise."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)

    def stop_ids(self, sampling: SamplingParams) -> frozenset[int]:
        """Tokens that end a request of these parameters."""
        eos = frozenset() if sampling.ignore_eos else self._eos_token_ids
        return eos | frozenset(sampling.stop_token_ids)

    @torch.inference_mode()
    def sample(
        self, logits: torch.Tensor, requests: Sequence[Request], choices: torch.Tensor | None = None
    ) -> list[SampledToken]:
        """The next token of each request. logits: float32 [len(requests), vocab_size], one row each; not changed.

        choices: `greedy_choices(logits)`, where it is there already. A row that holds NaN or +inf is that request's
        error.
        """
        rows = (greedy_choices(logits) if choices is None else choices).tolist()
        return [
            self._sample_row(row, request, (), token_id) if ok else SampledToken(error=NOT_NUMBERS)
            for row, request, (ok, token_id) in zip(logits, requests, rows, strict=True)
        ]

    @torch.inference_mode()
    def verify(
        self, logits: torch.Tensor, request: Request, draft_token_ids: Sequence[int], choices: torch.Tensor
    ) -> list[SampledToken]:
        """The request's next tokens: those that equal its drafts, and the one behind them.

        logits: float32 [1 + drafts, vocab_size], behind the request's last token and each draft. choices: as above.
        """
        tokens: list[SampledToken] = []
        for place, (row, (ok, token_id)) in enumerate(zip(logits, choices.tolist(), strict=True)):
            drafts = draft_token_ids[:place]
            tokens.append(self._sample_row(row, request, drafts, token_id) if ok else SampledToken(error=NOT_NUMBERS))
            if place == len(draft_token_ids) or not is_accepted(tokens[-1], draft_token_ids[place]):
                break
        return tokens

    def _sample_row(self, raw: torch.Tensor, request: Request, drafts: Sequence[int], likeliest: int) -> SampledToken:
        """`drafts`: tokens between the request's last one and the row. `likeliest`: the first of the row's maxima, so
        that ties go to the lowest token id."""
        if is_plain_greedy(request):
            return SampledToken(likeliest)
        sampling = request.sampling
        row = adjust_logits(raw, request, self.stop_ids(sampling), drafts)
        if sampling.is_greedy:
            token_id = likeliest if row is raw else int(row.argmax())
        else:
            token_id = _draw(row, request, request.num_tokens + len(drafts))
        logprobs = None if sampling.logprobs is None else token_logprobs(raw, token_id, sampling.logprobs)
        return SampledToken(token_id, logprobs)


def adjust_logits(
    raw: torch.Tensor, request: Request, stop_ids: frozenset[int], drafts: Sequence[int] = ()
) -> torch.Tensor:
    """Bias, penalties and the mask of `min_tokens` on one row, float32 [vocab_size]; `raw` itself is not changed.

    drafts: tokens that count as output although the request does not have them yet.
    """
    sampling = request.sampling
    masked = stop_ids if len(request.output_token_ids) + len(drafts) < sampling.min_tokens else frozenset()
    penalised = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
    if not (sampling.logit_bias or masked or penalised or sampling.repetition_penalty != 1.0):
        return raw
    output_counts = request.output_counts + Counter(drafts) if drafts else request.output_counts
    row = raw.clone()
    device = row.device
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=device)
        row[ids] += torch.tensor(list(sampling.logit_bias.values()), device=device, dtype=row.dtype)
    if sampling.repetition_penalty != 1.0:
        ids = torch.tensor(sorted({*request.prompt_token_ids, *output_counts}), device=device)
        seen = row[ids]
        penalty = sampling.repetition_penalty
        row[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    if penalised and output_counts:
        ids = torch.tensor(list(output_counts), device=device)
        counts = torch.tensor(list(output_counts.values()), device=device, dtype=row.dtype)
        row[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if masked:
        row[torch.tensor(sorted(masked), device=device)] = float("-inf")
    return row


def _draw(row: torch.Tensor, request: Request, position: int) -> int:
    """Gumbel-max over what the filters keep of one row. position: of the token that is drawn."""
    sampling = request.sampling
    seed = sampling.seed
    assert seed is not None, "a seed is assigned at admission"
    key = (seed, request.choice_index, position)
    scaled = row.cpu() / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return int((scaled + gumbel_noise_of_vocabulary(scaled.shape[0], *key)).argmax())
    values, ids = filter_tokens(scaled, sampling.top_k, sampling.top_p, sampling.min_p)
    return int(ids[(values + gumbel_noise(ids, *key)).argmax()])


def filter_tokens(scaled: torch.Tensor, top_k: int, top_p: float, min_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What top-k, then top-p, then min-p keep of one row, likeliest first, ties by token id: values and ids.

    top-p keeps the shortest prefix whose probability, renormalised after top-k, reaches `top_p` (Holtzman et al.
    2020); min-p keeps tokens at least `min_p` times as likely as the likeliest (Nguyen et al. 2024). At least one
    token is kept.
    """
    vocab_size = scaled.shape[0]
    limit = min(top_k or vocab_size, vocab_size)
    # Twice the shortlist at least, or the sort costs as much as the detour.
    if vocab_size > 2 * SHORTLIST:
        threshold = torch.topk(scaled, SHORTLIST).values[-1]
        # Strictly above the threshold: which of several equal to it are in would be topk's own choice.
        ids = (scaled > threshold).nonzero().flatten()
        values, order = scaled[ids].sort(descending=True, stable=True)
        kept = _count_kept(scaled, values, limit, top_p, min_p)
        if kept is not None:
            return values[:kept], ids[order[:kept]]
    values, ids = scaled.sort(descending=True, stable=True)
    kept = _count_kept(scaled, values, limit, top_p, min_p)
    assert kept is not None, "the whole vocabulary always decides"
    return values[:kept], ids[:kept]


def _count_kept(scaled: torch.Tensor, values: torch.Tensor, limit: int, top_p: float, min_p: float) -> int | None:
    """How many of `values` (the likeliest tokens of the row, in order) are kept; None if they do not decide it."""
    vocab_size = scaled.shape[0]
    kept = min(limit, values.shape[0])
    # Undecided: the cut may lie beyond `values`, unless a filter below finds it among them.
    decided = kept == limit
    if kept == 0 or (limit < vocab_size and not decided):
        return None
    # In float64 and in descending order, so that a prefix has the same sums whether the tail was sorted or not.
    weights = torch.exp(values[:kept].double() - values[0])
    if top_p < 1.0:
        total = weights.sum() if limit < vocab_size else torch.exp(scaled.double() - values[0]).sum()
        reached = torch.cumsum(weights, dim=0) >= top_p * total
        if bool(reached[-1]):
            kept = int(reached.int().argmax()) + 1
            decided = True
    if min_p > 0.0:
        below = weights[:kept] < min_p
        if bool(below.any()):
            kept = int(below.int().argmax())
            decided = True
    return kept if decided else None


def token_logprobs(raw: torch.Tensor, token_id: int, top: int) -> TokenLogprobs:
    """Log-probabilities of the chosen token and of the `top` likeliest, from one row of raw logits."""
    logprobs = torch.log_softmax(raw, dim=-1)
    chosen = float(logprobs[token_id])
    if top == 0:
        return TokenLogprobs(chosen)
    values, ids = filter_tokens(logprobs.cpu(), top, 1.0, 0.0)
    return TokenLogprobs(chosen, tuple(zip(ids.tolist(), values.tolist(), strict=True)))
