"""How long a step is: the curvature of the loss along it.

Each block of a Newton step is solved as if all other parameters stood still, and then
all move at once; and outside x̄ an averaged block is flat. Both faults are in the
*length* of the step, and one exact number mends them: the curvature of the loss along
the step d of all parameters together,

    dᵀGd = Σ_n u_nᵀ H_n u_n,        u = J d.

u is what a forward pass of d through the layers' own rules leaves at the outputs
(Pearlmutter 1994), and H_n u_n one second derivative of the loss in one direction. With
it the step goes to the minimum of the Gauss-Newton model on its line (Martens & Grosse
2015, section 6.4), and promises no more than the loss has above its lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from hbp.core import newton
from hbp.core.containers import HBPResidual, HBPSequential
from hbp.core.guards import full_precision
from hbp.core.module import HBPModule
from hbp.losses import batch_summed_hessian, per_sample_hessian

Moves = Mapping[Tensor, Tensor]
"""By how much each parameter moves."""


@singledispatch
def tangent(layer: HBPModule, u: Tensor | None, moves: Moves) -> Tensor | None:
    """How z moves as x moves by u and each parameter by its own move.

    Args:
        layer: After a forward pass with gradients enabled.
        u: [1, N · in_features]; None where x stays.
        moves: By how much parameters move; those it does not name stay.

    Returns:
        [1, N · out_features], exact for every sample; None where z stays.
    """
    rules = layer.parameter_jacobians() if any(True for _ in _own(layer, moves)) else ()
    terms = [J.jvp(moves[p].reshape(1, -1)) for p, J in rules if p in moves]
    if u is not None:
        terms.append(layer.jacobian().jvp(u))
    return sum(terms[1:], terms[0]) if terms else None


def _own(layer: HBPModule, moves: Moves) -> Iterable[Tensor]:
    return (p for p in layer.parameters(recurse=False) if p in moves)


@tangent.register
def _(chain: HBPSequential, u: Tensor | None, moves: Moves) -> Tensor | None:
    for layer in chain:
        u = tangent(layer, u, moves)
    return u


@tangent.register
def _(layer: HBPResidual, u: Tensor | None, moves: Moves) -> Tensor | None:
    past = u if layer.shortcut is None else tangent(layer.shortcut, u, moves)
    through = tangent(layer.branch, u, moves)
    return through if past is None else past if through is None else past + through


class Line:
    """The loss along any step from here."""

    def __init__(self, model, outputs, gradient, loss, bound):
        self.model, self.outputs, self.gradient = model, outputs, gradient
        self.loss, self.bound = loss, bound

    def curvature(self, moves: Moves) -> Tensor:
        u = tangent(self.model, None, moves)
        if u is None or not self.gradient.requires_grad:
            return self.loss.new_zeros(())
        u = u.view(self.outputs.shape)
        with torch.enable_grad():
            (Hu,) = torch.autograd.grad(
                self.gradient, self.outputs, u.to(self.gradient), retain_graph=True,
                allow_unused=True,
            )
        return self.loss.new_zeros(()) if Hu is None else (u * Hu).sum()


def backward(model, outputs, loss, curvature="abs", exact=False, lower_bound=0.0):
    hessian = (per_sample_hessian if exact else batch_summed_hessian)(loss, outputs)
    (gradient,) = torch.autograd.grad(loss, outputs, create_graph=True)
    torch.autograd.backward(outputs, gradient.detach())
    model.backward_hessian(hessian, modify_2nd_order_terms=curvature)
    line = Line(model, outputs, gradient, loss.detach(), lower_bound)
    for p in model.parameters():
        p.line = line


class CGNewton(newton.CGNewton):
    def __init__(self, params, lr=None, alpha=0.1, cg_tol=0.1, cg_atol=0.0, cg_maxiter=50, **k):
        self.adaptive = lr is None
        self.last_line = None
        self.cap = 1.0
        super().__init__(params, 1.0 if lr is None else lr, alpha, cg_tol=cg_tol, cg_atol=cg_atol, cg_maxiter=cg_maxiter, **k)

    def _take(self, steps):
        if self.adaptive:
            for step in steps: step.info(step.lr)
            moves = {s.equation.parameter: s.change() for s in steps}
            slope = -sum((p.grad * d).sum() for p, d in moves.items())
            line = steps[0].equation.parameter.line
            slope, D, loss = torch.stack([slope, line.curvature(moves), line.loss]).tolist()
            room = loss - line.bound if line.bound is not None else -1
            best = slope / D if D > 0 else math.inf
            if room > 0:
                room *= self.cap
                best = min(best, 2 * room / (slope + math.sqrt(max(slope * slope - 2 * D * room, 0))))
            self.last_line = (best, slope, D, loss)
            steps = [s._replace(lr=s.lr * best) for s in steps]
        super()._take(steps)
