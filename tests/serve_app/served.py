"""`serve run serve_app:app` as users start it, in a network of its own."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.serve_app.network_namespace import Namespace, may_make_namespaces, namespace

ROOT = Path(__file__).parents[2]
SERVE = Path(sys.executable).with_name("serve")
LIMIT_S = 200.0  # for anything there, on a busy machine
MARKS = [  # of what uses it
    pytest.mark.skipif(not may_make_namespaces(), reason="needs root, for a network of its own"),
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("cluster"),  # not beside the other one
]


@contextmanager
def serving(output: Path, is_ready: Callable[[], bool], *arguments: str) -> Iterator[Namespace]:
    """The application on a CPU, with these arguments, from when `is_ready` says so inside."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [str(SERVE), "run", "serve_app:app", "device=cpu", *arguments]
    with namespace(command, output, environment, ROOT) as service:
        wait_until(lambda: service.has_ended or service.inside(is_ready), service)
        yield service


def wait_until(condition: Callable[[], bool], service: Namespace) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, service.output()
        time.sleep(0.1)
    assert not service.has_ended, service.output()
