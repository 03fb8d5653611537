"""What the commands that start a service of their own have in common: its arguments, and their summaries."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def app_arguments(given: Sequence[str] | None) -> dict[str, str]:
    """name=value … as a mapping."""
    return dict(argument.partition("=")[::2] for argument in given or [])


def write_down(summary: "DataclassInstance", output: Path | None) -> None:
    """Prints it as JSON, and writes the same to `output`."""
    text = json.dumps(asdict(summary), indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")
