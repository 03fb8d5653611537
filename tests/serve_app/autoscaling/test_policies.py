"""The policies as Serve calls them, with contexts of its own class."""

import inspect
import math
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.autoscaling import DraftPolicy, EnginePolicy, IngressPolicy
from serve_app.autoscaling.load import (
    CAPACITY_PER_S,
    CPU_USAGE,
    FINISHED_PER_S,
    KV_CACHE_USAGE,
    NUM_ONGOING,
    NUM_RUNNING,
    NUM_UNPLACED,
    NUM_WAITING,
    OUTPUT_TOKENS_PER_S,
)
from serve_app.replica_counts import ReplicaCount, scaled_options

ENGINE_NAMES = (NUM_RUNNING, NUM_WAITING, KV_CACHE_USAGE, FINISHED_PER_S, CAPACITY_PER_S, OUTPUT_TOKENS_PER_S)
applications = (f"app{number}" for number in count())  # boards outlive a test


@dataclass
class Controller:
    """What of Serve's controller a policy sees, for one application."""

    application: str = field(default_factory=lambda: next(applications))
    now_s: float = 1000.0

    def policy(self, kind: Any, **goal: float) -> Any:
        pace = {"hold_s": 60.0, "pending_hold_s": 10.0, "margin": 0.5, "idle_s": 300.0, "stale_s": 5.0}
        return kind(**goal, **pace, clock=lambda: self.now_s)

    def context(self, target: int, reports: dict[str, dict[str, Any]], **changes: Any) -> AutoscalingContext:
        """reports: by replica, numbers by name."""
        raw: dict[str, Any] = {}
        for replica, report in reports.items():
            for name, value in report.items():
                raw.setdefault(name, {})[replica] = [TimeStampedValue(self.now_s, value)]
        arguments: dict[str, Any] = {
            "deployment_id": DeploymentID("engine", self.application),
            "deployment_name": "engine",
            "app_name": self.application,
            "current_num_replicas": len(reports),
            "target_num_replicas": target,
            "running_replicas": list(reports),
            "total_num_requests": 0.0,
            "total_queued_requests": 0.0,
            "aggregated_metrics": {},
            "raw_metrics": raw,
            "capacity_adjusted_min_replicas": 0,
            "capacity_adjusted_max_replicas": 20,
            "policy_state": {},
            "last_scale_up_time": None,
            "last_scale_down_time": None,
            "current_time": self.now_s,
            "config": AutoscalingConfig(min_replicas=0, max_replicas=20),
        }
        return AutoscalingContext(**(arguments | changes))


def engine_report(**changes: Any) -> dict[str, Any]:
    return dict.fromkeys(ENGINE_NAMES, 0.0) | changes


def ingress_report(ongoing: float, unplaced: float = 0.0, cpu: float = 0.0) -> dict[str, float]:
    return {NUM_ONGOING: ongoing, NUM_UNPLACED: unplaced, CPU_USAGE: cpu}


def test_a_burst_that_one_engine_has_taken() -> None:
    controller = Controller()
    policy = controller.policy(EnginePolicy, target_queue_depth=16, drain_s=2)
    reports = {"a": engine_report(num_requests_running=10, num_requests_waiting=54)}
    assert policy(controller.context(1, reports)) == (4, {})


def test_a_burst_from_zero_counts_what_waits_in_the_ingresses() -> None:
    controller = Controller()
    engine = controller.policy(EnginePolicy, target_queue_depth=16, drain_s=2)
    ingress = controller.policy(IngressPolicy, target_queue_depth=100)
    assert engine(controller.context(0, {})) == (0, {})
    reports = {"x": ingress_report(40, unplaced=40), "y": ingress_report(24, unplaced=24)}
    assert ingress(controller.context(2, reports))[0] == 2
    assert engine(controller.context(0, {}))[0] == 4


def test_what_serve_makes_of_it_at_zero() -> None:
    """Its wrapper asks no policy while a call waits for a replica: hence serve_app.waking."""
    controller = Controller()
    engine = controller.policy(EnginePolicy, target_queue_depth=16, drain_s=2)
    ingress = controller.policy(IngressPolicy, target_queue_depth=100)
    ingress(controller.context(1, {"x": ingress_report(64, unplaced=64)}))
    [options] = scaled_options(ReplicaCount(0, 20, 16), "EnginePolicy", target_queue_depth=16, drain_s=2).values()
    wrapped = _apply_autoscaling_config(engine)
    assert wrapped(controller.context(0, {}, total_num_requests=1, config=options))[0] == 1
    assert wrapped(controller.context(0, {}, config=options))[0] == 4
    assert wrapped(controller.context(4, {}, total_num_requests=1, config=options))[0] == 4


def test_serve_adds_no_delay() -> None:
    controller = Controller()
    [options] = scaled_options(ReplicaCount(1, 20, 16), "EnginePolicy", target_queue_depth=16, drain_s=2).values()
    wrapped = _apply_autoscaling_config(lambda ctx: (ctx.total_num_requests, {}))
    for replicas in (3, 20, 2, 1):
        assert wrapped(controller.context(5, {"a": {}}, total_num_requests=replicas, config=options))[0] == replicas


def test_silent_replicas_keep_the_target() -> None:
    controller = Controller()
    quiet, deaf, idle = (controller.policy(EnginePolicy, target_queue_depth=16, drain_s=2) for _ in range(3))
    ingress = controller.policy(IngressPolicy, target_queue_depth=100)
    old = controller.context(5, {"a": engine_report()})
    for _ in range(200):
        controller.now_s += 5
        ingress(controller.context(1, {"x": ingress_report(0)}))
        assert quiet(controller.context(5, {"a": engine_report(), "b": {}}))[0] == 5  # b has never reported
        assert deaf(old)[0] == 5  # a has not reported again
        target = idle(controller.context(5, {"a": engine_report()}))[0]
    assert target == 0


def test_engines_wait_for_a_word_of_the_ingresses() -> None:
    controller = Controller()
    engine = controller.policy(EnginePolicy, target_queue_depth=16, drain_s=2)
    for _ in range(200):
        controller.now_s += 5
        assert engine(controller.context(5, {"a": engine_report()}))[0] == 5


def test_requests_of_an_ingress_that_has_gone_silent_still_wait() -> None:
    controller = Controller()
    engine = controller.policy(EnginePolicy, target_queue_depth=16, drain_s=2)
    ingress = controller.policy(IngressPolicy, target_queue_depth=100)
    ingress(controller.context(2, {"x": ingress_report(64, unplaced=64), "y": ingress_report(0)}))
    ingress(controller.context(2, {"x": {}, "y": ingress_report(0)}))
    assert engine(controller.context(0, {}))[0] == 4


def test_drafts_follow_the_engines() -> None:
    controller = Controller()
    engine = controller.policy(EnginePolicy, target_queue_depth=16, drain_s=2)
    draft = controller.policy(DraftPolicy, engines_per_draft=3)
    assert draft(controller.context(1, {"d": {}}))[0] == 1
    assert engine(controller.context(1, {"a": engine_report(num_requests_running=16 * 7)}))[0] == 7
    assert draft(controller.context(1, {"d": {}}))[0] == 3


def test_applications_have_boards_of_their_own() -> None:
    busy, idle = Controller(), Controller()
    busy.policy(EnginePolicy, target_queue_depth=1, drain_s=2)(
        busy.context(1, {"a": engine_report(**{NUM_RUNNING: 9})})
    )
    assert idle.policy(DraftPolicy, engines_per_draft=1)(idle.context(2, {}))[0] == 2


def test_ingresses_by_their_own_load() -> None:
    controller = Controller()
    policy = controller.policy(IngressPolicy, target_queue_depth=100)
    assert policy(controller.context(1, {"x": ingress_report(250)}))[0] == 3
    assert policy(controller.context(1, {"x": ingress_report(5, cpu=0.9)}))[0] == 2


strange = st.one_of(
    st.floats(), st.integers(), st.none(), st.text(max_size=3), st.booleans(), st.lists(st.floats(), max_size=2)
)
POLICIES = [
    (EnginePolicy, {"target_queue_depth": 16.0, "drain_s": 2.0}),
    (DraftPolicy, {"engines_per_draft": 3.0}),
    (IngressPolicy, {"target_queue_depth": 100.0}),
]


@given(
    st.sampled_from(POLICIES),
    st.lists(
        st.dictionaries(
            st.sampled_from("abc"),
            st.dictionaries(st.sampled_from((*ENGINE_NAMES, NUM_ONGOING, NUM_UNPLACED, CPU_USAGE)), strange),
        ),
        max_size=4,
    ),
    st.one_of(st.none(), st.text(max_size=3), st.dictionaries(st.text(max_size=3), strange)),
)
def test_no_stats_make_a_policy_raise(policy: Any, reports: list[dict[str, dict[str, Any]]], raw: Any) -> None:
    controller = Controller()
    called = controller.policy(policy[0], **policy[1])
    contexts = [controller.context(3, each) for each in reports] + [controller.context(3, {"a": {}}, raw_metrics=raw)]
    for ctx in contexts:
        controller.now_s += 1
        target, state = called(ctx)
        assert isinstance(target, int)
        assert 0 <= target <= 20
        assert state == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_number_that_cannot_be_is_no_report(value: float) -> None:
    controller = Controller()
    policy = controller.policy(EnginePolicy, target_queue_depth=16, drain_s=2)
    assert policy(controller.context(2, {"a": engine_report(num_requests_waiting=value)}))[0] == 2


def test_a_broken_context_keeps_the_target() -> None:
    controller = Controller()
    policy = controller.policy(EnginePolicy, target_queue_depth=16, drain_s=2)

    def fail() -> Any:
        raise RuntimeError("the controller is restarting")

    assert policy(controller.context(6, {}, raw_metrics=fail)) == (6, {})


def test_policies_are_not_async() -> None:
    for policy, _ in POLICIES:
        assert not inspect.iscoroutinefunction(policy.__call__)


IN_CONTROLLER = """
import pathlib, pickle, sys
sys.modules["serve_app"] = None  # cannot be imported here
from types import SimpleNamespace
policies = [pickle.loads(pathlib.Path(path).read_bytes()) for path in sys.argv[1:]]
pace = dict(hold_s=60, pending_hold_s=10, margin=0.5, idle_s=300, stale_s=5)
engine = policies[0](target_queue_depth=16, drain_s=2, **pace)
draft = policies[1](engines_per_draft=2, **pace)
names = {names!r}
value = SimpleNamespace(value=64.0, timestamp=1.0)
ctx = SimpleNamespace(
    raw_metrics={{name: {{"a": [value]}} for name in names}}, running_replicas=["a"], current_num_replicas=1,
    target_num_replicas=1, app_name="x", deployment_name="engine",
    capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=99,
)
print(engine(ctx)[0], draft(ctx)[0])
"""


def test_a_controller_that_cannot_import_us(tmp_path: Path) -> None:
    """It has what Serve has pickled, and the policies still meet on the board."""
    paths = []
    for policy, goal in POLICIES[:2]:
        [config] = scaled_options(ReplicaCount(1, 2, 1), policy.__name__, **goal).values()
        paths.append(tmp_path / policy.__name__)
        paths[-1].write_bytes(config.policy.get_serialized_policy_def())
    code = IN_CONTROLLER.format(names=ENGINE_NAMES)
    command = [sys.executable, "-c", code, *map(str, paths)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert result.stdout.split() == ["72", "36"], result.stderr  # 64 KV caches, nine tenths full each
