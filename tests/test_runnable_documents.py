"""Every block of the documents that is marked runnable runs, and prints what is shown there. See tests/documents.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Service
from tests.documents import ROOT, SERVICE_ADDRESS, Block, all_blocks, shows
from tests.tiny_models import write_tiny_model
from tests.tokenizer.vocabularies import byte_level_backend

TIMEOUT_S = 240  # of one block, on a machine that does much else
RUNNABLE = [block for block in all_blocks() if block.runnable is not None]
PROSE = "The lighthouse keeper climbed the stairs every evening at dusk, carrying a can of oil and a clean cloth.\n"
WRITTEN_TO = "benchmarks"  # its commands leave results there


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader's folder looks like: a clone, a model and a text of their own."""
    folder = tmp_path_factory.mktemp("clone")
    for entry in ROOT.iterdir():
        if entry.name == WRITTEN_TO:
            shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    byte_level_backend().save(str(write_tiny_model(folder / "my-model", vocab_size=512) / "tokenizer.json"))
    (folder / "prose.txt").write_text(PROSE)
    (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    return folder


def run(block: Block, folder: Path, address: str = SERVICE_ADDRESS, **variables: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CURL_HOME": str(folder),
        "COLUMNS": "100",
    }
    text = block.text_to_run().replace(SERVICE_ADDRESS, address)
    command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
    done = subprocess.run(
        [*command, text],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{block.place}: exit status {done.returncode}\n{text}{done.stdout}{done.stderr}"
    assert not block.output or shows(block.output, done.stdout), f"{block.place} prints\n{done.stdout}"


def blocks_to_run(*, needs_service: bool) -> pytest.MarkDecorator:
    chosen = [block for block in RUNNABLE if block.needs_service == needs_service]
    assert len(chosen) > 5
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.place)


@blocks_to_run(needs_service=False)
def test_a_block_runs(block: Block, checkout: Path, default_model_path: Path) -> None:  # noqa: ARG001 - fetched before
    run(block, checkout)


@blocks_to_run(needs_service=True)
def test_a_block_runs_against_the_service(block: Block, checkout: Path, service: Service) -> None:
    import ray

    cluster = ray.get_runtime_context().gcs_address
    run(block, checkout, service.url.removeprefix("http://"), RAY_ADDRESS=cluster)


@pytest.mark.parametrize(
    ("text", "output", "words"),
    [
        ("slipstream plan my-model --gpus h100\n", "", "No such option"),
        ("curl http://127.0.0.1:9/v1/models\n", "", "exit status 7"),
        ("false | true\n", "", "exit status 1"),
        ("echo one; echo two\n", "one\n", "prints"),
        ("echo one; echo two\n", "…three\n", "prints"),
    ],
)
def test_a_stale_block_fails(text: str, output: str, words: str, checkout: Path) -> None:
    block = Block("here", "bash", text, {}, output)
    with pytest.raises(AssertionError, match=words):
        run(block, checkout)


def test_an_output_may_leave_something_out(checkout: Path) -> None:
    run(Block("here", "bash", "seq 12\n", {"12": "11"}, "1\n 2\n…\n11\n"), checkout)


def test_a_marker_that_replaces_nothing_fails() -> None:
    with pytest.raises(AssertionError, match="is not in the block"):
        Block("here", "bash", "seq 12\n", {"13": "11"}).text_to_run()
