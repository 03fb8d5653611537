"""SGLang's server."""

from pathlib import Path
from typing import ClassVar

from benchmarks.peers.peer import SERVED_NAME, Launch, Peer, Place


class SGLang(Peer):
    """On a CPU it needs SGLang's build for CPUs, with its kernels."""

    name: ClassVar[str] = "sglang"
    packages: ClassVar[tuple[str, ...]] = ("sglang", "torch")

    def launch(self, model: Path, number_format: str, place: Place) -> Launch:
        command = [self.program, "-m", "sglang.launch_server", "--model-path", str(model)]
        command += ["--served-model-name", SERVED_NAME, "--host", place.host, "--port", str(place.port)]
        command += ["--dtype", number_format, "--context-length", str(place.max_model_len), "--device", place.device]
        if place.device != "cpu":
            return Launch(command)
        # Its documents ask for both on CPUs.
        environment = {
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": f"0-{place.num_threads - 1}",
        }
        return Launch([*command, "--disable-overlap-schedule"], environment)
