"""Parts of a benchmark, each in a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

from rich.console import Console

from benchmarks.service_clients import HOST
from serve_app.serve_modes import switch_on

SERVICE = "service"  # the part that runs Serve, which reads its modes when it is imported
PATIENCE_S = 500  # kernels may have to be compiled
errors = Console(stderr=True)


def run_part(module: str, part: str, *options: str) -> Any:
    """This command once more, with --part; gives what its last line says in JSON.

    Raises:
        subprocess.SubprocessError: it has failed, or takes more than PATIENCE_S.
    """
    command = [sys.executable, "-m", module, *sys.argv[1:], "--part", part, *options]
    environment = dict(os.environ)
    if part == SERVICE:
        errors.print(switch_on("auto", HOST, environment))
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=PATIENCE_S)
    return json.loads(ended.stdout.splitlines()[-1])
