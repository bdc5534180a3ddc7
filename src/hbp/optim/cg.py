"""Conjugate gradients for one symmetric system, as SciPy stops it.

It differs from ``scipy.sparse.linalg.cg`` where a Newton method needs it to:
negative curvature ends the iteration with the last good iterate, ``maxiter`` bounds
the *products* with A, and the result says what happened.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hbp.checks import is_number, require_floats
from hbp.precision import full_precision, is_narrow


class SupportsProduct(Protocol):
    """Anything that multiplies a vector with ``@``."""

    def __matmul__(self, vector: Tensor, /) -> Tensor:
        """The product A v, [n]."""


class CGResult(NamedTuple):
    """What ``cg`` returns.

    Attributes:
        x: The last iterate, [n].
        iterations: Steps taken.
        residual_norm: ‖b - A x‖ as the recurrence knows it.
        converged: whether residual_norm ≤ max(tol·‖b‖, atol).
        negative_curvature: whether the iteration ended at a direction p with
            pᵀAp ≤ 0, where A is not positive definite.
        on_boundary: whether the iteration ended at ‖x‖ = trust_radius.
    """

    x: Tensor
    iterations: int
    residual_norm: float
    converged: bool
    negative_curvature: bool
    on_boundary: bool = False


def check_cg_options(
    tol: float, atol: float, maxiter: int | None, prefix: str = ""
) -> None:
    """Raise ValueError naming the first of the options that is unusable."""
    if not (is_number(tol) and tol > 0):
        raise ValueError(
            f"{prefix}tol={tol!r} must be positive: the solver stops at a residual of "
            "tol·‖b‖. Use 1e-5 for an accurate solve, 0.1 for a cheap one."
        )
    if not (is_number(atol) and atol >= 0):
        raise ValueError(
            f"{prefix}atol={atol!r} must not be negative. Use 0.0 to stop by "
            f"{prefix}tol alone."
        )
    is_count = isinstance(maxiter, int) and not isinstance(maxiter, bool)
    if maxiter is not None and not (is_count and maxiter >= 1):
        raise ValueError(
            f"{prefix}maxiter={maxiter!r} must be a positive integer, or None for ten "
            "times the number of unknowns."
        )


def check_trust_radius(radius: float | None) -> None:
    """Raise ValueError if the trust radius is unusable."""
    is_real = is_number(radius) and not isinstance(radius, bool)
    if radius is not None and not (is_real and 0 < float(radius) < math.inf):
        raise ValueError(
            f"trust_radius={radius!r} must be a positive finite number: it bounds the "
            "norm of the solution. Use None for no bound."
        )


def to_boundary(x: Tensor, p: Tensor, radius: Tensor | float) -> Tensor:
    """The τ ≥ 0 with ‖x + τp‖ = radius, for ‖x‖ ≤ radius and xᵀp ≥ 0; row by row.

    This is eq-boundary, in units of the radius and of ‖p‖, so that no square over- or
    underflows. Of the two forms of the root, this one does not subtract.
    """
    length = torch.linalg.vector_norm(p, dim=-1, keepdim=True)
    x, p = x / radius, p / length
    slope = (x * p).sum(-1, keepdim=True)
    gap = (1 - (x * x).sum(-1, keepdim=True)).clamp(min=0)
    return gap / (slope + (slope * slope + gap).sqrt()) * (radius / length)


@torch.no_grad()
@full_precision()
def cg(
    A: SupportsProduct,
    b: Tensor,
    x0: Tensor | None = None,
    tol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    trust_radius: float | None = None,
) -> CGResult:
    """Solve A x = b for a symmetric positive definite A.

    [The iteration][eq-cg] is that of Hestenes & Stiefel 1952. It [stops][eq-stopping]
    as soon as ‖r‖ ≤ max(tol·‖b‖, atol), like
    ``scipy.sparse.linalg.cg(A, b, rtol=tol, atol=atol)``.

    With a trust radius, as Steihaug 1983: where a step would leave the ball, and where
    a direction has no positive curvature, the iteration goes along it [to the
    boundary][eq-boundary] and ends there. So A may be indefinite.

    Args:
        A: Symmetric operator or matrix, [n, n]; only ``A @ v`` is used.
        b: Right-hand side, [n]. If it is zero, the solution 0 is returned at once.
        x0: Start, [n], left unchanged; ``None`` means 0. A given start costs one
            product.
        tol: Relative tolerance, positive.
        atol: Absolute tolerance, not negative.
        maxiter: At most this many products with A; ``None`` means 10 n.
        trust_radius: Bound on ‖x‖, positive; ``None`` means no bound. It needs x0 =
            ``None``: only from 0 do the iterates grow in norm.

    Returns:
        The last iterate and what happened, see ``CGResult``.

    Raises:
        TypeError: A has no product, or b or x0 is no tensor.
        ValueError: an option is out of range, or shapes, dtypes or devices do not fit.
        ArithmeticError: b, x0 or a product contains NaN or infinity.
    """
    check_cg_options(tol, atol, maxiter)
    check_trust_radius(trust_radius)
    if trust_radius is not None and x0 is not None:
        raise ValueError(
            f"trust_radius={trust_radius!r} needs a start at 0. Use x0=None."
        )
    _check_shapes(A, b)
    budget = 10 * b.numel() if maxiter is None else maxiter
    largest = _finite("b", b.abs().max())
    if largest == 0:
        return CGResult(torch.zeros_like(b), 0, 0.0, True, False)
    # In units of a power of 2 near max|b|: exact, and r @ r cannot under- or overflow.
    unit = 2.0 ** math.frexp(largest)[1]
    if x0 is None:
        x, r = torch.zeros_like(b), b / unit
    else:
        _check_start(x0, b)
        x, r = x0 / unit, (b - A @ x0) / unit
        budget -= 1
    target = max(tol * float(torch.linalg.vector_norm(b / unit)), atol / unit)

    def result(negative_curvature: bool = False) -> CGResult:
        solution = x * unit
        _finite("the solution", solution.abs().max())
        done = residual <= target
        return CGResult(
            solution, iterations, residual * unit, done, negative_curvature, outside
        )

    p = r.clone()
    rr = _finite("b - A x0", r @ r)
    iterations, bent, outside = 0, False, False
    while (residual := rr**0.5) > target and iterations < budget and not outside:
        Ap = A @ p
        curvature = _finite("A @ p", p @ Ap)
        bent = curvature <= 0
        if bent and trust_radius is None:
            return result(negative_curvature=True)
        step = math.inf if bent else rr / curvature
        if trust_radius is not None:
            longest = float(to_boundary(x, p, trust_radius / unit))
            outside, step = step >= longest, min(step, longest)
        x.add_(p, alpha=step)
        r.sub_(Ap, alpha=step)
        rr_new = _finite("the residual", r @ r)
        p.mul_(rr_new / rr).add_(r)
        rr = rr_new
        iterations += 1
    return result(negative_curvature=bent)


def _check_shapes(A: SupportsProduct, b: Tensor) -> None:
    require_floats("b", b)
    if b.dim() != 1 or b.numel() == 0:
        raise ValueError(f"b must be a vector [n], got shape {list(b.shape)}.")
    if is_narrow(b.dtype):
        raise ValueError(
            f"b is {b.dtype}, too coarse for conjugate gradients. Convert A and b with "
            ".float()."
        )
    shape = tuple(getattr(A, "shape", (len(b), len(b))))
    if shape != (len(b), len(b)):
        raise ValueError(
            f"A has shape {list(shape)}, but b has {len(b)} entries: "
            f"[{len(b)}, {len(b)}] is needed."
        )
    if not hasattr(type(A), "__matmul__"):
        raise TypeError(
            f"A is a {type(A).__name__}, which has no product A @ v. Wrap a function "
            "as hbp.operators.MatrixFree(...)."
        )
    kind = getattr(A, "dtype", b.dtype), getattr(A, "device", b.device)
    if kind != (b.dtype, b.device):
        raise ValueError(
            f"A is {kind[0]} on {kind[1]}, but b is {b.dtype} on {b.device}. Convert "
            "one with .to(...)."
        )


def _check_start(x0: Tensor, b: Tensor) -> None:
    require_floats("x0", x0)
    if x0.shape != b.shape or x0.dtype != b.dtype or x0.device != b.device:
        raise ValueError(
            f"x0 is {list(x0.shape)}, {x0.dtype} on {x0.device}; it must match b: "
            f"{list(b.shape)}, {b.dtype} on {b.device}."
        )


def _finite(name: str, value: Tensor) -> float:
    number = float(value)
    if not abs(number) < float("inf"):
        raise ArithmeticError(
            f"Conjugate gradients met {number}: {name} contains NaN or infinity."
        )
    return number
