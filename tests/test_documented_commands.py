"""The documents' commands take the arguments that they are given there, also where they cannot be run here."""

import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import typer
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.config import parse_config
from slipstream_cli.app import app as slipstream
from tests.documents import DOCUMENTS, Block, all_blocks, codes_in_sentences

OURS = re.compile(r"(slipstream (?!-)|serve run serve_app:app|python -m (benchmarks|loadtest|tools|tests)\.)")
# What a block says that needs a GPU, a cloud, a Ray of its own, the network, or long.
CANNOT_RUN_HERE = re.compile(
    r"^(serve|ray|aws|gcloud|kubectl|docker|prometheus|guidellm|pytest) |pip install|ray start|--device cuda|"
    r"slipstream compile|python -m (tests\.cluster|tools\.|benchmarks\.(kernels|serve_modes|peers)|"
    r"loadtest\.(chaos|storm|slow_readers|soak))|pytest -n|/tmp/ray/session_latest",
    re.MULTILINE,
)


def scripts() -> list[Block]:
    return [block for block in all_blocks() if block.language in ("bash", "python")]


def test_what_can_run_here_is_marked_as_runnable() -> None:
    assert len(scripts()) > 40
    unmarked = [block for block in scripts() if block.runnable is None]
    assert [block.place for block in unmarked if not CANNOT_RUN_HERE.search(block.text)] == []


def commands() -> list[tuple[str, list[str]]]:
    """Ours, in blocks and in sentences: place, and words without redirection."""
    found = []
    for block in scripts():
        found += [(block.place, line) for line in block.text.replace("\\\n", " ").splitlines()]
    for document in DOCUMENTS:
        found += [(document.name, code.replace("\n", " ")) for code in codes_in_sentences(document)]
    return [
        (place, [word for word in shlex.split(line.split(" > ")[0], comments=True) if word != "…"])
        for place, line in found
        if OURS.match(line) and "name=value" not in line and "--help" not in line
    ]


def parse(command: Any, arguments: list[str]) -> None:
    """As the command would, without running it. Without any, it is only mentioned."""
    while hasattr(command, "commands") and arguments:
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if arguments:
        command.make_context(command.name, list(arguments))


def command_of(module_name: str) -> Any:
    """None where the module has no typer command."""
    spec = find_spec(module_name)
    assert spec is not None, module_name
    module = import_module(f"{module_name}.__main__" if spec.submodule_search_locations else module_name)
    apps = [value for value in vars(module).values() if isinstance(value, typer.Typer)]
    if not apps and hasattr(module, "typer"):
        apps = [typer.Typer()]
        apps[0].command()(module.main)
    return typer.main.get_command(apps[0]) if apps else None


@pytest.mark.parametrize("words", [pytest.param(words, id=f"{place} {' '.join(words)}") for place, words in commands()])
def test_a_command_takes_its_arguments(words: list[str]) -> None:
    if words[0] == "serve":
        parse_config(dict(word.split("=", 1) for word in words[3:]))
    elif words[0] == "slipstream":
        parse(typer.main.get_command(slipstream), words[1:])
    elif words[2] != "tests.cluster":  # which starts when it is imported, and takes none
        command = command_of(words[2])
        assert command is not None or not words[3:], "its arguments are not looked at"
        if command is not None:
            parse(command, words[3:])


def test_config_files_are_accepted() -> None:
    files = [yaml.safe_load(block.text) for block in all_blocks() if block.language == "yaml"]
    assert files
    for file in files:
        for application in ServeDeploySchema.model_validate(file).applications:
            parse_config(application.args)
