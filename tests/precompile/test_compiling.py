"""What is refused once it is compiled."""

import pytest

from engine.errors import ConfigError
from engine.precompile.compiling import Compiled, fitting
from engine.precompile.gpus import GPUS


def test_a_gpu_without_room_for_a_kernel() -> None:
    gpu = GPUS["l4"]
    assert fitting(Compiled("k", True, gpu.gpu.shared_bytes), gpu).name == "k"
    with pytest.raises(ConfigError, match=f"k needs {gpu.gpu.shared_bytes + 1} bytes of shared memory, and L4"):
        fitting(Compiled("k", True, gpu.gpu.shared_bytes + 1), gpu)
