"""The part of two Kubernetes schemas that deploy/kuberay.yaml uses; a field that is not here does not pass.

RayService and below: the reference of ray.io/v1 of KubeRay 1.7.0. Pods and NetworkPolicy: Kubernetes 1.28, which that
reference refers to.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Quantity = str | int
Labels = dict[str, str]


class Fields(BaseModel):
    """Names in camel case, types not bent, nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Fields):
    name: str | None = None
    labels: Labels = {}


class ContainerPort(Fields):
    name: str = Field(max_length=15)
    container_port: int = Field(ge=1, le=65535)


class EnvironmentVariable(Fields):
    name: str
    value: str  # YAML's 1 is a number, which Kubernetes refuses


class Resources(Fields):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Capabilities(Fields):
    drop: list[str]


class ContainerSecurity(Fields):
    allow_privilege_escalation: bool
    capabilities: Capabilities


class Container(Fields):
    name: str
    image: str
    env: list[EnvironmentVariable]
    ports: list[ContainerPort]
    resources: Resources
    security_context: ContainerSecurity


class PodSecurity(Fields):
    run_as_non_root: bool
    run_as_user: int
    fs_group: int


class Toleration(Fields):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Fields):
    containers: list[Container] = Field(min_length=1)
    security_context: PodSecurity
    automount_service_account_token: bool
    tolerations: list[Toleration] = []
    termination_grace_period_seconds: int = Field(30, ge=0)


class PodTemplate(Fields):
    metadata: Metadata
    spec: PodSpec


class HeadGroup(Fields):
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    ray_start_params: dict[str, str]
    template: PodTemplate


class WorkerGroup(Fields):
    group_name: str
    replicas: int = Field(ge=0)
    min_replicas: int = Field(ge=0)
    max_replicas: int = Field(ge=0)
    ray_start_params: dict[str, str]
    template: PodTemplate


class AuthOptions(Fields):
    mode: Literal["disabled", "token"]


class AutoscalerOptions(Fields):
    idle_timeout_seconds: int
    resources: Resources


class RayCluster(Fields):
    ray_version: str
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool
    autoscaler_options: AutoscalerOptions
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class UpgradeStrategy(Fields):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class RayServiceSpec(Fields):
    upgrade_strategy: UpgradeStrategy
    ray_cluster_deletion_delay_seconds: int = Field(ge=0)
    serve_config: str = Field(alias="serveConfigV2")
    ray_cluster: RayCluster = Field(alias="rayClusterConfig")


class RayService(Fields):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


class LabelSelector(Fields):
    match_labels: Labels = {}


class Peer(Fields):
    namespace_selector: LabelSelector | None = None
    pod_selector: LabelSelector | None = None


class PolicyPort(Fields):
    port: int = Field(ge=1, le=65535)
    protocol: Literal["TCP", "UDP", "SCTP"]


class IngressRule(Fields):
    sources: list[Peer] = Field(alias="from", min_length=1)  # without one, everybody
    ports: list[PolicyPort] | None = None  # without any, all


class NetworkPolicySpec(Fields):
    pod_selector: LabelSelector
    policy_types: list[Literal["Ingress", "Egress"]]
    ingress: list[IngressRule]


class NetworkPolicy(Fields):
    api_version: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: NetworkPolicySpec
