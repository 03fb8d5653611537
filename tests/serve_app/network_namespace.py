"""A network of its own for a command: all its ports are free there, and nobody else's sockets are in it."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")
ADDRESS = "198.51.100.2"  # beside 127.0.0.1: as an interface has that others reach
_CLONE_NEWNET = 0x40000000
_SET_UP = f"""
set -e
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray
ip link set lo up
ip link add out type veth peer name other && ip link set other up
ip addr add {ADDRESS}/24 dev out && ip link set out up && ip route add default dev out
exec "$@"
"""


class Namespace:
    """A command in its network, its processes, and what it writes."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self._process = process
        self._output = output
        self._inside = ThreadPoolExecutor(1, initializer=self._enter)  # a namespace belongs to a thread

    @cached_property
    def command(self) -> psutil.Process:
        """Itself; its parent only waits for it."""
        deadline = time.monotonic() + 30
        while not (children := psutil.Process(self._process.pid).children()):
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)
        return children[0]

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def run_inside(self, command: Sequence[str]) -> str:
        """What another command writes in this network, among all processes."""
        enter = ["nsenter", "-t", str(self.command.pid), "-n", *command]
        return subprocess.run(enter, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout

    def processes(self) -> list[psutil.Process]:
        return [self.command, *self.command.children(recursive=True)]

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def inside(self, function: Callable[[], T]) -> T:
        """What the function gives in a thread that is in this network."""
        return self._inside.submit(function).result(timeout=300)

    def _enter(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/proc/{self.command.pid}/ns/net").open() as network:
            if libc.setns(network.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")

    def close(self) -> None:
        """Whatever is in there dies with the first process."""
        self._inside.shutdown()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)


@contextmanager
def namespace(command: Sequence[str], output: Path, environment: dict[str, str], cwd: Path) -> Iterator[Namespace]:
    """Needs root."""
    isolate = ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "--kill-child", "bash", "-c", _SET_UP, "bash"]
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [*isolate, *command], stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=cwd
        )
    running = Namespace(process, output)
    try:
        yield running
    finally:
        running.close()


def may_make_namespaces() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-n", "true"], check=False).returncode == 0
