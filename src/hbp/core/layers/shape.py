"""Layers that are linear in x and have no parameters: they move features or mix them.

z = Πx, so H_x = Πᵀ H_z Π, and there is no second-order term.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..jacobians import Function, Jacobian, Rearrangement
from ..module import HBPModule


class LinearRule(HBPModule):
    """z = Πx with one linear function Π for each sample, whatever its values.

    [Rule][eq-selection]: H_x = Πᵀ H_z Π, and there is no second-order term.

    A subclass puts this class before the ``torch.nn`` layer that computes Π, and is
    done: automatic differentiation finds Πᵀ.
    """

    def forward(self, input: Tensor) -> Tensor:
        """z = Πx, [N, ...] → [N, ...]."""
        return self.record(input, super().forward(input), None, with_gradient=False)

    def jacobian(self) -> Jacobian:
        before, after = self.last_record.input_shape, self.last_record.output_shape
        return Function(super().forward, before[1:], after[1:], before[0])


class RearrangementRule(LinearRule):
    """Π is the identity on flattened features."""

    def jacobian(self) -> Jacobian:
        before, after = self.last_record.input_shape, self.last_record.output_shape
        return Rearrangement(before[1:], after[1:], before[0])


class HBPFlatten(RearrangementRule, nn.Flatten):
    """``torch.nn.Flatten`` that sends curvature backward.

    The batch dimension must stay, as with the default ``start_dim=1``.
    """
