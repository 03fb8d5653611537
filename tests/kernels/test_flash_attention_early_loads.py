# ruff: noqa: N803
"""What attention reads before the kernel ahead of it is done does not depend on that kernel."""

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from engine.kernels import attention_at_once, flash_attention
from engine.kernels.attention_worklist import build_worklist
from engine.kernels.pdl import INTERPRETED, launch_dependents
from tests.kernels.attention_cases import Cache, Chunk, Heads

STEPS = [
    [Chunk(0, 599, 1)],
    [Chunk(0, 255, 1), Chunk(1, 256, 1), Chunk(2, 0, 1)],
    [
        Chunk(0, 252, 5),
        Chunk(1, 60, 4),
        Chunk(None, 0, 2),
        Chunk(2, 0, 3),
    ],  # several tiles of a request, across borders
    [Chunk(0, 250, 20), Chunk(1, 250, 7), Chunk(2, 39, 1)],  # a large tile too
]


def written_by(step: list[Chunk], cache: Cache) -> torch.Tensor:
    """Whether each slot [num_blocks, block_size] holds a position that the step computes."""
    slots = torch.zeros(cache.k.shape[:2], dtype=torch.bool)
    for chunk in step:
        if chunk.request is not None:
            for position in range(chunk.start, chunk.start + chunk.count):
                slots[cache.tables[chunk.request][position // cache.block_size], position % cache.block_size] = True
    return slots.to(cache.k.device)


@pytest.mark.skipif(not INTERPRETED, reason="patches what only the interpreter looks up")
@pytest.mark.parametrize(("int8", "window"), [(False, None), (True, 70)])
@pytest.mark.parametrize("step", STEPS)
def test_nothing_early_that_the_step_writes(
    step: list[Chunk], int8: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every program begins with keys and values of the step that are not there, and finds them behind its wait."""
    cache = Cache([600, 300, 40], Heads(1, 8, 64), "cpu", window=window, int8=int8)
    expected = cache.attend(step)
    slots = written_by(step, cache)
    tensors = [cache.k_scales, cache.v_scales] if int8 else [cache.k, cache.v]
    true = [tensor.clone() for tensor in tensors]
    waits = 0

    def begin(_: object) -> None:
        for tensor in tensors:
            tensor[slots] = torch.nan

    def wait(_: object) -> None:
        nonlocal waits
        waits += 1
        for tensor, full in zip(tensors, true, strict=True):
            tensor.copy_(full)

    queries, requests, positions = cache.rows(step)
    workspace = cache.workspace(len(queries), num_processors=6)
    build_worklist(workspace, requests, positions)
    monkeypatch.setattr(flash_attention, "launch_dependents", begin)
    monkeypatch.setattr(attention_at_once, "wait_for_producers", wait)
    assert torch.equal(cache.attend_again(queries, workspace), expected)
    assert waits > 1


@triton.jit
def _late_writer(source, target, count, delay_ns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lets its dependents start at once and writes its copy much later."""
    launch_dependents(True)
    until = globaltimer() + delay_ns
    while globaltimer() < until:
        pass
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < count
        tl.store(target + index, tl.load(source + index, mask=mask), mask=mask)


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("heads", [Heads(2, 8, 64), Heads(2, 4, 128)])
@pytest.mark.parametrize("step", STEPS)
def test_keys_of_the_kernel_ahead(step: list[Chunk], heads: Heads, int8: bool) -> None:
    """The kernel ahead writes the step's keys and values, late, while attention has begun."""
    cache = Cache([600, 300, 40], heads, "cuda", int8=int8)
    expected = cache.attend(step)
    slots = written_by(step, cache)
    full = cache.k.clone()
    queries, requests, positions = cache.rows(step)
    workspace = cache.workspace(len(queries))
    for _ in range(3):
        cache.k[slots] = 0
        build_worklist(workspace, requests, positions)
        _late_writer[(1,)](full, cache.k, full.numel(), 2_000_000, BLOCK=1024)
        assert torch.equal(cache.attend_again(queries, workspace), expected)
