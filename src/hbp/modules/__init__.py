"""Layers that send curvature backward."""

from hbp.modules.base import HBPModule as HBPModule
from hbp.modules.containers import HBPSequential as HBPSequential
from hbp.modules.elementwise import ElementwiseRule as ElementwiseRule
from hbp.modules.elementwise import HBPElementwise as HBPElementwise
from hbp.modules.elementwise import HBPReLU as HBPReLU
from hbp.modules.elementwise import HBPSigmoid as HBPSigmoid
from hbp.modules.elementwise import HBPTanh as HBPTanh
from hbp.modules.linear import HBPLinear as HBPLinear
from hbp.modules.shape import HBPFlatten as HBPFlatten
