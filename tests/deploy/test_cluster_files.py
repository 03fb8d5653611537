"""`ray up` files: Ray's own validator, and what it does not look at."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from serve_app import haproxy
from serve_app.config import AppConfig, parse_config
from tests.deploy.files import ROOT, compile_commands, read_yaml, serve_arguments, serve_config

FILES = ["cluster.yaml", "deploy/gcp.yaml"]
AUTOSCALING = {"min_replicas", "max_replicas"}  # no business of the kernels


@pytest.fixture(params=FILES)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read_yaml(request.param)


def node_configs(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: node_type["node_config"] for name, node_type in cluster["available_node_types"].items()}


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    # What Ray's defaults add is for other images than these.
    assert prepared["head_setup_commands"] == cluster["setup_commands"]
    assert prepared["worker_setup_commands"] == cluster["setup_commands"] + cluster["worker_setup_commands"]


def test_the_head_has_no_gpu_and_gpu_nodes_can_all_go(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    head = types.pop(cluster["head_node_type"])
    assert "GPU" not in head["resources"]
    assert head["max_workers"] == 0
    assert set(types) == {"gpu", "gpu_spot"}
    assert all(node_type["resources"]["GPU"] == 1 and node_type["min_workers"] == 0 for node_type in types.values())
    most = sum(node_type["max_workers"] for node_type in types.values())
    assert most == cluster["max_workers"] == serve_arguments(serve_config())["max_replicas"]


def test_spot_nodes_are_on_demand_nodes_but_for_the_price() -> None:
    for file, field in (("cluster.yaml", "InstanceMarketOptions"), ("deploy/gcp.yaml", "scheduling")):
        nodes = node_configs(read_yaml(file))
        spot = nodes["gpu_spot"]
        market = spot.pop(field)
        nodes["gpu"].pop(field, None)
        assert spot == nodes["gpu"], file
        assert market.get("MarketType", market.get("provisioningModel", "")).lower() == "spot"


def test_aws_opens_nothing_but_ssh() -> None:
    """Ray opens SSH and what is between the nodes; the file may add rules, or name groups that have any."""
    cluster = read_yaml("cluster.yaml")
    assert cluster["provider"]["security_group"] == {"GroupName": "slipstream"}
    for node in node_configs(cluster).values():
        assert not {"SecurityGroupIds", "SecurityGroups", "NetworkInterfaces", "LaunchTemplate"} & set(node)


def test_aws_nodes_answer_only_imdsv2_and_encrypt_their_disks() -> None:
    for node in node_configs(read_yaml("cluster.yaml")).values():
        assert node["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        [disk] = node["BlockDeviceMappings"]
        assert disk["Ebs"]["Encrypted"] is True
        assert node["ImageId"].startswith("resolve:ssm:/aws/service/")  # an id would be one region's


def test_only_the_head_has_rights_on_aws_and_few() -> None:
    cluster = read_yaml("cluster.yaml")
    assert [name for name, node in node_configs(cluster).items() if "IamInstanceProfile" in node] == ["head"]
    statements = json.loads((ROOT / "deploy/aws_head_policy.json").read_text())["Statement"]
    conditions: dict[str, list[dict[str, str]]] = {}
    for statement in statements:
        assert statement["Effect"] == "Allow"
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            conditions.setdefault(action, []).append(statement.get("Condition", {}).get("StringEquals", {}))
    assert not any("*" in action or action == "iam:PassRole" for action in conditions)
    assert {"ec2:DescribeInstances", "ec2:RunInstances", "ssm:GetParameters"} <= set(conditions)
    # Who may tag a stranger's machine as one of the cluster's may also end it.
    own = {"aws:ResourceTag/ray-cluster-name": cluster["cluster_name"]}
    assert conditions["ec2:TerminateInstances"] == [own]
    assert conditions["ec2:CreateTags"] == [{"ec2:CreateAction": "RunInstances"}, own]


def test_gcp_nodes_are_in_a_network_of_their_own() -> None:
    cluster = read_yaml("deploy/gcp.yaml")
    for name, node in node_configs(cluster).items():
        [interface] = node["networkInterfaces"]
        assert interface["subnetwork"] == f"regions/{cluster['provider']['region']}/subnetworks/slipstream"
        assert "serviceAccounts" not in node
        if name != cluster["head_node_type"]:
            assert node["scheduling"]["onHostMaintenance"] == "TERMINATE"


def test_dashboard_and_token(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    [head] = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        assert "0.0.0.0" not in command
    [line] = [command for command in cluster["setup_commands"] if ".bashrc" in command]
    assert "source ~/slipstream/deploy/environment.sh" in line
    assert cluster["file_mounts"]["~/slipstream"] == "."


def test_ray_heeds_the_environment(tmp_path: Path) -> None:
    """The variables have the names that this version of Ray reads."""
    program = (
        "from ray._raylet import AuthenticationMode, get_authentication_mode\n"
        "from ray.serve._private import constants\n"
        "print(get_authentication_mode() == AuthenticationMode.TOKEN, constants.RAY_SERVE_ENABLE_HA_PROXY,\n"
        "    constants.RAY_SERVE_THROUGHPUT_OPTIMIZED, constants.RAY_SERVE_HAPROXY_TUNE_BUFSIZE > 64 * 1024,\n"
        f"   constants.RAY_SERVE_HAPROXY_BALANCE_ALGORITHM == {haproxy.BALANCE!r},\n"
        f"   constants.RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S == {haproxy.HARD_STOP_S},\n"
        f"   constants.RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S == {haproxy.CLIENT_TIMEOUT_S})\n"
    )
    script = f'source "$1" && exec "{sys.executable}" -c "$2"'
    command = ["bash", "-c", script, "bash", str(ROOT / "deploy/environment.sh"), program]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(tmp_path)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.stdout.split() == ["True"] * 7, result.stderr


def test_serve_accepts_the_service() -> None:
    ServeDeploySchema.model_validate(serve_config())
    arguments = serve_arguments(serve_config())
    known = AppConfig.model_fields.keys() | arguments.keys() - AUTOSCALING  # which are checked once AppConfig has them
    parse_config({name: value for name, value in arguments.items() if name in known})
    assert arguments["device"] == "cuda"  # `auto` means the CPU while there is no GPU node


@pytest.mark.parametrize("file", [*FILES, "deploy/Dockerfile"])
def test_kernels_are_compiled_for_what_is_served(file: str) -> None:
    [command] = compile_commands(file)
    assert command.pop("gpu") == "l4"
    arguments = serve_arguments(serve_config())
    assert command == {name: str(arguments[name]) for name in command}
    settings = set(arguments) - {"device"} - AUTOSCALING
    assert set(command) == settings


def test_versions_are_fixed_within_what_the_project_accepts() -> None:
    lines = (ROOT / "deploy/constraints.txt").read_text().splitlines()
    fixed = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    accepted = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    assert set(fixed) == {"ray", "torch"}
    assert all(accepted[name].specifier.contains(version) for name, version in fixed.items())


def test_every_port_is_documented() -> None:
    """Those of the files, and those that HAProxy takes for itself."""
    from ray.serve._private import constants

    text = (ROOT / "docs/operations.md").read_text()
    documented = set(re.findall(r"^\| (\d+)", text, re.MULTILINE))
    own = {constants.RAY_SERVE_HAPROXY_STATS_PORT, constants.RAY_SERVE_HAPROXY_METRICS_PORT}
    own |= {constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT, 8000, 8265}
    for file in FILES:
        for command in read_yaml(file)["head_start_ray_commands"]:
            own |= {int(port) for port in re.findall(r"port=(\d+)", command)}
    assert {str(port) for port in own} <= documented
