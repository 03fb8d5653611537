"""The documents, and the blocks of code in them.

A block that can be run on a CPU and without a network has a line before its fence, which GitHub does not show:

    <!-- runnable -->
    <!-- runnable: "-t 60s" is "-t 3s", "tinyllama-1.1b" is "my-model" -->

The second puts other words in place of some, for commands that take long or need what a test cannot have. A block
behind `<!-- output -->` is what the one before it prints; `…` in it stands for anything.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SERVICE_ADDRESS = "127.0.0.1:8000"
_RUNNABLE = re.compile(r"<!-- runnable(?:: (.*))? -->")
_REPLACEMENT = re.compile(r'"([^"]*)" is "([^"]*)"')


@dataclass(frozen=True)
class Block:
    """`runnable`: None where it is not marked, else what to put in place of what. `output`: empty if none is shown."""

    place: str
    language: str
    text: str
    runnable: dict[str, str] | None = None
    output: str = ""

    @property
    def needs_service(self) -> bool:
        return SERVICE_ADDRESS in self.text or "get_deployment_handle" in self.text

    def text_to_run(self) -> str:
        """With the marker's words in place; fails if the marker speaks of what is not there any more."""
        text = self.text
        for old, new in (self.runnable or {}).items():
            assert old in text, f"{self.place}: the marker replaces {old!r}, which is not in the block"
            text = text.replace(old, new)
        return text


def blocks(document: Path) -> list[Block]:
    """In their order. A marker without a block behind it fails."""
    found: list[Block] = []
    lines = iter(enumerate(document.read_text().splitlines(), 1))
    marker = ""
    for number, line in lines:
        if line.startswith("```"):
            text = "".join(f"{inner}\n" for inner in _until_the_fence(lines))
            place = f"{document.relative_to(ROOT)}:{number}"
            if marker == "<!-- output -->":
                assert found, place
                found[-1] = Block(found[-1].place, found[-1].language, found[-1].text, found[-1].runnable, text)
            else:
                found.append(Block(place, line.removeprefix("```").strip(), text, _replacements(marker, place)))
            marker = ""
        else:
            assert not marker, f"{document.name}:{number}: no block behind {marker}"
            marker = line if line.startswith(("<!-- runnable", "<!-- output")) else ""
    return found


def _until_the_fence(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    for _, line in lines:
        if line == "```":
            return
        yield line


def _replacements(marker: str, place: str) -> dict[str, str] | None:
    if not marker:
        return None
    match = _RUNNABLE.fullmatch(marker)
    assert match, f"{place}: {marker}"
    found = dict(_REPLACEMENT.findall(match[1] or ""))
    assert ", ".join(f'"{old}" is "{new}"' for old, new in found.items()) == (match[1] or ""), f"{place}: {marker}"
    return found


def all_blocks() -> list[Block]:
    return [block for document in DOCUMENTS for block in blocks(document)]


def codes_in_sentences(document: Path) -> list[str]:
    """What stands between single backticks, outside of blocks."""
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", prose)


def shows(output: str, printed: str) -> bool:
    """Whether a document's output is what was printed, `…` apart; spaces and empty lines do not count."""
    pattern = re.escape(" ".join(output.split())).replace("…", ".*")
    return re.fullmatch(pattern, " ".join(printed.split()), re.DOTALL) is not None
