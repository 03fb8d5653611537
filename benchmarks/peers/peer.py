"""What there is to know of a peer: how it is found and started, what files it reads, what it is asked for."""

import json
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

SERVED_NAME = "benchmarked"  # what requests call the model, where the peer lets it have a name
FLOATS = ("bfloat16", "float32", "float16")
VERSION_TIMEOUT_S = 60.0
_PRINT_VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class AbsentError(Exception):
    """The peer is not installed, or has no model that it could serve. The message is why, in one line."""


class FileKind(StrEnum):
    """What a peer reads. ANY: either, as the model was given."""

    ANY = "any"
    DIRECTORY = "a directory with safetensors"
    GGUF = "a GGUF file"


@dataclass(frozen=True)
class Place:
    """Where and how a server runs. max_model_len: tokens of one request; max_streams: requests at once, at most."""

    host: str
    port: int
    device: str  # cpu or cuda
    num_threads: int
    max_model_len: int
    max_streams: int
    folder: Path  # for files that a server is started from

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True)
class Launch:
    """A server's command, and what its environment has beside this process's."""

    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class Peer(ABC):
    """One server. `program` is its Python interpreter, or its binary."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]  # that the interpreter must have; their versions are reported
    reads: ClassVar[FileKind] = FileKind.DIRECTORY
    formats: ClassVar[tuple[str, ...]] = FLOATS  # of numbers; the first is the default
    ready_path: ClassVar[str] = "/health"
    greedy: ClassVar[Mapping[str, Any]] = {"temperature": 0}
    says_done: ClassVar[bool] = True  # that its streams end with [DONE], as OpenAI's do

    def __init__(self, program: str) -> None:
        self.program = program

    def versions(self) -> str:
        """Of its packages, such as `vllm 0.26.0`.

        Raises:
            AbsentError: one is missing.
        """
        command = [self.program, "-c", _PRINT_VERSIONS, *self.packages]
        found: dict[str, str] = json.loads(run_for_version(command).stdout)
        if missing := [name for name in self.packages if name not in found]:
            raise AbsentError(f"not installed: its interpreter has no {' and no '.join(missing)}")
        return ", ".join(f"{name} {version}" for name, version in found.items())

    @abstractmethod
    def launch(self, model: Path, number_format: str, place: Place) -> Launch:
        """How it is started for one model in one of `formats`."""

    def model_name(self, model: Path) -> str:
        """What requests call it."""
        del model
        return SERVED_NAME

    def full_length(self, max_tokens: int) -> dict[str, Any]:
        """Fields of a request that make each answer as long as is asked for; empty where the peer has none."""
        del max_tokens
        return {"ignore_eos": True}


def run_for_version(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Raises:
    AbsentError: the program does not run.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=VERSION_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise AbsentError(f"its program does not run: {type(error).__name__}") from None


def write_serve_config(place: Place, import_path: str, arguments: Mapping[str, Any]) -> Path:
    """For `serve run`: JSON, which is YAML too. The only way to tell it a port."""
    application = {"name": "default", "route_prefix": "/", "import_path": import_path, "args": dict(arguments)}
    config = {"http_options": {"host": place.host, "port": place.port}, "applications": [application]}
    path = place.folder / f"serve-{place.port}.yaml"
    path.write_text(json.dumps(config, indent=1))
    return path


def serve_launch(python: str, config: Path, environment: Mapping[str, str]) -> Launch:
    """On a Ray of its own, whatever else runs on the machine. Ray gives its workers a low priority, which no other
    server here has beside the client: it is told not to."""
    command = [python, "-m", "ray.serve.scripts", "run", "--address", "local", str(config)]
    return Launch(command, {**environment, "RAY_worker_niceness": "0"})
