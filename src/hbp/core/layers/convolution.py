"""Convolutions: linear in x and in the weight, so two transposes are all it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..jacobians import Bias, Bilinear, Chain, Function, Jacobian
from ..module import HBPModule
from ..operators import Watched


class ConvolutionRule(HBPModule):
    """z = W ∗ x + b, a convolution, transposed or not.

    [Rules][eq-convolution] (Dangel, Harmeling & Hennig 2020), with ⟦x⟧ the unfolded
    input:

        H_x = (∂z/∂x)ᵀ H_z (∂z/∂x)
        H_W = (I ⊗ ⟦x⟧) H_z (I ⊗ ⟦x⟧)ᵀ        H_b = Σ_pp' H_z, over positions

    z is linear in x and in (W, b), so there is no second-order term. None of these
    matrices is formed: a product convolves. Over a batch, averaged curvature puts x̄
    for x, one virtual sample; or with ``average_parameter_jacobian=False`` it averages
    the product over the samples' own x.

    Arguments are those of torch's layer, and so are padding modes. The Hessian pass
    takes inputs with a batch dimension.
    """

    schemes = ("average_parameter_jacobian",)
    weight: Any
    bias: Any

    def forward(self, input: Tensor) -> Tensor:
        """z = W ∗ x + b, [N, C, ...] → [N, out, ...]."""
        return self.record(input, super().forward(input), keep=input)

    def convolution(self: Any) -> Convolution:
        """x, W ↦ W ∗ x as in the latest forward pass."""
        # Zeros of equal widths are left to torch; a transposed convolution crops.
        zeros, named = self.padding_mode == "zeros", isinstance(self.padding, str)
        plain = self.transposed or (zeros and not named)
        pads = [] if plain else self._reversed_padding_repeated_twice
        padding = self.padding if plain else (0,) * len(self.kernel_size)
        options = self.dilation, self.transposed, self.output_padding, self.groups
        mode = "constant" if zeros else self.padding_mode
        return Convolution(pads, mode, (self.stride, padding, *options))

    def jacobian(self) -> Jacobian:
        before, after = self.last_record.input_shape, self.last_record.output_shape
        convolution, W = self.convolution(), self.weight.detach()
        padded = convolution.pad(W.new_empty(()).expand(1, *before[1:])).shape[1:]
        pad = Function(convolution.pad, before[1:], padded, before[0])
        apply, reads = partial(convolution.apply, W), [Watched(W, "A weight")]
        pull = partial(convolution.to_input, W, padded)
        convolve = Function(apply, padded, after[1:], before[0], pull, reads)
        return Chain([pad, convolve] if any(convolution.pads) else [convolve])

    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        x, after = self.last_record.kept, self.last_record.output_shape[1:]
        convolution, shape = self.convolution(), self.weight.shape
        pull = partial(convolution.to_weight, shape)
        yield self.weight, Bilinear(convolution.of_any, pull, x, shape, after)
        if self.bias is not None:
            yield self.bias, Bias(self.bias.shape, after, len(x))


class Convolution(NamedTuple):
    """x, W ↦ W ∗ x of a layer, without its bias. It can be copied and pickled."""

    pads: Sequence[int]
    mode: str
    options: tuple[Any, ...]

    def pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, mode=self.mode) if any(self.pads) else x

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        """W ∗ x for a padded x, [M, C, ...] → [M, out, ...]."""
        return torch.convolution(x, W, None, *self.options)

    def of_any(self, x: Tensor, W: Tensor) -> Tensor:
        """W ∗ x, [N, C, ...] → [N, out, ...]."""
        return self.apply(W, self.pad(x))

    def to_input(self, W: Tensor, shape: torch.Size, u: Tensor) -> Tensor:
        """Σ_z u ∂z/∂x of a padded x, [M, out, ...] → [M, *shape]."""
        return self._backward(u, u.new_empty(()).expand(len(u), *shape), W, 0)

    def to_weight(self, shape: torch.Size, x: Tensor, u: Tensor) -> Tensor:
        """Σ_n Σ_z u ∂z/∂W, of the shape of W."""
        return self._backward(u, self.pad(x), u.new_empty(()).expand(shape), 1)

    def _backward(self, u: Tensor, x: Tensor, W: Tensor, which: int) -> Tensor:
        # The operation behind torch.nn.grad, which cannot transpose a transposed one.
        # Of what it differentiates by, it reads the shape only.
        wanted = [which == 0, which == 1, False]
        backward = torch.ops.aten.convolution_backward
        gradients: list[Tensor] = backward(u, x, W, None, *self.options, wanted)
        return gradients[which]


class HBPConv2d(ConvolutionRule, nn.Conv2d):
    """``torch.nn.Conv2d`` that sends curvature backward."""

    input_dimensions = 4
