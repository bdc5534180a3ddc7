"""Conjugate gradients on many systems at once, without waiting for a GPU.

The systems of one optimizer step are small and many: their vectors fill the rows of
one matrix, and every vector operation of the iteration serves all of them. Scalars
stay on the device. A row that is done is frozen there by steps of length zero, so
the result does not depend on how often the host looks; it looks every few iterations,
and leaves out the products of the rows it finds done.

Row by row, the iterates are those of ``hbp.cg``, which is the one to read first
(eq-cg).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from hbp.distributed import JointOperator, add_joint_products
from hbp.operators import SymmetricOperator
from hbp.optim.cg import to_boundary

CHECK_EVERY: Final = 3
"""Iterations between two reads of what is done: each read makes the host wait."""


class Damped(NamedTuple):
    """The system [(1-α)A + αI] x = b, and when to stop.

    Attributes:
        operator: A, [k, k]. Where b is longer than k, A has zeros there.
        alpha: α.
        b: Right-hand side, [n], n ≥ k.
        tol: Stop at ‖r‖ ≤ max(tol·‖b‖, share·atol).
        atol: See ``tol``.
        maxiter: At most this many products; ``None`` means 10 n.
        share: ‖b‖ relative to the norm of the whole right-hand side of which b is a
            part, a scalar tensor. Of ``atol``, this part may take that share, so that
            the whole residual keeps within it. ``None`` if b is the whole.
        trust_radius: ‖x‖ ≤ share·trust_radius; ``None`` means no bound. The shares'
            squares add up to 1, so that the whole keeps within trust_radius.
    """

    operator: SymmetricOperator
    alpha: float
    b: Tensor
    tol: float
    atol: float
    maxiter: int | None
    share: Tensor | None = None
    trust_radius: float | None = None

    @property
    def budget(self) -> int:
        """At most this many products."""
        # Beyond that, no float tells one count from the next.
        return 10 * len(self.b) if self.maxiter is None else min(self.maxiter, 2**53)


class LockstepResult(NamedTuple):
    """What ``cg_lockstep`` returns, one row or entry per system, on the device.

    Attributes:
        x: The last iterates, [systems, width]; row i is padded with zeros.
        iterations: Steps taken.
        residual_norm: ‖b - [(1-α)A + αI] x‖ as the recurrence knows it. Where the
            system has NaN or infinity, this or ``norm`` is not finite, and the other
            entries mean nothing.
        converged: Whether residual_norm ≤ max(tol·‖b‖, share·atol).
        negative_curvature: Whether the iteration ended at a direction p with
            pᵀ[(1-α)A + αI]p ≤ 0.
        norm: ‖x‖.
        descent: xᵀb.
        on_boundary: Whether the iteration ended at ‖x‖ = share·trust_radius.
        overlap: xᵀr there, and 0 elsewhere, where it is round-off.
    """

    x: Tensor
    iterations: Tensor
    residual_norm: Tensor
    converged: Tensor
    negative_curvature: Tensor
    norm: Tensor
    descent: Tensor
    on_boundary: Tensor
    overlap: Tensor


@torch.no_grad()
def cg_lockstep(
    systems: Sequence[Damped], check_every: int = CHECK_EVERY
) -> LockstepResult:
    """Solve systems of one dtype and device by conjugate gradients from 0.

    Args:
        systems: At least one.
        check_every: Iterations between two host reads.

    Returns:
        The iterates that ``hbp.cg`` ends with, and what happened.
    """
    b = _rows([system.b for system in systems])
    options = [(s.alpha, s.tol, s.atol, s.budget) for s in systems]
    alpha, tol, atol, budget = _to_device(options, b).unsqueeze(2).unbind(1)
    whole = b.new_ones(())
    shares = [whole if s.share is None else s.share for s in systems]
    share = torch.stack(shares).unsqueeze(1)
    atol = atol * share

    # In units of a power of 2 near max|b|: exact, and no square over- or underflows.
    exponent = torch.frexp(b.abs().amax(1, keepdim=True)).exponent
    unit = torch.exp2(exponent.to(b.dtype))
    r = b / unit
    p, x, Ap = r.clone(), torch.zeros_like(b), torch.empty_like(b)
    multiply = _multiplier(systems, alpha, p, Ap)
    rr = _dot(r, r)
    target = torch.maximum(tol * tol * rr, (atol / unit).square())
    active = rr > target
    iterations, zero = torch.zeros_like(rr), b.new_zeros(())
    region = _Region.of(systems, share, unit)

    for iteration in range(max(system.budget for system in systems)):
        if iteration % check_every == 0:
            running = active.flatten().tolist()
            if not any(running):
                break
        multiply(running)
        curvature = _dot(p, Ap)
        advances, step = curvature > 0, rr / curvature
        if region is not None:
            advances, step = region.cut(x, p, step, curvature, active)
        active &= advances
        # A row that is done takes steps of length 0. One that has met NaN or infinity
        # becomes NaN all over (0 · NaN is NaN), and so says what happened.
        step = torch.where(active, step, zero)
        x.addcmul_(step, p)
        r.addcmul_(step, Ap, value=-1)
        iterations += active
        rr_new = _dot(r, r)
        active &= (rr_new > target) & (iterations < budget)
        if region is not None:
            active &= ~region.left
        torch.addcmul(r, p, torch.where(active, rr_new / rr, zero), out=p)
        rr = rr_new

    converged = rr <= target
    bent = ~converged & (iterations < budget)
    left, overlap = torch.zeros_like(bent), torch.zeros_like(rr)
    if region is not None:
        left = region.left
        bent = torch.where(left, region.bent, bent)
        overlap = torch.where(left, _dot(x, r), zero)
    # A float32 x can be large or small enough for its square to have no number.
    wide, norm = unit.double(), torch.linalg.vector_norm
    per_system = (
        iterations,
        rr.sqrt() * unit,
        converged,
        bent,
        norm(x, dim=1, keepdim=True, dtype=wide.dtype) * wide,
        _dot(x, b / unit) * wide * wide,
        left,
        overlap * wide * wide,
    )
    return LockstepResult(x * unit, *(values.squeeze(1) for values in per_system))


class _Region:
    """The trust regions of the rows, and which rows have met their boundary."""

    def __init__(self, radius: Tensor, unit: Tensor) -> None:
        self.bounded = radius.isfinite()
        # A radius that underflows would make x / radius NaN.
        self.radius = (radius / unit).clamp(min=torch.finfo(unit.dtype).tiny)
        self.left = torch.zeros_like(self.bounded)
        self.bent = torch.zeros_like(self.bounded)

    @classmethod
    def of(
        cls, systems: Sequence[Damped], share: Tensor, unit: Tensor
    ) -> _Region | None:
        """The regions, or ``None`` if no system has one."""
        radii = [s.trust_radius for s in systems]
        if all(radius is None for radius in radii):
            return None
        rows = [[math.inf if radius is None else radius] for radius in radii]
        radius = _to_device(rows, unit)
        return cls(torch.where(radius.isfinite(), radius * share, radius), unit)

    def cut(
        self, x: Tensor, p: Tensor, step: Tensor, curvature: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which rows may advance, and how far: none beyond its boundary."""
        longest, bent = to_boundary(x, p, self.radius), curvature <= 0
        leaves = active & self.bounded & (bent | (step >= longest))
        self.left |= leaves
        self.bent |= leaves & bent
        return (curvature > 0) | leaves, torch.where(leaves, longest, step)


def _multiplier(
    systems: Sequence[Damped], alpha: Tensor, p: Tensor, Ap: Tensor
) -> Callable[[Sequence[bool]], None]:
    """A function that fills the rows of Ap with [(1-α)A + αI] p.

    It holds views of p and Ap, so these must be written in place ever after.
    """
    parts = []
    for i, (operator, own_alpha, *_) in enumerate(systems):
        k = operator.shape[0]
        parts.append((operator, Ap[i, :k, None], p[i, :k, None], 1 - own_alpha))

    def multiply(running: Sequence[bool]) -> None:
        torch.mul(p, alpha, out=Ap)
        joint: list[tuple[JointOperator, Tensor, Tensor, float]] = []
        for part, is_running in zip(parts, running, strict=True):
            operator, Ap_row, p_row, weight = part
            if not is_running:
                continue
            if isinstance(operator, JointOperator):
                joint.append((operator, Ap_row, p_row, weight))
            else:
                operator.add_product(Ap_row, p_row, weight)
        add_joint_products(joint)

    return multiply


def _to_device(values: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Numbers of the host as a tensor; from pinned memory, so that no GPU waits."""
    pinned = like.device.type == "cuda"
    host = torch.tensor(values, dtype=like.dtype, pin_memory=pinned)
    return host.to(like.device, non_blocking=True)


def _rows(vectors: Sequence[Tensor]) -> Tensor:
    """Vectors as rows, padded with zeros."""
    width = max(len(vector) for vector in vectors)
    rows = vectors[0].new_zeros(len(vectors), width)
    for row, vector in zip(rows, vectors, strict=True):
        row[: len(vector)] = vector
    return rows


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """Inner products row by row, [systems, 1]."""
    return (u * v).sum(1, keepdim=True)
