"""Adaptive pooling: the size of the output is given."""

from __future__ import annotations

from torch import nn

from hbp.core.layers.shape import LinearRule


class HBPAdaptiveAvgPool1d(LinearRule, nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d`` that sends curvature backward."""


class HBPAdaptiveAvgPool2d(LinearRule, nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` that sends curvature backward."""


class HBPAdaptiveAvgPool3d(LinearRule, nn.AdaptiveAvgPool3d):
    """``torch.nn.AdaptiveAvgPool3d`` that sends curvature backward."""
