# mypy: disable-error-code="no-untyped-def"
"""Programmatic dependent launch: a kernel starts, and fetches its weights, while the one before it still runs.

Rules that every kernel of the chain keeps: dependents are launched first, which publishes nothing; only immutable
data is read before the wait; every CTA waits before it stores or exits, otherwise the kernel after next could read
what this one has not written yet; activations are read with `cache_modifier=".cg"`, so that no compiler may hoist
them above the wait as read-only data.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.target import gpu_of

INTERPRETED: bool = triton.knobs.runtime.interpret  # as it was when the kernels were decorated


def supports_pdl(device: torch.device) -> bool:
    """True where a kernel may be launched before the one ahead of it has finished: Hopper and later."""
    gpu = None if INTERPRETED else gpu_of(device)
    return gpu is not None and gpu.capability >= (9, 0)


@triton.jit
def launch_dependents(PDL: tl.constexpr):  # noqa: N803
    """Let the next kernel start as soon as there is room for it."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_producers(PDL: tl.constexpr):  # noqa: N803
    """Until the kernels before this one have finished and their writes are visible."""
    if PDL:
        gdc_wait()
