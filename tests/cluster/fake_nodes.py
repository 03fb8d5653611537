"""The head of a Ray cluster and its autoscaler, which starts nodes on this machine as if it rented them.

Not ray.cluster_utils.AutoscalingCluster: that reads a file which the wheel lacks, and calls `ray stop --force`, which
ends every Ray on the machine. For the same file the provider cannot be had by its name, `fake_multinode`, but as an
external one it can. The autoscaler is version 2, as after `ray up`.
"""

import json
import os
import secrets
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ADDRESS = "127.0.0.1:6379"
WORKER_TYPE = "gpu_worker"
MAX_WORKERS = 3
IDLE_TIMEOUT_S = 3.0
_HEAD_ID, _HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"  # those of the provider
_STORE_BYTES = 80 * 2**20  # an object store's least is 75 MiB
_EMPTY_LISTS = (
    *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands"),
    *("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
)


class HeadError(Exception):
    """Ray's head did not start. It has 30 s for that, whatever else the machine does."""


def cluster_config() -> dict[str, Any]:
    """What cluster.yaml is elsewhere."""
    return {
        "cluster_name": "pretended",
        "max_workers": MAX_WORKERS,
        "idle_timeout_minutes": IDLE_TIMEOUT_S / 60,
        "upscaling_speed": 10.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": ADDRESS,
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            WORKER_TYPE: {
                "resources": {"CPU": 1, "GPU": 1, "object_store_memory": _STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MAX_WORKERS,
            },
        },
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in _EMPTY_LISTS},
    }


def ray_environment(directory: Path) -> dict[str, str]:
    """What the first process has to have when it imports Ray: it must not take the files, address or token of another
    Ray on the machine for its own."""
    return {
        "RAY_TMPDIR": str(directory),
        "RAY_ADDRESS": ADDRESS,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def start_head(directory: Path) -> None:
    """Starts Ray's head without a GPU, its files in `directory`.

    Raises:
        HeadError: it did not start. Some of its processes may be left.
    """
    config = directory / "cluster.json"
    config.write_text(json.dumps(cluster_config()))
    of_autoscaler = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", "--head", f"--node-ip-address={ADDRESS.split(':')[0]}"]
    command += [f"--port={ADDRESS.split(':')[1]}", "--num-cpus=2", "--num-gpus=0"]
    command += [f"--object-store-memory={_STORE_BYTES}", "--include-dashboard=false", f"--temp-dir={directory}"]
    # 10 s is long to wait for metrics that are looked at
    command += [f"--autoscaling-config={config}", '--system-config={"metrics_report_interval_ms":1000}']
    done = subprocess.run(command, env=os.environ | of_autoscaler, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HeadError(done.stdout + done.stderr)


def raylet_of(node_id: str) -> psutil.Process:
    """The process that is a node; what runs on the node are its children."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and f"--node_id={node_id}" in (process.info["cmdline"] or ()):
            return process
    raise LookupError(f"no raylet of node {node_id}")


def lose_node(node_id: str) -> int:
    """Ends a node at once and without notice to anybody, as if it lost its power. Returns how many processes died."""
    raylet = raylet_of(node_id)
    processes = [raylet, *raylet.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it saw its raylet die
            process.kill()
    return len(processes)
