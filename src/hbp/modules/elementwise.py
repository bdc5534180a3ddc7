"""Elementwise layers: a name, φ, and its first two derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hbp.maps import DiagonalMap, LinearMap
from hbp.modules.base import HBPModule, HessianPass
from hbp.operators import DenseOperator, SymmetricOperator, fits_dense

Function = Callable[[Tensor], Tensor]


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

    average_input_jacobian: bool = True
    derivatives_from_output: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """z = φ(x), [N, ...] → [N, ...]."""
        # An in-place layer overwrites x, which its derivatives may need.
        overwrites = (
            getattr(self, "inplace", False) and not self.derivatives_from_output
        )
        x = input.detach().clone() if overwrites else input
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

    def _input_hessian(
        self, output_hessian: SymmetricOperator, hessian_pass: HessianPass
    ) -> SymmetricOperator:
        """The general rule; a formula for the averaged product, if it fits."""
        averages = hessian_pass.is_exact or self.average_input_jacobian
        if averages or not output_hessian.fits:
            return super()._input_hessian(output_hessian, hessian_pass)
        products = self._mean_products(hessian_pass)
        hessian_pass.finite(products, "derivative", self)
        matrix = products.mul_(output_hessian.to_dense())
        second_order = self._read_second_order(hessian_pass)
        if second_order is not None:
            matrix.diagonal().add_(second_order)
        return DenseOperator(matrix)

    def _mean_products(self, hessian_pass: HessianPass) -> Tensor:
        """E[φ'φ'ᵀ], [features, features]."""
        slopes = self._slopes(hessian_pass).flatten(1)
        hessian_pass = hessian_pass.reading(self, "mean_products")
        return hessian_pass.mean_of_sum(slopes.T @ slopes, len(slopes))

    def _collect_jacobian(self, hessian_pass: HessianPass) -> None:
        record = self.last_record
        size, dtype = record.input_shape[1:].numel() ** 2, record.kind[0]
        if not self.average_input_jacobian and fits_dense(size * dtype.itemsize):
            self._mean_products(hessian_pass)
        else:
            super()._collect_jacobian(hessian_pass)

    def _slopes(self, hessian_pass: HessianPass) -> Tensor:
        """φ' of every entry, [N, ...]."""
        record = self.last_record
        return hessian_pass.once(record, lambda: self.first_derivative(record.kept))

    def jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        mean = hessian_pass.mean(self._slopes(hessian_pass))
        return DiagonalMap(hessian_pass.finite(mean, "mean derivative", self))

    def second_order(self, hessian_pass: HessianPass) -> Tensor | None:
        """mod(φ''(x_n) ⊙ δ_n), summed over the batch before or as it is."""
        if hessian_pass.treatment is None:
            return None
        record = self.last_record
        second = self.second_derivative(record.kept, self._slopes(hessian_pass))
        if second is None:
            return None
        if record.output_gradient is None:
            raise RuntimeError(
                f"The second-order term of {self} needs the gradient w.r.t. its "
                "output, but nothing before it requires one. Call "
                "inputs.requires_grad_() before the forward pass, or choose 'zero'."
            )
        total = hessian_pass.total(second * record.output_gradient)
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


class HBPLeakyReLU(ElementwiseRule, nn.LeakyReLU):
    """``torch.nn.LeakyReLU`` that sends curvature backward."""


class HBPELU(ElementwiseRule, nn.ELU):
    """``torch.nn.ELU`` that sends curvature backward."""


class HBPSELU(ElementwiseRule, nn.SELU):
    """``torch.nn.SELU`` that sends curvature backward."""


class HBPCELU(ElementwiseRule, nn.CELU):
    """``torch.nn.CELU`` that sends curvature backward."""


class HBPGELU(ElementwiseRule, nn.GELU):
    """``torch.nn.GELU`` that sends curvature backward."""


class HBPSiLU(ElementwiseRule, nn.SiLU):
    """``torch.nn.SiLU`` that sends curvature backward."""


class HBPMish(ElementwiseRule, nn.Mish):
    """``torch.nn.Mish`` that sends curvature backward."""


class HBPSoftplus(ElementwiseRule, nn.Softplus):
    """``torch.nn.Softplus`` that sends curvature backward."""


class HBPSoftsign(ElementwiseRule, nn.Softsign):
    """``torch.nn.Softsign`` that sends curvature backward."""


class HBPLogSigmoid(ElementwiseRule, nn.LogSigmoid):
    """``torch.nn.LogSigmoid`` that sends curvature backward."""


class HBPHardtanh(ElementwiseRule, nn.Hardtanh):
    """``torch.nn.Hardtanh`` that sends curvature backward."""


class HBPReLU6(ElementwiseRule, nn.ReLU6):
    """``torch.nn.ReLU6`` that sends curvature backward."""


class HBPHardswish(ElementwiseRule, nn.Hardswish):
    """``torch.nn.Hardswish`` that sends curvature backward."""


class DropoutRule(ElementwiseRule):
    """z = m ⊙ x for a random mask m, the one that was drawn.

    φ' = m and φ'' = 0. Averaged, E[m] is the mean of the samples' masks.
    """

    def forward(self, input: Tensor) -> Tensor:
        """z = m ⊙ x, [N, ...] → [N, ...]."""
        with torch.no_grad():  # The very mask that torch's layer would draw.
            mask = super(ElementwiseRule, self).forward(torch.ones_like(input))
        output = input.mul_(mask) if self.inplace else input * mask
        return self.record(input, output, keep=mask, with_gradient=False)

    def first_derivative(self, mask: Tensor) -> Tensor:
        """φ' = m."""
        return mask

    def second_derivative(self, mask: Tensor, first: Tensor) -> None:
        """φ'' = 0."""
        return


class HBPDropout(DropoutRule, nn.Dropout):
    """``torch.nn.Dropout`` that sends curvature backward."""


class HBPDropout1d(DropoutRule, nn.Dropout1d):
    """``torch.nn.Dropout1d`` that sends curvature backward."""


class HBPDropout2d(DropoutRule, nn.Dropout2d):
    """``torch.nn.Dropout2d`` that sends curvature backward."""


class HBPDropout3d(DropoutRule, nn.Dropout3d):
    """``torch.nn.Dropout3d`` that sends curvature backward."""


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
