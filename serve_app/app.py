"""Composition root: arguments in, a Serve application out.

Imports little, because importing the package imports it; functions import what they need.
"""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import SlipstreamError
from engine.loader.catalogue import CATALOGUE
from serve_app.config import AppConfig, cache_dir, parse_config

if TYPE_CHECKING:
    from ray.serve import Application

    from engine.llm_engine import LLMEngine
    from serve_app.ingress import ServedModel

logger = logging.getLogger("ray.serve")

ENGINE_DEPLOYMENT = "engine"
INGRESS_DEPLOYMENT = "ingress"

_HEALTH_CHECK_PERIOD_S = 2.0  # Serve replaces a replica that fails three in a row
_HEALTH_CHECK_TIMEOUT_S = 15.0
_DRAIN_TIMEOUT_S = 30.0  # for the streams under way; then Serve kills the replica, and they end with an error
# libgomp spins at every barrier until the last thread is there, which on shared cores is when the scheduler lets that
# one run again: beside three busy processes a step took 580 ms instead of 29. Spinning for some 10 µs costs nothing on
# idle cores and bounds the loss on busy ones. libgomp reads this once, when the process starts.
_CPU_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}
_DRAIN_POLL_S = 0.2  # Serve's 2 s would be the least that a shutdown takes


def app(args: dict[str, Any]) -> "Application":
    """`serve run serve_app:app name=value …`; the names are the fields of serve_app.config.AppConfig.

    A wrong argument or model ends `serve run` with one line. Elsewhere (a Serve config file, a Python program) it
    raises RayServeException, whose text Serve shows as the application's status.
    """
    from ray.serve.exceptions import RayServeException

    from serve_app.launch import in_command_line

    try:
        return build(parse_config(args))
    except SlipstreamError as error:
        line = f"slipstream: {error}"
        if not in_command_line():
            raise RayServeException(line) from None
        print(line, file=sys.stderr)
        sys.exit(1)


def build(config: AppConfig) -> "Application":
    """Checks whatever can be checked before a replica starts, and binds the deployments.

    Raises:
        SlipstreamError: a setting or the model is wrong.
    """
    from serve_app.launch import check_http_port, resolve_device, starts_ray_here

    ray_starts_here = starts_ray_here()
    if ray_starts_here:
        check_http_port()
    path = Path(config.model).expanduser()
    is_path = config.model not in CATALOGUE and path.exists()
    if is_path:  # replicas run in another directory
        config = config.model_copy(update={"model": str(path.absolute()), "served_model_name": config.model_name})
    config = config.model_copy(update={"device": resolve_device(config.device)})
    if ray_starts_here or is_path:  # in a cluster, each node that needs the model fetches it
        check_model(config)
    return bind(config, partial(load_engine, config), partial(load_served_model, config))


def check_model(config: AppConfig) -> None:
    """Fetches the model if need be, shows how far that is, and opens it: replicas then start with what is there."""
    from engine.loader.checkpoint import open_checkpoint
    from engine.loader.fetch import resolve_model
    from engine.loader.progress import progress_on
    from engine.model.weights import check_tensors
    from engine.tokenizer import load_tokenizer

    path = resolve_model(config.model, cache_dir=cache_dir(), progress=progress_on(sys.stderr))
    checkpoint = open_checkpoint(path)
    config.engine_config(checkpoint.config)
    check_tensors(checkpoint)
    load_tokenizer(path)


def load_engine(config: AppConfig) -> "LLMEngine":
    """Runs in an engine replica, whose log says how far it is and where the memory goes."""
    from engine.llm_engine import LLMEngine
    from engine.loader.checkpoint import open_checkpoint
    from engine.runner.start_up import LoggedStartUp, Phase

    if config.device == "cpu" and config.num_threads is None:
        # A core for HTTP: on two cores, two threads that wait for each other gave 15 tokens/s through HTTP, one 23.
        config = config.model_copy(update={"num_threads": max(1, len(os.sched_getaffinity(0)) - 1)})
    path = _model_on_this_node(config)
    start_up = LoggedStartUp(logger.info)
    with start_up.phase(Phase.HEADERS):
        checkpoint = open_checkpoint(path)
    return LLMEngine.from_checkpoint(checkpoint, config.engine_config(checkpoint.config), start_up)


def load_served_model(config: AppConfig) -> "ServedModel":
    """Runs in an ingress replica."""
    from engine.loader.checkpoint import open_checkpoint
    from engine.tokenizer import load_tokenizer
    from serve_app.ingress import ServedModel

    path = _model_on_this_node(config)
    checkpoint = open_checkpoint(path)
    return ServedModel(
        name=config.model_name,
        tokenizer=load_tokenizer(path),
        defaults=checkpoint.generation,
        max_model_len=config.resolve_max_model_len(checkpoint.config),
        vocab_size=checkpoint.config.vocab_size,
    )


def _model_on_this_node(config: AppConfig) -> Path:
    """Usually there already; a replica on another node fetches it, and says so in its log."""
    from engine.loader.fetch import resolve_model
    from engine.loader.progress import PlainProgress

    return resolve_model(config.model, cache_dir=cache_dir(), progress=PlainProgress(logger.info))


def bind(
    config: AppConfig, load_engine: Callable[[], "LLMEngine"], load_model: Callable[[], "ServedModel"]
) -> "Application":
    """The deployments and how they hang together. The loaders run in the replicas; `device` has been resolved."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from serve_app.engine_deployment import Engine
    from serve_app.ingress import Ingress
    from serve_app.request_router import EngineRouter

    common = {
        "health_check_period_s": _HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": _HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_timeout_s": _DRAIN_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": _DRAIN_POLL_S,
    }
    actor_options: dict[str, Any] = {"num_cpus": config.engine_num_cpus, "num_gpus": int(config.device == "cuda")}
    if config.device == "cpu":
        actor_options["runtime_env"] = {"env_vars": _CPU_ENVIRONMENT}
    engine = serve.deployment(
        Engine,
        name=ENGINE_DEPLOYMENT,
        num_replicas=config.engine_replicas,
        ray_actor_options=actor_options,
        max_ongoing_requests=config.engine_max_ongoing_requests,
        request_router_config=RequestRouterConfig(request_router_class=EngineRouter),
        logging_config={"enable_access_log": False},  # a line for every acknowledgement says nothing
        **common,
    )
    ingress = serve.deployment(
        Ingress,
        name=INGRESS_DEPLOYMENT,
        num_replicas=config.ingress_replicas,
        ray_actor_options={"num_cpus": config.ingress_num_cpus},
        max_ongoing_requests=config.ingress_max_ongoing_requests,
        **common,
    )
    application: Application = ingress.bind(engine.bind(load_engine), load_model, config.max_queued_requests)
    return application
