"""Layers that move features without changing them."""

from __future__ import annotations

from torch import Tensor, nn

from hbp.modules.base import HBPModule, HessianPass
from hbp.operators import SymmetricOperator


class HBPFlatten(HBPModule, nn.Flatten):
    """``torch.nn.Flatten`` that sends curvature backward.

    Rule: z = Πx with Π the identity on flattened features, so H_x = Πᵀ H_z Π = H_z.
    The batch dimension must stay, as with the default ``start_dim=1``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """z, [N, ...] → [N, features]."""
        return self.record(
            input, super().forward(input), keep=None, with_gradient=False
        )

    def _input_hessian(
        self, output_hessian: SymmetricOperator, hessian_pass: HessianPass
    ) -> SymmetricOperator:
        return output_hessian
