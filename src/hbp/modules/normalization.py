"""Normalisation: by recorded statistics, a scaling; by a sample's own, by autograd."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hbp.maps import BiasMap, ChainMap, DiagonalMap, LinearMap, ReplicateMap
from hbp.modules.base import HBPModule, HessianPass
from hbp.modules.general import GeneralRule


class BatchNormRule(HBPModule):
    """z = γ x̂ + β, x̂ = (x - μ)/√(σ² + ε), with the running statistics.

    [Rules][eq-batch-norm], with s = γ/√(σ² + ε) spread over the positions of each
    channel:

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

    def jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        scale = self._inverse_deviation
        if self.weight is not None:
            scale = scale * self.weight
        spread = scale.repeat_interleave(self._positions)
        return DiagonalMap(spread.repeat(hessian_pass.samples))

    def parameter_jacobians(
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


class HBPLayerNorm(GeneralRule, nn.LayerNorm):
    """``torch.nn.LayerNorm``, z = γ x̂ + β, that sends curvature backward.

    The features of a sample depend on each other through its mean and deviation, so
    [the Jacobian and the second-order term][eq-layer-norm] w.r.t. x are dense. W.r.t. γ
    and β

        H_γ = BᵀH_z B, B = diag(x̂) over the normalised groups        H_β = H_z, summed
    """

    average_parameter_jacobian: bool = True

    def parameter_jacobians(
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
