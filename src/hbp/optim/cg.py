"""Conjugate gradients for one symmetric system, as SciPy stops it.

It differs from ``scipy.sparse.linalg.cg`` where a Newton method needs it to:
negative curvature ends the iteration with the last good iterate, ``maxiter`` bounds
the *products* with A, and the result says what happened.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


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
    """

    x: Tensor
    iterations: int
    residual_norm: float
    converged: bool
    negative_curvature: bool


def check_cg_options(
    tol: float, atol: float, maxiter: int | None, prefix: str = ""
) -> None:
    """Raise ValueError naming the first of the options that is unusable."""
    if not (isinstance(tol, Real) and tol > 0):
        raise ValueError(
            f"{prefix}tol={tol!r} must be positive: the solver stops at a residual of "
            "tol·‖b‖. Use 1e-5 for an accurate solve, 0.1 for a cheap one."
        )
    if not (isinstance(atol, Real) and atol >= 0):
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


@torch.no_grad()
def cg(
    A: SupportsProduct,
    b: Tensor,
    x0: Tensor | None = None,
    tol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
) -> CGResult:
    """Solve A x = b for a symmetric positive definite A.

    Hestenes & Stiefel 1952. Stops as soon as ‖r‖ ≤ max(tol·‖b‖, atol), like
    ``scipy.sparse.linalg.cg(A, b, rtol=tol, atol=atol)``.

    Args:
        A: Symmetric operator or matrix, [n, n]; only ``A @ v`` is used.
        b: Right-hand side, [n]. If it is zero, the solution 0 is returned at once.
        x0: Start, [n], left unchanged; ``None`` means 0. A given start costs one
            product.
        tol: Relative tolerance, positive.
        atol: Absolute tolerance, not negative.
        maxiter: At most this many products with A; ``None`` means 10 n.

    Returns:
        The last iterate and what happened, see ``CGResult``.

    Raises:
        ValueError: an option is out of range, or shapes do not fit.
        ArithmeticError: b, x0 or a product contains NaN or infinity.
    """
    check_cg_options(tol, atol, maxiter)
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
        return CGResult(solution, iterations, residual * unit, done, negative_curvature)

    p = r.clone()
    rr = _finite("b - A x0", r @ r)
    iterations = 0
    while (residual := rr**0.5) > target and iterations < budget:
        Ap = A @ p
        curvature = _finite("A @ p", p @ Ap)
        if curvature <= 0:
            return result(negative_curvature=True)
        step = rr / curvature
        x.add_(p, alpha=step)
        r.sub_(Ap, alpha=step)
        rr_new = _finite("the residual", r @ r)
        p.mul_(rr_new / rr).add_(r)
        rr = rr_new
        iterations += 1
    return result()


def _check_shapes(A: SupportsProduct, b: Tensor) -> None:
    if b.dim() != 1 or b.numel() == 0 or not b.is_floating_point():
        raise ValueError(
            f"b must be a floating-point vector [n], got shape {list(b.shape)} of "
            f"{b.dtype}."
        )
    shape = tuple(getattr(A, "shape", (len(b), len(b))))
    if shape != (len(b), len(b)):
        raise ValueError(
            f"A has shape {list(shape)}, but b has {len(b)} entries: "
            f"[{len(b)}, {len(b)}] is needed."
        )


def _check_start(x0: Tensor, b: Tensor) -> None:
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
