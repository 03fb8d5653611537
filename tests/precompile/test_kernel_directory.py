"""A directory of kernels that is filled in one place and used in another."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.precompile.kernel_directory import MANIFEST, Entry, KernelDirectory

ENTRY = Entry("m", "h100", "9.0", "bfloat16", "none", "auto", 16, 64, 1, 8, "3.6.0", "3.12.1", 17)


def write_kernel(directory: Path, key: str, place: Path) -> Path:
    """As Triton does, with a list that says that it lies at `place`. Returns the list."""
    files = {}
    for name in ("kernel.json", "kernel.cubin"):
        file = directory / key / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
        files[name] = str(place / key / name)
    group = directory / key / "__grp__kernel.json"
    group.write_text(json.dumps({"child_paths": files, "other": 1}))
    return group


def test_it_can_be_moved(tmp_path: Path) -> None:
    directory = KernelDirectory(tmp_path / "new" / "kernels")
    groups = [write_kernel(directory.path, key, tmp_path) for key in ("A", "B")]
    directory.expect_at(Path("/opt/kernels"))
    for group, key in zip(groups, "AB", strict=True):
        assert json.loads(group.read_text()) == {
            "child_paths": {name: f"/opt/kernels/{key}/{name}" for name in ("kernel.json", "kernel.cubin")},
            "other": 1,
        }
    directory.expect_at(directory.path)
    for group in groups:
        assert all(Path(file).exists() for file in json.loads(group.read_text())["child_paths"].values())
    assert {file.name for file in directory.path.glob("*/*")} == {groups[0].name, "kernel.json", "kernel.cubin"}


def test_the_manifest_has_an_entry_for_each_engine(tmp_path: Path) -> None:
    KernelDirectory(tmp_path).note(ENTRY, tmp_path)
    KernelDirectory(tmp_path).note(replace(ENTRY, num_kernels=18), tmp_path)
    KernelDirectory(tmp_path).note(replace(ENTRY, quantization="int8"), Path("/opt/kernels"))
    directory = KernelDirectory(tmp_path)
    assert directory.entries == [replace(ENTRY, num_kernels=18), replace(ENTRY, quantization="int8")]
    assert json.loads((tmp_path / MANIFEST).read_text())["path"] == "/opt/kernels"
    assert directory.num_bytes == (tmp_path / MANIFEST).stat().st_size > 0


@pytest.mark.parametrize("content", ["", "[]", '{"engines": [{"model": "m"}]}'])
def test_a_manifest_of_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ConfigError, match=MANIFEST):
        KernelDirectory(tmp_path)


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("")
    with pytest.raises(ConfigError, match="output="):
        KernelDirectory(tmp_path / "kernels")
