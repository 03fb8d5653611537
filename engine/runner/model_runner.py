"""Runs a scheduled step on the device: the decoder forward, then sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch

from engine.batch import SampledToken, ScheduledChunk, ScheduledStep, StepTokens
from engine.request import Request
from engine.runner.forward import Forward, StepLogits
from engine.sampling.sampler import Sampler
from engine.sampling.verification import num_accepted

_is_chosen_by_device = attrgetter("is_chosen_by_device")


@dataclass(frozen=True)
class LaunchedStep:
    """A step on its way through the device."""

    step: ScheduledStep
    sampling: list[Request]  # whose next tokens it computes, in order
    drafts: list[Sequence[int]]  # of each of them; empty where the step has none
    outcome: StepLogits
    is_chosen_by_device: bool  # all of those tokens
    has_details: bool  # somebody asks for log-probabilities


class ModelRunner:
    """The device side of an engine."""

    def __init__(self, forward: Forward, sampler: Sampler) -> None:
        self.forward = forward
        self._sampler = sampler

    @property
    def dtype(self) -> torch.dtype:
        return self.forward.dtype

    def launch(self, step: ScheduledStep, num_further: int = 0) -> LaunchedStep:
        """Start computing the step's KV and the next token of every chunk that samples. num_further: so many steps may
        be launched with `launch_further`.

        Raises:
            torch.OutOfMemoryError, RuntimeError: the device could not do it; no request's earlier KV is touched.
        """
        drafts: list[Sequence[int]] = []
        if step.num_draft_tokens:
            chunks = [chunk for chunk in step.chunks if chunk.samples]
            sampling, drafts = [chunk.request for chunk in chunks], [chunk.draft_token_ids for chunk in chunks]
        else:
            sampling = [  # the same, less two calls for each
                chunk.request
                for chunk in step.chunks
                if chunk.start + chunk.num_scheduled_tokens == chunk.request.num_tokens
            ]
        is_chosen = all(map(_is_chosen_by_device, sampling))
        has_details = any(request.sampling.logprobs is not None for request in sampling)
        outcome = self.forward.launch(step.chunks, num_further)
        return LaunchedStep(step, sampling, drafts, outcome, is_chosen, has_details)

    def launch_further(self, last: LaunchedStep) -> LaunchedStep:
        """Start one more step for the requests that sample in `last`, where it can be run ahead of and nobody asks for
        log-probabilities. Raises as `launch` does."""
        chunks = [ScheduledChunk(request, request.num_computed_tokens, 1) for request in last.sampling]
        return LaunchedStep(ScheduledStep(chunks), last.sampling, [], self.forward.launch_further(), True, False)

    def read(self, launched: LaunchedStep) -> StepTokens:
        """The tokens of `launched.sampling`, in order; waits for them. Raises as `launch` does.

        Each request's tokens are always chosen in the same place, whoever shares its steps.
        """
        if launched.drafts:
            return self._read_verified(launched)
        sampling, outcome = launched.sampling, launched.outcome
        choices = outcome.choices()
        token_ids = choices[:, 1].tolist()
        details: dict[int, SampledToken] = {}
        if launched.has_details or not choices[:, 0].all():
            details.update(outcome.details(sampling))
        if not launched.is_chosen_by_device:
            places = [place for place, request in enumerate(sampling) if not request.is_chosen_by_device]
            requests = [sampling[place] for place in places]
            chosen = self._sampler.sample(outcome.logits[places], requests, torch.from_numpy(choices[places]))
            for place, token in zip(places, chosen, strict=True):
                token_ids[place] = token.token_id
                if token.logprobs is not None or token.error is not None:
                    details[place] = token
        return StepTokens(token_ids, details)

    def _read_verified(self, launched: LaunchedStep) -> StepTokens:
        """The same of a step with drafts, in which a request has a row of logits more for each of its own."""
        outcome = launched.outcome
        choices = outcome.choices()
        of_rows = [
            request
            for request, drafts in zip(launched.sampling, launched.drafts, strict=True)
            for _ in range(1 + len(drafts))
        ]
        row_details = outcome.details(of_rows) if launched.has_details or not choices[:, 0].all() else {}
        token_ids: list[int] = []
        details: dict[int, SampledToken] = {}
        verified: dict[int, list[SampledToken]] = {}
        first = 0
        for place, (request, drafts) in enumerate(zip(launched.sampling, launched.drafts, strict=True)):
            rows = range(first, first + 1 + len(drafts))
            first = rows.stop
            own = choices[rows.start : rows.stop]
            if request.is_chosen_by_device:
                chosen = own[:, 1].tolist()
                tokens = [row_details.get(row) or SampledToken(chosen[row - rows.start]) for row in rows]
                tokens = tokens[: 1 + num_accepted(tokens, drafts)]
            else:
                logits = outcome.logits[rows.start : rows.stop]
                tokens = self._sampler.verify(logits, request, drafts, torch.from_numpy(own))
            token_ids.append(tokens[0].token_id)
            if drafts:
                verified[place] = tokens
            elif tokens[0].logprobs is not None or tokens[0].error is not None:
                details[place] = tokens[0]
        return StepTokens(token_ids, details, verified)

    def can_run_ahead(self, launched: LaunchedStep) -> bool:
        """Whether the next step may be launched before this one is read: the device has chosen all of its tokens."""
        return self.forward.feeds_back and launched.is_chosen_by_device

    def chooses_on_device(self, request: Request) -> bool:
        """Whether all of this request's tokens are chosen without the host."""
        return self.forward.chooses(request)
