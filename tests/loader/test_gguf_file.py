import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ModelConfig, RopeConfig
from engine.errors import ModelError
from engine.loader.checkpoint import open_checkpoint
from engine.loader.generation_defaults import GenerationDefaults
from engine.loader.gguf_metadata import read_gguf_metadata
from engine.loader.gguf_tensors import ACCEPTED_TYPES
from engine.model.expected_tensors import check_tensors
from tests.loader.files import interleave, random_quantised, refusal_of, tiny_weights, write_gguf

TYPES = GGMLQuantizationType


def without(weights: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: weight for name, weight in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("architecture", "hf_name", "qkv_bias", "qk_norm"),
    [
        ("llama", "LlamaForCausalLM", False, False),
        ("qwen2", "Qwen2ForCausalLM", True, False),
        ("qwen3", "Qwen3ForCausalLM", False, True),
    ],
)
def test_every_architecture(tmp_path: Path, architecture: str, hf_name: str, qkv_bias: bool, qk_norm: bool) -> None:
    weights = tiny_weights(qkv_bias=qkv_bias, qk_norm=qk_norm)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", architecture, weights))
    assert checkpoint.config == ModelConfig(
        architecture=hf_name,
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=float(np.float32(1e-5)),
        max_position_embeddings=512,
        rope=RopeConfig(10000.0),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        eos_token_ids=(2,),
    )
    check_tensors(checkpoint)
    assert set(checkpoint.tensors) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(checkpoint.load(name), torch.from_numpy(weight)), name


def test_a_tied_embedding_is_seen_by_the_missing_output(tmp_path: Path) -> None:
    tied = write_gguf(tmp_path / "tied.gguf", weights=without(tiny_weights(), "lm_head.weight"))
    assert open_checkpoint(tied).config.tie_word_embeddings
    check_tensors(open_checkpoint(tied))
    assert not open_checkpoint(write_gguf(tmp_path / "untied.gguf")).config.tie_word_embeddings


def single_tensor_file(path: Path, stored: np.ndarray[Any, Any], tensor_type: TYPES) -> Path:
    """A llama file whose only weight beside the embedding is one feed-forward matrix of 512 columns."""
    writer = GGUFWriter(path, "llama")
    for key, value in (
        ("context_length", 512),
        ("embedding_length", 512),
        ("block_count", 1),
        ("feed_forward_length", 48),
        ("attention.head_count", 8),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((4, 512), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", stored, raw_dtype=tensor_type)
    writer.add_tensor("blk.0.attn_q.weight", stored[:16], raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tensor_type", ACCEPTED_TYPES, ids=lambda tensor_type: tensor_type.name)
def test_every_accepted_type(tmp_path: Path, tensor_type: TYPES) -> None:
    stored = random_quantised(tensor_type, 300, 512, seed=tensor_type)  # more than one chunk, and a part of one
    checkpoint = open_checkpoint(single_tensor_file(tmp_path / "tiny.gguf", stored, tensor_type))
    expected = dequantize(stored, tensor_type)
    assert np.isfinite(expected).all()
    assert expected.std() > 0.01
    name = "model.layers.0.mlp.up_proj.weight"
    loaded = checkpoint.load(name)
    plain = {TYPES.F32: torch.float32, TYPES.F16: torch.float16, TYPES.BF16: torch.bfloat16}
    assert loaded.dtype == plain.get(tensor_type, torch.float32)
    assert checkpoint.tensors[name].dtype == str(plain.get(tensor_type, tensor_type.name)).removeprefix("torch.")
    assert checkpoint.tensors[name].shape == (300, 512)
    assert torch.equal(loaded.float(), torch.from_numpy(expected))
    # Rows are moved before they are decoded: interleaving what came back must give the file's order again.
    query = checkpoint.load("model.layers.0.self_attn.q_proj.weight").float().numpy()
    assert np.array_equal(interleave(query, 8), expected[:16])


@pytest.mark.parametrize(("tensor_type", "step"), [(TYPES.Q4_0, 0.6), (TYPES.Q4_1, 0.5), (TYPES.Q8_0, 0.03)])
def test_quantised_weights_are_near_the_original(tmp_path: Path, tensor_type: TYPES, step: float) -> None:
    weights = tiny_weights()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", weights=weights, tensor_type=tensor_type))
    for name, weight in weights.items():
        error = np.abs(checkpoint.load(name).numpy() - weight).max()
        assert error < (step if weight.ndim == 2 else 1e-12), name


def test_q4_1_by_its_definition(tmp_path: Path) -> None:
    """One block by hand, as the format defines it: element i is the low nibble of byte i, 16 + i the high one."""
    scale, minimum = np.float16(0.25), np.float16(-1.5)
    nibbles = np.arange(16, dtype=np.uint8) | (np.arange(16, dtype=np.uint8)[::-1] << 4)
    block = scale.tobytes() + minimum.tobytes() + nibbles.tobytes()
    row = np.frombuffer(block * 16, np.uint8)
    checkpoint = open_checkpoint(single_tensor_file(tmp_path / "t.gguf", np.tile(row, (16, 1)), TYPES.Q4_1))
    expected = [0.25 * i - 1.5 for i in range(16)] + [0.25 * (15 - i) - 1.5 for i in range(16)]
    assert checkpoint.load("model.layers.0.mlp.up_proj.weight")[3, :32].tolist() == expected


def test_frequency_factors_and_linear_scaling(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path = write_gguf(tmp_path / "a.gguf", extra_tensors={"rope_freqs.weight": factors})
    rope = open_checkpoint(path).config.rope
    assert rope == RopeConfig(10000.0, scaling="factors", frequency_factors=tuple(factors.tolist()))
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    rope = open_checkpoint(write_gguf(tmp_path / "b.gguf", extra_keys=keys)).config.rope
    assert rope == RopeConfig(10000.0, scaling="linear", factor=4.0)


def test_sampling_window_and_turn_ends_from_metadata(tmp_path: Path) -> None:
    assert open_checkpoint(write_gguf(tmp_path / "a.gguf")).generation == GenerationDefaults()
    keys = {
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "llama.attention.sliding_window": 100,
        "tokenizer.ggml.eot_token_id": 7,
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "b.gguf", extra_keys=keys))
    assert checkpoint.generation == GenerationDefaults(temperature=0.5, top_k=20)
    assert checkpoint.config.sliding_window == 100
    assert checkpoint.config.eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        *[
            ({f"llama.{key}": None}, f"llama.{key}: is missing")
            for key in ("context_length", "embedding_length", "block_count", "feed_forward_length")
        ],
        ({"llama.attention.head_count": "4"}, "llama.attention.head_count: must be an integer"),
        ({"llama.attention.head_count": [4, 4]}, "llama.attention.head_count: must be an integer"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count: must be between 1"),
        ({"llama.attention.head_count": 5}, "llama.attention.head_count: 5 heads do not divide"),
        ({"llama.attention.head_count_kv": 3}, "llama.attention.head_count_kv: 3 key-value heads"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length: 8 is not supported"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count: 8 is not supported"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "layer_norm_rms_epsilon: must be above 0"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon: must be above 0"),
        ({"llama.block_count": 2_000_000_000}, "llama.block_count: must be between 1 and 1024"),
        ({"llama.expert_count": 8}, "llama.expert_count: mixtures of experts"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: 'yarn' is not supported"),
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.factor: is missing"),
        ({"tokenizer.ggml.eos_token_id": 96}, "tokenizer.ggml.eos_token_id: 96 is not below"),
        ({"split.count": 3}, "split.count: the model is split"),
        ({"general.sampling.top_p": 1.5}, "general.sampling.top_p: must be above 0"),
    ],
)
def test_refuses_metadata_in_one_line(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", extra_keys=keys)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_an_unknown_architecture_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "mamba")
    with pytest.raises(ModelError, match=r"general\.architecture: 'mamba' is not known; known are llama, qwen2, qwen3"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("blk.0.attn_q.bias", (64,), "tensor 'blk.0.attn_q.bias': is not part of the architecture"),
        ("blk.0.ffn_gate_inp.weight", (4, 64), "tensor 'blk.0.ffn_gate_inp.weight': is not part"),
        ("rope_freqs.weight", (9,), "rope_freqs.weight has 9 factors, not 8"),
        ("rope_freqs.weight", (2, 4), "tensor 'rope_freqs.weight': must be a vector of float32"),
    ],
)
def test_refuses_a_tensor_it_would_have_to_drop(tmp_path: Path, name: str, shape: tuple[int, ...], named: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", extra_tensors={name: np.ones(shape, np.float32)})
    with pytest.raises(ModelError) as caught:
        open_checkpoint(path)
    assert named in str(caught.value)


def test_refuses_other_types_by_name(tmp_path: Path) -> None:
    stored = np.zeros((300, 512 // 256 * 110), np.uint8)
    path = single_tensor_file(tmp_path / "t.gguf", stored, TYPES.Q3_K)
    with pytest.raises(
        ModelError, match=rf"{path}: tensor 'blk\.0\.ffn_up\.weight': has type Q3_K, .* supported are F32"
    ):
        open_checkpoint(path)


def test_a_file_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    header_end = whole.index(b"output.weight") + 100
    assert header_end < len(whole) // 4
    for length in [*range(0, header_end, 7), header_end + 1000, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError) as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = open_checkpoint(write_gguf(tmp_path / "a.gguf")).fingerprint
    assert open_checkpoint(write_gguf(tmp_path / "b.gguf")).fingerprint == first
    assert open_checkpoint(write_gguf(tmp_path / "c.gguf", weights=tiny_weights(seed=1))).fingerprint != first


def test_metadata_as_the_tokenizer_reads_it(tmp_path: Path) -> None:
    metadata = read_gguf_metadata(write_gguf(tmp_path / "a.gguf", extra_keys={"some.flag": True, "empty": "x"}))
    assert metadata.strings("tokenizer.ggml.tokens") == ["<a>", "b", "ç"]
    assert metadata.integers("tokenizer.ggml.token_type") == [1, 2, 3]
    assert metadata.boolean("some.flag") is True
    assert metadata.boolean("no.flag", default=False) is False
    assert metadata.integer("llama.block_count") == 2
    assert metadata.number("llama.rope.freq_base") == 10000.0
    with pytest.raises(ModelError, match=r"a\.gguf: some\.flag: must be an integer"):
        metadata.integer("some.flag")
    with pytest.raises(ModelError, match=r"no\.key: is missing"):
        metadata.string("no.key")


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_gguf(tmp_path_factory.mktemp("valid") / "tiny.gguf", tensor_type=TYPES.Q8_0)
    return path.read_bytes()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_mutated_header_is_read_or_refused_cheaply(
    valid_file: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Numbers overwritten in place, of 1, 4 and 8 bytes: huge counts, lengths, dimensions, offsets, type numbers."""
    content = bytearray(valid_file)
    header_end = content.index(b"output.weight") + 100
    for _ in range(data.draw(st.integers(1, 3))):
        width = data.draw(st.sampled_from([1, 4, 8]))
        position = data.draw(st.integers(0, header_end - width))
        limit = 1 << (8 * width)
        value = data.draw(st.integers(0, limit - 1) | st.sampled_from([0, 1, limit - 1, limit // 2, 255]))
        content[position : position + width] = value.to_bytes(width, "little")
    path = tmp_path_factory.mktemp("mutated") / "tiny.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    started_s = time.process_time()

    def load_all() -> None:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensors:
            checkpoint.load(name)

    message = refusal_of(load_all)
    elapsed_s = time.process_time() - started_s
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if message is not None:
        assert "\n" not in message
        assert len(message) < 1500
    assert elapsed_s < 2
    assert peak_bytes < 20 * len(content) + (1 << 20)


def test_refuses_rows_that_are_not_whole_blocks(tmp_path: Path) -> None:
    """The library does not write such a row, so its size is changed in the file."""
    path = write_gguf(tmp_path / "tiny.gguf", tensor_type=TYPES.Q8_0)
    content = path.read_bytes()
    start = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4
    assert content[start : start + 8] == (64).to_bytes(8, "little")
    path.write_bytes(content[:start] + (63).to_bytes(8, "little") + content[start + 8 :])
    with pytest.raises(ModelError, match=r"tensor 'blk\.0\.ffn_up\.weight': has rows of 63, not whole blocks of 32"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("place", "width", "value", "named"),
    [
        (0, 4, 5, "has 5 dimensions; 1 to 4 are allowed"),
        (0, 4, 0, "has 0 dimensions; 1 to 4 are allowed"),
        (4, 8, 0, "has an empty dimension"),
        (12, 8, 1 << 60, "its data end at byte"),
        (20, 4, 5, "has type number 5, which is not known"),
        (24, 8, 1 << 40, "its data end at byte"),
        (24, 8, 8, "offset 8 is not aligned to 32"),
        (24, 8, 0, "its data overlap another tensor's"),
    ],
)
def test_refuses_a_hostile_tensor_table(tmp_path: Path, place: int, width: int, value: int, named: str) -> None:
    """Behind a matrix's name: number of dimensions, two dimensions, type number, offset of the data."""
    path = write_gguf(tmp_path / "tiny.gguf")
    content = bytearray(path.read_bytes())
    start = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + place
    content[start : start + width] = value.to_bytes(width, "little")
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(path)
    # Moved onto another's data, either of the two may be named.
    assert named in str(caught.value)
    assert str(caught.value).startswith(f"{path}: tensor '")


@pytest.mark.parametrize("alignment", [0, 4, 48, 1 << 30])
def test_refuses_an_impossible_alignment(tmp_path: Path, alignment: int) -> None:
    content = write_gguf(tmp_path / "tiny.gguf", extra_keys={"general.xlignment": 64}).read_bytes()
    start = content.index(b"general.xlignment")  # the writer itself would act on the true key
    key = b"general.alignment"
    changed = content[:start] + key + content[start + len(key) :]
    value = start + len(key) + 4
    (tmp_path / "tiny.gguf").write_bytes(changed[:value] + alignment.to_bytes(4, "little") + changed[value + 4 :])
    with pytest.raises(ModelError, match=r"general\.alignment: must be a power of two"):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_refuses_two_scalings_at_once(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf",
        extra_keys={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        extra_tensors={"rope_freqs.weight": np.ones(8, np.float32)},
    )
    with pytest.raises(ModelError, match=r"llama\.rope\.scaling\.type: linear scaling together with rope_freqs"):
        open_checkpoint(path)
