"""From the tensor names of GGUF files to Hugging Face's."""

import re

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WITH_BIAS = ("attn_q", "attn_k", "attn_v")
_WITH_NORM = ("attn_q_norm", "attn_k_norm")
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.([a-z_]+)\.(weight|bias)")

ROPE_FACTORS = "rope_freqs.weight"


def hf_tensor_name(gguf_name: str, qkv_bias: bool, qk_norm: bool) -> str | None:
    """Hugging Face's name, or None for a tensor that the architecture has no place for.

    >>> hf_tensor_name("blk.3.attn_q.weight", qkv_bias=False, qk_norm=False)
    'model.layers.3.self_attn.q_proj.weight'
    """
    if gguf_name in _OUTER:
        return _OUTER[gguf_name]
    match = _LAYER.fullmatch(gguf_name)
    if match is None:
        return None
    index, part, kind = match.groups()
    if part not in _IN_LAYER or (part in _WITH_NORM and not qk_norm):
        return None
    if kind == "bias" and not (qkv_bias and part in _WITH_BIAS):
        return None
    return f"model.layers.{index}.{_IN_LAYER[part]}.{kind}"


def is_ignorable(gguf_name: str) -> bool:
    """Whether the tensor holds nothing that the decoder needs as a weight: rotary tables, read or recomputed."""
    return gguf_name == ROPE_FACTORS or gguf_name.endswith((".attn_rot_embd.weight", ".rot_embd.weight"))
