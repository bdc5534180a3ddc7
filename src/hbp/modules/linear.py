"""The fully-connected layer."""

from __future__ import annotations

from torch import Tensor, nn

from hbp.curvature import Treatment
from hbp.modules.base import Blocks, HBPModule, require_finite
from hbp.operators import Congruence, KroneckerBlock, MatrixMap, SymmetricOperator


class HBPLinear(HBPModule, nn.Linear):
    """``torch.nn.Linear``, z = Wx + b, that sends curvature backward.

    Rules (Dangel, Harmeling & Hennig 2020; W flattened row-major):

        H_x = Wᵀ H_z W
        H_W = H_z ⊗ x xᵀ        H_b = H_z

    z is linear in x and in (W, b), so there is no second-order term. Over a batch,
    the weight block is H̄ ⊗ x̄x̄ᵀ, or with ``average_parameter_jacobian=False``
    H̄ ⊗ E[xxᵀ], see ``set_hbp_approximation``. H_x and H_b are the same in both.

    Arguments are those of ``torch.nn.Linear``. The Hessian pass takes inputs of
    shape [N, in_features].
    """

    average_parameter_jacobian: bool = True

    def forward(self, input: Tensor) -> Tensor:
        """z = Wx + b, [N, in_features] → [N, out_features]."""
        return self.record(input, super().forward(input), keep=input)

    def _input_hessian(
        self, output_hessian: SymmetricOperator, treatment: Treatment
    ) -> SymmetricOperator:
        return Congruence(output_hessian, MatrixMap(self.weight))

    def _parameter_hessians(self, output_hessian: SymmetricOperator) -> Blocks:
        blocks: Blocks = []
        if self.weight.requires_grad:
            rows = self._input_rows()
            blocks.append((self.weight, KroneckerBlock(output_hessian, rows)))
        if self.bias is not None and self.bias.requires_grad:
            blocks.append((self.bias, output_hessian))
        return blocks

    def _input_rows(self) -> Tensor:
        """F with FᵀF = x̄x̄ᵀ, [1, in], or FᵀF = E[xxᵀ], [N, in]."""
        x = self.last_record.kept
        if self.average_parameter_jacobian:
            rows = x.mean(0, keepdim=True)
        else:
            rows = x / len(x) ** 0.5
        return require_finite(rows, "input", self)

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
        return f"{super().extra_repr()}, {scheme}"
