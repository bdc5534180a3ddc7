"""The four treatments of a module's second-order term.

Hessian backpropagation through ``z = f(x, θ)`` adds two matrices (eq-hbp),

    H_x = J_xᵀ H_z J_x + mod( Σ_k ∇²_x z_k · δ_k ),      δ = ∂loss/∂z,

(the HBP equation of Dangel, Harmeling & Hennig 2020, arXiv 1902.01813). What is done
to the second one decides which curvature matrix travels backward:

| treatment | mod(R) | curvature matrix |
|---|---|---|
| ``None``, ``"none"`` | R | Hessian; can be indefinite |
| ``"zero"`` | 0 | generalized Gauss-Newton (GGN) |
| ``"abs"`` | absolute value of R | positive-curvature Hessian (PCH) |
| ``"clip"`` | max(R, 0) | the other PCH |

Absolute value and maximum act on the eigenvalues of R (eq-mod). For the elementwise
layers R is diagonal, so they act on its entries, and only the diagonal is ever stored.

With the batch schemes of this package R is *summed over the batch first and
modified after* ("abs of the mean", eq-sum-then-modify), which is not the same matrix
as the sum of per-sample PCHs (eq-two-pchs).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Final

import torch
from torch import Tensor

Treatment = Callable[[Tensor], Tensor] | None
"""How a second-order term's diagonal, [features], is modified; None drops it."""


def _keep(diagonal: Tensor) -> Tensor:
    return diagonal


def _clip(diagonal: Tensor) -> Tensor:
    return diagonal.clamp(min=0)


_TREATMENTS: Final[dict[str | None, Treatment]] = {
    None: _keep,
    "none": _keep,
    "zero": None,
    "abs": torch.abs,
    "clip": _clip,
}


def is_nonnegative(treatment: Treatment) -> bool:
    """Whether a treated diagonal has no negative entry, whatever it was before."""
    own = treatment.modify if isinstance(treatment, _Unscaled) else treatment
    return own is not _keep


@dataclass(frozen=True)
class _Unscaled:
    """mod(R) from s · R, where the loss was multiplied by s > 0."""

    modify: Callable[[Tensor], Tensor]
    loss_scale: float

    def __call__(self, diagonal: Tensor) -> Tensor:
        return self.modify(diagonal) / self.loss_scale


def second_order_treatment(name: str | None, loss_scale: float = 1.0) -> Treatment:
    """Look up the treatment called ``name``.

    Args:
        name: ``None`` or ``"none"``, ``"zero"``, ``"abs"`` or ``"clip"``.
        loss_scale: By how much δ, and with it the term, is too large.

    Returns:
        A function from the diagonal of a second-order term, [features], to the
        modified diagonal, [features]; ``None`` for ``"zero"``, which drops the term.

    Raises:
        ValueError: ``name`` is none of these, or ``loss_scale`` not positive and
            finite.
    """
    # A list or dict is no key; a lookup must not answer with its own TypeError.
    if not isinstance(name, str | None) or name not in _TREATMENTS:
        raise ValueError(
            f"modify_2nd_order_terms={name!r} is unknown. Choose None or 'none' "
            "(Hessian), 'zero' (generalized Gauss-Newton), 'abs' or 'clip' "
            "(positive-curvature Hessians)."
        )
    if not (isinstance(loss_scale, Real) and 0 < loss_scale < math.inf):
        raise ValueError(
            f"loss_scale={loss_scale!r} must be a positive finite number: what the "
            "loss was multiplied by before backward(), as scaler.get_scale()."
        )
    treatment = _TREATMENTS[name]
    if treatment is None or loss_scale == 1:
        return treatment
    return _Unscaled(treatment, float(loss_scale))
