"""Which proxy is chosen and why, and what Serve's processes are told. That they listen to it: test_listening.py."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
import ray

from engine.errors import ConfigError
from serve_app import haproxy, launch, serve_modes
from serve_app.serve_modes import HAPROXY_FLAG, THROUGHPUT_FLAG, ServeModes, check, switch_on

HOST = "127.0.0.1"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the user's own, whose name is short enough for sockets, as this one need not be."""
    monkeypatch.setattr(haproxy, "_MAX_DIRECTORY_BYTES", 1000)
    monkeypatch.setattr(haproxy, "private_directory", lambda: tmp_path / "own")
    return tmp_path / "own"


def no_binary() -> str:
    raise FileNotFoundError("Could not find an HAProxy binary.")


def test_haproxy_is_on_where_it_works(directory: Path) -> None:
    environment: dict[str, str] = {}
    assert switch_on("auto", HOST, environment) == "Serve is throughput-optimised, with HAProxy in front"
    assert (environment[THROUGHPUT_FLAG], environment[HAPROXY_FLAG]) == ("1", "1")
    assert int(environment["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]) > 64 * 1024
    sockets = {"RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"}
    assert {Path(environment[name]).parent for name in sockets} == {directory}
    assert directory.stat().st_mode & 0o777 == 0o700


def test_without_a_binary_rays_own_proxy_is_on(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr(haproxy, "find_binary", no_binary)
    environment: dict[str, str] = {}
    line = switch_on("auto", HOST, environment)
    assert line.endswith("Ray's own proxy, not HAProxy (Could not find an HAProxy binary.) in front")
    assert (environment[THROUGHPUT_FLAG], environment[HAPROXY_FLAG]) == ("1", "0")
    assert not any(name.startswith("RAY_SERVE_HAPROXY") for name in environment)
    with pytest.raises(ConfigError, match="HAProxy cannot run here: Could not find an HAProxy binary"):
        switch_on("haproxy", HOST, {})


def test_a_binary_that_does_not_run_is_none(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy, "find_binary", lambda: "/bin/false")
    assert "/bin/false" in (haproxy.obstacle(directory) or "")


def test_a_directory_that_others_can_enter_is_not_used(directory: Path) -> None:
    directory.mkdir(mode=0o755)
    assert "not a directory of this user's alone" in (haproxy.obstacle(directory) or "")
    directory.rmdir()
    directory.symlink_to(directory.parent)
    assert "not a directory of this user's alone" in (haproxy.obstacle(directory) or "")


def test_the_users_own_directory_is_short_enough_for_sockets() -> None:
    assert len(os.fsencode(haproxy.private_directory())) <= haproxy._MAX_DIRECTORY_BYTES


def test_what_the_user_has_set_stays(directory: Path) -> None:  # noqa: ARG001
    environment = {THROUGHPUT_FLAG: "0", HAPROXY_FLAG: "1", "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "100000"}
    line = switch_on("auto", HOST, environment)
    assert line == f"Serve is not throughput-optimised ({THROUGHPUT_FLAG}=0), with HAProxy in front"
    assert environment[THROUGHPUT_FLAG] == "0"
    assert environment["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"] == "100000"
    environment = {HAPROXY_FLAG: "0"}
    assert f"not HAProxy ({HAPROXY_FLAG}=0)" in switch_on("auto", HOST, environment)
    for proxy, flag in (("haproxy", "0"), ("ray", "1")):
        with pytest.raises(ConfigError, match=f"proxy={proxy}, but {HAPROXY_FLAG}={flag} is set"):
            switch_on(proxy, HOST, {HAPROXY_FLAG: flag})


def test_a_port_that_is_taken_is_left_to_whoever_has_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private import constants

    assert haproxy.obstacle(directory) is None
    with socket.socket() as taken, socket.socket() as free:
        taken.bind((HOST, 0))
        taken.listen()
        free.bind((HOST, 0))
        monkeypatch.setattr(constants, "RAY_SERVE_HAPROXY_STATS_PORT", taken.getsockname()[1])
        monkeypatch.setattr(constants, "RAY_SERVE_HAPROXY_METRICS_PORT", free.getsockname()[1])
        free.close()
        chosen = haproxy.settings(directory, HOST, {})
        assert int(chosen["RAY_SERVE_HAPROXY_STATS_PORT"]) != taken.getsockname()[1]
    assert "RAY_SERVE_HAPROXY_METRICS_PORT" not in chosen


def test_on_loopback_haproxy_opens_nothing_to_others(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = directory.parent / "haproxy of mine"
    binary.write_text('#!/bin/sh\ncat "$3"; echo "$$ $*"\n')
    binary.chmod(0o755)
    monkeypatch.setattr(haproxy, "find_binary", lambda: str(binary))
    assert haproxy.obstacle(directory) is None
    configuration = directory.parent / "haproxy.cfg"
    lines = ["    bind :9101", "    bind 10.0.0.1:8000", "  bind *:8404", "  server a b:80"]
    configuration.write_text("\n".join(lines) + "\n")
    wrapper = haproxy.settings(directory, HOST, {})["RAY_SERVE_HAPROXY_BINARY_PATH"]
    arguments = ["-db", "-f", str(configuration), "-sf", "1 2"]
    with subprocess.Popen([wrapper, *arguments], stdout=subprocess.PIPE, text=True) as process:
        output = process.stdout.read() if process.stdout else ""
    lines[0], lines[2] = "    bind 127.0.0.1:9101", "  bind 127.0.0.1:8404"
    assert output.splitlines() == [*lines, f"{process.pid} {' '.join(arguments)}"]
    assert "RAY_SERVE_HAPROXY_BINARY_PATH" not in haproxy.settings(directory, "0.0.0.0", {})


def test_serve_copies_what_it_has_no_setting_for_into_haproxys_configuration() -> None:
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    [line] = [line for line in HAPROXY_CONFIG_TEMPLATE.splitlines() if "balance_algorithm" in line]
    assert line == "    balance {{ config.balance_algorithm }}"
    assert HAPROXY_CONFIG_TEMPLATE.index("\ndefaults\n") < HAPROXY_CONFIG_TEMPLATE.index(line)


def test_a_ray_without_the_modes_is_warned_of_once_with_the_command() -> None:
    warning = check("auto", ServeModes(throughput_optimized=False, haproxy=False))
    assert warning == (
        "Ray was started without throughput-optimised Serve and HAProxy, which makes the service several times slower: "
        "stop Ray and start it with `RAY_SERVE_THROUGHPUT_OPTIMIZED=1 RAY_SERVE_ENABLE_HA_PROXY=1 "
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE=81920 ray start --head`"
    )
    assert check("auto", ServeModes(throughput_optimized=True, haproxy=True)) is None
    assert check("ray", ServeModes(throughput_optimized=True, haproxy=False)) is None
    with pytest.raises(ConfigError, match="proxy=haproxy, but Ray was started without it: stop Ray and start it with"):
        check("haproxy", ServeModes(throughput_optimized=True, haproxy=False))
    with pytest.raises(ConfigError, match="proxy=ray, but Ray was started with RAY_SERVE_ENABLE_HA_PROXY=1"):
        check("ray", ServeModes(throughput_optimized=True, haproxy=True))


def test_a_running_ray_is_asked_which_modes_its_processes_have(
    serve_cluster: str,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.serve._private import constants

    monkeypatch.setattr(constants, "RAY_SERVE_ENABLE_HA_PROXY", True)  # of this process, which is not the question
    running = launch.find_ray("auto")
    assert running is not None
    assert running.modes == ServeModes(throughput_optimized=False, haproxy=False)
    task = ray.remote(num_cpus=0)(lambda: launch.find_ray("auto"))  # as in a build task of Serve's
    assert ray.get(task.remote(), timeout=200) == running
    warnings: list[str] = []
    monkeypatch.setattr(launch.logger, "warning", warnings.append)
    launch.check_running_ray("auto", running)
    assert warnings == [serve_modes.check("auto", running.modes)]
