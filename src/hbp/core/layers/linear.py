"""The fully-connected layer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..jacobians import Jacobian, Matrix, Spread, Weight
from ..module import HBPModule


class HBPLinear(HBPModule, nn.Linear):
    """``torch.nn.Linear``, z = Wx + b, that sends curvature backward.

    [Rules][eq-linear] (Dangel, Harmeling & Hennig 2020; W flattened row-major):

        H_x = Wᵀ H_z W
        H_W = H_z ⊗ x xᵀ        H_b = H_z

    z is linear in x and in (W, b), so there is no second-order term. Over a batch, the
    weight block is H̄ ⊗ x̄x̄ᵀ, or with ``average_parameter_jacobian=False``
    H̄ ⊗ E[xxᵀ], see ``set_hbp_approximation``. H_x and H_b are the same in both. Exact
    products sum H_z ⊗ x xᵀ over the samples.

    A sample may be a sequence of x_p, [N, ..., in_features]. Then the layer acts on
    every position p, and [the weight's block][eq-positions] is

        H_W = Σ_pq H_pq ⊗ x_p x_qᵀ        H_b = Σ_pq H_pq,

    with H_pq the part of H_z that couples positions p and q.

    Arguments are those of ``torch.nn.Linear``.
    """

    schemes = ("average_parameter_jacobian",)

    def forward(self, input: Tensor) -> Tensor:
        """z = Wx + b, [N, ..., in_features] → [N, ..., out_features]."""
        return self.record(input, super().forward(input), keep=input)

    def jacobian(self) -> Jacobian:
        shape = self.last_record.output_shape
        return Matrix(self.weight, shape[0], shape[1:-1])

    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        x, delta = self.last_record.kept, self.last_record.output_gradient
        yield self.weight, Weight(x, self.out_features, delta)
        if self.bias is not None:
            shape = self.last_record.output_shape
            yield self.bias, Spread(self.bias.shape, shape[1:], len(x))
