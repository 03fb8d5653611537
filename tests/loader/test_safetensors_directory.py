import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.errors import ModelError
from engine.loader.checkpoint import open_checkpoint
from engine.loader.safetensors_header import MAX_HEADER_BYTES, read_safetensors_header
from tests.loader.files import refusal_of, tiny_weights, write_config, write_raw_safetensors

WEIGHTS = {name: torch.from_numpy(weight) for name, weight in tiny_weights().items()}


def write_sharded(directory: Path, num_shards: int = 3) -> Path:
    write_config(directory)
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(WEIGHTS.items())[shard::num_shards])
        save_file(part, directory / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("layout", ["single", "sharded", "loose"])
def test_every_tensor_comes_back_in_every_layout(tmp_path: Path, layout: str) -> None:
    if layout == "single":
        save_file(WEIGHTS, write_config(tmp_path) / "model.safetensors")
    else:
        write_sharded(tmp_path)
    if layout == "loose":
        (tmp_path / "model.safetensors.index.json").unlink()
        # Mistral's second copy, under its own names, is no part of the model.
        save_file({"tok_embeddings.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(WEIGHTS)
    for name, weight in WEIGHTS.items():
        assert checkpoint.tensors[name].shape == tuple(weight.shape)
        assert checkpoint.tensors[name].dtype == "float32"
        assert torch.equal(checkpoint.load(name), weight)
    with pytest.raises(ModelError, match=r"tensor 'nothing\.weight' is missing"):
        checkpoint.load("nothing.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_keep_their_stored_format(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"model.norm.weight": torch.arange(8).to(dtype)}, write_config(tmp_path) / "model.safetensors")
    loaded = open_checkpoint(tmp_path).load("model.norm.weight")
    assert loaded.dtype == dtype
    assert loaded.tolist() == list(range(8))


def test_tensors_come_in_the_order_of_their_offsets(tmp_path: Path) -> None:
    header = {"a": entry(8, 12), "b": entry(0, 4), "c": entry(4, 8)}
    file = write_raw_safetensors(tmp_path / "model.safetensors", header, b"x" * 12)
    assert list(read_safetensors_header(file).tensors) == ["b", "c", "a"]


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    save_file(WEIGHTS, write_config(tmp_path / "a") / "model.safetensors")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    fingerprint = open_checkpoint(tmp_path / "a").fingerprint
    assert open_checkpoint(tmp_path / "b").fingerprint == fingerprint
    write_config(tmp_path / "b", rms_norm_eps=1e-6)
    assert open_checkpoint(tmp_path / "b").fingerprint != fingerprint
    # A fine-tune: same names, same shapes, other values.
    tuned = {name: weight + 0.001 for name, weight in WEIGHTS.items()}
    save_file(tuned, tmp_path / "a" / "model.safetensors")
    assert open_checkpoint(tmp_path / "a").fingerprint != fingerprint


def test_buffers_of_other_formats_are_left_out_and_weights_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file({"model.norm.weight": torch.ones(4), "mask": torch.ones(4, dtype=torch.bool)}, tmp_path / "a.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["model.norm.weight"]
    save_file({"model.norm.weight": torch.ones(4, dtype=torch.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"a\.safetensors: tensor 'model\.norm\.weight': dtype: I8 is not supported"):
        open_checkpoint(tmp_path)


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "named"),
    [
        (b"{", b"", "header: is not valid JSON"),
        (b"[]", b"", "header: must be a JSON object"),
        ({"a": 3}, b"", "tensor 'a': entry: must be an object"),
        ({"a": {}}, b"", "tensor 'a': dtype: None is not known"),
        ({"a": entry(0, 8, dtype="F99")}, b"x" * 8, "tensor 'a': dtype: 'F99' is not known"),
        ({"a": entry(0, 8, shape=[-2])}, b"x" * 8, "tensor 'a': shape: must be"),
        ({"a": entry(0, 8, shape=[True, 2])}, b"x" * 8, "tensor 'a': shape: must be"),
        ({"a": entry(0, 8, shape=["2"])}, b"x" * 8, "tensor 'a': shape: must be"),
        ({"a": entry(0, 8, shape=[1] * 9)}, b"x" * 8, "tensor 'a': shape: must be"),
        (
            {"a": entry(0, 8, shape=[3])},
            b"x" * 8,
            r"tensor 'a': data_offsets: span 8 bytes; shape \[3\] of F32 takes 12",
        ),
        ({"a": entry(0, 8, shape=[1 << 40] * 8)}, b"x" * 8, "tensor 'a': data_offsets: span 8 bytes"),
        ({"a": entry(0, 8)}, b"x" * 7, "tensor 'a': data_offsets: end 1 bytes past the end"),
        ({"a": entry(0, 1 << 48)}, b"x" * 8, "tensor 'a': data_offsets: end .* past the end"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"x" * 8, "'a': data_offsets: must be two"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, b"x" * 8, "'a': data_offsets: must be two"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}}, b"x" * 8, "'a': data_offsets: must be two"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12, "tensor 'b': data_offsets: overlap another tensor"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, b"x" * 8, "tensor 'b': data_offsets: overlap another tensor"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12, "tensor 'b': data_offsets: leave a gap"),
        ({"a": entry(0, 4)}, b"x" * 12, "header: 8 bytes at the end of the file belong to no tensor"),
    ],
)
def test_hostile_headers_are_refused_by_tensor_and_field(tmp_path: Path, header: Any, data: bytes, named: str) -> None:
    file = write_raw_safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelError, match=named) as caught:
        read_safetensors_header(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "header length: the file ends after 0 bytes"),
        (b"\x08\0\0", "header length: the file ends after 3 bytes"),
        (b"\xff" * 8 + b"{}", "header length: 18446744073709551615 bytes; at most"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), "header length: .* at most 16777216 are allowed"),
        ((100).to_bytes(8, "little") + b"{}", "header length: 100 bytes, but only 2 follow"),
    ],
)
def test_an_impossible_header_length_is_refused(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=named):
        read_safetensors_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ({}, "weight_map: is missing"),
        ({"weight_map": []}, "weight_map: must be an object"),
        ({"weight_map": {}}, "weight_map: is empty"),
        ({"weight_map": {"a": 1}}, "weight_map: 'a' must be in a safetensors file beside it, not in 1"),
        ({"weight_map": {"a": "../x.safetensors"}}, r"not in '\.\./x\.safetensors'"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "not in '/etc/x.safetensors'"),
        ({"weight_map": {"a": "..\\x.safetensors"}}, "must be in a safetensors file beside it"),
        ({"weight_map": {"a": "config.json"}}, "must be in a safetensors file beside it"),
        ({"weight_map": {"a\nb": "x\n.safetensors"}}, "must be in a safetensors file beside it"),
        ({"weight_map": {"a": "none.safetensors"}}, "weight_map: 'none.safetensors' does not exist"),
        ({"weight_map": {"a": "real.safetensors"}}, r"real\.safetensors: tensor 'a': is missing, though"),
    ],
)
def test_a_hostile_index_is_refused(tmp_path: Path, index: Any, named: str) -> None:
    write_config(tmp_path / "model")
    for directory in (tmp_path, tmp_path / "model"):
        save_file({"b": torch.ones(1)}, directory / ("real.safetensors" if directory != tmp_path else "x.safetensors"))
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=named) as caught:
        open_checkpoint(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    for name in ("a", "b"):
        save_file({"model.norm.weight": torch.ones(4)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"b\.safetensors: tensor 'model\.norm\.weight': is also in a\.safetensors"):
        open_checkpoint(tmp_path)


def test_what_is_no_model_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such file or directory"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(
        ModelError, match=r"config\.json: is missing; to serve the GGUF file in it, give its path: .*tiny"
    ):
        open_checkpoint(tmp_path)
    write_config(tmp_path)
    with pytest.raises(ModelError, match=r"holds no safetensors file$"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"holds no safetensors file; pytorch_model\.bin is pickled"):
        open_checkpoint(tmp_path)


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    file = write_config(tmp_path) / "model.safetensors"
    save_file({"model.norm.weight": torch.ones(4)}, file)
    checkpoint = open_checkpoint(tmp_path)
    save_file({"model.norm.weight": torch.ones(6)}, file)
    with pytest.raises(ModelError, match="has changed since it was opened"):
        checkpoint.load("model.norm.weight")


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("valid") / "model.safetensors"
    save_file({"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(3, 4)}, file)
    return file.read_bytes()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_mutated_file_is_read_whole_or_refused(
    valid_file: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(valid_file)
    header_end = 8 + int.from_bytes(content[:8], "little")
    for position in data.draw(st.lists(st.integers(0, header_end - 1), max_size=4)):
        content[position] = data.draw(st.sampled_from(b'0123456789"{}[],:-\x00\xff') | st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    directory = write_config(tmp_path_factory.mktemp("mutated"))
    (directory / "model.safetensors").write_bytes(content)
    loaded: dict[str, torch.Tensor] = {}

    def load_all() -> None:
        checkpoint = open_checkpoint(directory)
        loaded.update({name: checkpoint.load(name) for name in checkpoint.tensors})

    started_s = time.process_time()
    message = refusal_of(load_all)
    if message is not None:
        assert "\n" not in message
        assert len(message) < 1000
    assert sum(tensor.nbytes for tensor in loaded.values()) <= len(content)
    assert time.process_time() - started_s < 2
