"""Layers that are one linear, or affine, function, the same for every sample.

``hbp.nn`` passes on all names, so that what else is imported has a name of its own.
"""

from torch import nn as _nn

from hbp.core.layers.shape import LinearRule as _LinearRule
from hbp.layers.general import AffineRule as _AffineRule


class HBPAvgPool1d(_LinearRule, _nn.AvgPool1d):
    """``torch.nn.AvgPool1d`` that sends curvature backward."""


class HBPAvgPool2d(_LinearRule, _nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` that sends curvature backward."""


class HBPAvgPool3d(_LinearRule, _nn.AvgPool3d):
    """``torch.nn.AvgPool3d`` that sends curvature backward."""


class HBPAdaptiveAvgPool1d(_LinearRule, _nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d`` that sends curvature backward."""


class HBPAdaptiveAvgPool2d(_LinearRule, _nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` that sends curvature backward."""


class HBPAdaptiveAvgPool3d(_LinearRule, _nn.AdaptiveAvgPool3d):
    """``torch.nn.AdaptiveAvgPool3d`` that sends curvature backward."""


class HBPZeroPad1d(_LinearRule, _nn.ZeroPad1d):
    """``torch.nn.ZeroPad1d`` that sends curvature backward."""


class HBPZeroPad2d(_LinearRule, _nn.ZeroPad2d):
    """``torch.nn.ZeroPad2d`` that sends curvature backward."""


class HBPZeroPad3d(_LinearRule, _nn.ZeroPad3d):
    """``torch.nn.ZeroPad3d`` that sends curvature backward."""


class HBPReflectionPad1d(_LinearRule, _nn.ReflectionPad1d):
    """``torch.nn.ReflectionPad1d`` that sends curvature backward."""


class HBPReflectionPad2d(_LinearRule, _nn.ReflectionPad2d):
    """``torch.nn.ReflectionPad2d`` that sends curvature backward."""


class HBPReflectionPad3d(_LinearRule, _nn.ReflectionPad3d):
    """``torch.nn.ReflectionPad3d`` that sends curvature backward."""


class HBPReplicationPad1d(_LinearRule, _nn.ReplicationPad1d):
    """``torch.nn.ReplicationPad1d`` that sends curvature backward."""


class HBPReplicationPad2d(_LinearRule, _nn.ReplicationPad2d):
    """``torch.nn.ReplicationPad2d`` that sends curvature backward."""


class HBPReplicationPad3d(_LinearRule, _nn.ReplicationPad3d):
    """``torch.nn.ReplicationPad3d`` that sends curvature backward."""


class HBPCircularPad1d(_LinearRule, _nn.CircularPad1d):
    """``torch.nn.CircularPad1d`` that sends curvature backward."""


class HBPCircularPad2d(_LinearRule, _nn.CircularPad2d):
    """``torch.nn.CircularPad2d`` that sends curvature backward."""


class HBPCircularPad3d(_LinearRule, _nn.CircularPad3d):
    """``torch.nn.CircularPad3d`` that sends curvature backward."""


class HBPConstantPad1d(_AffineRule, _nn.ConstantPad1d):
    """``torch.nn.ConstantPad1d`` that sends curvature backward."""


class HBPConstantPad2d(_AffineRule, _nn.ConstantPad2d):
    """``torch.nn.ConstantPad2d`` that sends curvature backward."""


class HBPConstantPad3d(_AffineRule, _nn.ConstantPad3d):
    """``torch.nn.ConstantPad3d`` that sends curvature backward."""


class HBPPixelShuffle(_LinearRule, _nn.PixelShuffle):
    """``torch.nn.PixelShuffle`` that sends curvature backward."""


class HBPPixelUnshuffle(_LinearRule, _nn.PixelUnshuffle):
    """``torch.nn.PixelUnshuffle`` that sends curvature backward."""


class HBPUpsample(_LinearRule, _nn.Upsample):
    """``torch.nn.Upsample`` that sends curvature backward."""
