"""`transformers serve`."""

import json
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.peers.peer import Launch, Peer, Place

NO_TOKEN = -1


class TransformersServe(Peer):
    """As it comes: requests do not share steps."""

    name: ClassVar[str] = "transformers"
    packages: ClassVar[tuple[str, ...]] = ("transformers", "torch", "fastapi", "uvicorn", "openai", "accelerate")
    says_done: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()

    def launch(self, model: Path, number_format: str, place: Place) -> Launch:
        command = [self.program, "-m", "transformers.cli.transformers", "serve", str(model)]
        command += ["--device", place.device, "--dtype", number_format]
        command += ["--host", place.host, "--port", str(place.port), *self.options]
        return Launch(command, {"HF_HUB_OFFLINE": "1"})

    def model_name(self, model: Path) -> str:
        return str(model)

    def full_length(self, max_tokens: int) -> dict[str, Any]:
        fields = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": NO_TOKEN}
        return {"generation_config": json.dumps(fields)}


class TransformersBatching(TransformersServe):
    """With its continuous batching."""

    name: ClassVar[str] = "transformers-batching"
    options: ClassVar[tuple[str, ...]] = ("--continuous-batching",)
