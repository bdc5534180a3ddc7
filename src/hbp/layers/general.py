"""Layers whose rules automatic differentiation finds.

A subclass puts a rule before the ``torch.nn`` layer that computes z, and is done. A
rule of its own is faster; this one is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vjp, vmap

from hbp.core import settings
from hbp.core.jacobians import Bilinear, Function, Jacobian
from hbp.core.layers.shape import LinearRule
from hbp.core.module import HBPModule, Reading
from hbp.core.operators import SampleBlocks, SymmetricOperator, Watched


class Dense(Jacobian):
    """A dense Jacobian of its own for each sample; ``data`` is J, [N, z, x]."""

    def __init__(
        self, J: Tensor, in_shape: Sequence[int], out_shape: Sequence[int]
    ) -> None:
        super().__init__(in_shape, out_shape, len(J), J)

    def jvp(self, rows: Tensor) -> Tensor:
        return self._multiply(rows, lambda J: J.mT)

    def vjp(self, rows: Tensor) -> Tensor:
        return self._multiply(rows, lambda J: J)

    def _multiply(self, rows: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
        # One product per sample for all rows: one per row would copy the matrices.
        parts = rows.reshape(len(rows), self.samples, -1).transpose(0, 1)
        return (parts @ turn(self.data)).transpose(0, 1).flatten(1)


class AffineRule(LinearRule):
    """z = Πx + c, the same Π and c for every sample; autograd parts the two.

    [Rule][eq-selection]: H_x = Πᵀ H_z Π, and there is no second-order term.
    """

    def jacobian(self) -> Jacobian:
        before, after = self.last_record.input_shape, self.last_record.output_shape
        push, pull = _linear_part(super().forward)

        def transpose(u: Tensor) -> Tensor:
            return pull(u, u.new_zeros(len(u), *before[1:]))

        shapes = before[1:], after[1:], before[0]
        return Function(push, *shapes, transpose, self._watched())

    def _watched(self, but: Tensor | None = None) -> list[Watched]:
        """What a product reads of the layer."""
        own = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        return [Watched(value, "A weight") for value in own if value is not but]


class BilinearRule(AffineRule):
    """z = f(x, θ₁, θ₂, …), linear in x and in each of the layer's own parameters.

    Rules, with both Jacobians by automatic differentiation, never formed:

        H_x = JᵀH_z J, J = ∂z/∂x        H_θ = JᵀH_z J, J = ∂z/∂θ

    A constant part, such as a bias, may be added; no second-order term appears. Over
    a batch, J = ∂z/∂θ is that of x̄, or with ``average_parameter_jacobian=False``
    H_θ is E[JᵀH̄ J]. ∂z/∂x is the same for all samples.
    """

    schemes = ("average_parameter_jacobian",)

    def forward(self, input: Tensor) -> Tensor:
        """z = f(x, θ), [N, ...] → [N, ...]."""
        return self.record(input, super().forward(input), keep=input)

    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        x, z = self.last_record.kept, self.last_record.output_shape
        for name, parameter in self.named_parameters(recurse=False):
            yield (
                parameter,
                Bilinear(
                    partial(self._push, name),
                    partial(self._pull, name, parameter.detach()),
                    x,
                    parameter.shape,
                    z[1:],
                    self._watched(but=parameter),
                ),
            )

    def check_record(self) -> None:
        super().check_record()
        inside = [name for name, _ in self.named_parameters() if "." in name]
        inside += [n for n, v in vars(self).items() if getattr(v, "grad_fn", None)]
        if inside:
            raise TypeError(
                f"BilinearRule varies a layer's own parameters, but {inside[0]} of "
                f"{type(self).__name__} belongs to a module inside it, or is computed "
                "before each pass, as by pruning. Register it on the layer, or build "
                "the layer as an HBPSequential; undo pruning by prune.remove()."
            )

    def _push(self, name: str, x: Tensor, v: Tensor) -> Tensor:
        push, _ = _linear_part(partial(self._varied, name, x))
        return push(v)

    def _pull(self, name: str, like: Tensor, x: Tensor, u: Tensor) -> Tensor:
        _, pull = _linear_part(partial(self._varied, name, x))
        return pull(u, torch.zeros_like(like))

    def _varied(self, name: str, x: Tensor, value: Tensor) -> Tensor:
        """z with another value for one parameter; no hook runs, nothing is recorded."""
        parameters: dict[str, Any] = self._parameters
        own = parameters[name]
        parameters[name] = value
        try:
            return super().forward(x)
        finally:
            parameters[name] = own


def _linear_part(
    function: Callable[[Tensor], Tensor],
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """v ↦ Jv, and u, a v of the right shape ↦ Jᵀu, of an affine function.

    function(v) - function(0) would lose the digits of a small v beside a large
    constant. u ↦ Jᵀu is linear, and its transpose is J.
    """

    def push(v: Tensor) -> Tensor:
        z, back = vjp(function, torch.zeros_like(v))[:2]
        forward = vjp(lambda u: back(u)[0], torch.zeros_like(z))[1]
        result: Tensor = forward(v)[0]
        return result

    def pull(u: Tensor, at: Tensor) -> Tensor:
        back = vjp(function, at)[1]
        result: Tensor = back(u)[0]
        return result

    return push, pull


class GeneralRule(HBPModule):
    """z = f(x) for any smooth function f of one sample, by automatic differentiation.

    [Rule][eq-hbp]: H_x = JᵀH_z J + mod(Σ_k ∇²z_k δ_k), J = ∂z/∂x and the second-order
    term as dense matrices, [features, features] for every sample. ``mod`` acts on the
    term's [eigenvalues][eq-mod]. A subclass puts this class before the ``torch.nn``
    layer that computes f; parameters, if it has any, need ``parameter_jacobians``.
    """

    schemes: Sequence[str] = ("average_input_jacobian",)

    def forward(self, input: Tensor) -> Tensor:
        """z = f(x), [N, ...] → [N, ...]."""
        return self.record(input, super().forward(input), keep=input)

    def _of_one(self, x: Tensor) -> Tensor:
        """f of one sample, flattened."""
        return super().forward(x.unsqueeze(0)).flatten()

    def jacobian(self) -> Jacobian:
        x, after = self.last_record.kept, self.last_record.output_shape
        jacobians = vmap(jacrev(self._of_one))(x).flatten(2)
        return Dense(jacobians, x.shape[1:], after[1:])

    def second_order_term(self, J: Jacobian, reading: Reading) -> SymmetricOperator:
        """mod(Σ_k ∇²z_k δ_k) of every sample, or of their sum: [F, F] matrices."""
        x, delta = self.last_record.kept, self.last_record.delta_of(self)

        def projected(x: Tensor, delta: Tensor) -> Tensor:
            return self._of_one(x) @ delta

        features = x[0].numel()
        terms = vmap(jacrev(jacrev(projected)))(x, delta.flatten(1))
        total = reading.totalled(terms.reshape(-1, features, features), self)
        # The pass will say what is not finite; eigh would raise an error of its own.
        symmetric = ((total + total.mT) / 2).nan_to_num(0.0, 0.0, 0.0)
        values, vectors = torch.linalg.eigh(symmetric)
        modified = reading.modify(values).unsqueeze(1)
        return SampleBlocks((vectors * modified) @ vectors.mT)

    def check_record(self) -> None:
        super().check_record()
        before, after = self.last_record.input_shape, self.last_record.output_shape
        entries = before.numel() * max(before[1:].numel(), after[1:].numel())
        size = entries * self.last_record.kind[0].itemsize
        if size > settings.dense_limit:
            raise MemoryError(
                f"{self} forms a dense Jacobian for each of {before[0]} samples of "
                f"{before[1:].numel()} features, {size / 2**30:.1f} GiB. Use a smaller "
                "batch, or raise the limit by hbp.set_dense_limit()."
            )


class SoftmaxRule(GeneralRule):
    """A softmax, or the logarithm of one, within each sample."""

    dim: int | None

    def check_record(self) -> None:
        super().check_record()
        count = len(self.last_record.input_shape)
        # Where dim is None, torch takes 0 for three dimensions, else 1.
        if (int(count != 3) if self.dim is None else self.dim) % count == 0:
            raise ValueError(
                f"{self} goes over the samples of an input of {count} dimensions, so "
                "that they depend on each other. Give it another dim."
            )


class HBPSoftmax(SoftmaxRule, nn.Softmax):
    """``torch.nn.Softmax`` that sends curvature backward."""


class HBPLogSoftmax(SoftmaxRule, nn.LogSoftmax):
    """``torch.nn.LogSoftmax`` that sends curvature backward."""
