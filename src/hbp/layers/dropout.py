"""Dropout: a random diagonal, known once it was drawn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hbp.core.layers.elementwise import ElementwiseRule


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
