"""Sub-blocks: of a weight's block only some blocks on the diagonal.

The parameter splitting of Dangel, Harmeling & Hennig 2020: a weight's block is split
into sub-blocks of consecutive output features, and what couples them is dropped. Solves
get cheaper, steps a little worse. The parameters stay as they are.

It joins the core as the ``structure`` that a layer gives to its blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hbp.core.guards import is_count
from hbp.core.layers.convolution import HBPConv2d
from hbp.core.layers.linear import HBPLinear
from hbp.core.module import HBPModule
from hbp.core.operators import DenseOperator, KroneckerBlock, SymmetricOperator
from hbp.layers.convolution import HBPConv1d, HBPConv3d


def set_hbp_blocks(model: HBPModule, sub_blocks: int = 1) -> None:
    """Split the block of every weight and bias, here and in every HBP module inside.

    It is a method of every HBP module: ``model.set_hbp_blocks(sub_blocks=4)``. It
    matters to linear layers and convolutions (not to transposed ones), and can be
    changed at any time; the next Hessian pass goes by it.

    Args:
        model: Any HBP module.
        sub_blocks: So many, of consecutive output features; what couples them is
            dropped. A layer of fewer output features gets one for each.

    Raises:
        ValueError: ``sub_blocks`` is no positive integer.
    """
    if not is_count(sub_blocks):
        raise ValueError(f"sub_blocks={sub_blocks!r} must be a positive integer.")
    for layer in model.modules():
        if isinstance(layer, HBPLinear | HBPConv1d | HBPConv2d | HBPConv3d):
            vars(layer).pop("structure", None)
            if sub_blocks > 1:
                vars(layer)["structure"] = SubBlocks(sub_blocks)


class SubBlocks(NamedTuple):
    """What becomes of a block of θ whose first dimension are output features."""

    parts: int

    def __call__(
        self, block: SymmetricOperator, parameter: Tensor
    ) -> SymmetricOperator:
        """The block, split."""
        groups = torch.arange(len(parameter)).chunk(min(self.parts, len(parameter)))
        entries = parameter[0].numel()
        return split(block, [len(group) * entries for group in groups])

    def __str__(self) -> str:
        return f"sub_blocks: {self.parts}"


def split(operator: SymmetricOperator, sizes: Sequence[int]) -> SymmetricOperator:
    """Of A only the blocks on the diagonal, of so many rows each, in order.

    Of H ⊗ FᵀF, blocks of whole output features are those of H.
    """
    whole = isinstance(operator, KroneckerBlock) and not any(
        size % operator.sizes[1] for size in sizes
    )
    if not (whole and isinstance(operator, KroneckerBlock)):
        return BlockDiagonal(operator, sizes)
    twin = copy.copy(operator)
    twin.outer = split(operator.outer, [size // operator.sizes[1] for size in sizes])
    return twin


class BlockDiagonal(SymmetricOperator):
    """Of A only the blocks on the diagonal: what couples them is dropped.

    Args:
        outer: A, [n, n].
        sizes: Rows of each block; they add up to n.
    """

    def __init__(self, outer: SymmetricOperator, sizes: Sequence[int]) -> None:
        super().__init__(outer.shape[0], outer, outer.reads)
        self.outer, self.sizes = outer, list(sizes)
        # Made on the device: for a copy to it the host would wait, at every layer.
        ones = torch.ones(1, sum(sizes), dtype=outer.dtype, device=outer.device)
        self._masks = torch.block_diag(*ones.split(self.sizes, dim=1))  # [blocks, n]

    def product(self, rows: Tensor) -> Tensor:
        alone = (rows[:, None] * self._masks).flatten(0, 1)
        products = self.outer.product(alone).view(len(rows), *self._masks.shape)
        return (products * self._masks).sum(1)

    @property
    def blocks(self) -> list[SymmetricOperator]:
        """An operator for each block, in order."""
        starts = list(accumulate(self.sizes[:-1], initial=0))
        spans = zip(starts, self.sizes, strict=True)
        return [_Block(self.outer, start, size) for start, size in spans]

    def _parts(self) -> list[Tensor]:
        """The blocks themselves."""
        rows = self.outer.to_dense().split(self.sizes)
        return [part.split(self.sizes, dim=1)[i] for i, part in enumerate(rows)]

    def _dense(self) -> Tensor:
        return torch.block_diag(*self._parts())

    def _diagonal(self) -> Tensor:
        return self.outer.diagonal()

    def _eigvalsh(self) -> Tensor:
        parts = [torch.linalg.eigvalsh(part) for part in self._parts()]
        return torch.cat(parts).sort().values

    def solve_damped(
        self, rows: Tensor, weight: float | Tensor, shift: float
    ) -> tuple[Tensor, Tensor]:
        """Block by block."""
        parts = zip(self._parts(), rows.split(self.sizes, dim=1), strict=True)
        solved = [DenseOperator(p).solve_damped(b, weight, shift) for p, b in parts]
        solutions, margins = zip(*solved, strict=True)
        return torch.cat(solutions, dim=1), torch.stack(margins).min()


class _Block(SymmetricOperator):
    """So many rows and columns of A, from ``start``."""

    def __init__(self, outer: SymmetricOperator, start: int, size: int) -> None:
        super().__init__(size, outer, outer.reads)
        self._outer, self._own = outer, slice(start, start + size)

    def product(self, rows: Tensor) -> Tensor:
        whole = rows.new_zeros(len(rows), self._outer.shape[0])
        whole[:, self._own] = rows
        return self._outer.product(whole)[:, self._own]


HBPModule.set_hbp_blocks = set_hbp_blocks
