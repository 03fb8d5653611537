"""Runs the driver in namespaces of its own, from outside."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer

from tests.cluster.driver import LIMIT_S, NO_HEAD, REPORT
from tests.cluster.fake_nodes import ray_environment
from tests.cluster.isolation import command_prefix
from tests.cluster.story import Report

ROOT = Path(__file__).parents[2]
_NUM_TRIES = 3  # to start Ray's head, which on a very busy machine is not up in time


def run_isolated(on_line: Callable[[str], None]) -> Report:
    """Bounded in time; no process of it is left, however it ends. `on_line` gets what the driver prints.

    Raises:
        NotPermittedError: there are no namespaces here.
    """
    for _ in range(_NUM_TRIES):
        # Below /tmp: the paths of Ray's sockets must be short.
        with TemporaryDirectory(prefix="slipstream-", dir="/tmp", ignore_cleanup_errors=True) as directory:
            status = _run_driver(Path(directory), on_line)
            written = Path(directory) / REPORT
            if written.exists():
                return Report(**json.loads(written.read_text()))
        if status != NO_HEAD:
            break
    return Report()


def _run_driver(directory: Path, on_line: Callable[[str], None]) -> int:
    """Its exit status."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # for Ray's workers
    process = subprocess.Popen(
        [*command_prefix(), sys.executable, "-m", "tests.cluster.driver", str(directory)],
        cwd=ROOT,
        env=os.environ | ray_environment(directory) | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,  # closed when this process ends, of which the driver takes notice
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # an interruption comes here, and is passed on by the end of `unshare`
    )
    late = Timer(LIMIT_S + 20, process.kill)
    late.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            on_line(line.rstrip())
        return process.wait()
    finally:
        late.cancel()
        process.kill()
        process.wait()
