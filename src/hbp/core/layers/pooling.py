"""Pooling: averages are linear in x, maxima select."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..jacobians import Jacobian, Selection
from ..module import HBPModule


class MaxPoolRule(HBPModule):
    """z_p = max of x over the window of position p: z = Πx, Π selects.

    [Rule][eq-selection] (Dangel, Harmeling & Hennig 2020): H_x = Πᵀ H_z Π, no
    second-order term.

    Which features Π selects differs between samples. Over a batch, H_x is
    E[Π]ᵀ H̄ E[Π], E[Π] being how often a feature was selected; or with
    ``average_input_jacobian=False`` E[Πᵀ H̄ Π].
    """

    schemes = ("average_input_jacobian",)
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
        return self.record(input, super().forward(input), input, with_gradient=False)

    def jacobian(self) -> Jacobian:
        x, z = self.last_record.kept, self.last_record.output_shape
        index = self.pooled(x)[1]
        plane = x.shape[2:].numel()
        starts = torch.arange(0, x[0].numel(), plane, device=x.device)[:, None]
        windows = self._windows(x.shape[2:], z[2:], x.device)
        # Every channel has its own plane: [C, positions, places], -1 in the padding.
        places = (windows + starts[..., None]).where(windows >= 0, -1)
        index = (index.flatten(2) + starts).flatten(1).unsqueeze(2)
        return Selection(index, x.new_ones(1), places.flatten(0, 1), x.shape[1:], z[1:])

    def _windows(
        self, sizes: torch.Size, counts: torch.Size, device: torch.device
    ) -> Tensor:
        """The positions of x under each window, [positions, places]; -1 in the padding.

        Positions count through a plane of x, as the indices of torch's pooling do.
        """
        grid = torch.arange(sizes.numel(), device=device).view(sizes)
        for d, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            at = self.reach(d, size, torch.arange(count, device=device))
            # Dimension d becomes [count, kernel]; the kernel goes to the end.
            grid = grid.movedim(d, -1)[..., at.clamp(0, size - 1)]
            grid = grid.masked_fill((at < 0) | (at >= size), -1).movedim(-2, d)
        return grid.flatten(len(sizes)).flatten(0, len(sizes) - 1)

    def pooled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z, and the positions of its maxima, [N, C, ...]."""
        pools: dict[int, Any] = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
        options = self.kernel_size, self.stride, self.padding, self.dilation
        return pools[x.dim()](x, *options, self.ceil_mode, return_indices=True)

    def reach(self, d: int, size: int, places: Tensor) -> Tensor:
        """What the windows of these places see of dimension d, [places, kernel].

        Whatever is not in 0, …, size - 1 is padding.
        """
        own = self.kernel_size, self.stride, self.padding, self.dilation
        width, stride, padding, step = (o if isinstance(o, int) else o[d] for o in own)
        first = (places * stride - padding)[:, None]
        return first + torch.arange(width, device=places.device) * step


class HBPMaxPool2d(MaxPoolRule, nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` that sends curvature backward."""

    input_dimensions = 4
