"""Which tensors of a model are stored in int8 where it is quantized, by Hugging Face's names."""

import re

SCALE_SUFFIX = "_scale"  # a matrix "x.weight" has its scales in "x.weight_scale"

_MATRIX = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight|lm_head\.weight", re.ASCII
)


def is_quantizable(name: str) -> bool:
    """Whether a tensor is a matrix that is multiplied; embeddings are looked up, not so."""
    return _MATRIX.fullmatch(name) is not None
