"""Serve's fast modes: replicas that call each other by gRPC and answer HTTP themselves, and HAProxy in front of them.

Each process of Serve reads them from its environment when it starts, and has that from Ray. So they are switched on
where Ray is about to be started, and elsewhere it can only be said that they are off.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from engine.errors import ConfigError
from serve_app import haproxy

THROUGHPUT_FLAG = "RAY_SERVE_THROUGHPUT_OPTIMIZED"
HAPROXY_FLAG = "RAY_SERVE_ENABLE_HA_PROXY"
_BUFFER_VARIABLE = "RAY_SERVE_HAPROXY_TUNE_BUFSIZE"


@dataclass(frozen=True)
class ServeModes:
    """Those that are on."""

    throughput_optimized: bool
    haproxy: bool


def modes_of_this_process() -> ServeModes:
    """As Serve read them when it was imported."""
    from ray.serve._private import constants

    return ServeModes(bool(constants.RAY_SERVE_THROUGHPUT_OPTIMIZED), bool(constants.RAY_SERVE_ENABLE_HA_PROXY))


def switch_on(proxy: str, host: str, environment: MutableMapping[str, str]) -> str:
    """For the processes that will inherit the environment, in which whatever is set already stays.

    proxy: auto, haproxy or ray. host: where Serve will listen. Gives one line that says what is on, and why.

    Raises:
        ConfigError: the proxy that was asked for cannot be had.
    """
    reason = _reason_against_haproxy(proxy, environment)
    environment.setdefault(THROUGHPUT_FLAG, "1")
    environment.setdefault(HAPROXY_FLAG, "0" if reason else "1")
    # What throughput-optimised Serve turns off, and `serve run` is to show all the same, as soon as it happens: how far
    # the replicas are. It is a line for each request as well, which takes 0.1 ms.
    environment.setdefault("RAY_SERVE_LOG_TO_STDERR", "1")
    if not reason:
        environment.update(haproxy.settings(haproxy.private_directory(), host, environment))
    front = f"Ray's own proxy, not HAProxy ({reason})" if reason else "HAProxy"
    throughput = environment[THROUGHPUT_FLAG]
    calls = (
        "throughput-optimised" if throughput == "1" else f"not throughput-optimised ({THROUGHPUT_FLAG}={throughput})"
    )
    return f"Serve is {calls}, with {front} in front"


def _reason_against_haproxy(proxy: str, environment: Mapping[str, str]) -> str | None:
    given = environment.get(HAPROXY_FLAG)
    wants = proxy == "haproxy" or (given == "1" and proxy == "auto")
    if given is not None and proxy != "auto" and (given == "1") != wants:
        raise ConfigError(f"proxy={proxy}, but {HAPROXY_FLAG}={given} is set: unset it, or leave proxy out")
    if proxy == "ray":
        return "proxy=ray"
    if given is not None and not wants:
        return f"{HAPROXY_FLAG}={given}"
    problem = haproxy.obstacle(haproxy.private_directory())
    if problem is not None and wants:
        raise ConfigError(f"HAProxy cannot run here: {problem}; proxy=ray does without")
    return problem


def check(proxy: str, modes: ServeModes) -> str | None:
    """Of a Ray that runs already: a warning of one line, if it could be faster.

    Raises:
        ConfigError: the proxy that was asked for is not the one that is on.
    """
    command = f"{THROUGHPUT_FLAG}=1 {HAPROXY_FLAG}=1 {_BUFFER_VARIABLE}={haproxy.BUFFER_BYTES} ray start --head"
    if proxy == "haproxy" and not modes.haproxy:
        raise ConfigError(f"proxy=haproxy, but Ray was started without it: stop Ray and start it with `{command}`")
    if proxy == "ray" and modes.haproxy:
        raise ConfigError(f"proxy=ray, but Ray was started with {HAPROXY_FLAG}=1: stop Ray and start it without")
    if proxy == "ray":
        command = f"{THROUGHPUT_FLAG}=1 ray start --head"
    missing = [] if modes.throughput_optimized else ["throughput-optimised Serve"]
    if not modes.haproxy and proxy == "auto":
        missing.append("HAProxy")
    if not missing:
        return None
    return (
        f"Ray was started without {' and '.join(missing)}, which makes the service several times slower: "
        f"stop Ray and start it with `{command}`"
    )
