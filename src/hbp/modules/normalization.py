"""Normalisation: by recorded statistics, a scaling; by a sample's own, by autograd."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacrev, vmap

from hbp.maps import (
    BiasMap,
    ChainMap,
    DiagonalMap,
    JacobianMap,
    LinearMap,
    ReplicateMap,
)
from hbp.modules.base import HBPModule, HessianPass
from hbp.operators import (
    OperatorSum,
    SampleBlocks,
    SymmetricOperator,
    ZeroOperator,
    fits_dense,
)


class BatchNormRule(HBPModule):
    """z = γ x̂ + β, x̂ = (x - μ)/√(σ² + ε), with the running statistics.

    Rules, with s = γ/√(σ² + ε) spread over the positions of each channel:

        H_x = diag(s) H_z diag(s)
        H_γ = BᵀH_z B, B = diag(x̂) spread        H_β = H_z, summed over positions

    In training mode the samples of a batch depend on each other, and curvature sample
    by sample has no meaning: the Hessian pass asks for ``eval()``.
    """

    average_parameter_jacobian: bool = True
    num_features: int
    eps: float
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any

    def forward(self, input: Tensor) -> Tensor:
        """z, [N, C, ...] → [N, C, ...]."""
        by_batch = self.training or self.running_mean is None
        output = super().forward(input)
        return self.record(input, output, None if by_batch else input, False)

    def _check_pass(self) -> None:
        super()._check_pass()
        if not self.last_record.keeps:
            raise ValueError(
                f"{self} normalised by the statistics of the batch, where samples "
                "depend on each other. Call eval() on it before the forward pass (and "
                "keep track_running_stats=True)."
            )

    @property
    def _inverse_deviation(self) -> Tensor:
        """1/√(σ² + ε), [C]."""
        inverse: Tensor = (self.running_var + self.eps).rsqrt()
        return inverse

    @property
    def _positions(self) -> int:
        return self.last_record.input_shape[2:].numel()

    def _jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        scale = self._inverse_deviation
        if self.weight is not None:
            scale = scale * self.weight
        spread = scale.repeat_interleave(self._positions)
        return DiagonalMap(spread.repeat(hessian_pass.samples))

    def _parameter_jacobians(
        self, hessian_pass: HessianPass
    ) -> Iterable[tuple[Tensor, LinearMap]]:
        if self.weight is None:
            return
        x = self.last_record.kept
        x = x.reshape(*x.shape[:2], -1)
        deviation = self._inverse_deviation.unsqueeze(1)
        normed = (x - self.running_mean.unsqueeze(1)) * deviation
        values = hessian_pass.finite(hessian_pass.mean(normed), "input", self)
        spread = BiasMap(hessian_pass.samples, self.num_features, self._positions)
        yield self.weight, ChainMap([spread, DiagonalMap(values)], spread.in_size)
        yield self.bias, spread

    def extra_repr(self) -> str:
        """The layer's options and its batch scheme."""
        scheme = f"avg_param_jac: {self.average_parameter_jacobian}"
        return f"{super().extra_repr()}, {scheme}"


class HBPBatchNorm1d(BatchNormRule, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` in eval mode that sends curvature backward."""


class HBPBatchNorm2d(BatchNormRule, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` in eval mode that sends curvature backward."""


class HBPBatchNorm3d(BatchNormRule, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` in eval mode that sends curvature backward."""


class GeneralRule(HBPModule):
    """z = f(x) for any smooth function f of one sample, by automatic differentiation.

    Rule: H_x = JᵀH_z J + mod(Σ_k ∇²z_k δ_k), J = ∂z/∂x and the second-order term as
    dense matrices, [features, features] for every sample. ``mod`` acts on the term's
    eigenvalues. A subclass puts this class before the ``torch.nn`` layer that
    computes f.
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

    def _jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        x = self.last_record.kept
        jacobians = vmap(jacrev(self._of_one))(x).flatten(2)
        if not hessian_pass.is_exact:
            jacobians = jacobians.mean(0, keepdim=True)
        return JacobianMap(hessian_pass.finite(jacobians, "derivative", self))

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
            blocks = blocks.sum(0, keepdim=True)
        hessian_pass.finite(blocks, "second-order term", self)
        assert hessian_pass.treatment is not None
        values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
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


class HBPLayerNorm(GeneralRule, nn.LayerNorm):
    """``torch.nn.LayerNorm``, z = γ x̂ + β, that sends curvature backward.

    The features of a sample depend on each other through its mean and deviation, so
    the Jacobian and the second-order term w.r.t. x are dense. W.r.t. γ and β

        H_γ = BᵀH_z B, B = diag(x̂) over the normalised groups        H_β = H_z, summed
    """

    average_parameter_jacobian: bool = True

    def _parameter_jacobians(
        self, hessian_pass: HessianPass
    ) -> Iterable[tuple[Tensor, LinearMap]]:
        if self.weight is None:
            return
        x = self.last_record.kept
        normed = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        values = hessian_pass.finite(hessian_pass.mean(normed), "input", self)
        groups = len(values) // self.weight.numel()
        spread = ReplicateMap(groups, self.weight.numel())
        yield self.weight, ChainMap([spread, DiagonalMap(values)], spread.in_size)
        if self.bias is not None:
            yield self.bias, spread
