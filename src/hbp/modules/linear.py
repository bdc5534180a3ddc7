"""The fully-connected layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hbp.distributed import Factor
from hbp.maps import BiasMap, DenseSampleMap, LinearMap, LinearWeightMap, MatrixMap
from hbp.modules.base import HBPModule, HessianPass, describe_blocks
from hbp.operators import KroneckerBlock, SymmetricOperator


class HBPLinear(HBPModule, nn.Linear):
    """``torch.nn.Linear``, z = Wx + b, that sends curvature backward.

    [Rules][eq-linear] (Dangel, Harmeling & Hennig 2020; W flattened row-major):

        H_x = Wᵀ H_z W
        H_W = H_z ⊗ x xᵀ        H_b = H_z

    z is linear in x and in (W, b), so there is no second-order term. Over a batch,
    the weight block is H̄ ⊗ x̄x̄ᵀ, or with ``average_parameter_jacobian=False``
    H̄ ⊗ E[xxᵀ], see ``set_hbp_approximation``. H_x and H_b are the same in both.
    Exact products sum H_z ⊗ x xᵀ over the samples.

    Arguments are those of ``torch.nn.Linear``. The Hessian pass takes inputs of
    shape [N, in_features].
    """

    average_parameter_jacobian: bool = True
    sub_blocks: int = 1
    joint_bias: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """z = Wx + b, [N, in_features] → [N, out_features]."""
        return self.record(input, super().forward(input), keep=input)

    def jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        if hessian_pass.is_exact:
            return DenseSampleMap(self.weight, hessian_pass.samples)
        return MatrixMap(self.weight)

    def parameter_jacobians(
        self, hessian_pass: HessianPass
    ) -> Iterable[tuple[Tensor, LinearMap]]:
        x = hessian_pass.finite(self.last_record.kept, "input", self)
        yield self.weight, LinearWeightMap(x, self.out_features)
        if self.bias is not None:
            yield self.bias, BiasMap(hessian_pass.samples, self.out_features, 1)

    def _parameter_hessians(
        self, output_hessian: SymmetricOperator, hessian_pass: HessianPass
    ) -> None:
        """Averaged curvature has the structure of a Kronecker product."""
        if hessian_pass.is_exact:
            super()._parameter_hessians(output_hessian, hessian_pass)
            return
        trained = self._trained
        joint = self.joint_bias and len(trained) == 2
        for parameter in trained[:1] if joint else trained:
            if parameter is self.bias:
                self._leave((parameter,), output_hessian, hessian_pass)
                continue
            factor = self._inner_factor(hessian_pass)
            hessian_pass.finite(factor.rows, "input", self)
            block = KroneckerBlock(output_hessian, *factor)
            self._leave(trained if joint else (parameter,), block, hessian_pass)

    @property
    def _trained(self) -> list[Tensor]:
        parameters = [p for p in (self.weight, self.bias) if p is not None]
        return [p for p in parameters if p.requires_grad]

    def _inner_factor(self, hessian_pass: HessianPass) -> Factor:
        """x̄, or rows that make E[xxᵀ] and what is known of δ; of [x; 1] if joint."""
        hessian_pass = hessian_pass.reading(self, "inner_factor")
        x, delta = self.last_record.kept, self.last_record.output_gradient
        if self.joint_bias and len(self._trained) == 2:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        if self.average_parameter_jacobian:
            return Factor(hessian_pass.mean(x).unsqueeze(0), 1.0, None)
        return hessian_pass.factor(x, delta)

    def _collect_parameters(self, hessian_pass: HessianPass) -> None:
        if self.weight.requires_grad:
            self._inner_factor(hessian_pass)

    def _check_pass(self) -> None:
        super()._check_pass()
        shape = self.last_record.input_shape
        if len(shape) != 2:
            raise ValueError(
                f"{self} got an input of shape {list(shape)}. Its curvature rules need "
                "[N, in_features]; flatten the dimensions between into the batch."
            )

    def extra_repr(self) -> str:
        """The layer's sizes and its batch scheme."""
        scheme = f"avg_param_jac: {self.average_parameter_jacobian}"
        return f"{super().extra_repr()}, {scheme}{describe_blocks(self)}"
