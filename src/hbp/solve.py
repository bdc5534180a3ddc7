"""Conjugate gradients for one symmetric system, as SciPy stops it.

It is one row of ``hbp.core.cg``, with its arguments checked.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hbp.core.cg import cg_rows, check_cg_options, check_trust_radius
from hbp.core.guards import full_precision, is_narrow, require_floats


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

    The iteration [stops][eq-stopping] as soon as ‖r‖ ≤ max(tol·‖b‖, atol), like
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
    r = b
    if x0 is not None and bool(b.any()):
        _check_start(x0, b)
        atol = max(tol * float(torch.linalg.vector_norm(b, dtype=torch.float64)), atol)
        r, tol, budget = b - A @ x0, 0.0, budget - 1
    radius = None if trust_radius is None else b.new_full((1, 1), trust_radius)
    found = cg_rows(
        lambda *_: lambda p: (A @ p[0])[None], r[None], tol, atol, budget, radius
    )
    x = found.x[0] if x0 is None or r is b else found.x[0] + x0
    iterations, residual, *flags = found.facts[0, :5].tolist()
    if not (math.isfinite(residual) and bool(x.isfinite().all())):
        raise ArithmeticError(
            "Conjugate gradients met NaN or infinity: A, b or x0 contains it, or their "
            "numbers are too large for their dtype."
        )
    return CGResult(x, int(iterations), residual, *map(bool, flags))


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
