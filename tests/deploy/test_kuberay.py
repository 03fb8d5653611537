"""The RayService: fields that KubeRay knows, and what would open or break it."""

import re
import subprocess
from typing import Any

import pydantic
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.deploy.files import ROOT, serve_arguments, serve_config
from tests.deploy.kuberay_fields import NetworkPolicy, PodTemplate, RayService


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "deploy/kuberay.yaml").read_text()))


@pytest.fixture
def service() -> RayService:
    return RayService.model_validate(documents()[0])


@pytest.fixture
def policy() -> NetworkPolicy:
    return NetworkPolicy.model_validate(documents()[1])


def pods(service: RayService) -> list[PodTemplate]:
    cluster = service.spec.ray_cluster
    return [cluster.head_group_spec.template, *(group.template for group in cluster.worker_group_specs)]


@pytest.mark.usefixtures("service", "policy")
def test_there_is_nothing_else_in_the_file() -> None:
    assert [document["kind"] for document in documents()] == ["RayService", "NetworkPolicy"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "serveConfig"), "applications: []"),
        (("spec", "rayClusterConfig", "authOptions", "mode"), "Token"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minWorkers"), 0),
        (("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "metrics-export-port"), 8080),
    ],
)
def test_a_wrong_field_does_not_pass(path: tuple[str | int, ...], value: Any) -> None:
    document: Any = documents()[0]
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(pydantic.ValidationError):
        RayService.model_validate(document)


def test_serve_accepts_the_service_which_is_that_of_the_other_clusters(service: RayService) -> None:
    config = yaml.safe_load(service.spec.serve_config)
    ServeDeploySchema.model_validate(config)
    assert serve_arguments(config) == serve_arguments(serve_config())
    # Pods are reached at their own address, and a pod is ready only if it has a proxy.
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}
    assert config["proxy_location"] == "EveryNode"


def test_token_and_version(service: RayService) -> None:
    assert service.spec.ray_cluster.auth_options.mode == "token"
    assert f"ray=={service.spec.ray_cluster.ray_version}\n" in (ROOT / "deploy/constraints.txt").read_text()


def test_all_pods_have_the_modes_of_the_other_clusters(service: RayService) -> None:
    script = ["env", "-i", "bash", "-c", 'source "$1" && env -0', "bash", str(ROOT / "deploy/environment.sh")]
    variables = subprocess.run(script, capture_output=True, text=True, check=True, timeout=200).stdout.split("\0")
    exported = dict(variable.split("=", 1) for variable in variables if variable.startswith("RAY_SERVE_"))
    assert len(exported) == 6
    for pod in pods(service):
        [container] = pod.spec.containers
        assert {variable.name: variable.value for variable in container.env} == exported


def test_gpu_pods_can_all_go_and_only_they_have_gpus(service: RayService) -> None:
    [group] = service.spec.ray_cluster.worker_group_specs
    assert (group.replicas, group.min_replicas) == (0, 0)
    assert group.max_replicas == serve_arguments(serve_config())["max_replicas"]
    head, worker = (pod.spec.containers[0].resources for pod in pods(service))
    assert worker.limits["nvidia.com/gpu"] == worker.requests["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in head.limits


def test_pods_run_as_the_image_s_user(service: RayService) -> None:
    [user_id] = re.findall(r"useradd .*--uid (\d+)", (ROOT / "deploy/Dockerfile").read_text())
    for pod in pods(service):
        assert pod.spec.security_context.run_as_non_root
        assert pod.spec.security_context.run_as_user == int(user_id)
        assert not pod.spec.containers[0].security_context.allow_privilege_escalation


def test_ray_s_ports_are_closed_to_others(service: RayService, policy: NetworkPolicy) -> None:
    own = policy.spec.pod_selector.match_labels
    assert own
    assert policy.spec.policy_types == ["Ingress"]
    assert all(own.items() <= pod.metadata.labels.items() for pod in pods(service))
    opened: dict[str, set[int]] = {}
    for rule in policy.spec.ingress:
        [source] = rule.sources
        assert source.pod_selector is not None
        labels = source.pod_selector.match_labels
        if labels == own:
            assert source.namespace_selector is None
            continue
        assert rule.ports, "all ports, for others"
        name = labels.get("app.kubernetes.io/name", "anybody")
        assert name != "anybody" or source.namespace_selector is None
        opened[name] = {port.port for port in rule.ports}
    assert opened == {"kuberay-operator": {8000, 8265, 52365}, "anybody": {8000}, "prometheus": {8080}}
