"""Conjugate gradients, and the Newton-style optimizer that uses them."""

from hbp.optim.cg import CGResult as CGResult
from hbp.optim.cg import cg as cg
from hbp.optim.cg_newton import CGNewton as CGNewton
from hbp.optim.cg_newton import StepInfo as StepInfo
from hbp.optim.damping import LevenbergMarquardt as LevenbergMarquardt
