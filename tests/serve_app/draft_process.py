"""A draft server in a process of its own, to be killed and stopped. Its first line of output is its address."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.config import CacheConfig, Device, DType, EngineConfig, SchedulerConfig
from engine.loader.checkpoint import open_checkpoint
from engine.speculative.draft_model import DraftModel
from engine.speculative.drafter import Drafter
from serve_app.draft_mirrors import MirrorKeeper
from serve_app.draft_server import DraftServer, LoadedDraft
from serve_app.draft_transport import Endpoint
from tests.serve_app.toy_drafter import ToyDrafter

ROOT = Path(__file__).parents[2]


@contextmanager
def draft_process(name: str = "toy", *model: str) -> Iterator[tuple[subprocess.Popen[str], Endpoint]]:
    """The process, which is killed in the end, and where it listens. model: path, device and dtype; else a toy."""
    command = [sys.executable, "-m", "tests.serve_app.draft_process", name, *model]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # Killed, it leaves the directory of its socket, which is therefore one of ours.
    with (
        tempfile.TemporaryDirectory(prefix="draft-") as directory,
        subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=os.environ | {"TMPDIR": directory}) as process,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address:
                raise RuntimeError("the draft process has ended before it listened")
            yield process, Endpoint(address)
        finally:
            process.kill()
            process.wait()


def _load(path: str, device: str, dtype: str) -> DraftModel:
    config = EngineConfig(
        device=Device(device),
        dtype=DType(dtype),
        cache=CacheConfig(num_blocks=4000),
        scheduler=SchedulerConfig(max_model_len=1024, token_budget=512),
        num_threads=1,
        warm_up=False,
    )
    return DraftModel.from_checkpoint(open_checkpoint(Path(path)), config, may_branch=True)


def main() -> None:
    drafter: Drafter = _load(*sys.argv[2:]) if len(sys.argv) > 2 else ToyDrafter()
    server = DraftServer(LoadedDraft(drafter, sys.argv[1], "fp"), MirrorKeeper(drafter))
    server.start()
    print(server.ipc.address, flush=True)
    sys.stdin.read()  # until the test has gone
    server.shutdown()


if __name__ == "__main__":
    main()
