"""`serve run` and Serve config files: what goes wrong ends in one line."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SERVE = Path(sys.executable).with_name("serve")


def run_cli(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [str(SERVE), "run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)


def our_lines(output: str) -> list[str]:
    """Without what Serve's command line logs."""
    return [line for line in output.splitlines() if line and "INFO" not in line]


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("modle=x", "slipstream: unknown argument 'modle'; did you mean 'model'? accepted: block_size, "),
        ("dtype=fp8", "slipstream: dtype must be one of auto, float32, bfloat16, float16, not 'fp8'"),
    ],
)
def test_wrong_argument_is_one_line(argument: str, line: str) -> None:
    result = run_cli("serve_app:app", argument)
    assert result.returncode == 1
    [found] = our_lines(result.stdout + result.stderr)
    assert found.startswith(line)


def test_busy_port_is_one_line() -> None:
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", 8000))
            taken.listen()
        except OSError:
            pass  # somebody else has it: just as well
        result = run_cli("serve_app:app")
    assert result.returncode == 1
    [found] = our_lines(result.stdout + result.stderr)
    assert found.startswith("slipstream: port 8000 on 127.0.0.1 is in use")


def test_config_file_with_a_wrong_argument_fails_with_the_line(serve_cluster: str, tmp_path: Path) -> None:  # noqa: ARG001
    import ray
    from ray import serve

    application = {"name": "wrong", "import_path": "serve_app:app", "route_prefix": "/wrong", "args": {"dtype": "fp8"}}
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump({"applications": [application]}))
    address = ray.get_runtime_context().gcs_address
    assert run_cli(str(config), "--address", address, "--non-blocking").returncode == 0
    deadline = time.monotonic() + 120
    while (status := serve.status().applications["wrong"]).status != "DEPLOY_FAILED":
        assert time.monotonic() < deadline, status
        time.sleep(0.1)
    last_line = status.message.strip().splitlines()[-1]
    assert last_line == "slipstream: dtype must be one of auto, float32, bfloat16, float16, not 'fp8'"
    assert "Traceback" not in status.message
    serve.delete("wrong")
