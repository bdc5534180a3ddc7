"""Convolutions: linear in x and in the weight, so two transposes are all it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..jacobians import Bias, Bilinear, Chain, Function, Jacobian
from ..operators import Watched
from .pooling import SpatialRule


class ConvolutionRule(SpatialRule):
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
    kernel_size: tuple[int, ...]
    stride: Any
    padding: Any
    padding_mode: str
    dilation: Any
    transposed: bool
    output_padding: Any
    groups: int
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:
        """z = W ∗ x + b, [N, C, ...] → [N, out, ...]."""
        return self.record(input, super().forward(input), keep=input)

    def jacobian(self) -> Jacobian:
        before, after = self.last_record.input_shape, self.last_record.output_shape
        W, pad = self.weight, self._padding
        padded = pad(W.new_empty(()).expand(1, *before[1:])).shape[1:]
        W, reads = W.detach(), [Watched(W, "A weight")]
        convolve = Function(
            partial(_convolve, self._options, W),
            padded,
            after[1:],
            before[0],
            partial(_transpose_x, self._options, W, padded),
            reads,
        )
        pads = Function(pad, before[1:], padded, before[0])
        return Chain([pads, convolve] if pad.keywords["pads"] else [convolve])

    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        x, after = self.last_record.kept, self.last_record.output_shape[1:]
        shape, options = self.weight.shape, (self._options, self._padding)
        push = partial(_convolve_by, *options)
        pull = partial(_transpose_W, *options, shape)
        yield self.weight, Bilinear(push, pull, x, shape, after)
        if self.bias is not None:
            yield self.bias, Bias(self.bias.shape, after, len(x))

    @property
    def _padding(self) -> partial[Tensor]:
        """What is padded beforehand; zeros of equal widths are left to torch."""
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        pads = self._reversed_padding_repeated_twice
        pads = [] if plain or self.transposed or not any(pads) else pads
        return partial(_pad, pads=pads, mode=self.padding_mode)

    @property
    def _options(self) -> tuple[Any, ...]:
        # "valid", or "same" for a kernel of one place, is no padding.
        padded = self._padding.keywords["pads"] or isinstance(self.padding, str)
        padding = (0,) * len(self.kernel_size) if padded else self.padding
        options = self.dilation, self.transposed, self.output_padding, self.groups
        return (self.stride, padding, *options)

    @property
    def dimensions(self) -> int:  # type: ignore[override]
        """Of space."""
        return len(self.kernel_size)


Options = tuple[Any, ...]
Pad = Callable[[Tensor], Tensor]

# Functions of the module: what holds them can be copied and pickled.


def _pad(x: Tensor, pads: list[int], mode: str) -> Tensor:
    if not pads:
        return x
    return F.pad(x, pads, mode="constant" if mode == "zeros" else mode)


def _convolve(options: Options, W: Tensor, x: Tensor) -> Tensor:
    """W ∗ x for a padded x, [M, C, ...] → [M, out, ...]."""
    return torch.convolution(x, W, None, *options)


def _convolve_by(options: Options, pad: Pad, x: Tensor, W: Tensor) -> Tensor:
    return _convolve(options, W, pad(x))


def _transpose_x(options: Options, W: Tensor, shape: torch.Size, u: Tensor) -> Tensor:
    """Σ_z u ∂z/∂x, [M, out, ...] → [M, *shape], padding included."""
    like = u.new_empty(()).expand(len(u), *shape)
    return _backward(options, u, like, W, 0)


def _transpose_W(
    options: Options, pad: Pad, shape: torch.Size, x: Tensor, u: Tensor
) -> Tensor:
    """Σ_z u ∂z/∂W, summed over the samples."""
    return _backward(options, u, pad(x), u.new_empty(()).expand(shape), 1)


def _backward(options: Options, u: Tensor, x: Tensor, W: Tensor, which: int) -> Tensor:
    # The operation behind torch.nn.grad, which cannot transpose a transposed one. Of
    # what it differentiates by, it reads the shape only.
    wanted = [which == 0, which == 1, False]
    backward = torch.ops.aten.convolution_backward
    gradient: Tensor = backward(u, x, W, None, *options, wanted)[which]
    return gradient


class HBPConv1d(ConvolutionRule, nn.Conv1d):
    """``torch.nn.Conv1d`` that sends curvature backward."""


class HBPConv2d(ConvolutionRule, nn.Conv2d):
    """``torch.nn.Conv2d`` that sends curvature backward."""


class HBPConv3d(ConvolutionRule, nn.Conv3d):
    """``torch.nn.Conv3d`` that sends curvature backward."""
