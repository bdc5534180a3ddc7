"""Layers that scale features by parameters.

Normalisation by recorded statistics is a scaling; by a sample's own, autograd finds the
rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hbp.core.jacobians import Bias, Chain, Diagonal, Jacobian, Spread
from hbp.core.layers.elementwise import ElementwiseRule
from hbp.core.module import HBPModule
from hbp.layers.general import GeneralRule


class BatchNormRule(HBPModule):
    """z = γ x̂ + β, x̂ = (x - μ)/√(σ² + ε), with the running statistics.

    [Rules][eq-batch-norm], with s = γ/√(σ² + ε) spread over the positions of each
    channel:

        H_x = diag(s) H_z diag(s)
        H_γ = BᵀH_z B, B = diag(x̂) spread        H_β = H_z, summed over positions

    In training mode the samples of a batch depend on each other, and curvature sample
    by sample has no meaning: the Hessian pass asks for ``eval()``.
    """

    schemes = ("average_parameter_jacobian",)
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

    def check_record(self) -> None:
        super().check_record()
        if not self.last_record.keeps:
            raise ValueError(
                f"{self} normalised by the statistics of the batch, where samples "
                "depend on each other. Call eval() on it before the forward pass (and "
                "keep track_running_stats=True)."
            )

    def _normed(self) -> tuple[Tensor, Tensor]:
        """x̂, [N, C, positions], and 1/√(σ² + ε), [C, 1]."""
        inverse = (self.running_var + self.eps).rsqrt().unsqueeze(1)
        x = self.last_record.kept
        x = x.reshape(*x.shape[:2], -1)
        return (x - self.running_mean.unsqueeze(1)) * inverse, inverse

    def jacobian(self) -> Jacobian:
        normed, scale = self._normed()
        if self.weight is not None:
            scale = scale * self.weight.unsqueeze(1)
        shape = self.last_record.input_shape
        return Diagonal(scale.expand_as(normed).reshape(shape))

    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        normed, _ = self._normed()
        if self.weight is None:
            return
        shape = self.last_record.output_shape
        spread = Bias(self.weight.shape, shape[1:], shape[0])
        yield self.weight, Chain([spread, Diagonal(normed.reshape(shape))])
        yield self.bias, spread


class HBPBatchNorm1d(BatchNormRule, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` in eval mode that sends curvature backward."""


class HBPBatchNorm2d(BatchNormRule, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` in eval mode that sends curvature backward."""


class HBPBatchNorm3d(BatchNormRule, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` in eval mode that sends curvature backward."""


class OwnStatisticsRule(GeneralRule):
    """z = γ x̂ + β, where x̂ is normed by statistics of the sample itself.

    The features of a sample depend on each other through its statistics, so
    [the Jacobian and the second-order term][eq-layer-norm] w.r.t. x are dense. W.r.t. γ
    and β

        H_γ = BᵀH_z B, B = diag(x̂) spread        H_β = H_z, summed

    Attributes:
        spread: How γ fills a sample.
    """

    schemes = ("average_input_jacobian", "average_parameter_jacobian")
    spread: type[Jacobian] = Spread
    weight: Any
    bias: Any

    def normed(self, x: Tensor) -> Tensor:
        """x̂, [N, ...]; every layer of this kind gives it."""
        raise NotImplementedError

    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        if self.weight is None:
            return
        x = self.last_record.kept
        spread = self.spread(self.weight.shape, x.shape[1:], len(x))
        yield self.weight, Chain([spread, Diagonal(self.normed(x))])
        if getattr(self, "bias", None) is not None:
            yield self.bias, spread


class HBPLayerNorm(OwnStatisticsRule, nn.LayerNorm):
    """``torch.nn.LayerNorm`` that sends curvature backward."""

    @property
    def mixed(self) -> int:  # type: ignore[override]  # By the shape it norms.
        """Every position has statistics of its own."""
        return len(self.normalized_shape)

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, eps=self.eps)


class HBPRMSNorm(OwnStatisticsRule, nn.RMSNorm):
    """``torch.nn.RMSNorm`` that sends curvature backward."""

    @property
    def mixed(self) -> int:  # type: ignore[override]  # By the shape it norms.
        """Every position has statistics of its own."""
        return len(self.normalized_shape)

    def normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, eps=self.eps)


class HBPGroupNorm(OwnStatisticsRule, nn.GroupNorm):
    """``torch.nn.GroupNorm`` that sends curvature backward."""

    spread = Bias

    def normed(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, eps=self.eps)


class HBPPReLU(ElementwiseRule, nn.PReLU):
    """``torch.nn.PReLU``, z = max(x, 0) + a min(x, 0), that sends curvature backward.

    It is linear in a, one number for all features or one for each channel:

        H_a = BᵀH_z B, B = diag(min(x, 0)) spread
    """

    schemes: Sequence[str] = ("average_input_jacobian", "average_parameter_jacobian")

    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        x = self.last_record.kept
        spread = Bias(self.weight.shape, x.shape[1:], len(x))
        yield self.weight, Chain([spread, Diagonal(x.clamp(max=0))])
