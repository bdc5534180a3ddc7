"""Pooling: averages are linear in x, maxima select."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbp.maps import LinearMap, SelectionMap
from hbp.modules.base import HBPModule, HessianPass
from hbp.modules.shape import LinearRule


class HBPAvgPool1d(LinearRule, nn.AvgPool1d):
    """``torch.nn.AvgPool1d`` that sends curvature backward."""


class HBPAvgPool2d(LinearRule, nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` that sends curvature backward."""


class HBPAvgPool3d(LinearRule, nn.AvgPool3d):
    """``torch.nn.AvgPool3d`` that sends curvature backward."""


class HBPAdaptiveAvgPool1d(LinearRule, nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d`` that sends curvature backward."""


class HBPAdaptiveAvgPool2d(LinearRule, nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` that sends curvature backward."""


class HBPAdaptiveAvgPool3d(LinearRule, nn.AdaptiveAvgPool3d):
    """``torch.nn.AdaptiveAvgPool3d`` that sends curvature backward."""


class MaxPoolRule(HBPModule):
    """z_p = max of x over the window of position p: z = Πx, Π selects.

    [Rule][eq-selection] (Dangel, Harmeling & Hennig 2020): H_x = Πᵀ H_z Π, no
    second-order term.

    Which features Π selects differs between samples. Over a batch, H_x is
    E[Π]ᵀ H̄ E[Π], E[Π] being how often a feature was selected; or with
    ``average_input_jacobian=False`` E[Πᵀ H̄ Π].
    """

    average_input_jacobian: bool = True
    dimensions: int
    # int, or one for each dimension; torch's classes declare them in several ways.
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    ceil_mode: bool
    return_indices: bool

    def forward(self, input: Tensor) -> Tensor:
        """z, [N, C, ...] → [N, C, ...]."""
        if self.return_indices:
            raise ValueError(
                f"{self} has return_indices=True, but the layers above take one tensor."
            )
        output = super().forward(input)
        return self.record(input, output, keep=input, with_gradient=False)

    def _check_pass(self) -> None:
        super()._check_pass()
        shape = self.last_record.input_shape
        if len(shape) != self.dimensions + 2:
            raise ValueError(
                f"{self} got an input of shape {list(shape)}. Its curvature rules need "
                "a batch dimension: inputs.unsqueeze(0) for one sample."
            )

    def _chosen(self) -> Tensor:
        """Which position of its plane is the maximum, [N, C, positions]."""
        x = self.last_record.kept
        pools = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
        pool: Callable[..., tuple[Tensor, Tensor]] = pools[x.dim()]
        options = self.kernel_size, self.stride, self.padding, self.dilation
        _, index = pool(x, *options, self.ceil_mode, return_indices=True)
        return index.flatten(2)

    def jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        chosen = hessian_pass.once(self.last_record, self._chosen)
        x = self.last_record.kept
        samples, channels, _ = chosen.shape
        plane = x[0, 0].numel()
        starts = torch.arange(samples * channels, device=x.device) * plane
        if hessian_pass.is_exact:
            picks = chosen.flatten(0, 1) + starts.unsqueeze(1)
            ones = x.new_ones(picks.numel(), 1)
            return SelectionMap(picks.reshape(-1, 1), ones, x.numel())
        windows = self._windows(x.device)
        counts = self._counts(chosen, windows).to(x.dtype)
        share = hessian_pass.mean_of_sum(counts, samples)
        index = windows.clamp(min=0) + starts[:channels].reshape(-1, 1, 1)
        return SelectionMap(index.flatten(0, 1), share.flatten(0, 1), x[0].numel())

    def _counts(self, chosen: Tensor, windows: Tensor) -> Tensor:
        """How often each place of a window was the maximum, [C, positions, places]."""
        return (chosen.unsqueeze(3) == windows).sum(0)

    def _windows(self, device: torch.device) -> Tensor:
        """The positions of x under each window, [positions, places]; -1 in the padding.

        Positions count through a plane of x, as the indices of torch's pooling do.
        """
        record = self.last_record
        places = torch.zeros(1, 1, dtype=torch.long, device=device)
        outside = torch.zeros(1, 1, dtype=torch.bool, device=device)
        sizes, counts = record.input_shape[2:], record.output_shape[2:]
        options = self.kernel_size, self.stride, self.padding, self.dilation
        for d, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            kernel, stride, padding, dilation = (_of_dimension(o, d) for o in options)
            first = torch.arange(count, device=device) * stride - padding
            at = first[:, None] + torch.arange(kernel, device=device) * dilation
            # [P, K] and [count, kernel] → [P · count, K · kernel]
            places = _combine(places * size, at)
            beyond = (at < 0) | (at >= size)
            outside = _combine(outside.long(), beyond.long()) > 0
        return places.masked_fill(outside, -1)

    def extra_repr(self) -> str:
        """The layer's options and its batch scheme."""
        return f"{super().extra_repr()}, avg_input_jac: {self.average_input_jacobian}"


def _of_dimension(option: int | Sequence[int], d: int) -> int:
    return option if isinstance(option, int) else option[d]


def _combine(first: Tensor, second: Tensor) -> Tensor:
    """a_pk + b_ql as one matrix, [p · q, k · l]."""
    total = first[:, None, :, None] + second[None, :, None, :]
    return total.flatten(2).flatten(0, 1)


class HBPMaxPool1d(MaxPoolRule, nn.MaxPool1d):
    """``torch.nn.MaxPool1d`` that sends curvature backward."""

    dimensions = 1


class HBPMaxPool2d(MaxPoolRule, nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` that sends curvature backward."""

    dimensions = 2


class HBPMaxPool3d(MaxPoolRule, nn.MaxPool3d):
    """``torch.nn.MaxPool3d`` that sends curvature backward."""

    dimensions = 3
