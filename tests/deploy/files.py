"""The files that put Slipstream on a cluster, as tests read them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
# Between a command's name and its end: the first operator of the shell, or the line's end.
COMPILE = re.compile(r"slipstream compile ([^&|;\n\\]+)")


def read_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def serve_config() -> dict[str, Any]:
    return read_yaml("deploy/serve.yaml")


def serve_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """The application's arguments, from a Serve config."""
    [application] = config["applications"]
    return application["args"]


def compile_commands(path: str) -> Iterator[dict[str, str]]:
    """Each `slipstream compile` of a file: its options by the service's names for them, model and GPU included."""
    for line in COMPILE.findall((ROOT / path).read_text()):
        model, *options = shlex.split(line)
        names = [option.removeprefix("--").replace("-", "_") for option in options[::2]]
        yield {"model": model, **dict(zip(names, options[1::2], strict=True))}
