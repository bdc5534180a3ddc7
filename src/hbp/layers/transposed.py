"""Transposed convolutions: the rules are those of every convolution."""

from __future__ import annotations

from torch import nn

from hbp.core.layers.convolution import ConvolutionRule

# torch's forward of these takes an output_size besides. It would change the layer's
# options from one call to the next, which the rules read but once.


class HBPConvTranspose1d(ConvolutionRule, nn.ConvTranspose1d):  # type: ignore[misc]
    """``torch.nn.ConvTranspose1d`` that sends curvature backward."""

    input_dimensions = 3


class HBPConvTranspose2d(ConvolutionRule, nn.ConvTranspose2d):  # type: ignore[misc]
    """``torch.nn.ConvTranspose2d`` that sends curvature backward."""

    input_dimensions = 4


class HBPConvTranspose3d(ConvolutionRule, nn.ConvTranspose3d):  # type: ignore[misc]
    """``torch.nn.ConvTranspose3d`` that sends curvature backward."""

    input_dimensions = 5
