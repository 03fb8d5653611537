"""llama.cpp's own server, `llama-server`."""

import re
import shutil
from pathlib import Path
from typing import ClassVar

from benchmarks.peers.model_files import GGUF_FORMATS
from benchmarks.peers.peer import SERVED_NAME, AbsentError, FileKind, Launch, Peer, Place, run_for_version

ALL_LAYERS = 999


class LlamaServer(Peer):
    """`program` is the binary."""

    name: ClassVar[str] = "llama-server"
    packages: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[FileKind] = FileKind.GGUF
    formats: ClassVar[tuple[str, ...]] = GGUF_FORMATS

    def versions(self) -> str:
        if shutil.which(self.program) is None:
            raise AbsentError(f"not installed: there is no {self.program} on the path")
        shown = run_for_version([self.program, "--version"])
        found = re.search(r"version:\s*(.+)", shown.stderr + shown.stdout)
        if found is None:
            raise AbsentError("its program says no version")
        return f"llama.cpp {found[1].strip()}"

    def launch(self, model: Path, number_format: str, place: Place) -> Launch:
        del number_format  # the file's
        command = [self.program, "--model", str(model), "--alias", SERVED_NAME]
        command += ["--host", place.host, "--port", str(place.port)]
        command += ["--threads", str(place.num_threads), "--threads-batch", str(place.num_threads)]
        # The context is divided among the slots.
        command += ["--parallel", str(place.max_streams), "--ctx-size", str(place.max_streams * place.max_model_len)]
        command += ["--n-gpu-layers", "0" if place.device == "cpu" else str(ALL_LAYERS)]
        return Launch(command)
