"""Jacobians: the linear maps between which curvature travels.

A layer's rule says what J = ∂z/∂x, or ∂z/∂θ, is *for every sample*. How the batch is
read is decided here, once for all layers, by three methods of a Jacobian:

| reading | method | curvature |
|---|---|---|
| exact | ``J.congruence(H, R)`` | JᵀHJ + R, all samples side by side |
| averaged Jacobian | ``J.mean(batch).congruence(H, R)`` | E[J]ᵀ H E[J] + R |
| averaged product | ``J.mean_congruence(H, R, batch)`` | E[JᵀHJ] + R |

| map | Jacobian |
|---|---|
| ``Matrix`` | a weight W, z = Wx |
| ``Diagonal`` | diag(d): an elementwise layer |
| ``Function`` | any linear function, the same for every sample |
| ``Rearrangement`` | the identity on flattened features |
| ``Selection`` | z_o = x_(index o): a maximum |
| ``Weight``, ``Bias`` | ∂z/∂W of z = Wx, ∂z/∂b |
| ``Bilinear`` | ∂z/∂θ of any z = f(x, θ) that is linear in both |
| ``Spread`` | θ ↦ (θ, …, θ) |
| ``Chain``, ``Sum`` | J_m ⋯ J₂J₁ and J₁ + J₂ |

``jvp`` and ``vjp`` take rows, [k, samples · features]: the features of all samples, one
sample after the other. Averaged, there is one virtual sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from .operators import Congruence, DenseOperator, KroneckerBlock, Repeated, Watched
from .operators import SymmetricOperator as Operator

Term = Operator | None
"""R: a second-order term, modified, as an operator; None for 0."""


class Batch:
    """Where means over the batch come from: here, from the samples of this process.

    Everything that a Hessian pass has to know of other processes, or of a faster way
    to the same numbers, is a subclass of this; see ``as_batch``.
    """

    def read(self, passage: Callable[[Batch], Any]) -> Any:
        """Run a Hessian pass, a function of the batch that it is to ask."""
        return passage(self)

    def mean(self, values: Tensor) -> Tensor:
        """E of a first derivative or an input, [N, ...] → [1, ...]."""
        return self.mean_of_sum(_sum(values), len(values))

    def mean_of_sum(self, own: Tensor, count: int) -> Tensor:
        """E over the batch, from the sum over ``count`` samples of this process."""
        return own / count

    def total(self, values: Tensor) -> Tensor:
        """Σ of what carries the 1/N of a mean loss, [N, ...] → [1, ...]."""
        return _sum(values)

    def of_all(self, J: Jacobian) -> Jacobian:
        """J of all samples of the batch, from that of the samples of this process."""
        return J

    def output_hessian(self, H: Operator) -> Operator:
        """H̄ of the batch, from that of the loss of this process."""
        return H

    def exact_block(self, block: Operator) -> Operator:
        """The exact block of the batch, from that of the samples of this process."""
        return block

    def congruence(self, J: Jacobian, H: Operator, R: Term) -> Operator:
        """JᵀHJ + R of one virtual sample."""
        return J.congruence(H, R)

    def weight_block(self, H: Operator, x: Tensor, delta: Tensor | None) -> Operator:
        """H ⊗ E[xxᵀ] from x, [N, in]; gradients may be δᵀx, δ = ∂loss/∂z, [N, out]."""
        return KroneckerBlock(H, x, 1 / len(x))


@singledispatch
def as_batch(source: object) -> Batch:
    """The ``Batch`` that ``backward_hessian(process_group=source)`` asks.

    ``None`` is this process alone. Who knows another kind of source registers it:
    ``as_batch.register(Kind, function)``.

    Raises:
        TypeError: nobody knows it.
    """
    raise TypeError(
        f"process_group={source!r} is no group of which this process is a member. Use "
        "torch.distributed.group.WORLD, or let only its members call."
    )


as_batch.register(type(None), lambda _: Batch())
as_batch.register(Batch, lambda batch: batch)


class Jacobian:
    """∂z/∂x of N samples, or ∂z/∂θ where ``of_parameter`` is set.

    Args:
        in_shape: Shape of one sample's x, or of θ.
        out_shape: Shape of one sample's z.
        samples: N.
        data: What differs between samples, [N, ...], in which ``jvp`` and ``vjp`` are
            linear, so that E[J] is the map of E[data]; or None.
        reads: What a product reads and somebody else owns.

    Attributes:
        in_size: Entries of what ``jvp`` takes.
        out_size: Entries of what ``jvp`` returns.
        matrix: W, if z = Wx for every sample.
        parts: What J is made of, if it is made of others.
    """

    of_parameter = False
    matrix: Tensor | None = None
    parts: Sequence[Jacobian] = ()
    data: Any

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        samples: int,
        data: Tensor | None = None,
        reads: Sequence[Watched] = (),
    ) -> None:
        self.in_shape, self.out_shape = torch.Size(in_shape), torch.Size(out_shape)
        self.samples, self.data, self.reads = samples, data, reads
        self.in_size = self.in_shape.numel() * (1 if self.of_parameter else samples)
        self.out_size = self.out_shape.numel() * samples

    def jvp(self, rows: Tensor) -> Tensor:
        """J v for each row v, [k, in_size] → [k, out_size]."""
        raise NotImplementedError

    def vjp(self, rows: Tensor) -> Tensor:
        """Jᵀu for each row u, [k, out_size] → [k, in_size]."""
        raise NotImplementedError

    def with_data(self, data: Tensor | None, samples: int) -> Jacobian:
        """The same map of other samples."""
        twin = copy.copy(self)
        # What was read of the samples is no longer read.
        reads = self.reads if data is None else ()
        Jacobian.__init__(twin, self.in_shape, self.out_shape, samples, data, reads)
        return twin

    def mean(self, batch: Batch) -> Jacobian:
        """E[J], of one virtual sample."""
        return self.with_data(None if self.data is None else batch.mean(self.data), 1)

    def congruence(self, H: Operator, R: Term = None) -> Operator:
        """JᵀHJ + R: what all three readings end in."""
        return Congruence(H, self, R)

    def mean_congruence(self, H: Operator, R: Term, batch: Batch) -> Operator:
        """E[JᵀHJ] + R: every sample gets 1/N of H, and its own J; eq-averaging."""
        each = batch.of_all(self)
        path: Jacobian = each
        if not self.of_parameter:
            path = Chain([Spread(self.in_shape, self.in_shape, each.samples), each])
        return Congruence(Repeated(H, each.samples), path, R)


class SharedJacobian(Jacobian):
    """One J for every sample: averaging it, or products with it, is the same."""

    def mean_congruence(self, H: Operator, R: Term, batch: Batch) -> Operator:
        return self.mean(batch).congruence(H, R)


class Matrix(SharedJacobian):
    """z = Wx by a weight, [z, x], that is read and not copied.

    Args:
        W: [z, x].
        samples: N.
        positions: Of how many vectors x a sample is made, [*positions, x].
    """

    def __init__(self, W: Tensor, samples: int, positions: Sequence[int] = ()) -> None:
        reads = [Watched(W, "A weight")]
        shapes = (*positions, W.shape[1]), (*positions, W.shape[0])
        super().__init__(*shapes, samples, reads=reads)
        self._W = W.detach()
        self.matrix = None if positions else self._W

    def jvp(self, rows: Tensor) -> Tensor:
        each = rows.reshape(-1, self._W.shape[1])
        return (each @ self._W.T).reshape(len(rows), -1)

    def vjp(self, rows: Tensor) -> Tensor:
        each = rows.reshape(-1, self._W.shape[0])
        return (each @ self._W).reshape(len(rows), -1)


class Diagonal(Jacobian):
    """z = d ⊙ x; ``data`` is d, [N, ...]."""

    def __init__(self, d: Tensor) -> None:
        super().__init__(d.shape[1:], d.shape[1:], len(d), d)

    def jvp(self, rows: Tensor) -> Tensor:
        return rows * self.data.flatten()

    vjp = jvp

    def mean_congruence(self, H: Operator, R: Term, batch: Batch) -> Operator:
        """E[ddᵀ] ⊙ H, where that fits; eq-averaging."""
        if not H.fits:
            return super().mean_congruence(H, R, batch)
        d = self.data.flatten(1)
        matrix = batch.mean_of_sum(d.T @ d, len(d)) * H.to_dense()
        if R is not None:
            matrix.diagonal().add_(R.diagonal())
        return DenseOperator(matrix)


class Function(SharedJacobian):
    """One linear function for every sample.

    Args:
        function: [M, *in_shape] → [M, *out_shape] for any number M of samples.
        in_shape: As in ``Jacobian``, like the next two.
        out_shape: See ``in_shape``.
        samples: See ``in_shape``.
        transpose: [M, *out_shape] → [M, *in_shape]; automatic differentiation finds
            it if it is not given.
        reads: As in ``Jacobian``.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        samples: int,
        transpose: Callable[[Tensor], Tensor] | None = None,
        reads: Sequence[Watched] = (),
    ) -> None:
        super().__init__(in_shape, out_shape, samples, reads=reads)
        self._function, self._transpose = function, transpose

    def jvp(self, rows: Tensor) -> Tensor:
        return self._function(rows.reshape(-1, *self.in_shape)).reshape(len(rows), -1)

    def vjp(self, rows: Tensor) -> Tensor:
        pull = self._transpose or self._by_autograd  # Kept, it would keep itself alive.
        return pull(rows.reshape(-1, *self.out_shape)).reshape(len(rows), -1)

    @torch.enable_grad()
    def _by_autograd(self, u: Tensor) -> Tensor:
        x = u.new_zeros(len(u), *self.in_shape).requires_grad_()
        return torch.autograd.grad(self._function(x), x, u)[0]


class Rearrangement(SharedJacobian):
    """The identity on flattened features: a reshape, or nothing at all."""

    def jvp(self, rows: Tensor) -> Tensor:
        return rows

    vjp = jvp

    def congruence(self, H: Operator, R: Term = None) -> Operator:
        return H if R is None else super().congruence(H, R)


class Selection(Jacobian):
    """z_o = Σ_j a_j x_(index oj): picks that differ between samples, as for a maximum.

    Args:
        index: Features of x, for each feature of z, [N, z, picks].
        weight: a; the ones of a mean are [z, picks].
        places: Among which features of x each one of z chooses, [z, K]; -1 for none.
        in_shape: As in ``Jacobian``, like the next.
        out_shape: See ``in_shape``.
    """

    def __init__(
        self,
        index: Tensor,
        weight: Tensor,
        places: Tensor,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
    ) -> None:
        super().__init__(in_shape, out_shape, len(index), index)
        self._weight, self._places = weight, places

    def _picks(self) -> Tensor:
        """The index among the features of all samples, [samples · z, picks]."""
        starts = torch.arange(self.samples, device=self.data.device).view(-1, 1, 1)
        return (self.data + starts * self.in_shape.numel()).flatten(0, 1)

    def jvp(self, rows: Tensor) -> Tensor:
        return (rows[:, self._picks()] * self._weight).sum(2)

    def vjp(self, rows: Tensor) -> Tensor:
        spread = (rows[:, :, None] * self._weight).flatten(1)
        x = rows.new_zeros(len(rows), self.in_size)
        return x.index_add_(1, self._picks().flatten(), spread)

    def mean(self, batch: Batch) -> Jacobian:
        """E[J]: how often each place was picked; of single picks."""
        counts = (self.data == self._places).sum(0, dtype=torch.int32)  # A fast sum.
        share = batch.mean_of_sum(counts.to(self._weight), self.samples)
        index, shapes = self._places.clamp(min=0)[None], (self.in_shape, self.out_shape)
        return Selection(index, share, self._places, *shapes)


class Weight(Jacobian):
    """∂z/∂W of z = Wx; ``data`` is x, [N, in], or [N, *positions, in].

    Args:
        x: Read, not copied.
        out_features: Rows of W.
        delta: δ = ∂loss/∂z, [N, out], if the gradient w.r.t. W may well be δᵀx.
    """

    of_parameter = True

    def __init__(
        self, x: Tensor, out_features: int, delta: Tensor | None = None
    ) -> None:
        shape, out_shape = (out_features, x.shape[-1]), (*x.shape[1:-1], out_features)
        super().__init__(shape, out_shape, len(x), x, [Watched(x, "An input")])
        self._delta, self._is_plain = delta, x.dim() == 2

    def jvp(self, rows: Tensor) -> Tensor:
        each = rows.reshape(-1, *self.in_shape).mT
        return (self.data.flatten(0, -2) @ each).flatten(1)

    def vjp(self, rows: Tensor) -> Tensor:
        outputs = rows.reshape(len(rows), -1, self.in_shape[0])
        return (outputs.mT @ self.data.flatten(0, -2)).flatten(1)

    def congruence(self, H: Operator, R: Term = None) -> Operator:
        """Of one vector, H ⊗ xxᵀ."""
        one = self.samples == 1 and self._is_plain
        return KroneckerBlock(H, self.data) if one else super().congruence(H, R)

    def mean_congruence(self, H: Operator, R: Term, batch: Batch) -> Operator:
        """H ⊗ E[xxᵀ], where a sample is one vector."""
        if not self._is_plain:
            return super().mean_congruence(H, R, batch)
        return batch.weight_block(H, self.data, self._delta)


class Spread(SharedJacobian):
    """θ ↦ (θ, …, θ): it fills every sample, in which it may stand several times."""

    of_parameter = True

    def jvp(self, rows: Tensor) -> Tensor:
        return rows.repeat(1, self.out_size // self.in_size)

    def vjp(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), -1, self.in_size).sum(1)

    def congruence(self, H: Operator, R: Term = None) -> Operator:
        """H itself where the map is the identity."""
        return H if self.in_size == self.out_size else super().congruence(H, R)


class Bias(Spread):
    """∂z/∂b: b, of any shape, reaches every sample and, in it, every position.

    Args:
        in_shape: Shape of b.
        out_shape: Shape of one sample's z, which begins with that of b.
        samples: N.
    """

    def jvp(self, rows: Tensor) -> Tensor:
        positions = self.out_shape.numel() // self.in_shape.numel()
        spread = rows.view(len(rows), 1, -1, 1).expand(-1, self.samples, -1, positions)
        return spread.reshape(len(rows), -1)

    def vjp(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), self.samples, self.in_size, -1).sum((1, 3))


class Bilinear(Jacobian):
    """∂z/∂θ of z = f(x, θ), linear in x and in θ; ``data`` is x, [N, ...].

    Args:
        function: x [N, ...], θ → z [N, *out_shape].
        transpose: x [N, ...], u [N, *out_shape] → Σ_n (∂z_n/∂θ)ᵀu_n, of the shape of θ.
        x: Read, not copied.
        in_shape: Shape of θ.
        out_shape: Shape of one sample's z.
        reads: What else the two functions read.
    """

    of_parameter = True

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        transpose: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        reads: Sequence[Watched] = (),
    ) -> None:
        reads = [Watched(x, "An input"), *reads]
        super().__init__(in_shape, out_shape, len(x), x, reads)
        self._function, self._transpose = function, transpose

    def with_data(self, data: Tensor | None, samples: int) -> Jacobian:
        twin = super().with_data(data, samples)
        twin.reads = self.reads[1:]
        return twin

    def jvp(self, rows: Tensor) -> Tensor:
        return self._each(self._function, rows.reshape(-1, *self.in_shape))

    def vjp(self, rows: Tensor) -> Tensor:
        outputs = rows.reshape(len(rows), self.samples, *self.out_shape)
        return self._each(self._transpose, outputs)

    def _each(self, function: Callable[..., Any], values: Tensor) -> Tensor:
        if len(values) == 1:
            result: Tensor = function(self.data, values[0])
            return result.reshape(1, -1)
        return vmap(function, (None, 0))(self.data, values).reshape(len(values), -1)


class Chain(Jacobian):
    """J_m ⋯ J₂J₁, given J₁, …, J_m; the identity of no stated size if there is none."""

    def __init__(self, steps: Sequence[Jacobian]) -> None:
        self.steps = list(steps)
        self.parts = [part for step in steps for part in step.parts or (step,)]
        reads = [watched for part in self.parts for watched in part.reads]
        first, last = (steps[0], steps[-1]) if steps else (Jacobian((), (), 1),) * 2
        self.of_parameter = first.of_parameter
        super().__init__(first.in_shape, last.out_shape, last.samples, reads=reads)

    def jvp(self, rows: Tensor) -> Tensor:
        for step in self.steps:
            rows = step.jvp(rows)
        return rows

    def vjp(self, rows: Tensor) -> Tensor:
        for step in reversed(self.steps):
            rows = step.vjp(rows)
        return rows

    def mean(self, batch: Batch) -> Jacobian:
        return Chain([step.mean(batch) for step in self.steps])


class Sum(Jacobian):
    """J₁ + J₂: two paths from x, of ``in_shape``, to z, of ``out_shape``."""

    def __init__(
        self,
        first: Jacobian,
        second: Jacobian,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        samples: int,
    ) -> None:
        self.first, self.second = first, second
        self.parts = [p for path in (first, second) for p in path.parts or (path,)]
        reads = [watched for part in self.parts for watched in part.reads]
        super().__init__(in_shape, out_shape, samples, reads=reads)

    def jvp(self, rows: Tensor) -> Tensor:
        return self.first.jvp(rows) + self.second.jvp(rows)

    def vjp(self, rows: Tensor) -> Tensor:
        return self.first.vjp(rows) + self.second.vjp(rows)

    def mean(self, batch: Batch) -> Sum:
        paths = self.first.mean(batch), self.second.mean(batch)
        return Sum(*paths, self.in_shape, self.out_shape, 1)


def _sum(values: Tensor) -> Tensor:
    # A matrix product streams through memory; a reduction over dimension 0 strides.
    flat = values.flatten(1)
    return (flat.new_ones(1, len(flat)) @ flat).view(1, *values.shape[1:])
