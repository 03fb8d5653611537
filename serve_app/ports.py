"""Ports of this machine."""

import errno
import socket

import psutil


def can_bind(host: str, port: int) -> bool:
    """Whether nobody else listens there.

    Raises:
        OSError: the host is none of this machine's, or the port is for the privileged.
    """
    with _new_socket(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not count
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


def listener(port: int) -> str | None:
    """Who listens on that TCP port, for a message: "NAME, process ID". None if that is not for this user to know."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1] == port and connection.pid is not None:
                return f"{psutil.Process(connection.pid).name()}, process {connection.pid}"
    except psutil.Error:  # on macOS, only the superuser may ask; or it has just ended
        pass
    return None


def free_port(host: str) -> int:
    """One that the system picks. Somebody else may take it before it is used."""
    with _new_socket(host) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def _new_socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
