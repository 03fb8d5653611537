"""How many replicas the arguments allow, and what Serve is told of it."""

from functools import partial
from typing import Any

import pytest

from engine.errors import ConfigError
from serve_app import replica_counts
from serve_app.app import bind, load_engine, load_served_model
from serve_app.config import parse_config
from serve_app.replica_counts import ReplicaCount, scaled_options

REMOTE = {"speculative": "remote", "draft_model": "d"}


def test_one_replica_of_each_unless_told_otherwise() -> None:
    config = parse_config({"device": "cpu"})
    counts = (config.engine_count, config.ingress_count, config.draft_count)
    assert [(count.fewest, count.most) for count in counts] == [(1, 1)] * 3


def test_fixed_numbers() -> None:
    config = parse_config({"engine_replicas": "3", "ingress_replicas": "2", **REMOTE, "draft_replicas": "4"})
    counts = (config.engine_count, config.ingress_count, config.draft_count)
    assert [(count.fewest, count.most) for count in counts] == [(3, 3), (2, 2), (4, 4)]


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"max_replicas": "4"}, ReplicaCount(1, 4, 8)),
        ({"min_replicas": "0"}, ReplicaCount(0, 1, 8)),
        ({"min_replicas": "2", "max_replicas": "9", "target_queue_depth": "2.5"}, ReplicaCount(2, 9, 2.5)),
        ({"min_replicas": "3", "max_replicas": "none"}, ReplicaCount(3, 3, 8)),
        ({"max_replicas": "4", "device": "cuda"}, ReplicaCount(1, 4, 128)),
        ({"max_replicas": "4", "device": "cuda", "max_num_seqs": "1"}, ReplicaCount(1, 4, 1)),
    ],
)
def test_numbers_that_vary(arguments: dict[str, str], count: ReplicaCount) -> None:
    assert parse_config({"device": "cpu"} | arguments).engine_count == count


def test_the_same_of_ingress_and_draft() -> None:
    ingress = {"ingress_min_replicas": "2", "ingress_max_replicas": "5", "ingress_target_queue_depth": "50"}
    draft = {"draft_min_replicas": "0", "draft_max_replicas": "3", "draft_target_queue_depth": "2"}
    config = parse_config({"max_replicas": "8", **REMOTE, **ingress, **draft})
    assert config.ingress_count == ReplicaCount(2, 5, 50)
    assert config.draft_count == ReplicaCount(0, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_replicas": "5", "max_replicas": "2"}, "min_replicas must be at most max_replicas, which is 2, not 5"),
        (
            {"engine_replicas": "2", "max_replicas": "4"},
            "engine_replicas fixes the number of replicas, and max_replicas",
        ),
        ({"ingress_replicas": "1", "ingress_min_replicas": "1"}, "ingress_replicas fixes .* and ingress_min_replicas"),
        ({"target_queue_depth": "4"}, "target_queue_depth does nothing with a fixed number of replicas: set max_repl"),
        ({"ingress_target_queue_depth": "4", "max_replicas": "3"}, "ingress_target_queue_depth does nothing with"),
        ({"draft_max_replicas": "3", **REMOTE}, "draft replicas are as many as the engine replicas need"),
    ],
)
def test_contradictions(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        parse_config(arguments)
    assert "\n" not in str(caught.value)


def test_room_for_calls_is_that_of_the_most_replicas() -> None:
    few, many = parse_config({"engine_replicas": 2}), parse_config({"max_replicas": 2})
    assert few.ingress_max_ongoing_requests == many.ingress_max_ongoing_requests
    few, many = parse_config({"ingress_replicas": 3}), parse_config({"ingress_max_replicas": 3})
    assert few.engine_max_ongoing_requests == many.engine_max_ongoing_requests


def deployments_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Serve's options by deployment."""
    config = parse_config({"device": "cpu"} | arguments)
    load_draft = (lambda: None) if config.speculative == "remote" else None
    ingress = bind(config, partial(load_engine, config), partial(load_served_model, config), load_draft)  # type: ignore[arg-type]
    engine = ingress._bound_deployment.init_args[0]
    bound = {"ingress": ingress, "engine": engine}
    if config.speculative == "remote":
        bound["draft"] = engine._bound_deployment.init_args[1]
    return {name: each._bound_deployment._deployment_config for name, each in bound.items()}


def test_without_arguments_serve_scales_nothing() -> None:
    for options in deployments_of(REMOTE).values():
        assert (options.num_replicas, options.autoscaling_config) == (1, None)


def test_serve_is_told_of_policies() -> None:
    options = deployments_of({**REMOTE, "min_replicas": 0, "max_replicas": 4, "draft_max_replicas": 2})
    engine, draft, ingress = (options[name].autoscaling_config for name in ("engine", "draft", "ingress"))
    assert (engine.min_replicas, engine.max_replicas, engine.initial_replicas) == (0, 4, None)
    assert engine.policy.policy_function == "serve_app.autoscaling:EnginePolicy"
    assert engine.policy.policy_kwargs["target_queue_depth"] == 8
    assert (draft.min_replicas, draft.max_replicas) == (1, 2)
    assert draft.policy.policy_kwargs["engines_per_draft"] == 4
    assert (ingress.min_replicas, ingress.max_replicas) == (1, 1)  # fixed, but it reports what waits
    assert ingress.policy.policy_function == "serve_app.autoscaling:IngressPolicy"
    assert (engine.upscale_delay_s, engine.downscale_delay_s, engine.downscale_to_zero_delay_s) == (0, 0, 0)


def test_an_ingress_may_vary_alone() -> None:
    options = deployments_of({"ingress_max_replicas": 3})
    assert options["ingress"].autoscaling_config.max_replicas == 3
    assert options["engine"].autoscaling_config is None


def test_every_policy_takes_its_arguments() -> None:
    for options in deployments_of({**REMOTE, "max_replicas": 4, "draft_max_replicas": 2}).values():
        policy = options.autoscaling_config.policy
        policy.get_policy()(**policy.policy_kwargs)


def test_many_replicas_report_less_often(recwarn: pytest.WarningsRecorder) -> None:
    few = scaled_options(ReplicaCount(1, 8, 1), "EnginePolicy")["autoscaling_config"]
    many = scaled_options(ReplicaCount(1, 1000, 1), "EnginePolicy")["autoscaling_config"]
    assert few.metrics_interval_s == replica_counts.REPORT_S
    assert many.metrics_interval_s == 4
    assert many.look_back_period_s > many.metrics_interval_s
    assert many.policy.policy_kwargs["stale_s"] == 60
    assert not recwarn.list
