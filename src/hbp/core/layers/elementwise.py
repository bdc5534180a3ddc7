"""Elementwise layers: a name, φ, and its first two derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..jacobians import Diagonal, Jacobian
from ..module import HBPModule


class ElementwiseRule(HBPModule):
    """z = φ(x), applied to every feature on its own.

    [Rule][eq-elementwise], with δ = ∂loss/∂z (Dangel, Harmeling & Hennig 2020):

        H_x = diag(φ') H_z diag(φ') + mod(diag(φ'' ⊙ δ))

    Over a batch, H_z = H̄ and the first term is E[φ']ᵀ H̄ E[φ'], or with
    ``average_input_jacobian=False`` E[φ'φ'ᵀ] ⊙ H̄, for which the dense matrix is
    formed. The second-order term is [summed over the batch][eq-sum-then-modify] first,
    then modified.

    A subclass puts this class before the ``torch.nn`` layer that computes φ, and
    overrides the derivatives where it knows a formula. Otherwise automatic
    differentiation finds them.

    Attributes:
        derivatives_from_output: Whether the two formulas are in terms of z = φ(x), so
            that x need not be kept, or in terms of x.
    """

    schemes: Sequence[str] = ("average_input_jacobian",)
    derivatives_from_output: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """z = φ(x), [N, ...] → [N, ...]."""
        # An in-place layer overwrites x, which its derivatives may need.
        in_place = getattr(self, "inplace", False) and not self.derivatives_from_output
        x = input.detach().clone() if in_place else input
        output = super().forward(input)
        return self.record(input, output, output if self.derivatives_from_output else x)

    def first_derivative(self, values: Tensor) -> Tensor:
        """φ' of every entry, [N, ...]; values are x, or z, see above."""
        return self._differentiate(values)[0]

    def second_derivative(self, values: Tensor, first: Tensor) -> Tensor | None:
        """φ'' of every entry, [N, ...], given φ'; None if it is 0 everywhere."""
        return self._differentiate(values)[1]

    @torch.enable_grad()
    def _differentiate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Features do not mix, so the gradient of the sum is the derivative at each.
        x = x.detach().requires_grad_()
        values = super().forward(x.clone() if getattr(self, "inplace", False) else x)
        first = _gradient_of_sum(values, x)
        return first.detach(), _gradient_of_sum(first, x).detach()

    def jacobian(self) -> Jacobian:
        return Diagonal(self.first_derivative(self.last_record.kept))

    def second_order(self, J: Jacobian) -> Tensor | None:
        """φ'' ⊙ δ."""
        assert J.data is not None
        second = self.second_derivative(self.last_record.kept, J.data)
        return None if second is None else second * self.last_record.delta_of(self)


def _gradient_of_sum(values: Tensor, x: Tensor) -> Tensor:
    if not values.requires_grad:  # A function that is linear, or constant, in x.
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(
        values.sum(), x, create_graph=True, materialize_grads=True
    )
    return gradient


class HBPSigmoid(ElementwiseRule, nn.Sigmoid):
    """``torch.nn.Sigmoid``, φ(x) = 1/(1 + e⁻ˣ), that sends curvature backward."""

    derivatives_from_output = True

    def first_derivative(self, z: Tensor) -> Tensor:
        """φ' = z(1 - z) = z - z²."""
        return torch.addcmul(z, z, z, value=-1)

    def second_derivative(self, z: Tensor, first: Tensor) -> Tensor:
        """φ'' = φ'(1 - 2z)."""
        return torch.addcmul(first, first, z, value=-2)


class HBPTanh(ElementwiseRule, nn.Tanh):
    """``torch.nn.Tanh``, φ(x) = tanh x, that sends curvature backward."""

    derivatives_from_output = True

    def first_derivative(self, z: Tensor) -> Tensor:
        """φ' = 1 - z²."""
        return 1 - z.square()

    def second_derivative(self, z: Tensor, first: Tensor) -> Tensor:
        """φ'' = -2zφ'."""
        return -2 * z * first


class HBPReLU(ElementwiseRule, nn.ReLU):
    """``torch.nn.ReLU``, φ(x) = max(x, 0), that sends curvature backward.

    The formulas need z only, so ``inplace=True`` may overwrite x. As in torch,
    φ'(0) = 0.
    """

    derivatives_from_output = True

    def first_derivative(self, z: Tensor) -> Tensor:
        """φ' = 1 where z > 0, else 0."""
        return (z > 0).to(z.dtype)

    def second_derivative(self, z: Tensor, first: Tensor) -> None:
        """φ'' = 0."""
        return
