"""Conjugate gradients, and the Newton-style optimizer that uses them."""

from hbp.core.newton import StepInfo as StepInfo
from hbp.damping import LevenbergMarquardt as LevenbergMarquardt
from hbp.line import CGNewton as CGNewton
from hbp.line import LineInfo as LineInfo
from hbp.solve import CGResult as CGResult
from hbp.solve import cg as cg
