"""Conjugate gradients on many systems at once: one for each row.

The systems of an optimizer step are small and many, so their vectors are the rows of
one matrix, and every vector operation of the iteration serves all of them. Scalars stay
on the device. A row that is done is frozen by steps of length zero; the host looks
every few iterations, and the rows that it finds done leave.

It differs from ``scipy.sparse.linalg.cg`` where a Newton method needs it to: negative
curvature ends the iteration with the last good iterate, ``maxiter`` bounds the
*products* with A, and the result says what happened. It knows product functions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .guards import is_count, is_number

Product = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """What the iteration ends with, row by row, on the device.

    Attributes:
        x: The last iterates, [systems, width].
        facts: Eight numbers for each row, [systems, 8], in float64: steps taken; the
            residual norm ‖b - A x‖ as the recurrence knows it; whether that is within
            the tolerance; whether the row ended at a direction p with pᵀAp ≤ 0; whether
            it ended at ‖x‖ = radius; there, xᵀ(b - A x), elsewhere 0, for it is
            round-off; ‖x‖; xᵀb. Norms are not finite where A or b is not.
    """

    x: Tensor
    facts: Tensor


class _State(NamedTuple):
    """The iteration, row by row, in units of each row; all but the vectors [k, 1]."""

    x: Tensor
    r: Tensor
    p: Tensor
    rr: Tensor
    target: Tensor
    radius: Tensor
    iterations: Tensor
    bent: Tensor
    left: Tensor
    slope: Tensor
    unit: Tensor


@torch.no_grad()
def cg_rows(
    product_of: Callable[[Sequence[int], Tensor], Product],
    b: Tensor,
    tol: Tensor | float,
    atol: Tensor | float,
    maxiter: int,
    radius: Tensor | None = None,
    check_every: int = 1,
    null: float = 0.0,
) -> Solution:
    """Solve A_i x_i = b_i for every row i, from 0.

    A row is done at ‖r_i‖ ≤ max(tol ‖b_i‖, atol_i). [The iteration][eq-cg] is that of
    Hestenes & Stiefel 1952.

    Args:
        product_of: For indices of rows, as the host and as the device knows them, the
            function that multiplies these rows.
        b: [systems, width].
        tol: Relative tolerance, for all rows or [systems, 1].
        atol: Absolute tolerance, for all rows or [systems, 1].
        maxiter: At most this many products.
        radius: ‖x_i‖ ≤ radius_i, [systems, 1]; ``None`` for no bound.
        check_every: Iterations between two looks of the host.
        null: A curvature pᵀAp/pᵀp of so much of the largest that was met is round-off
            of a direction in the null space, and counts as 0.
    """
    state, live = _start(b, tol, atol, radius), list(range(len(b)))
    found = Solution(torch.empty_like(b), b.new_empty(len(b), 8, dtype=torch.float64))
    places = torch.arange(len(b), device=b.device)
    product = product_of(live, places)
    active = ~(state.rr <= state.target)  # A row of NaN runs, and says so.
    for iteration in range(maxiter + 1):
        if iteration % check_every == 0 or iteration == maxiter:
            running = [False] * len(live)
            if iteration < maxiter:
                running = active.flatten().tolist()  # The host waits here.
            if not all(running):
                # Sorted on the device, which need not wait for an index of the host.
                order = active.flatten().byte().argsort(stable=True)
                ends, stays = order.split([running.count(False), running.count(True)])
                done, at = _State(*[part[ends] for part in state]), places[ends]
                found.x[at] = done.x * done.unit
                found.facts[at] = _facts(done, b[at])
                if not any(running):
                    break
                state, active = _State(*[part[stays] for part in state]), active[stays]
                live = [i for i, runs in zip(live, running, strict=True) if runs]
                places = places[stays]
                product = product_of(live, places)
        active = _iterate(state, product, active, radius is not None, null)
    return found


def _start(
    b: Tensor, tol: Tensor | float, atol: Tensor | float, radius: Tensor | None
) -> _State:
    # In units of a power of 2 near max|b|: exact, and no square over- or underflows.
    largest = torch.linalg.vector_norm(b, math.inf, dim=1, keepdim=True)
    unit = torch.exp2(torch.frexp(largest).exponent.to(b.dtype))
    r, zero = b / unit, torch.zeros_like(unit)
    # A radius that underflows would make x / radius NaN.
    tiny = torch.finfo(b.dtype).tiny
    bound = zero if radius is None else (radius / unit).clamp(min=tiny)
    rr, no = (r * r).sum(1, keepdim=True), zero > 0
    target = torch.maximum(tol * tol * rr, (atol / unit).square())
    vectors = torch.zeros_like(b), r, r.clone()
    return _State(*vectors, rr, target, bound, zero, no, no.clone(), zero.clone(), unit)


def _iterate(
    state: _State, product: Product, active: Tensor, bounded: bool, null: float
) -> Tensor:
    """One step of every active row, in place; which rows are active then."""
    x, r, p, rr, target, radius, iterations, bent, left, slope, _ = state
    Ap = product(p)
    curvature, floor = (p * Ap).sum(1, keepdim=True), slope  # Zeros, unless asked.
    if null > 0:
        pp = (p * p).sum(1, keepdim=True)
        floor = torch.maximum(slope, curvature / pp, out=slope) * pp * null
    advances, step = curvature > floor, rr / curvature
    bent |= active & (curvature <= floor)
    if bounded:  # No row beyond its boundary; a direction that bends leads there.
        longest = to_boundary(x, p, radius)
        leaves = active & (bent | (step >= longest))
        left |= leaves
        advances, step = advances | leaves, torch.where(leaves, longest, step)
    active = active & advances
    # A row that is done takes steps of length 0. One that has met NaN or infinity
    # becomes NaN all over (0 · NaN is NaN), and so says what happened.
    step = torch.where(active, step, 0)
    x.addcmul_(step, p)
    r.addcmul_(step, Ap, value=-1)
    iterations += active
    new = (r * r).sum(1, keepdim=True)
    active = active & (new > target) & ~left
    torch.addcmul(r, p, torch.where(active, new / rr, 0), out=p)
    rr.copy_(new)
    return active


def _facts(done: _State, b: Tensor) -> Tensor:
    """What ``Solution`` tells of rows that are done."""
    x, r, _, rr, target, _, iterations, bent, left, _, unit = done
    # Out of the units in float64: a float32 x can be large or small enough for its
    # square to have no number.
    wide = unit.double()
    overlap = torch.where(left, (x * r).sum(1, keepdim=True), 0) * wide * wide
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide.dtype) * wide
    descent = (x * (b / unit)).sum(1, keepdim=True) * wide * wide
    residual = rr.sqrt() * wide
    columns = iterations, residual, rr <= target, bent, left, overlap, norm, descent
    return torch.cat([column.to(wide) for column in columns], dim=1)


def to_boundary(x: Tensor, p: Tensor, radius: Tensor) -> Tensor:
    """The τ ≥ 0 with ‖x + τp‖ = radius, for ‖x‖ ≤ radius and xᵀp ≥ 0; row by row.

    This is eq-boundary, in units of the radius and of ‖p‖, so that no square over- or
    underflows. Of the two forms of the root, this one does not subtract.
    """
    length = torch.linalg.vector_norm(p, dim=-1, keepdim=True)
    x, p = x / radius, p / length
    slope = (x * p).sum(-1, keepdim=True)
    gap = (1 - (x * x).sum(-1, keepdim=True)).clamp(min=0)
    return gap / (slope + (slope * slope + gap).sqrt()) * (radius / length)


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
    if maxiter is not None and not is_count(maxiter):
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
