"""Ray Serve LLM: vLLM's engine behind Ray Serve."""

from pathlib import Path
from typing import Any, ClassVar

from benchmarks.peers.peer import SERVED_NAME, Launch, Peer, Place, serve_launch, write_serve_config
from benchmarks.peers.vllm import cpu_environment


class RayServeLLM(Peer):
    """From `pip install 'ray[llm]'`."""

    name: ClassVar[str] = "ray-serve-llm"
    packages: ClassVar[tuple[str, ...]] = ("ray", "vllm")
    ready_path: ClassVar[str] = "/v1/models"

    def launch(self, model: Path, number_format: str, place: Place) -> Launch:
        config: dict[str, Any] = {
            "model_loading_config": {"model_id": SERVED_NAME, "model_source": str(model)},
            "engine_kwargs": {"dtype": number_format, "max_model_len": place.max_model_len},
            "deployment_config": {"num_replicas": 1},
            "accelerator_config": {"kind": "cpu" if place.device == "cpu" else "gpu"},
        }
        path = write_serve_config(place, "ray.serve.llm:build_openai_app", {"llm_configs": [config]})
        return serve_launch(self.program, path, cpu_environment(place) if place.device == "cpu" else {})
