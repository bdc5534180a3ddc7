"""Linear maps: the Jacobians between which curvature travels.

A layer's Jacobian J, of shape [z, x], is known by its products with J and Jᵀ. Vectors
are columns, so J multiplies [x, k] from the left.

| map | Jacobian |
|---|---|
| ``MatrixMap`` | a weight W, z = Wx |
| ``DiagonalMap`` | diag(d): an elementwise layer |
| ``FunctionMap`` | any linear function, on every sample |
| ``DerivativeMap`` | any affine function, by automatic differentiation alone |
| ``SelectionMap`` | weighted picks, z_o = Σ_j a_oj x_(index oj): pooling by maximum |
| ``BiasMap`` | ∂z/∂b: a bias reaches every sample and position |
| ``ReplicateMap`` | x ↦ (x, …, x) |
| ``ChainMap``, ``SumMap`` | J₂J₁ and J₁ + J₂ |

Some serve a whole batch at once: their vectors hold the features of all samples,
sample by sample, [samples · features]. With averaged curvature there is one virtual
sample, and ``samples`` is 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hbp.operators import SymmetricOperator

COLUMNS_AT_ONCE: Final = 256
"""Columns of the identity that are multiplied at a time, at most."""

ENTRIES_AT_ONCE: Final = 2**24
"""Entries of such columns or of their images, at most: 64 MiB in float32."""


def columns_at_once(features: int) -> int:
    """How many vectors of that many entries are multiplied at a time; at least 1."""
    return max(1, min(COLUMNS_AT_ONCE, ENTRIES_AT_ONCE // features))


class Watched:
    """A tensor that belongs to somebody else: read, not copied.

    A later change of it is noticed, unless it is made behind autograd's back, through
    ``tensor.data``. A copy of this object owns a copy of the tensor.

    Args:
        tensor: Of any shape.
        what: What to call it in an error.
    """

    def __init__(self, tensor: Tensor, what: str) -> None:
        self._tensor = tensor.detach()
        self._what = what
        self._version: int | None = self._tensor._version

    def __getstate__(self) -> dict[str, object]:
        """A copy owns its tensor; the check for changes is made here."""
        return {
            **self.__dict__,
            "_tensor": self._tensor.clone(),
            "_version": None if self._is_stale else 0,
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        """The copy's version counter starts anew, unless it was stale."""
        self.__dict__.update(state)
        if self._version is not None:
            self._version = self._tensor._version

    @property
    def _is_stale(self) -> bool:
        return self._tensor._version != self._version

    @property
    def value(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it has changed since this object was made.
        """
        if self._is_stale:
            raise RuntimeError(
                f"{self._what} of shape {list(self._tensor.shape)} has changed since "
                "backward_hessian(), so this curvature no longer belongs to the "
                "model. Use it before optimizer.step(), or keep to_dense()."
            )
        return self._tensor


class LinearMap(ABC):
    """A Jacobian J of shape [z, x]: the map of one step of the chain."""

    in_size: int
    out_size: int

    @abstractmethod
    def forward(self, columns: Tensor) -> Tensor:
        """J v for columns v, [x, k] → [z, k]."""

    @abstractmethod
    def transpose(self, columns: Tensor) -> Tensor:
        """Jᵀ u for columns u, [z, k] → [x, k]."""

    def congruence(self, matrix: Tensor) -> Tensor:
        """JᵀMJ for a dense symmetric M, [z, z] → [x, x]."""
        return self.transpose(self.transpose(matrix).T).clone()

    def congruence_diagonal(self, operator: SymmetricOperator) -> Tensor:
        """The diagonal of JᵀMJ, [x], a few columns of the identity at a time."""
        like = torch.empty((), dtype=operator.dtype, device=operator.device)
        step, parts = columns_at_once(max(self.in_size, self.out_size)), []
        for start in range(0, self.in_size, step):
            count = min(step, self.in_size - start)
            columns = like.new_zeros(self.in_size, count)
            columns[start : start + count].fill_diagonal_(1)
            image = self.forward(columns)
            parts.append((image * (operator @ image)).sum(0))
        return torch.cat(parts)

    # Most maps own what they read, so the default is to have nothing to check.
    def require_fresh(self) -> None:  # noqa: B027
        """Raise RuntimeError if a tensor that the map reads has changed."""


class MatrixMap(LinearMap):
    """J = W, [z, x]. W belongs to a layer and is read, not copied."""

    def __init__(self, matrix: Tensor) -> None:
        self.out_size, self.in_size = matrix.shape
        self._weight = Watched(matrix, "A weight")

    @property
    def matrix(self) -> Tensor:
        """W, [z, x].

        Raises:
            RuntimeError: W has changed since the operator was made.
        """
        return self._weight.value

    def forward(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns

    def transpose(self, columns: Tensor) -> Tensor:
        return self.matrix.T @ columns

    def congruence(self, matrix: Tensor) -> Tensor:
        return self.matrix.T @ (matrix @ self.matrix)

    def congruence_diagonal(self, operator: SymmetricOperator) -> Tensor:
        return (self.matrix * (operator @ self.matrix)).sum(0)

    def require_fresh(self) -> None:
        _ = self.matrix


class DiagonalMap(LinearMap):
    """J = diag(d), given d of shape [n]."""

    def __init__(self, diagonal: Tensor) -> None:
        self.in_size = self.out_size = diagonal.shape[0]
        self.diagonal = diagonal
        self._column = diagonal.unsqueeze(1)

    def forward(self, columns: Tensor) -> Tensor:
        return self._column * columns

    def transpose(self, columns: Tensor) -> Tensor:
        return self.forward(columns)

    def congruence(self, matrix: Tensor) -> Tensor:
        return torch.outer(self.diagonal, self.diagonal).mul_(matrix)

    def congruence_diagonal(self, operator: SymmetricOperator) -> Tensor:
        return self.diagonal.square() * operator.diagonal()


class SampleMap(LinearMap):
    """One linear function, applied to each sample on its own.

    Args:
        samples: How many there are.
        in_shape: Shape of one sample's x.
        out_shape: Shape of one sample's z.
    """

    def __init__(
        self, samples: int, in_shape: Sequence[int], out_shape: Sequence[int]
    ) -> None:
        self.samples = samples
        self.in_shape, self.out_shape = torch.Size(in_shape), torch.Size(out_shape)
        self.in_size = samples * self.in_shape.numel()
        self.out_size = samples * self.out_shape.numel()

    @abstractmethod
    def _apply(self, batch: Tensor) -> Tensor:
        """[M, *in_shape] → [M, *out_shape] for any number M of samples."""

    @abstractmethod
    def _apply_transpose(self, batch: Tensor) -> Tensor:
        """[M, *out_shape] → [M, *in_shape]."""

    def forward(self, columns: Tensor) -> Tensor:
        # Columns become more samples.
        batch = columns.T.reshape(-1, *self.in_shape)
        return self._apply(batch).reshape(columns.shape[1], -1).T

    def transpose(self, columns: Tensor) -> Tensor:
        batch = columns.T.reshape(-1, *self.out_shape)
        return self._apply_transpose(batch).reshape(columns.shape[1], -1).T


class FunctionMap(SampleMap):
    """A linear function; automatic differentiation transposes it.

    Args:
        function: [M, *in_shape] → [M, *out_shape], linear, sample by sample.
        samples: As in ``SampleMap``, like the two shapes.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        samples: int,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
    ) -> None:
        super().__init__(samples, in_shape, out_shape)
        self.function = function

    def _apply(self, batch: Tensor) -> Tensor:
        return self.function(batch)

    def _apply_transpose(self, batch: Tensor) -> Tensor:
        return transpose_by_autograd(self.function, batch, self.in_shape)


def transpose_by_autograd(
    function: Callable[[Tensor], Tensor], batch: Tensor, in_shape: Sequence[int]
) -> Tensor:
    """Jᵀ of a linear function at ``batch``, [M, *out_shape] → [M, *in_shape]."""
    with torch.enable_grad():
        x = batch.new_zeros(len(batch), *in_shape).requires_grad_()
        (result,) = torch.autograd.grad(function(x), x, batch)
    return result


class DerivativeMap(LinearMap):
    """J = ∂z/∂v of a function that is linear in v, up to a constant part.

    Args:
        function: v ↦ z, differentiable twice.
        at: A v of the right shape, to differentiate at; any will do.
        out_size: Entries of z.
        reads: What else the function reads.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        at: Tensor,
        out_size: int,
        reads: Sequence[Watched] = (),
    ) -> None:
        self.in_size, self.out_size = at.numel(), out_size
        self._function, self._at, self._reads = function, at.detach(), reads

    def forward(self, columns: Tensor) -> Tensor:
        # function(v) - function(0) would lose the digits of a small v next to a large
        # constant. u ↦ Jᵀu is linear too, and its transpose is J.
        with torch.enable_grad():
            v, z = self._evaluate()
            u = torch.zeros_like(z, requires_grad=True)
            (back,) = torch.autograd.grad(z, v, u, create_graph=True)
        return _batched_gradient(back, u, columns)

    def transpose(self, columns: Tensor) -> Tensor:
        v, z = self._evaluate()
        return _batched_gradient(z, v, columns)

    @torch.enable_grad()
    def _evaluate(self) -> tuple[Tensor, Tensor]:
        self.require_fresh()
        v = self._at.clone().requires_grad_()
        return v, self._function(v)

    def require_fresh(self) -> None:
        for tensor in self._reads:
            _ = tensor.value


def _batched_gradient(outputs: Tensor, inputs: Tensor, columns: Tensor) -> Tensor:
    """(∂outputs/∂inputs)ᵀ times each column, [outputs, k] → [inputs, k]."""
    each = columns.T.reshape(-1, *outputs.shape)
    (rows,) = torch.autograd.grad(outputs, inputs, each, is_grads_batched=True)
    return rows.flatten(1).T


class DenseSampleMap(SampleMap):
    """z = Wx for each sample, by W of a layer, [z, x], that is read and not copied."""

    def __init__(self, matrix: Tensor, samples: int) -> None:
        super().__init__(samples, matrix.shape[1:], matrix.shape[:1])
        self._weight = Watched(matrix, "A weight")

    def _apply(self, batch: Tensor) -> Tensor:
        return batch @ self._weight.value.T

    def _apply_transpose(self, batch: Tensor) -> Tensor:
        return batch @ self._weight.value

    def require_fresh(self) -> None:
        _ = self._weight.value


class JacobianMap(LinearMap):
    """A dense Jacobian of its own for each sample.

    Args:
        jacobians: [samples, z, x].
    """

    def __init__(self, jacobians: Tensor) -> None:
        self.in_size = jacobians.shape[::2].numel()
        self.out_size = jacobians.shape[:2].numel()
        self.jacobians = jacobians

    def forward(self, columns: Tensor) -> Tensor:
        return self._multiply(self.jacobians, columns)

    def transpose(self, columns: Tensor) -> Tensor:
        return self._multiply(self.jacobians.mT, columns)

    def _multiply(self, matrices: Tensor, columns: Tensor) -> Tensor:
        # One product per sample for all columns: one per column copies the matrices.
        parts = columns.reshape(*matrices.shape[::2], -1)
        return (matrices @ parts).flatten(0, 1)


class SelectionMap(LinearMap):
    """z_o = Σ_j a_oj x_(index oj).

    Args:
        index: Which features of x, [z, picks].
        weight: a, [z, picks].
        in_size: Features of x.
    """

    def __init__(self, index: Tensor, weight: Tensor, in_size: int) -> None:
        self.in_size, self.out_size = in_size, len(index)
        self._index, self._weight = index, weight.unsqueeze(2)

    def forward(self, columns: Tensor) -> Tensor:
        return (columns[self._index] * self._weight).sum(1)

    def transpose(self, columns: Tensor) -> Tensor:
        spread = (columns.unsqueeze(1) * self._weight).flatten(0, 1)
        result = columns.new_zeros(self.in_size, columns.shape[1])
        return result.index_add_(0, self._index.flatten(), spread)


class LinearWeightMap(LinearMap):
    """∂z/∂W of z_n = W x_n: W [out · in] ↦ (W x_n)_n, [samples · out].

    Args:
        inputs: x, [samples, in]; read, not copied.
        out_features: Rows of W.
    """

    def __init__(self, inputs: Tensor, out_features: int) -> None:
        self._inputs = Watched(inputs, "An input")
        self._out_features = out_features
        self.in_size = out_features * inputs.shape[1]
        self.out_size = out_features * len(inputs)

    def forward(self, columns: Tensor) -> Tensor:
        x = self._inputs.value
        weights = columns.T.reshape(-1, self._out_features, x.shape[1])
        return (x @ weights.mT).reshape(columns.shape[1], -1).T

    def transpose(self, columns: Tensor) -> Tensor:
        x = self._inputs.value
        outputs = columns.T.reshape(-1, len(x), self._out_features)
        return (outputs.mT @ x).reshape(columns.shape[1], -1).T

    def require_fresh(self) -> None:
        _ = self._inputs.value


class BiasMap(LinearMap):
    """∂z/∂b: b, [channels], reaches every sample and position.

    Args:
        samples: How many.
        channels: How many.
        positions: How many per channel.
    """

    def __init__(self, samples: int, channels: int, positions: int) -> None:
        self._shape = samples, channels, positions
        self.in_size, self.out_size = channels, samples * channels * positions

    def forward(self, columns: Tensor) -> Tensor:
        samples, channels, positions = self._shape
        spread = columns.reshape(1, channels, 1, -1)
        return spread.expand(samples, -1, positions, -1).reshape(self.out_size, -1)

    def transpose(self, columns: Tensor) -> Tensor:
        return columns.reshape(*self._shape, -1).sum((0, 2))


class ReplicateMap(LinearMap):
    """x ↦ (x, …, x), one for each sample."""

    def __init__(self, samples: int, size: int) -> None:
        self._samples = samples
        self.in_size, self.out_size = size, samples * size

    def forward(self, columns: Tensor) -> Tensor:
        return columns.repeat(self._samples, 1)

    def transpose(self, columns: Tensor) -> Tensor:
        return columns.reshape(self._samples, self.in_size, -1).sum(0)


class ChainMap(LinearMap):
    """J_m ⋯ J₂J₁, given J₁, …, J_m; the identity of ``size`` if there is none."""

    def __init__(self, maps: Sequence[LinearMap], size: int) -> None:
        self.maps = list(maps)
        self.in_size = self.maps[0].in_size if maps else size
        self.out_size = self.maps[-1].out_size if maps else size

    def forward(self, columns: Tensor) -> Tensor:
        for step in self.maps:
            columns = step.forward(columns)
        return columns

    def transpose(self, columns: Tensor) -> Tensor:
        for step in reversed(self.maps):
            columns = step.transpose(columns)
        return columns

    def require_fresh(self) -> None:
        for step in self.maps:
            step.require_fresh()


class SumMap(LinearMap):
    """J₁ + J₂: two paths from x to z."""

    def __init__(self, first: LinearMap, second: LinearMap) -> None:
        self.first, self.second = first, second
        self.in_size, self.out_size = first.in_size, first.out_size

    def forward(self, columns: Tensor) -> Tensor:
        return self.first.forward(columns) + self.second.forward(columns)

    def transpose(self, columns: Tensor) -> Tensor:
        return self.first.transpose(columns) + self.second.transpose(columns)

    def require_fresh(self) -> None:
        self.first.require_fresh()
        self.second.require_fresh()


class JointMap(LinearMap):
    """∂z/∂(W, b) from ∂z/∂W and ∂z/∂b: rows of [W, b], [out · (in + 1)].

    Args:
        weight: ∂z/∂W for W of ``out`` rows.
        bias: ∂z/∂b.
    """

    def __init__(self, weight: LinearMap, bias: LinearMap) -> None:
        self.weight, self.bias = weight, bias
        self.in_size = weight.in_size + bias.in_size
        self.out_size = weight.out_size

    def forward(self, columns: Tensor) -> Tensor:
        count = columns.shape[1]
        rows = columns.reshape(self.bias.in_size, -1, count)
        of_weight = self.weight.forward(rows[:, :-1].reshape(-1, count))
        return of_weight + self.bias.forward(rows[:, -1])

    def transpose(self, columns: Tensor) -> Tensor:
        count = columns.shape[1]
        weight = self.weight.transpose(columns)
        weight = weight.reshape(self.bias.in_size, -1, count)
        bias = self.bias.transpose(columns).unsqueeze(1)
        return torch.cat([weight, bias], dim=1).reshape(-1, count)

    def require_fresh(self) -> None:
        self.weight.require_fresh()
        self.bias.require_fresh()
