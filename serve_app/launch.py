"""Where the application's builder runs, and what follows for ports and devices."""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.serve.config import HTTPOptions

from engine.errors import ConfigError
from serve_app import serve_modes
from serve_app.ports import can_bind, listener

logger = logging.getLogger("ray.serve")

# Of NVIDIA's driver, of the same under Windows' Linux, and of AMD's. Without any, torch need not be asked.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
_ANSWER_TIMEOUT_S = 30.0  # for a process to start in, on a busy machine


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


def prepare_ray(proxy: str) -> None:
    """What the processes of a Ray that starts here will inherit: Serve's fast modes.

    Raises:
        ConfigError: see serve_modes.switch_on.
    """
    host = _http_options().host
    logger.info(serve_modes.switch_on(proxy, host, os.environ))
    if serve_modes.modes_of_this_process().haproxy and host != "127.0.0.1":
        logger.warning(
            f"{serve_modes.HAPROXY_FLAG} was set before `serve run`, so Serve listens on all interfaces: unset it, and "
            "HAProxy is on all the same, on 127.0.0.1"
        )


@dataclass(frozen=True)
class RunningRay:
    """What a Ray that runs already is like."""

    has_gpu: bool
    modes: serve_modes.ServeModes


def find_ray(device: str) -> RunningRay | None:
    """The one that this process is part of, or that `serve run` will join. None in a program that has joined none yet;
    unless device is auto, for which it has to run.

    Raises:
        ConfigError: it cannot be joined, or starts no process.
    """
    if ray.is_initialized():
        return _ask_ray()
    if not in_command_line() and device != "auto":
        return None
    context = click.get_current_context(silent=True)
    address = None if context is None else context.params.get("address")
    try:  # for these questions only: `serve run` connects by itself, with the runtime environment that it was given
        ray.init(address=address or "auto", log_to_driver=False, logging_level="warning")
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot join the Ray cluster at {address or 'its known address'}: {reason}") from None
    try:
        return _ask_ray()
    finally:
        ray.shutdown()


def _ask_ray() -> RunningRay:
    return RunningRay(has_gpu=ray.cluster_resources().get("GPU", 0) >= 1, modes=_modes_of_ray())


def _modes_of_ray() -> serve_modes.ServeModes:
    if ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        return serve_modes.modes_of_this_process()

    @ray.remote(num_cpus=0)
    def modes() -> tuple[bool, bool]:  # in here it is pickled by value: the other process may not have this package yet
        from ray.serve._private import constants

        return bool(constants.RAY_SERVE_THROUGHPUT_OPTIMIZED), bool(constants.RAY_SERVE_ENABLE_HA_PROXY)

    try:
        return serve_modes.ServeModes(*ray.get(modes.remote(), timeout=_ANSWER_TIMEOUT_S))
    except ray.exceptions.GetTimeoutError:
        raise ConfigError(f"the Ray cluster has started no process within {_ANSWER_TIMEOUT_S:g} s") from None


def check_running_ray(proxy: str, running: RunningRay | None) -> None:
    """Warns if Serve's fast modes are off. running: None if Ray does not run yet, in a program that may start it.

    Raises:
        ConfigError: see serve_modes.check.
    """
    modes = serve_modes.modes_of_this_process() if running is None else running.modes
    if warning := serve_modes.check(proxy, modes):
        logger.warning(warning)


def check_http_port() -> None:
    """`serve run` binds Serve's default port; when somebody else has it, that fails late and at length.

    Raises:
        ConfigError: the port is taken.
    """
    options = _http_options()
    if not can_bind(options.host, options.port):
        who = listener(options.port)
        raise ConfigError(
            f"port {options.port} on {options.host} is in use: stop what listens there"
            f"{f' ({who})' if who else ''}, or set http_options.port in a Serve config file"
        )


def _http_options() -> HTTPOptions:
    """What `serve run` will give Serve."""
    options = HTTPOptions()
    assert options.host is not None
    return options


def resolve_device(device: str, running: RunningRay | None) -> str:
    """`auto` is cuda where a GPU can be used: on this machine when Ray starts here, else anywhere in the cluster.

    Raises:
        ConfigError: cuda was asked for on this machine, which has none. (A cluster may yet add a node that has.)
    """
    if device == "cpu":
        return device
    if not starts_ray_here():
        has_gpu = running is not None and running.has_gpu
        return "cuda" if device == "cuda" or has_gpu else "cpu"
    has_cuda = _this_machine_has_cuda()
    if device == "cuda" and not has_cuda:
        raise ConfigError("device=cuda, but torch finds no CUDA device here: use device=cpu, or check the driver")
    return "cuda" if has_cuda else "cpu"


def _this_machine_has_cuda() -> bool:
    if sys.platform == "linux" and not any(Path(device).exists() for device in _GPU_DEVICES):
        return False
    import torch  # here, for it takes seconds to import

    return bool(torch.cuda.is_available())
