"""Further maxima: of one and three dimensions, and to an output of given size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbp.core.layers.pooling import MaxPoolRule


class AdaptiveMaxPoolRule(MaxPoolRule):
    """z_p = max of x over the window of position p, which begins at ⌊p · in / out⌋.

    The rule is that of [maximum pooling][hbp.core.layers.pooling.MaxPoolRule].
    """

    output_size: Any

    def pooled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pool: Any = getattr(F, f"adaptive_max_pool{x.dim() - 2}d")
        return pool(x, self.output_size, return_indices=True)

    def reach(self, d: int, size: int, places: Tensor) -> Tensor:
        count = len(places)
        first, end = places * size // count, -(-(places + 1) * size // count)
        # A window has at most one more than in / out, rounded up.
        at = first[:, None] + torch.arange(size // count + 2, device=places.device)
        return at.where(at < end[:, None], -1)


class HBPAdaptiveMaxPool1d(AdaptiveMaxPoolRule, nn.AdaptiveMaxPool1d):
    """``torch.nn.AdaptiveMaxPool1d`` that sends curvature backward."""

    input_dimensions = 3


class HBPAdaptiveMaxPool2d(AdaptiveMaxPoolRule, nn.AdaptiveMaxPool2d):
    """``torch.nn.AdaptiveMaxPool2d`` that sends curvature backward."""

    input_dimensions = 4


class HBPAdaptiveMaxPool3d(AdaptiveMaxPoolRule, nn.AdaptiveMaxPool3d):
    """``torch.nn.AdaptiveMaxPool3d`` that sends curvature backward."""

    input_dimensions = 5


class HBPMaxPool1d(MaxPoolRule, nn.MaxPool1d):
    """``torch.nn.MaxPool1d`` that sends curvature backward."""

    input_dimensions = 3


class HBPMaxPool3d(MaxPoolRule, nn.MaxPool3d):
    """``torch.nn.MaxPool3d`` that sends curvature backward."""

    input_dimensions = 5
