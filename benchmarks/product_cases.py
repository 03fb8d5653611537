"""The products of a decoder layer, each ready to be launched, checked and timed: what `benchmarks.kernels` measures.

engine.kernels is imported late: `--rehearse` decides first whether kernels run under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from engine.kernels.configurations import Configuration, Kernel
    from engine.kernels.matrix import Matrix
    from engine.kernels.row_norm import NormedRows

COPIES_BYTES = 240e6  # of weights: several times an H100's L2
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder layer."""

    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    head_norm: bool = False


SHAPES = {
    "tinyllama": Shape(2048, 5632, 32, 4, 64, 32000),
    "smollm2": Shape(576, 1536, 9, 3, 64, 49152),
    "mistral": Shape(4096, 14336, 32, 8, 128, 32000),
    "qwen3": Shape(1024, 3072, 16, 8, 128, 151936, head_norm=True),
    "tiny": Shape(64, 48, 2, 1, 16, 101),
}
Product = Literal["qkv", "o", "gate_up", "down", "logits"]
PRODUCTS: tuple[Product, ...] = ("qkv", "o", "gate_up", "down", "logits")


class Case:
    """One product of a layer at some number of rows, with copies of its weights in bfloat16, or in int8 with scales.

    launch: runs the kernel on the i-th copy and returns the tensors that it wrote and whose bits count. composed: the
    plain-torch twin. library: the product alone, by torch's library; both in bfloat16. bytes: what the kernel reads and
    writes, each thing once.
    """

    def __init__(
        self, name: Product, shape: Shape, rows: int, device: str, *, int8: bool = False, copies: int | None = None
    ) -> None:
        self.name, self.shape, self.rows, self.device, self.int8 = name, shape, rows, device, int8
        heads = shape.num_heads + 2 * shape.num_kv_heads
        self.outputs, self.features = {
            "qkv": (heads * shape.head_dim, shape.hidden),
            "o": (shape.hidden, shape.num_heads * shape.head_dim),
            "gate_up": (2 * shape.ffn, shape.hidden),
            "down": (shape.hidden, shape.ffn),
            "logits": (shape.vocab, shape.hidden),
        }[name]
        kernels: dict[Product, Kernel] = {
            "qkv": "norm_qkv_head_norm_rope" if shape.head_norm else "norm_qkv_rope",
            "o": "product_residual",
            "gate_up": "norm_gate_up_silu",
            "down": "product_residual",
            "logits": "norm_logits",
        }
        self.kernel = kernels[name]
        read_bytes = (1 if int8 else 2) * self.outputs * self.features
        self.copies = copies or max(4, -(-int(COPIES_BYTES) // read_bytes))
        self._draw = torch.Generator(device).manual_seed(1)
        self.weights = [
            (torch.randn(self.outputs, self.features, generator=self._draw, device=device) * self.features**-0.5)
            .bfloat16()
            for _ in range(self.copies)
        ]  # fmt: skip
        self.matrices = [self._matrix(weight) for weight in self.weights]
        self.x = self._normal(rows, self.features)
        self.launch: Callable[[int, Configuration | None], list[torch.Tensor]]
        self.composed: Callable[[int], object]
        reads = [self.x, *self._prepare()]
        reads += [scales for scales in [self.matrices[0].scales] if scales is not None]
        self.bytes = read_bytes + sum(t.numel() * t.element_size() for t in (*reads, *self.launch(0, None)))

    def library(self, index: int) -> object:
        return torch.nn.functional.linear(self.x, self.weights[index])

    def bits(self, configuration: Configuration) -> list[torch.Tensor]:
        """What the kernel writes for the first weights, over poisoned outputs."""
        for tensor in self.launch(0, configuration):
            tensor.fill_(float("nan"))
        return [tensor.clone() for tensor in self.launch(0, configuration)]

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._draw, device=self.device).bfloat16()

    def _matrix(self, weight: torch.Tensor) -> Matrix:
        from engine.kernels.matrix import Matrix, pack

        if not self.int8:
            return Matrix(weight, pack(weight))
        scales = weight.float().abs().amax(dim=1) / 127
        rows = (weight.float() / scales[:, None]).round().to(torch.int8)
        return Matrix(rows, pack(rows), scales)

    def _prepare(self) -> list[torch.Tensor]:
        """Set `launch` and `composed`; returns what the kernel reads beside x and the weight."""
        return {
            "qkv": self._prepare_qkv,
            "o": self._prepare_residual,
            "gate_up": self._prepare_gate_up,
            "down": self._prepare_residual,
            "logits": self._prepare_logits,
        }[self.name]()

    def _normed(self) -> tuple[NormedRows, torch.Tensor]:
        """x on its way into a norm as a product with residual leaves it for so many rows, and the norm's weights."""
        from engine.kernels.matrix import Matrix, pack
        from engine.kernels.product_residual import product_residual
        from engine.kernels.row_norm import max_parts

        norm = torch.rand(self.features, generator=self._draw, device=self.device) + 0.5
        zeros = torch.zeros(self.features, 64, device=self.device, dtype=torch.bfloat16)
        squares = torch.empty(self.rows, max_parts(self.features), device=self.device)
        nothing = torch.zeros(self.rows, 64, device=self.device, dtype=torch.bfloat16)
        outputs = torch.empty_like(self.x), torch.empty_like(self.x)
        return product_residual(nothing, Matrix(zeros, pack(zeros)), self.x, norm, EPS, *outputs, squares), norm

    def _prepare_qkv(self) -> list[torch.Tensor]:
        from engine.kernels import reference
        from engine.kernels.norm_qkv_rope import QKVWeights, norm_qkv_rope

        shape, rows, device = self.shape, self.rows, self.device
        angle = torch.rand(4096, shape.head_dim // 2, generator=self._draw, device=device) * 6
        rope = (angle.cos(), angle.sin())
        positions, slots = torch.arange(rows, device=device) + 100, torch.arange(rows, device=device) + 16
        cache_shape = (2, rows // 16 + 2, 16, shape.num_kv_heads, shape.head_dim)
        both = torch.zeros(cache_shape, device=device, dtype=torch.bfloat16)
        kv = (both[0], both[1])
        q = torch.empty(rows, shape.num_heads, shape.head_dim, device=device, dtype=torch.bfloat16)
        head = torch.ones(shape.head_dim, device=device) if shape.head_norm else None
        sizes = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        x, norm = self._normed()
        ours = [QKVWeights(matrix, None, head, head, EPS, *sizes) for matrix in self.matrices]
        theirs = [reference.QKVProjection(norm, weight, None, head, head, EPS, *sizes) for weight in self.weights]

        def launch(index: int, configuration: Configuration | None) -> list[torch.Tensor]:
            norm_qkv_rope(x, ours[index], rope, positions, slots, q, kv, configuration=configuration)
            return [q, both.flatten(1, 2)[:, 16 : 16 + rows]]

        self.launch = launch
        self.composed = lambda index: reference.norm_qkv_rope(self.x, theirs[index], rope, positions, slots, kv)
        return [x.squares[:, : x.num_parts], rope[0][positions], rope[1][positions], positions, slots]

    def _prepare_residual(self) -> list[torch.Tensor]:
        from engine.kernels import reference
        from engine.kernels.product_residual import product_residual
        from engine.kernels.row_norm import max_parts

        residual = self._normal(self.rows, self.outputs)
        norm = torch.rand(self.outputs, generator=self._draw, device=self.device) + 0.5
        out, weighted = torch.empty_like(residual), torch.empty_like(residual)
        squares = torch.empty(self.rows, max_parts(self.outputs), device=self.device)

        def launch(index: int, configuration: Configuration | None) -> list[torch.Tensor]:
            matrix = self.matrices[index]
            product_residual(
                self.x, matrix, residual, norm, EPS, out, weighted, squares, configuration=configuration
            )  # fmt: skip
            return [out, weighted]  # how many sums of squares there are follows from the configuration

        self.launch = launch
        self.composed = lambda index: reference.product_residual(self.x, self.weights[index], residual)
        return [residual, norm]

    def _prepare_gate_up(self) -> list[torch.Tensor]:
        from engine.kernels import reference
        from engine.kernels.norm_gate_up_silu import norm_gate_up_silu

        out = torch.empty(self.rows, self.outputs // 2, device=self.device, dtype=torch.bfloat16)
        x, norm = self._normed()

        def launch(index: int, configuration: Configuration | None) -> list[torch.Tensor]:
            norm_gate_up_silu(x, self.matrices[index], out, configuration=configuration)
            return [out]

        self.launch = launch
        self.composed = lambda index: reference.norm_gate_up_silu(self.x, norm, EPS, self.weights[index])
        return [x.squares[:, : x.num_parts]]

    def _prepare_logits(self) -> list[torch.Tensor]:
        from engine.kernels import reference
        from engine.kernels.norm_logits import norm_logits

        out = torch.empty(self.rows, self.outputs, device=self.device)
        x, norm = self._normed()

        def launch(index: int, configuration: Configuration | None) -> list[torch.Tensor]:
            norm_logits(x, self.matrices[index], out, configuration=configuration)
            return [out]

        self.launch = launch
        self.composed = lambda index: reference.norm_logits(self.x, norm, EPS, self.weights[index])
        return [x.squares[:, : x.num_parts]]
