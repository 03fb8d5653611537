"""vLLM's own server."""

from pathlib import Path
from typing import ClassVar

from benchmarks.peers.peer import SERVED_NAME, Launch, Peer, Place

CPU_KV_CACHE_GIB = 2


class VLLM(Peer):
    """On a CPU it needs vLLM's build for CPUs."""

    name: ClassVar[str] = "vllm"
    packages: ClassVar[tuple[str, ...]] = ("vllm", "torch")

    def launch(self, model: Path, number_format: str, place: Place) -> Launch:
        command = [str(Path(self.program).with_name("vllm")), "serve", str(model), "--served-model-name", SERVED_NAME]
        command += ["--host", place.host, "--port", str(place.port), "--dtype", number_format]
        command += ["--max-model-len", str(place.max_model_len)]
        return Launch(command, cpu_environment(place) if place.device == "cpu" else {})


def cpu_environment(place: Place) -> dict[str, str]:
    """Its threads are bound to the first cores, and their number is that of the cores."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{place.num_threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_CACHE_GIB),
    }
