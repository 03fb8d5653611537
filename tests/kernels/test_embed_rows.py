"""Embeddings on their way into a norm: exactly what their definition says, over poison, and nothing else."""

import pytest
import torch

from engine.kernels.embed_rows import embed_rows
from tests.kernels.products import DEVICES, EPS, Draw, sums_of_squares

VOCABULARY = 50


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [8, 37, 48, 160, 576, 2048])
def test_equals_its_definition(device: str, dtype: torch.dtype, features: int) -> None:
    draw = Draw(device, dtype, features)
    embedding, norm = draw.normal(VOCABULARY, features, scale=3.0), draw.norm(features)
    embedding[7] = float("nan")  # a neighbour that nobody asks for
    tokens = torch.tensor([3, 0, 3, VOCABULARY - 1], device=device)
    hidden, weighted = draw.poisoned(6, features), draw.poisoned(6, features)
    squares = draw.poisoned(6, 5, dtype=torch.float32)
    rows = embed_rows(tokens, embedding, norm, EPS, hidden[:4], weighted[:4], squares[:4])
    expected = embedding[tokens]
    assert torch.equal(hidden[:4], expected)
    assert torch.equal(weighted[:4], (expected.float() * norm).to(dtype))
    assert torch.equal(squares[:4, :1], sums_of_squares(expected, 16 << (features // 16).bit_length()))
    for rest in (hidden[4:], weighted[4:], squares[4:], squares[:, 1:]):
        assert rest.isnan().all()
    assert (rows.num_parts, rows.eps) == (1, EPS)
    assert rows.weighted.data_ptr() == weighted.data_ptr()
    assert rows.squares.data_ptr() == squares.data_ptr()
