"""Runs a scheduled step on the device: the decoder forward, then sampling."""

import torch

from engine.batch import SampledToken, ScheduledStep
from engine.runner.forward import Forward
from engine.sampling.sampler import Sampler


class ModelRunner:
    """The device side of an engine."""

    def __init__(self, forward: Forward, sampler: Sampler) -> None:
        self.forward = forward
        self._sampler = sampler

    @property
    def dtype(self) -> torch.dtype:
        return self.forward.dtype

    def run(self, step: ScheduledStep) -> list[SampledToken]:
        """Compute the step's KV and the next token of every chunk that samples, in the order of the chunks.

        Raises:
            torch.OutOfMemoryError, RuntimeError: the device could not do it; no request's earlier KV is touched.
        """
        sampling = [chunk.request for chunk in step.chunks if chunk.samples]
        return self._sampler.sample(self.forward(step.chunks), sampling)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed for want of memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
