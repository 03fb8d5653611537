"""Where the application's builder runs, and what follows for ports and devices."""

import errno
import socket

import click
import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.serve.config import HTTPOptions

from engine.errors import ConfigError


def in_command_line() -> bool:
    """Whether `serve run` calls; else it is a build task of Serve on the cluster, or somebody's Python program."""
    return click.get_current_context(silent=True) is not None


def starts_ray_here() -> bool:
    """Whether `serve run` will start Ray on this machine, once it has the application."""
    context = click.get_current_context(silent=True)
    if context is None or ray.is_initialized():
        return False
    # The question that ray.init will ask with the same argument: a given address, RAY_ADDRESS, a Ray running here.
    return canonicalize_bootstrap_address(context.params.get("address")) is None


def check_http_port() -> None:
    """`serve run` binds Serve's default port; when somebody else has it, that fails late and at length.

    Raises:
        ConfigError: the port is taken.
    """
    options = HTTPOptions()
    assert options.host is not None
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not count
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise ConfigError(
                f"port {options.port} on {options.host} is in use: stop what listens there, "
                "or set http_options.port in a Serve config file"
            ) from None


def resolve_device(device: str) -> str:
    """`auto` is cuda where a GPU can be used: on this machine when Ray starts here, else anywhere in the cluster.

    Raises:
        ConfigError: cuda was asked for on this machine, which has none. (A cluster may yet add a node that has.)
    """
    if device == "cpu":
        return device
    if not starts_ray_here():
        return "cuda" if device == "cuda" or _cluster_has_gpu() else "cpu"
    has_cuda = _this_machine_has_cuda()
    if device == "cuda" and not has_cuda:
        raise ConfigError("device=cuda, but torch finds no CUDA device here: use device=cpu, or check the driver")
    return "cuda" if has_cuda else "cpu"


def _this_machine_has_cuda() -> bool:
    import torch  # here, for it takes seconds to import

    return bool(torch.cuda.is_available())


def _ray_has_gpu() -> bool:
    return bool(ray.cluster_resources().get("GPU", 0) >= 1)


def _cluster_has_gpu() -> bool:
    if ray.is_initialized():
        return _ray_has_gpu()
    context = click.get_current_context(silent=True)
    address = None if context is None else context.params.get("address")
    try:  # for this question only: `serve run` connects by itself, with the runtime environment that it was given
        ray.init(address=address or "auto", log_to_driver=False, logging_level="warning")
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot join the Ray cluster at {address or 'its known address'}: {reason}") from None
    try:
        return _ray_has_gpu()
    finally:
        ray.shutdown()
