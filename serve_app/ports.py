"""Ports of this machine."""

import errno
import socket


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


def free_port(host: str) -> int:
    """One that the system picks. Somebody else may take it before it is used."""
    with _new_socket(host) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def _new_socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
