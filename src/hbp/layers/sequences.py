"""Layers of sequences, [N, T, features]: what a small transformer is made of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbp.core.jacobians import Batch, Bilinear, Jacobian
from hbp.core.module import HBPModule
from hbp.core.operators import Watched
from hbp.layers.general import BilinearRule, GeneralRule


class HBPEmbedding(HBPModule, nn.Embedding):
    """``torch.nn.Embedding``, z = W[i], whose table has curvature.

    It is a linear layer of one-hot vectors e_i, z = Wᵀe_i, which are never formed:

        H_W = Σ_pq e_p e_qᵀ ⊗ H_pq        over the positions p and q of a sample

    Over a batch, the mean of e_p is how often each index stands at position p. Nothing
    is below: indices have no curvature.

    Arguments are those of ``torch.nn.Embedding``, without ``max_norm``,
    ``scale_grad_by_freq`` and ``sparse``. Its input are indices, [N, ...].
    """

    schemes = ("average_parameter_jacobian",)

    def forward(self, input: Tensor) -> Tensor:
        """z = W[i], [N, ...] → [N, ..., features]."""
        return self.record(input, super().forward(input), keep=input)

    def check_record(self) -> None:
        super().check_record()
        names = "max_norm", "scale_grad_by_freq", "sparse"
        if used := [name for name in names if getattr(self, name)]:
            raise ValueError(
                f"{self} has {used[0]}={getattr(self, used[0])}, with which it is no "
                "linear function of its table. Leave that option away."
            )

    def jacobian(self) -> Jacobian:
        raise TypeError(
            f"{self} takes indices, which have no curvature. Ask for the input Hessian "
            "of the layers above it."
        )

    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        indices = self.last_record.kept
        yield self.weight, Lookup(indices, self.weight.detach(), self.padding_idx)


class Lookup(Jacobian):
    """∂z/∂W of z = W[i]; ``data`` is i, [N, ...].

    Args:
        indices: i; read, not copied.
        table: W, [entries, features], of which only the kind is read.
        padding: The row that does not move, or None.
    """

    of_parameter = True

    def __init__(self, indices: Tensor, table: Tensor, padding: int | None) -> None:
        shape, reads = table.shape, [Watched(indices, "An input")]
        out_shape = (*indices.shape[1:], shape[1])
        super().__init__(shape, out_shape, len(indices), indices, reads)
        # 0 for the row that does not move, and 1 for all others, [entries, 1].
        self._moves = table.new_ones(shape[0], 1)
        if padding is not None:
            self._moves[padding] = 0

    def jvp(self, rows: Tensor) -> Tensor:
        tables = rows.reshape(-1, *self.in_shape) * self._moves
        return tables[:, self.data.flatten()].flatten(1)

    def vjp(self, rows: Tensor) -> Tensor:
        each = rows.reshape(len(rows), -1, self.in_shape[1])
        tables = rows.new_zeros(len(rows), *self.in_shape)
        tables = tables.index_add_(1, self.data.flatten(), each)
        return (tables * self._moves).flatten(1)

    def mean(self, batch: Batch) -> Jacobian:
        """E[J], from how often each index stands at each position."""
        positions, entries = self.data.shape[1:], self.in_shape[0]
        place = torch.arange(positions.numel(), device=self.data.device) * entries
        counts = self._moves.new_zeros(positions.numel() * entries)
        places = (self.data.flatten(1) + place).flatten()
        counts.index_add_(0, places, self._moves.new_ones(places.shape))
        share = batch.mean_of_sum(counts.view(1, *positions, entries), self.samples)
        return Bilinear(
            torch.matmul,
            lambda x, u: x.flatten(0, -2).T @ u.flatten(0, -2),
            share * self._moves[:, 0],
            self.in_shape,
            self.out_shape,
        )


class _Position(nn.Module):
    """A vector of its own for each position."""

    def __init__(self, length: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, features))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, input: Tensor) -> Tensor:
        return input + self.weight[: input.shape[1]]

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class HBPPosition(BilinearRule, _Position):
    """z_p = x_p + w_p: a vector of its own for each position p, which is learned.

    H_x = H_z, and H_w = H_z.

    Args:
        length: How many positions there are at most.
        features: Of x_p.
    """


class _Attention(nn.Module):
    """Scaled dot-product attention of (q, k, v), [N, T, 3 · features]."""

    def __init__(self, heads: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal

    def forward(self, input: Tensor) -> Tensor:
        # [N, T, 3 · features] → [3, N, heads, T, features of a head].
        q, k, v = input.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return mixed.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}"


class HBPAttention(GeneralRule, _Attention):
    """Softmax(q kᵀ/√d) v of queries, keys and values that a linear layer has made.

    (q, k, v) come side by side, [N, T, 3 · features], as from
    ``HBPLinear(features, 3 * features)``; z is [N, T, features]. Its Jacobian is taken
    by automatic differentiation, in products. The second-order term couples positions
    and is not diagonal, so ``"abs"`` and ``"clip"``, which act on its eigenvalues, are
    for short sequences; ``"ggn"`` is for all.

    Args:
        heads: Into how many heads features are split.
        causal: Whether positions see none that come after them.
    """
