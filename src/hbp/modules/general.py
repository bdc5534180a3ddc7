"""Layers whose rules automatic differentiation finds.

A subclass puts a rule before the ``torch.nn`` layer that computes z, and is done. A
rule of its own is faster; this one is right.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from hbp.maps import DerivativeMap, JacobianMap, LinearMap, Watched
from hbp.modules.base import HBPModule, HessianPass
from hbp.operators import (
    OperatorSum,
    SampleBlocks,
    SymmetricOperator,
    ZeroOperator,
    fits_dense,
)


class BilinearRule(HBPModule):
    """z = f(x, θ₁, θ₂, …), linear in x and in each of the layer's own parameters.

    Rules, with both Jacobians by automatic differentiation, never formed:

        H_x = JᵀH_z J, J = ∂z/∂x        H_θ = JᵀH_z J, J = ∂z/∂θ

    A constant part, such as a bias, may be added; no second-order term appears. Over
    a batch, J = ∂z/∂θ is that of x̄, or with ``average_parameter_jacobian=False``
    H_θ is E[JᵀH̄ J]. ∂z/∂x is the same for all samples.
    """

    average_parameter_jacobian: bool = True

    def forward(self, input: Tensor) -> Tensor:
        """z = f(x, θ), [N, ...] → [N, ...]."""
        return self.record(input, super().forward(input), keep=input)

    def jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        """∂z/∂x, the same for every sample."""
        record = self.last_record
        kept = record.kept
        x = kept.new_zeros(hessian_pass.samples, *kept.shape[1:])
        out_size = record.output_shape[1:].numel() * hessian_pass.samples
        return DerivativeMap(self._of_input, x, out_size, self._watched())

    def parameter_jacobians(
        self, hessian_pass: HessianPass
    ) -> Iterable[tuple[Tensor, LinearMap]]:
        """∂z/∂θ at x̄, or at every sample's x."""
        record = self.last_record
        x = record.kept
        if not hessian_pass.is_exact:
            x = hessian_pass.mean(x).reshape(1, *x.shape[1:])
        hessian_pass.finite(x, "input", self)
        inputs = Watched(x, "An input")
        out_size = record.output_shape[1:].numel() * hessian_pass.samples
        for name, parameter in self.named_parameters(recurse=False):
            function = partial(self._of_parameter, name, inputs)
            reads = [inputs, *self._watched(but=parameter)]
            zero = torch.zeros_like(parameter)
            yield parameter, DerivativeMap(function, zero, out_size, reads)

    def _of_input(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def _of_parameter(self, name: str, inputs: Watched, value: Tensor) -> Tensor:
        """z with another value for one parameter; no hook runs, nothing is recorded."""
        parameters: dict[str, Any] = self._parameters
        own = parameters[name]
        parameters[name] = value
        try:
            return super().forward(inputs.value)
        finally:
            parameters[name] = own

    def _watched(self, but: Tensor | None = None) -> list[Watched]:
        """What a product reads of the layer."""
        own = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        return [Watched(value, "A weight") for value in own if value is not but]

    def _check_pass(self) -> None:
        super()._check_pass()
        inside = [name for name, _ in self.named_parameters() if "." in name]
        if inside:
            raise TypeError(
                f"BilinearRule varies a layer's own parameters, but {inside[0]} of "
                f"{type(self).__name__} belongs to a module inside it. Register it on "
                "the layer, or build the layer as an HBPSequential."
            )

    def extra_repr(self) -> str:
        """The layer's options and its batch scheme."""
        scheme = f"avg_param_jac: {self.average_parameter_jacobian}"
        return ", ".join(filter(None, [super().extra_repr(), scheme]))


class GeneralRule(HBPModule):
    """z = f(x) for any smooth function f of one sample, by automatic differentiation.

    [Rule][eq-hbp]: H_x = JᵀH_z J + mod(Σ_k ∇²z_k δ_k), J = ∂z/∂x and the second-order
    term as dense matrices, [features, features] for every sample. ``mod`` acts on the
    term's [eigenvalues][eq-mod]. A subclass puts this class before the ``torch.nn``
    layer that computes f; parameters, if it has any, need ``parameter_jacobians``.
    """

    average_input_jacobian: bool = True

    def forward(self, input: Tensor) -> Tensor:
        """z = f(x), [N, ...] → [N, ...]."""
        return self.record(input, super().forward(input), keep=input)

    def _of_one(self, x: Tensor) -> Tensor:
        """f of one sample, flattened."""
        return super().forward(x.unsqueeze(0)).flatten()

    def _input_hessian(
        self, output_hessian: SymmetricOperator, hessian_pass: HessianPass
    ) -> SymmetricOperator:
        first = super()._input_hessian(output_hessian, hessian_pass)
        if hessian_pass.treatment is None:
            return first
        blocks = SampleBlocks(self._second_order_blocks(hessian_pass))
        alone = isinstance(first, ZeroOperator)
        return blocks if alone else OperatorSum([first, blocks])

    def jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        x = self.last_record.kept
        jacobians = vmap(jacrev(self._of_one))(x).flatten(2)
        if not hessian_pass.is_exact:
            mean = hessian_pass.mean(jacobians)
            jacobians = mean.reshape(1, *jacobians.shape[1:])
        return JacobianMap(hessian_pass.finite(jacobians, "derivative", self))

    def _collect_jacobian(self, hessian_pass: HessianPass) -> None:
        super()._collect_jacobian(hessian_pass)
        if hessian_pass.treatment is not None:
            self._second_order_blocks(hessian_pass)

    def _second_order_blocks(self, hessian_pass: HessianPass) -> Tensor:
        """mod(Σ_k ∇²z_k δ_k) of every sample, or of their sum, [samples, F, F]."""
        record = self.last_record
        x, delta = record.kept, record.output_gradient
        if delta is None:
            raise RuntimeError(
                f"The second-order term of {self} needs the gradient w.r.t. its "
                "output, but nothing before it requires one. Call "
                "inputs.requires_grad_() before the forward pass, or choose 'zero'."
            )

        def projected(x: Tensor, delta: Tensor) -> Tensor:
            return self._of_one(x) @ delta

        features = x[0].numel()
        blocks = vmap(jacrev(jacrev(projected)))(x, delta.flatten(1))
        blocks = blocks.reshape(-1, features, features)
        if not hessian_pass.is_exact:
            total = hessian_pass.reading(self, "second_order").total(blocks)
            blocks = total.reshape(1, features, features)
        hessian_pass.finite(blocks, "second-order term", self)
        assert hessian_pass.treatment is not None
        # The pass will say what is not finite; eigh would raise an error of its own.
        symmetric = ((blocks + blocks.mT) / 2).nan_to_num(0.0, 0.0, 0.0)
        values, vectors = torch.linalg.eigh(symmetric)
        treated = hessian_pass.treatment(values).unsqueeze(1)
        return (vectors * treated) @ vectors.mT

    def _check_pass(self) -> None:
        super()._check_pass()
        before, after = self.last_record.input_shape, self.last_record.output_shape
        entries = before.numel() * max(before[1:].numel(), after[1:].numel())
        dtype, _ = self.last_record.kind
        if not fits_dense(entries * dtype.itemsize):
            raise MemoryError(
                f"{self} forms a dense Jacobian for each of {before[0]} samples of "
                f"{before[1:].numel()} features, "
                f"{entries * dtype.itemsize / 2**30:.1f} GiB. Use a smaller batch, "
                "or raise the limit by hbp.set_dense_limit()."
            )
