"""Further activations: automatic differentiation finds φ' and φ''.

``hbp.nn`` passes on all names, so that what else is imported has a name of its own.
"""

from torch import Tensor as _Tensor
from torch import nn as _nn

from hbp.core.layers.elementwise import ElementwiseRule as _ElementwiseRule


class HBPLeakyReLU(_ElementwiseRule, _nn.LeakyReLU):
    """``torch.nn.LeakyReLU`` that sends curvature backward."""


class HBPELU(_ElementwiseRule, _nn.ELU):
    """``torch.nn.ELU`` that sends curvature backward."""


class HBPSELU(_ElementwiseRule, _nn.SELU):
    """``torch.nn.SELU`` that sends curvature backward."""


class HBPCELU(_ElementwiseRule, _nn.CELU):
    """``torch.nn.CELU`` that sends curvature backward."""


class HBPGELU(_ElementwiseRule, _nn.GELU):
    """``torch.nn.GELU`` that sends curvature backward."""


class HBPSiLU(_ElementwiseRule, _nn.SiLU):
    """``torch.nn.SiLU`` that sends curvature backward."""


class HBPMish(_ElementwiseRule, _nn.Mish):
    """``torch.nn.Mish`` that sends curvature backward."""


class HBPSoftplus(_ElementwiseRule, _nn.Softplus):
    """``torch.nn.Softplus`` that sends curvature backward."""


class HBPSoftsign(_ElementwiseRule, _nn.Softsign):
    """``torch.nn.Softsign`` that sends curvature backward."""


class HBPLogSigmoid(_ElementwiseRule, _nn.LogSigmoid):
    """``torch.nn.LogSigmoid`` that sends curvature backward."""


class HBPHardtanh(_ElementwiseRule, _nn.Hardtanh):
    """``torch.nn.Hardtanh`` that sends curvature backward."""


class HBPReLU6(_ElementwiseRule, _nn.ReLU6):
    """``torch.nn.ReLU6`` that sends curvature backward."""


class HBPHardswish(_ElementwiseRule, _nn.Hardswish):
    """``torch.nn.Hardswish`` that sends curvature backward."""


class HBPHardsigmoid(_ElementwiseRule, _nn.Hardsigmoid):
    """``torch.nn.Hardsigmoid`` that sends curvature backward.

    torch cannot differentiate it twice, so the derivatives stand here.
    """

    derivatives_from_output = True

    def first_derivative(self, z: _Tensor) -> _Tensor:
        """φ' = 1/6 where 0 < z < 1, else 0."""
        return ((z > 0) & (z < 1)).to(z.dtype) / 6

    def second_derivative(self, z: _Tensor, first: _Tensor) -> None:
        """φ'' = 0."""
        return
