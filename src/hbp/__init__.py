"""Hessian backpropagation for PyTorch: curvature sent backward, layer by layer.

Dangel, Harmeling & Hennig, "Modular Block-diagonal Curvature Approximations for
Feedforward Architectures", AISTATS 2020, arXiv 1902.01813.
"""

from hbp.convert import convert as convert
from hbp.inspection import compare_curvature as compare_curvature
from hbp.inspection import condition_number as condition_number
from hbp.inspection import estimate_trace as estimate_trace
from hbp.inspection import extremal_eigenvalues as extremal_eigenvalues
from hbp.inspection import inspect_curvature as inspect_curvature
from hbp.inspection import negative_mass as negative_mass
from hbp.losses import batch_summed_hessian as batch_summed_hessian
from hbp.losses import output_hessian as output_hessian
from hbp.modules import HBPElementwise as HBPElementwise
from hbp.modules import HBPFlatten as HBPFlatten
from hbp.modules import HBPLinear as HBPLinear
from hbp.modules import HBPModule as HBPModule
from hbp.modules import HBPReLU as HBPReLU
from hbp.modules import HBPSequential as HBPSequential
from hbp.modules import HBPSigmoid as HBPSigmoid
from hbp.modules import HBPTanh as HBPTanh
from hbp.optim import CGNewton as CGNewton
from hbp.optim import CGResult as CGResult
from hbp.optim import cg as cg
from hbp.seeds import set_seeds as set_seeds
