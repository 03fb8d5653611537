"""Namespaces of Linux: a process that has its own loopback and sees only what it started, all of which ends with it."""

import fcntl
import os
import shutil
import socket
import struct
import subprocess
from functools import cache

# Everything that has been started inside ends with the first process, and that one with `unshare`.
_NAMESPACES = ("--net", "--pid", "--fork", "--mount-proc", "--kill-child")
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


class NotPermittedError(Exception):
    """Why there are no namespaces here, in one line."""


@cache
def command_prefix() -> tuple[str, ...]:
    """What to put before a command so that it runs in namespaces: as root, or as an ordinary user who may be root in a
    namespace of users.

    Raises:
        NotPermittedError: neither is possible.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        raise NotPermittedError("there is no `unshare` here (util-linux)")
    said = ""
    for user in ((), ("--map-root-user",)):
        prefix = (unshare, *user, *_NAMESPACES, "--")
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, timeout=30, check=False)
        if tried.returncode == 0:
            return prefix
        said = tried.stderr.strip()
    raise NotPermittedError(f"namespaces are not permitted here: {said}")


def is_isolated() -> bool:
    """Whether this process is the first of its namespace."""
    return os.getpid() == 1


def bring_loopback_up() -> None:
    """In a new network namespace it is down. What `ip link set lo up` does, which not every machine has."""
    assert is_isolated()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request)
        flags: int = struct.unpack("16sH14x", answer)[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))
