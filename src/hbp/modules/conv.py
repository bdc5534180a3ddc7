"""Convolutions: linear in x and in the weight, so two transposes are all it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from hbp.maps import BiasMap, LinearMap, SampleMap, Watched, transpose_by_autograd
from hbp.modules.base import HBPModule, HessianPass, describe_blocks


class Convolution:
    """x, W ↦ W ∗ x without a bias, and its transposes in x and in W.

    Args:
        layer: Any of torch's convolutions; its options are read, its weight is not.
    """

    def __init__(self, layer: Any) -> None:
        dimensions = len(layer.kernel_size)
        self._transposed = layer.transposed
        self._mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        # A transposed convolution crops its output; others pad their input first.
        padding = layer.padding if layer.transposed else (0,) * dimensions
        self._pads = layer._reversed_padding_repeated_twice
        self._options = (
            layer.stride,
            padding,
            layer.dilation,
            layer.transposed,
            layer.output_padding,
            layer.groups,
        )

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """W ∗ x, [M, C, ...] → [M, out, ...]."""
        return torch.convolution(self._pad(x), weight, None, *self._options)

    def transpose_input(
        self, z: Tensor, weight: Tensor, in_shape: Sequence[int]
    ) -> Tensor:
        """Σ_z z ∂z/∂x, [M, out, ...] → [M, *in_shape]."""
        empty = z.new_empty(()).expand(len(z), *in_shape)
        padded = empty if self._transposed else _padded_shape(empty, self._pads)
        gradient = self._backward(z, padded, weight, 0)
        if self._transposed or not any(self._pads):
            return gradient
        if self._mode == "constant":
            return F.pad(gradient, [-pad for pad in self._pads])
        return transpose_by_autograd(self._pad, gradient, in_shape)

    def transpose_weight(
        self, z: Tensor, x: Tensor, weight_shape: torch.Size
    ) -> Tensor:
        """Σ_z z ∂z/∂W, [M, out, ...] → the shape of W."""
        empty = z.new_empty(()).expand(weight_shape)
        return self._backward(z, self._pad(x), empty, 1)

    def _pad(self, x: Tensor) -> Tensor:
        if self._transposed or not any(self._pads):
            return x
        return F.pad(x, self._pads, mode=self._mode)

    def _backward(self, z: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        # The ops behind torch.nn.grad, which cannot transpose a transposed one.
        wanted = [which == 0, which == 1, False]
        backward = torch.ops.aten.convolution_backward
        return backward(z, x, weight, None, *self._options, wanted)[which]


def _padded_shape(x: Tensor, pads: Sequence[int]) -> Tensor:
    """A stand-in of the shape that x has when padded; torch only reads the shape."""
    before, after = pads[::2], pads[1::2]
    grown = [a + b for a, b in zip(before, after, strict=True)][::-1]
    spatial = [n + more for n, more in zip(x.shape[2:], grown, strict=True)]
    return x.new_empty(()).expand(*x.shape[:2], *spatial)


class ConvolutionMap(SampleMap):
    """∂z/∂x: convolution by a weight that belongs to a layer, for each sample.

    Args:
        convolution: Its options.
        weight: W; read, not copied.
        samples: As in ``SampleMap``, like the two shapes.
    """

    def __init__(
        self,
        convolution: Convolution,
        weight: Tensor,
        samples: int,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
    ) -> None:
        super().__init__(samples, in_shape, out_shape)
        self._convolution = convolution
        self._weight = Watched(weight, "A weight")

    def _apply(self, batch: Tensor) -> Tensor:
        return self._convolution.apply(batch, self._weight.value)

    def _apply_transpose(self, batch: Tensor) -> Tensor:
        weight = self._weight.value
        return self._convolution.transpose_input(batch, weight, self.in_shape)

    def require_fresh(self) -> None:
        _ = self._weight.value


class ConvolutionWeightMap(LinearMap):
    """∂z/∂W: convolution of given inputs.

    Args:
        convolution: Its options.
        inputs: x, [samples, C, ...]; read, not copied.
        weight_shape: Shape of W.
        out_shape: Shape of one sample's z.
    """

    def __init__(
        self,
        convolution: Convolution,
        inputs: Tensor,
        weight_shape: torch.Size,
        out_shape: Sequence[int],
    ) -> None:
        self._convolution = convolution
        self._inputs = Watched(inputs, "An input")
        self._weight_shape = weight_shape
        self._out_shape = (len(inputs), *out_shape)
        self.in_size = weight_shape.numel()
        self.out_size = torch.Size(self._out_shape).numel()

    def forward(self, columns: Tensor) -> Tensor:
        x = self._inputs.value
        weights = columns.T.reshape(-1, *self._weight_shape)
        return _each(lambda w: self._convolution.apply(x, w), weights)

    def transpose(self, columns: Tensor) -> Tensor:
        x = self._inputs.value
        outputs = columns.T.reshape(-1, *self._out_shape)
        return _each(
            lambda z: self._convolution.transpose_weight(z, x, self._weight_shape),
            outputs,
        )

    def require_fresh(self) -> None:
        _ = self._inputs.value


def _each(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """A function of every value, [k, ...], as columns, [n, k]."""
    if len(values) == 1:
        return function(values[0]).reshape(-1, 1)
    return vmap(function)(values).flatten(1).T


class ConvolutionRule(HBPModule):
    """z = W ∗ x + b, a convolution.

    [Rules][eq-convolution] (Dangel, Harmeling & Hennig 2020), with ⟦x⟧ the unfolded
    input:

        H_x = (∂z/∂x)ᵀ H_z (∂z/∂x)
        H_W = (I ⊗ ⟦x⟧) H_z (I ⊗ ⟦x⟧)ᵀ        H_b = Σ_pp' H_z, over positions

    z is linear in x and in (W, b), so there is no second-order term. None of these
    matrices is formed: a product convolves. Over a batch, averaged curvature puts x̄
    for x, one virtual sample; or with ``average_parameter_jacobian=False`` it
    averages the product over the samples' own x.

    Arguments are those of torch's layer, and so are padding modes. The Hessian pass
    takes inputs with a batch dimension.
    """

    average_parameter_jacobian: bool = True
    kernel_size: tuple[int, ...]
    weight: Any
    bias: Any

    def forward(self, input: Tensor) -> Tensor:
        """z = W ∗ x + b, [N, C, ...] → [N, out, ...]."""
        return self.record(input, super().forward(input), keep=input)

    def jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        record = self.last_record
        shapes = record.input_shape[1:], record.output_shape[1:]
        options = Convolution(self)
        return ConvolutionMap(options, self.weight, hessian_pass.samples, *shapes)

    def parameter_jacobians(
        self, hessian_pass: HessianPass
    ) -> Iterable[tuple[Tensor, LinearMap]]:
        record = self.last_record
        x, shape = record.kept, record.output_shape[1:]
        if not hessian_pass.is_exact:
            x = hessian_pass.mean(x).reshape(1, *x.shape[1:])
        hessian_pass.finite(x, "input", self)
        weight = self.weight.shape
        yield self.weight, ConvolutionWeightMap(Convolution(self), x, weight, shape)
        if self.bias is not None:
            positions = shape[1:].numel()
            yield self.bias, BiasMap(hessian_pass.samples, shape[0], positions)

    def _check_pass(self) -> None:
        super()._check_pass()
        shape = self.last_record.input_shape
        if len(shape) != len(self.kernel_size) + 2:
            raise ValueError(
                f"{self} got an input of shape {list(shape)}. Its curvature rules need "
                "a batch dimension: inputs.unsqueeze(0) for one sample."
            )

    def extra_repr(self) -> str:
        """The layer's options and its batch scheme."""
        scheme = f"avg_param_jac: {self.average_parameter_jacobian}"
        return f"{super().extra_repr()}, {scheme}"


class BlockedConvolutionRule(ConvolutionRule):
    """A convolution whose weight has a row for each output channel."""

    sub_blocks: int = 1
    joint_bias: bool = False

    def extra_repr(self) -> str:
        """The layer's options, its batch scheme and what makes its blocks."""
        return super().extra_repr() + describe_blocks(self)


class HBPConv1d(BlockedConvolutionRule, nn.Conv1d):
    """``torch.nn.Conv1d`` that sends curvature backward."""


class HBPConv2d(BlockedConvolutionRule, nn.Conv2d):
    """``torch.nn.Conv2d`` that sends curvature backward."""


class HBPConv3d(BlockedConvolutionRule, nn.Conv3d):
    """``torch.nn.Conv3d`` that sends curvature backward."""


# torch's forward of the next three takes an output_size besides. It would change the
# layer's options from one call to the next, which the rules above read but once.


class HBPConvTranspose1d(ConvolutionRule, nn.ConvTranspose1d):  # type: ignore[misc]
    """``torch.nn.ConvTranspose1d`` that sends curvature backward."""


class HBPConvTranspose2d(ConvolutionRule, nn.ConvTranspose2d):  # type: ignore[misc]
    """``torch.nn.ConvTranspose2d`` that sends curvature backward."""


class HBPConvTranspose3d(ConvolutionRule, nn.ConvTranspose3d):  # type: ignore[misc]
    """``torch.nn.ConvTranspose3d`` that sends curvature backward."""
