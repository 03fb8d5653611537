"""Runs a scheduled step on the device: the decoder forward, then sampling."""

from dataclasses import dataclass

import torch

from engine.batch import SampledToken, ScheduledStep
from engine.request import Request
from engine.runner.forward import Forward, StepLogits
from engine.sampling.greedy import is_plain_greedy
from engine.sampling.sampler import Sampler


@dataclass(frozen=True)
class LaunchedStep:
    """A step on its way through the device."""

    step: ScheduledStep
    sampling: list[Request]  # whose next tokens it computes, in order
    outcome: StepLogits


class ModelRunner:
    """The device side of an engine."""

    def __init__(self, forward: Forward, sampler: Sampler) -> None:
        self.forward = forward
        self._sampler = sampler

    @property
    def dtype(self) -> torch.dtype:
        return self.forward.dtype

    def launch(self, step: ScheduledStep) -> LaunchedStep:
        """Start computing the step's KV and the next token of every chunk that samples.

        Raises:
            torch.OutOfMemoryError, RuntimeError: the device could not do it; no request's earlier KV is touched.
        """
        sampling = [chunk.request for chunk in step.chunks if chunk.samples]
        return LaunchedStep(step, sampling, self.forward.launch(step.chunks))

    def read(self, launched: LaunchedStep) -> list[SampledToken]:
        """The tokens of `launched.sampling`, in order; waits for them. Raises as `launch` does."""
        return self._sampler.sample(launched.outcome.logits, launched.sampling, launched.outcome.choices())

    def can_run_ahead(self, launched: LaunchedStep) -> bool:
        """Whether the next step may be launched before this one is read: the device has chosen all of its tokens."""
        return self.forward.feeds_back and all(map(is_plain_greedy, launched.sampling))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed for want of memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
