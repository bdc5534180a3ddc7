"""Which entries make a block: sub-blocks of a weight, and a weight with its bias.

Both are properties of the curvature alone; the parameters stay as they are.

* A weight's block can be *split* into sub-blocks of consecutive output features. What
  couples them is dropped: products and solves get cheaper, steps a little worse (the
  parameter splitting of Dangel, Harmeling & Hennig 2020).
* Weight and bias can have one *joint* block. In homogeneous coordinates x̃ = [x; 1] a
  layer is z = [W, b] x̃, so its vectors are the rows of [W, b]: [out · (in + 1)].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hbp.operators import SymmetricOperator


class JointBlock:
    """One block for a weight and a bias.

    Args:
        operator: Of the rows of [W, b], [out · (in + 1)] numbers.
        out_features: out.

    Attributes:
        operator: The same.
    """

    def __init__(self, operator: SymmetricOperator, out_features: int) -> None:
        self.operator = operator
        self._out_features = out_features

    def gather(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Something of W, [out · in, k], and of b, [out, k], as rows of [W, b]."""
        rows = weight.reshape(self._out_features, -1, weight.shape[1])
        return torch.cat([rows, bias.unsqueeze(1)], dim=1).flatten(0, 1)

    def scatter(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The reverse of ``gather``."""
        rows = columns.reshape(self._out_features, -1, columns.shape[1])
        return rows[:, :-1].flatten(0, 1), rows[:, -1]


class JointPart(SymmetricOperator):
    """The part of a joint block that belongs to the weight, or to the bias.

    As ``p.hessian`` it answers as the parameter's own block. ``CGNewton`` sees the
    joint block behind it and solves for both parameters at once.

    Args:
        joint: The block of both.
        sizes: Numbers of entries of W and of b.
        index: 0 for the weight, 1 for the bias.
    """

    def __init__(self, joint: JointBlock, sizes: Sequence[int], index: int) -> None:
        operator = joint.operator
        super().__init__(sizes[index], operator.dtype, operator.device)
        self.joint = joint
        self.index = index
        self._other = sizes[1 - index]

    def _product(self, columns: Tensor) -> Tensor:
        both = [columns, columns.new_zeros(self._other, columns.shape[1])]
        gathered = self.joint.gather(*(reversed(both) if self.index else both))
        product = self.joint.operator._product(gathered)
        return self.joint.scatter(product)[self.index]

    def diagonal(self) -> Tensor:
        diagonal = self.joint.operator.diagonal().unsqueeze(1)
        return self.joint.scatter(diagonal)[self.index].squeeze(1)

    def require_fresh(self) -> None:
        self.joint.operator.require_fresh()
