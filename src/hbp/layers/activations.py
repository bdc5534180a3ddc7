"""Further activations: automatic differentiation finds φ' and φ''."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from hbp.core.layers.elementwise import ElementwiseRule

Function = Callable[[Tensor], Tensor]


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
