"""Elementwise layers: a name, φ, and its first two derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hbp.curvature import is_nonnegative
from hbp.modules.base import HBPModule, HessianPass, sum_over_batch
from hbp.operators import Congruence, DenseOperator, DiagonalMap, SymmetricOperator

Function = Callable[[Tensor], Tensor]


class ElementwiseRule(HBPModule):
    """z = φ(x), applied to every feature on its own.

    Rule, with δ = ∂loss/∂z (Dangel, Harmeling & Hennig 2020):

        H_x = diag(φ') H_z diag(φ') + mod(diag(φ'' ⊙ δ))

    Over a batch, H_z = H̄ and the first term is E[φ']ᵀ H̄ E[φ'], or with
    ``average_input_jacobian=False`` E[φ'φ'ᵀ] ⊙ H̄, for which the dense matrix is
    formed. The second-order term is summed over the batch first, then modified.

    A subclass puts this class before the ``torch.nn`` layer that computes φ, and
    overrides the derivatives where it knows a formula. Otherwise automatic
    differentiation finds them.

    Attributes:
        derivatives_from_output: Whether the two formulas are in terms of z = φ(x), so
            that x need not be kept, or in terms of x.
    """

    average_input_jacobian: bool = True
    derivatives_from_output: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """z = φ(x), [N, ...] → [N, ...]."""
        output = super().forward(input)
        keep = output if self.derivatives_from_output else input
        return self.record(input, output, keep)

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
        first = _gradient_of_sum(super().forward(x), x)
        return first.detach(), _gradient_of_sum(first, x).detach()

    def _input_hessian(
        self, output_hessian: SymmetricOperator, hessian_pass: HessianPass
    ) -> SymmetricOperator:
        first = self.first_derivative(self.last_record.kept)
        slopes = first.flatten(1)
        second_order = self._second_order(first, hessian_pass)
        if self.average_input_jacobian:
            mean = sum_over_batch(slopes) / len(slopes)
            hessian_pass.finite(mean, "mean derivative", self)
            positive = is_nonnegative(hessian_pass.treatment)
            return Congruence(output_hessian, DiagonalMap(mean), second_order, positive)
        products = slopes.T @ slopes / len(slopes)
        hessian_pass.finite(products, "derivative", self)
        matrix = products.mul_(output_hessian.to_dense())
        if second_order is not None:
            matrix.diagonal().add_(second_order)
        return DenseOperator(matrix)

    def _second_order(self, first: Tensor, hessian_pass: HessianPass) -> Tensor | None:
        """mod(Σ_n φ''(x_n) ⊙ δ_n), [features], or None where it is zero."""
        if hessian_pass.treatment is None:
            return None
        record = self.last_record
        second = self.second_derivative(record.kept, first)
        if second is None:
            return None
        if record.output_gradient is None:
            raise RuntimeError(
                f"The second-order term of {self} needs the gradient w.r.t. its "
                "output, but nothing before it requires one. Call "
                "inputs.requires_grad_() before the forward pass, or choose 'zero'."
            )
        total = sum_over_batch((second * record.output_gradient).flatten(1))
        hessian_pass.finite(total, "second-order term", self)
        return hessian_pass.treatment(total)

    def extra_repr(self) -> str:
        """The layer's options and its batch scheme."""
        scheme = f"avg_input_jac: {self.average_input_jacobian}"
        return ", ".join(filter(None, [super().extra_repr(), scheme]))


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


class _Function(nn.Module):
    """φ from a plain function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)


class HBPElementwise(ElementwiseRule, _Function):
    """Any smooth function of one number, applied to every feature.

    Args:
        function: φ, [N, ...] → [N, ...], entry by entry (not softmax, say).
        first: φ', or ``None`` for automatic differentiation.
        second: φ'', or ``None`` for automatic differentiation.

    To copy or pickle the layer, give it functions that can be.

    Examples:
        >>> import torch
        >>> from hbp import HBPElementwise
        >>> layer = HBPElementwise(torch.nn.functional.softplus)

    Raises:
        TypeError: an argument is not callable.
    """

    def __init__(
        self,
        function: Function,
        first: Function | None = None,
        second: Function | None = None,
    ) -> None:
        for name, value in [
            ("function", function),
            ("first", first),
            ("second", second),
        ]:
            if not callable(value) and (value is not None or name == "function"):
                raise TypeError(f"{name}={value!r} must be a function of a tensor.")
        super().__init__(function)
        self.first = first
        self.second = second

    def forward(self, input: Tensor) -> Tensor:
        """z = φ(x), [N, ...] → [N, ...].

        Raises:
            RuntimeError: the function overwrites x, where its derivatives are taken.
        """
        version = input._version
        output = super().forward(input)
        if input._version != version:
            raise RuntimeError(
                f"{self} changes its input in place, but its derivatives need it. Give "
                "HBPElementwise an out-of-place function."
            )
        return output

    def first_derivative(self, x: Tensor) -> Tensor:
        """φ'(x)."""
        return self.first(x) if self.first else super().first_derivative(x)

    def second_derivative(self, x: Tensor, first: Tensor) -> Tensor | None:
        """φ''(x)."""
        return self.second(x) if self.second else super().second_derivative(x, first)

    def extra_repr(self) -> str:
        """The function's name and the batch scheme."""
        name = getattr(self.function, "__name__", repr(self.function))
        return f"{name}, {super().extra_repr()}"
