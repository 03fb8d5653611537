"""What launches depend on is asked of the GPU that is aimed at, wherever tensors lie."""

from types import SimpleNamespace

import pytest
import torch

from engine.kernels.attention_worklist import AttentionWorkspace, attention_workspace
from engine.kernels.pdl import INTERPRETED, supports_pdl
from engine.kernels.target import GPU, aimed_at, gpu_of

CPU = torch.device("cpu")
HOPPER = GPU((9, 0), 132, 79 << 30, 232_448)
AMPERE = GPU((8, 0), 108, 79 << 30, 166_912)


def workspace() -> AttentionWorkspace:
    return attention_workspace(1, 4, 2, 16, 64, torch.bfloat16, CPU)


def test_a_cpu_is_no_gpu() -> None:
    assert gpu_of(CPU) is None
    assert not supports_pdl(CPU)


def test_aims_end_and_may_be_nested() -> None:
    with aimed_at(HOPPER):
        assert gpu_of(CPU) == HOPPER
        with aimed_at(AMPERE):
            assert gpu_of(CPU) == AMPERE
            assert not supports_pdl(CPU)
        assert gpu_of(CPU) == HOPPER
        assert supports_pdl(CPU) is not INTERPRETED
    assert gpu_of(CPU) is None


def test_an_installed_gpu_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        major=8,
        minor=0,
        multi_processor_count=108,
        total_memory=79 << 30,
        shared_memory_per_block=49_152,  # what a program gets that does not ask for more
        shared_memory_per_block_optin=166_912,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    assert gpu_of(torch.device("cuda", 63)) == AMPERE


def test_grids_are_for_the_gpu_that_is_aimed_at() -> None:
    alone = workspace().num_processors
    with aimed_at(AMPERE):
        assert workspace().num_processors == 108 != alone
