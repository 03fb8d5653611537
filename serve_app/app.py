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

from engine.errors import ConfigError, ModelError, SlipstreamError
from engine.loader.catalogue import CATALOGUE
from serve_app.config import AppConfig, cache_dir, parse_config
from serve_app.replica_counts import DRAIN_S, fixed_options, scaled_options

if TYPE_CHECKING:
    from ray.serve import Application

    from engine.llm_engine import LLMEngine
    from engine.loader.checkpoint import Checkpoint
    from engine.runner.start_up import StartUp
    from engine.tokenizer import Tokenizer
    from serve_app.draft_link import Resolve
    from serve_app.draft_server import LoadedDraft
    from serve_app.ingress import ServedModel

logger = logging.getLogger("ray.serve")

ENGINE_DEPLOYMENT = "engine"
DRAFT_DEPLOYMENT = "draft"
INGRESS_DEPLOYMENT = "ingress"

_HEALTH_CHECK_PERIOD_S = 2.0  # Serve replaces a replica that fails three in a row
_HEALTH_CHECK_TIMEOUT_S = 15.0
# For the streams under way. Those of an engine move to another at once, if one fits; else they go on until Serve kills
# the replica, and then wait for one.
_DRAIN_TIMEOUT_S = 30.0
# libgomp spins at every barrier until the last thread is there, which on shared cores is when the scheduler lets that
# one run again: beside three busy processes a step took 580 ms instead of 29. Spinning for some 10 µs costs nothing on
# idle cores and bounds the loss on busy ones. libgomp reads this once, when the process starts.
_CPU_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}
_DRAFT_MAX_ONGOING_REQUESTS = 256  # engines that look for a draft replica at once
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
    from serve_app import launch

    ray_starts_here = launch.starts_ray_here()
    running = None
    if ray_starts_here:
        launch.check_http_port()
    else:
        running = launch.find_ray(config.device)
        launch.check_running_ray(config.proxy, running)
    path, draft_path = _existing_path(config.model), _existing_path(config.draft_model)
    if path is not None:  # replicas run in another directory
        config = config.model_copy(update={"model": str(path), "served_model_name": config.model_name})
    if draft_path is not None:
        config = config.model_copy(update={"draft_model": str(draft_path)})
    config = config.model_copy(update={"device": launch.resolve_device(config.device, running)})
    if ray_starts_here or path or draft_path:  # in a cluster, each node that needs the model fetches it
        check_model(config)
    if ray_starts_here:
        launch.prepare_ray(config.proxy)
    load_drafts = partial(load_draft, config) if config.speculative == "remote" else None
    return bind(config, partial(load_engine, config), partial(load_served_model, config), load_drafts)


def _existing_path(model: str | None) -> Path | None:
    """The absolute path, if it is one and no name."""
    if model is None or model in CATALOGUE:
        return None
    path = Path(model).expanduser()
    return path.absolute() if path.exists() else None


def check_model(config: AppConfig) -> None:
    """Fetches the model if need be, shows how far that is, and opens it: replicas then start with what is there."""
    from engine.loader.checkpoint import open_checkpoint
    from engine.loader.fetch import resolve_model
    from engine.loader.progress import progress_on
    from engine.model.expected_tensors import check_tensors
    from engine.tokenizer import load_tokenizer

    path = resolve_model(config.model, cache_dir=cache_dir(), progress=progress_on(sys.stderr))
    checkpoint = open_checkpoint(path)
    draft_path = None
    if config.draft_model is not None:
        draft_path = resolve_model(
            config.draft_model, cache_dir=cache_dir(), progress=progress_on(sys.stderr), argument="draft_model"
        )
    config.engine_config(checkpoint.config, draft_path if config.speculative == "local" else None)
    check_tensors(checkpoint)
    tokenizer = load_tokenizer(path)
    if draft_path is not None:
        check_draft_model(config, draft_path, checkpoint, tokenizer)


def check_draft_model(config: AppConfig, path: Path, target: "Checkpoint", tokenizer: "Tokenizer") -> None:
    """Whether the model at `path` can draft for the target.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: its vocabulary is another one.
    """
    from engine.loader.checkpoint import open_checkpoint
    from engine.model.expected_tensors import check_tensors
    from engine.speculative.vocabulary import vocabulary_mismatch
    from engine.tokenizer import load_tokenizer
    from serve_app.draft_vocabulary import token_mismatch

    assert config.draft_model is not None
    draft = open_checkpoint(path)
    check_tensors(draft)
    names = (config.draft_model, config.model)
    mismatch = vocabulary_mismatch(names[0], draft.config.vocab_size, names[1], target.config.vocab_size)
    if mismatch is None:
        try:
            own_tokenizer = load_tokenizer(path)
        except ModelError:  # it comes without: a draft needs none
            return
        mismatch = token_mismatch(names[0], own_tokenizer, names[1], tokenizer)
    if mismatch is not None:
        raise ConfigError(mismatch)


def load_engine(
    config: AppConfig, find_drafts: "Resolve | None" = None, start_up: "StartUp | None" = None
) -> "LLMEngine":
    """Runs in an engine replica, whose log says how far it is and where the memory goes.

    find_drafts: where the draft replicas are, with speculative=remote. start_up: who hears of it in place of the log.
    """
    from engine.runner.start_up import LoggedStartUp, Phase

    start_up = start_up or LoggedStartUp(_log_now)
    with start_up.phase(Phase.IMPORTS):
        from engine.llm_engine import LLMEngine
        from engine.loader.checkpoint import open_checkpoint
    if config.device == "cpu" and config.num_threads is None:
        config = config.model_copy(update={"num_threads": num_cpu_threads()})
    path = _on_this_node(config.model)
    draft_path = None
    if config.speculative == "local" and config.draft_model is not None:
        draft_path = _on_this_node(config.draft_model)
    with start_up.phase(Phase.HEADERS):
        checkpoint = open_checkpoint(path)
    engine_config = config.engine_config(checkpoint.config, draft_path)
    if find_drafts is None:
        return LLMEngine.from_checkpoint(checkpoint, engine_config, start_up)

    from engine.speculative.ngram import NgramProposer
    from serve_app.draft_client import RemoteProposer

    proposer = RemoteProposer(
        find_drafts, NgramProposer(), vocab_size=checkpoint.config.vocab_size, target_name=config.model
    )
    return LLMEngine.from_checkpoint(checkpoint, engine_config, start_up, proposer)


def num_cpu_threads() -> int:
    """Of an engine on a CPU that HTTP works on too, with a core for that: on two cores, two threads that wait for each
    other gave 15 tokens/s through HTTP, one 23."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def load_draft(config: AppConfig) -> "LoadedDraft":
    """Runs in a draft replica."""
    from engine.runner.start_up import LoggedStartUp, Phase

    start_up = LoggedStartUp(_log_now)
    with start_up.phase(Phase.IMPORTS):
        from engine.loader.checkpoint import open_checkpoint
        from engine.speculative.draft_model import DraftModel
        from serve_app.draft_server import LoadedDraft
    assert config.draft_model is not None
    path = _on_this_node(config.draft_model)
    with start_up.phase(Phase.HEADERS):
        checkpoint = open_checkpoint(path)
    drafter = DraftModel.from_checkpoint(checkpoint, config.draft_config(checkpoint.config), start_up, may_branch=True)
    return LoadedDraft(drafter, config.draft_model, checkpoint.fingerprint)


def load_served_model(config: AppConfig) -> "ServedModel":
    """Runs in an ingress replica."""
    from engine.loader.checkpoint import open_checkpoint
    from engine.tokenizer import load_tokenizer
    from serve_app.ingress import ServedModel

    path = _on_this_node(config.model)
    checkpoint = open_checkpoint(path)
    return ServedModel(
        name=config.model_name,
        tokenizer=load_tokenizer(path),
        defaults=checkpoint.generation,
        max_model_len=config.resolve_max_model_len(checkpoint.config),
        vocab_size=checkpoint.config.vocab_size,
    )


def _log_now(line: str) -> None:
    """Throughput-optimised Serve writes a replica's log to its file a thousand lines at a time."""
    logger.info(line)
    for handler in logger.handlers:
        handler.flush()


def _on_this_node(model: str) -> Path:
    """Usually there already; a replica on another node fetches it, and says so in its log."""
    from engine.loader.fetch import resolve_model
    from engine.loader.progress import PlainProgress

    return resolve_model(model, cache_dir=cache_dir(), progress=PlainProgress(_log_now))


def bind(
    config: AppConfig,
    load_engine: Callable[["Resolve | None"], "LLMEngine"],
    load_model: Callable[[], "ServedModel"],
    load_draft: Callable[[], "LoadedDraft"] | None = None,
) -> "Application":
    """The deployments and how they hang together. The loaders run in the replicas; `device` has been resolved.

    load_draft: of the draft deployment, which there is with speculative=remote only.
    """
    from ray import serve
    from ray.serve.config import BackpressureConfig, RequestRouterConfig

    from serve_app.engine_deployment import Engine
    from serve_app.ingress import Ingress, IngressLimits
    from serve_app.request_router import EngineRouter

    common = {
        "health_check_period_s": _HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": _HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_timeout_s": _DRAIN_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": _DRAIN_POLL_S,
    }
    environment = {"runtime_env": {"env_vars": _CPU_ENVIRONMENT}} if config.device == "cpu" else {}
    engine = serve.deployment(
        Engine,
        name=ENGINE_DEPLOYMENT,
        **_engine_scaling(config),
        ray_actor_options={"num_cpus": config.engine_num_cpus, "num_gpus": config.engine_num_gpus, **environment},
        max_ongoing_requests=config.engine_max_ongoing_requests,
        request_router_config=RequestRouterConfig(request_router_class=EngineRouter),
        logging_config={"enable_access_log": False},  # a line for every acknowledgement says nothing
        **common,
    )
    ingress = serve.deployment(
        Ingress,
        name=INGRESS_DEPLOYMENT,
        **_ingress_scaling(config),
        ray_actor_options={"num_cpus": config.ingress_num_cpus},
        max_ongoing_requests=config.ingress_max_ongoing_requests,
        # What Serve lets wait where even that is not enough: clients that take long to read what is ready for them.
        max_queued_requests=config.ingress_max_ongoing_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1.0),
        **common,
    )
    engine_arguments: list[Any] = [load_engine]
    if load_draft is not None:
        from serve_app.draft_deployment import Draft

        draft = serve.deployment(
            Draft,
            name=DRAFT_DEPLOYMENT,
            **_draft_scaling(config),
            ray_actor_options={"num_cpus": config.draft_num_cpus, "num_gpus": config.draft_gpu_share, **environment},
            max_ongoing_requests=_DRAFT_MAX_ONGOING_REQUESTS,
            logging_config={"enable_access_log": False},
            **common,
        )
        engine_arguments.append(draft.bind(load_draft))
    bound_engine = engine.bind(*engine_arguments, max_requests=config.max_num_seqs + config.max_waiting_requests)
    limits = IngressLimits(config.max_queued_requests, config.max_queued_requests_per_key, config.time_limits)
    application: Application = ingress.bind(
        bound_engine, load_model, limits, config.failover_policy, config.placement_rule
    )
    return application


def _engine_scaling(config: AppConfig) -> dict[str, Any]:
    count = config.engine_count
    if count.is_fixed:
        return fixed_options(count)
    return scaled_options(count, "EnginePolicy", target_queue_depth=count.target_queue_depth, drain_s=DRAIN_S)


def _ingress_scaling(config: AppConfig) -> dict[str, Any]:
    """With a policy also where the number is fixed, if that of the engines is not: theirs asks it what waits."""
    count = config.ingress_count
    if count.is_fixed and config.engine_count.is_fixed:
        return fixed_options(count)
    return scaled_options(count, "IngressPolicy", target_queue_depth=count.target_queue_depth)


def _draft_scaling(config: AppConfig) -> dict[str, Any]:
    count = config.draft_count
    if count.is_fixed:
        return fixed_options(count)
    return scaled_options(count, "DraftPolicy", engines_per_draft=count.target_queue_depth)
