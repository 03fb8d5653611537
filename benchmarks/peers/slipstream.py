"""Slipstream, as `serve run serve_app:app` starts it."""

import os
import subprocess
from pathlib import Path
from typing import ClassVar

from benchmarks.peers.peer import SERVED_NAME, FileKind, Launch, Peer, Place, serve_launch, write_serve_config
from serve_app.serve_modes import switch_on

ROOT = Path(__file__).parents[2]
QUANTIZATIONS = ("int8", "w8a8")


class Slipstream(Peer):
    """Without speculation: the other peers have none either."""

    name: ClassVar[str] = "slipstream"
    packages: ClassVar[tuple[str, ...]] = ("slipstream-llm", "torch", "ray")
    reads: ClassVar[FileKind] = FileKind.ANY
    formats: ClassVar[tuple[str, ...]] = ("bfloat16", "float32", "float16", *QUANTIZATIONS)
    ready_path: ClassVar[str] = "/v1/models"
    speculative: ClassVar[str] = "off"

    def versions(self) -> str:
        described = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        commit = described.stdout.strip()
        found = super().versions()
        return found.replace(", torch", f" ({commit}), torch") if commit else found

    def launch(self, model: Path, number_format: str, place: Place) -> Launch:
        quantization = number_format if number_format in QUANTIZATIONS else "none"
        arguments = {
            "model": str(model),
            "served_model_name": SERVED_NAME,
            "device": place.device,
            "dtype": "auto" if number_format in QUANTIZATIONS else number_format,
            "quantization": quantization,
            "num_threads": place.num_threads,
            "max_model_len": place.max_model_len,
            "speculative": self.speculative,
        }
        environment = dict(os.environ)
        switch_on("auto", place.host, environment)  # with a file, `serve run` reads arguments after Ray has started
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
        return serve_launch(
            self.program,
            write_serve_config(place, "serve_app:app", arguments),
            {name: value for name, value in environment.items() if os.environ.get(name) != value},
        )


class SlipstreamNgram(Slipstream):
    """As it comes on a CPU: proposals from a request's own text."""

    name: ClassVar[str] = "slipstream-ngram"
    speculative: ClassVar[str] = "ngram"
