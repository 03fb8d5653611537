"""Model files made for the loader's tests."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from engine.errors import ModelError

Float32Array = npt.NDArray[np.float32]

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}


def refusal_of(call: Callable[[], object]) -> str | None:
    """The message of the ModelError that `call` ends in; None if it succeeds. Any other exception passes."""
    try:
        call()
    except ModelError as error:
        return str(error)
    return None


def write_config(directory: Path, **changes: Any) -> Path:
    """config.json of a small Llama with `changes`; a change to `...` removes the field."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in (LLAMA | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_raw_safetensors(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file whose header is whatever the test wants it to be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def random_quantised(tensor_type: GGMLQuantizationType, rows: int, columns: int, seed: int) -> npt.NDArray[np.uint8]:
    """Bytes of a tensor of any type: quantised noise, or random blocks with sound scales where the library cannot."""
    rng = np.random.default_rng(seed)
    try:
        return quantize(rng.standard_normal((rows, columns), np.float32), tensor_type)
    except NotImplementedError:
        block_elements, block_bytes = GGML_QUANT_SIZES[tensor_type]
        num_blocks = rows * columns // block_elements
        blocks = rng.integers(0, 256, (num_blocks, block_bytes), np.uint8)
        # Where float16 scales lie: Q6_K has one at the end, Q4_K and Q5_K have two at the start.
        positions = [block_bytes - 2] if tensor_type is GGMLQuantizationType.Q6_K else [0, 2]
        for position in positions:
            scales = rng.uniform(0.001, 0.02, num_blocks).astype(np.float16)
            blocks[:, position : position + 2] = scales.view(np.uint8).reshape(num_blocks, 2)
        return blocks.reshape(rows, -1)


def interleave(weight: Float32Array, num_heads: int) -> Float32Array:
    """Rows as converters store them for Llama, one at a time: row j of the first half of a head goes to 2j, of the
    second half to 2j + 1."""
    head_dim = weight.shape[0] // num_heads
    half = head_dim // 2
    stored = np.empty_like(weight)
    for row in range(weight.shape[0]):
        head, place = divmod(row, head_dim)
        stored[head * head_dim + (2 * place if place < half else 2 * (place - half) + 1)] = weight[row]
    return stored


def tiny_weights(seed: int = 0, *, qkv_bias: bool = False, qk_norm: bool = False) -> dict[str, Float32Array]:
    """Weights for `LLAMA`'s shape (untied), by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    hidden, ffn, vocab, kv = 64, 96, 96, 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(2):
        layer = f"model.layers.{index}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        for name, size in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (size, hidden)
            if qkv_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (size,)
            if qk_norm and name != "v":
                shapes[f"{layer}self_attn.{name}_norm.weight"] = (16,)
        shapes[layer + "self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        shapes[layer + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[layer + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


# By hand, as the format's documentation lists them.
GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name]
    _, _, index, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{GGUF_PARTS[part]}.{kind}"


def write_gguf(
    path: Path,
    architecture: str = "llama",
    weights: dict[str, Float32Array] | None = None,
    tensor_type: GGMLQuantizationType = GGMLQuantizationType.F32,
    extra_keys: dict[str, Any] | None = None,
    extra_tensors: dict[str, Float32Array] | None = None,
) -> Path:
    """A GGUF file of `LLAMA`'s shape: matrices in `tensor_type`, vectors in float32, Q and K rows interleaved for
    the architecture that stores them so. `extra_keys` adds metadata; None removes a key."""
    weights = tiny_weights() if weights is None else weights
    keys: dict[str, Any] = {
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": 64,
        f"{architecture}.block_count": 2,
        f"{architecture}.feed_forward_length": 96,
        f"{architecture}.attention.head_count": 4,
        f"{architecture}.attention.head_count_kv": 2,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.tokens": ["<a>", "b", "ç"],
        "tokenizer.ggml.token_type": [1, 2, 3],
    } | (extra_keys or {})
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, weight in weights.items():
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleave(weight, 4 if "q_proj" in name else 2)
        if weight.ndim == 1:
            writer.add_tensor(gguf_name(name), weight)
        else:
            writer.add_tensor(gguf_name(name), quantize(weight, tensor_type), raw_dtype=tensor_type)
    for name, weight in (extra_tensors or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
