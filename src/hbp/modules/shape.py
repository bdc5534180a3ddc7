"""Layers that are linear in x and have no parameters: they move features or mix them.

z = Πx, so H_x = Πᵀ H_z Π, and there is no second-order term.
"""

from __future__ import annotations

from torch import Tensor, nn

from hbp.maps import FunctionMap, LinearMap
from hbp.modules.base import HBPModule, HessianPass
from hbp.operators import SymmetricOperator


class LinearRule(HBPModule):
    """z = Πx with one linear function Π for each sample, whatever its values.

    [Rule][eq-selection]: H_x = Πᵀ H_z Π, and there is no second-order term.

    A subclass puts this class before the ``torch.nn`` layer that computes Π, and is
    done: automatic differentiation finds Πᵀ.
    """

    def forward(self, input: Tensor) -> Tensor:
        """z = Πx, [N, ...] → [N, ...]."""
        output = super().forward(input)
        return self.record(input, output, keep=None, with_gradient=False)

    def _map(self, batch: Tensor) -> Tensor:
        return super().forward(batch)

    def jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        record = self.last_record
        shapes = record.input_shape[1:], record.output_shape[1:]
        return FunctionMap(self._map, hessian_pass.samples, *shapes)


class _Rearrangement(LinearRule):
    """Π is the identity on flattened features."""

    def _input_hessian(
        self, output_hessian: SymmetricOperator, hessian_pass: HessianPass
    ) -> SymmetricOperator:
        return output_hessian


class HBPFlatten(_Rearrangement, nn.Flatten):
    """``torch.nn.Flatten`` that sends curvature backward.

    The batch dimension must stay, as with the default ``start_dim=1``.
    """


class HBPUnflatten(_Rearrangement, nn.Unflatten):
    """``torch.nn.Unflatten`` that sends curvature backward.

    The batch dimension must stay as it is.
    """


class _Reshape(nn.Module):
    """Reshaping, with a sample for each sample."""

    def __init__(self, *shape: int | None) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, input: Tensor) -> Tensor:
        sizes = [len(input) if size is None else size for size in self.shape]
        output = input.reshape(sizes)
        if output.shape[:1] != input.shape[:1]:
            raise ValueError(
                f"{self} made {list(output.shape)} of {list(input.shape)}: the number "
                "of samples must stay. Write x.flatten(1), or "
                "x.reshape(x.size(0), ...)."
            )
        return output

    def extra_repr(self) -> str:
        return ", ".join("N" if size is None else str(size) for size in self.shape)


class HBPReshape(_Rearrangement, _Reshape):
    """``Tensor.reshape`` that sends curvature backward.

    Args:
        shape: The new shape; ``None`` stands for the number of samples, and is first,
            or -1 is.
    """


class HBPIdentity(_Rearrangement, nn.Identity):
    """``torch.nn.Identity`` that sends curvature backward."""


class HBPZeroPad1d(LinearRule, nn.ZeroPad1d):
    """``torch.nn.ZeroPad1d`` that sends curvature backward."""


class HBPZeroPad2d(LinearRule, nn.ZeroPad2d):
    """``torch.nn.ZeroPad2d`` that sends curvature backward."""


class HBPZeroPad3d(LinearRule, nn.ZeroPad3d):
    """``torch.nn.ZeroPad3d`` that sends curvature backward."""
