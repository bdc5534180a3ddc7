"""Two faster ways to the same step.

*H ⊗ E[xxᵀ] by rows.* With fewer samples than features the block of a weight is that of
N rows. The core finds an orthonormal basis of their span and projects the gradient on
it. But the gradient of the very batch is δᵀX, so its coordinates are known: eq-rows.
Whether a gradient is one is asked of one random vector (Freivalds 1977).

*Direct solves in a narrower layer.* JᵀHJ + R with a small H is solved in the size of H
by Woodbury's identity, eq-woodbury. Without second-order terms that is the output's.

Both join the core through the ``Batch`` that ``backward_hessian`` asks by default.
"""

from __future__ import annotations

from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from hbp.core.jacobians import Batch, Jacobian, as_batch
from hbp.core.operators import (
    Congruence,
    DiagonalOperator,
    KroneckerBlock,
    SymmetricOperator,
    System,
    eigh_of_gram,
    regularity,
)
from hbp.core.settings import NEGLIGIBLE

MULTIPLE_SLACK: Final = 16
"""By how many eps of its terms' sizes a gradient may differ from δᵀX.

Measured in the network of tutorial 02, at initialisation and after ten epochs, with
and without centred inputs: 5 at most; in 80 runs with two random samples of 3072 inputs
11. Above, the gradient counts as any other, which is slower and as exact.
"""


class RowsBlock(KroneckerBlock):
    """H ⊗ w FᵀF, whose right-hand sides are likely to be multiples of δᵀF.

    With w FFᵀ = UΛUᵀ, the rows of UᵀF are orthogonal and have the lengths √(λ_j/w). So
    for B = GᵀF column j of GᵀU, times this length, is column j of Y in an orthonormal
    basis that need not be formed. Nothing is projected, and B itself is not needed.

    Args:
        outer: H, [out, out].
        rows: F, [m, in].
        weight: w.
        delta: δ, [m, out].
    """

    def __init__(
        self, outer: SymmetricOperator, rows: Tensor, weight: float, delta: Tensor
    ) -> None:
        super().__init__(outer, rows, weight)
        self._delta = delta

    def system(self, b: Tensor) -> System:
        """Without a basis where B = c δᵀF; the host reads whether it is."""
        self.require_fresh()
        if len(self.rows) >= self.sizes[1]:
            return super().system(b)
        factor, is_multiple = self._compare(b.view(self.sizes))
        if not bool(is_multiple):
            return super().system(b)
        values, U = eigh_of_gram(self.rows @ self.rows.T * self.weight)
        # Where λ_j is no more than round-off, so is row j of UᵀF; its direction means
        # nothing. It belongs to the null space, and is scaled like the others.
        null = values <= len(values) * torch.finfo(values.dtype).eps * values[-1]
        lengths = (values / self.weight).sqrt()
        lengths = torch.where(null, NEGLIGIBLE * lengths[-1], lengths)[:, None]
        Y = (U.T @ self._delta) * factor * lengths
        # The rows span less than the whole space: one coordinate for the rest, which
        # is next to nothing.
        rhs = torch.cat([Y, Y.new_zeros(len(Y), 1)], dim=1)
        rhs[0, -1] = NEGLIGIBLE * torch.linalg.vector_norm(Y)

        def add_to(target: Tensor, y: Tensor, scale: float) -> None:
            coefficients = U @ (y[:, :-1] / lengths)
            target.view(self.sizes).addmm_(coefficients.T, self.rows, alpha=scale)

        return System(self.outer, torch.where(null, 0, values), rhs, add_to)

    def _compare(self, B: Tensor) -> tuple[Tensor, Tensor]:
        """The c for which B, [out, in], may be c δᵀF, and whether it is.

        Both are multiplied by one vector, which costs one pass over B. It is cos k²,
        as good as random, for which the device needs no generator. Where B or δ is not
        finite, or δᵀF is zero, the answer is no.
        """
        numbers = torch.arange(B.shape[1], dtype=B.dtype, device=B.device)
        probe = numbers.square().cos()
        expected, found = self._delta.T @ (self.rows @ probe), B @ probe
        # In units of the largest entry, so that no square underflows.
        unit = expected.abs().max()
        expected, found = expected / unit, found / unit
        factor = (expected @ found) / (expected @ expected)
        gap = (found - factor * expected).abs().max()
        # Round-off is relative to the terms of δᵀF, which may cancel, not to the sum.
        terms = self._delta.abs().T @ torch.linalg.vector_norm(self.rows, dim=1)
        scale = factor.abs() * terms.max() / unit
        return factor, gap < MULTIPLE_SLACK * torch.finfo(B.dtype).eps * scale


class NarrowCongruence(Congruence):
    """JᵀHJ + R, which solves in the width of H where that is at most half as wide."""

    def solve_damped(
        self, rows: Tensor, weight: float | Tensor, shift: float
    ) -> tuple[Tensor, Tensor]:
        """Woodbury's identity, eq-woodbury: a layer above is at most half as wide.

        With D = weight · R + shift · I and G = weight · H,

            (D + JᵀGJ)⁻¹ b = D⁻¹(b - Jᵀu),   (I + G JD⁻¹Jᵀ) u = G JD⁻¹b,

        a system of the size of H. It needs D to be well away from 0, so R ≥ 0.
        """
        narrow = self._narrow_factors if shift > 0 else None
        if narrow is None:
            return super().solve_damped(rows, weight, shift)
        outer, J = narrow
        D = rows.new_full((self.shape[0],), shift)
        if isinstance(self.term, DiagonalOperator):
            D = D + self.term.values * weight
        G, scaled = outer.to_dense() * weight, J / D
        capacitance = G @ (scaled @ J.T)
        capacitance.diagonal().add_(1)
        factors, pivots, _ = torch.linalg.lu_factor_ex(capacitance)
        u = torch.linalg.lu_solve(factors, pivots, G @ (scaled @ rows.T))
        return (rows - u.T @ J) / D, regularity(factors.diagonal(), shift)

    @cached_property
    def _narrow_factors(self) -> tuple[SymmetricOperator, Tensor] | None:
        """H and a dense J, [z, x], with 2z ≤ x and A = JᵀHJ + R for R ≥ 0, or None.

        JᵀHJ has no more rank than the matrix at the output, as long as no second-order
        term has joined on the way. Then H is that matrix, and J goes all the way.
        """
        outer, jacobian, W = self.outer, self.jacobian, self.jacobian.matrix
        if not (self.term is None or getattr(self.term, "nonnegative", False)):
            return None
        above = None
        if isinstance(outer, NarrowCongruence) and outer.term is None:
            above = outer._narrow_factors
        if above:
            found = above[0], jacobian.vjp(above[1])
        elif W is not None and len(W) == outer.shape[0]:  # one virtual sample
            found = outer, W
        else:
            return None
        return found if 2 * len(found[1]) <= self.shape[0] else None


class FastBatch(Batch):
    """The samples of this process, whose gradients are likely those of the batch."""

    def congruence(
        self, J: Jacobian, H: SymmetricOperator, term: SymmetricOperator | None
    ) -> SymmetricOperator:
        found = super().congruence(J, H, term)
        return NarrowCongruence(H, J, term) if type(found) is Congruence else found

    def weight_block(
        self, H: SymmetricOperator, x: Tensor, delta: Tensor | None
    ) -> SymmetricOperator:
        if delta is None:
            return super().weight_block(H, x, delta)
        return RowsBlock(H, x, 1 / len(x), delta)


@as_batch.register(type(None))
def _own_samples(_: None) -> Batch:
    return FastBatch()
