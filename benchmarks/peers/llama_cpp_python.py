"""The server that comes with llama-cpp-python, llama.cpp's Python binding."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.peers.model_files import GGUF_FORMATS
from benchmarks.peers.peer import SERVED_NAME, FileKind, Launch, Peer, Place


class LlamaCppPython(Peer):
    """It computes one request at a time; others wait. It cannot be told to go on past an end of sequence."""

    name: ClassVar[str] = "llama-cpp-python"
    packages: ClassVar[tuple[str, ...]] = ("llama-cpp-python", "uvicorn")
    reads: ClassVar[FileKind] = FileKind.GGUF
    formats: ClassVar[tuple[str, ...]] = GGUF_FORMATS
    ready_path: ClassVar[str] = "/v1/models"
    greedy: ClassVar[Mapping[str, Any]] = {"temperature": 0, "repeat_penalty": 1.0}  # as it comes: 1.1

    def launch(self, model: Path, number_format: str, place: Place) -> Launch:
        del number_format  # the file's
        command = [self.program, "-m", "llama_cpp.server", "--model", str(model), "--model_alias", SERVED_NAME]
        command += ["--host", place.host, "--port", str(place.port), "--n_ctx", str(place.max_model_len)]
        command += ["--n_threads", str(place.num_threads), "--n_threads_batch", str(place.num_threads)]
        command += ["--n_gpu_layers", "0" if place.device == "cpu" else "-1"]
        # As it comes, a new request ends the answer that is under way.
        return Launch([*command, "--interrupt_requests", "false"])

    def full_length(self, max_tokens: int) -> dict[str, Any]:
        del max_tokens
        return {}
