"""Hessian backpropagation for PyTorch: curvature sent backward, layer by layer.

Dangel, Harmeling & Hennig, "Modular Block-diagonal Curvature Approximations for
Feedforward Architectures", AISTATS 2020, arXiv 1902.01813.
"""

from hbp import algebra, blocks, distributed, fast  # noqa: F401  # They join the core.
from hbp import inspect as inspect
from hbp import modules as modules
from hbp import nn as nn
from hbp import optim as optim
from hbp.convert import convert as convert
from hbp.damping import LevenbergMarquardt as LevenbergMarquardt
from hbp.inspect import compare_curvature as compare_curvature
from hbp.inspect import condition_number as condition_number
from hbp.inspect import estimate_trace as estimate_trace
from hbp.inspect import extremal_eigenvalues as extremal_eigenvalues
from hbp.inspect import inspect_curvature as inspect_curvature
from hbp.inspect import negative_mass as negative_mass
from hbp.line import CGNewton as CGNewton
from hbp.line import backward as backward
from hbp.losses import batch_summed_hessian as batch_summed_hessian
from hbp.losses import output_hessian as output_hessian
from hbp.losses import per_sample_hessian as per_sample_hessian
from hbp.nn import *  # noqa: F403  # It names nothing but layers.
from hbp.operators import set_dense_limit as set_dense_limit
from hbp.seeds import set_seeds as set_seeds
from hbp.solve import CGResult as CGResult
from hbp.solve import cg as cg

__version__ = "0.1.0"


def __dir__() -> list[str]:
    """What users call, and where they may look; not what only joins the core."""
    joins = {"algebra", "blocks", "core", "damping", "fast"}
    joins |= {"layers", "line", "seeds", "solve"}
    public = {name for name in globals() if not name.startswith("_")}
    return sorted(public - joins | {"__version__"})
