"""Symmetric operators: what travels backward, and what ``p.hessian`` is.

A curvature matrix is often far too large to write down, and rarely needs to be. An
operator answers the same questions from its factors:

| operator | matrix |
|---|---|
| ``DenseOperator`` | H, stored |
| ``DiagonalOperator`` | diag(r) |
| ``SampleBlocks`` | one matrix for each sample, block-diagonal |
| ``Repeated`` | H/N for each of N samples |
| ``Congruence`` | JᵀHJ + R: one step of the backward chain |
| ``OperatorSum`` | A₁ + A₂ + … |
| ``KroneckerBlock`` | H ⊗ w FᵀF: a linear layer's weight |
| ``MatrixFree`` | any function that multiplies a vector |

Inside the package vectors are rows, [k, n], as samples are everywhere in PyTorch; only
``operator @ v`` takes columns, as a matrix does.

An operator reads weights and inputs of the model, it does not copy them. Once one of
them has changed, it raises an error instead of mixing two points of parameter space.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import lu_solve

from . import settings
from .guards import full_precision, is_narrow, is_number, require_floats
from .settings import DENSE_FEATURES, NEGLIGIBLE, REMAINDER_ENTRIES, rows_at_once

if TYPE_CHECKING:
    from .jacobians import Jacobian


Solved = tuple[Tensor, Tensor]
"""Solutions, and a margin: above 1 unless the matrix is singular or not finite."""


class System(NamedTuple):
    """[(1-α) λ_j H + αI] y_j = b_j for j = 1 … k: a linear system in few coordinates.

    The coordinates belong to an orthonormal basis of a subspace that holds the Krylov
    space of A and b. So conjugate gradients takes the very steps that it would take on
    A itself, in fewer numbers; see eq-krylov.

    Attributes:
        operator: H, [n, n].
        scales: λ, [k].
        rhs: b, [k, n + 1]. The last column is a coordinate in the null space of A,
            where the damped matrix is α.
        add_to: (target, y, scale): target, flat, += scale · the vector that y, of the
            shape of ``rhs``, stands for.
    """

    operator: SymmetricOperator
    scales: Tensor
    rhs: Tensor
    add_to: Callable[[Tensor, Tensor, float], object]


class Watched:
    """A tensor that belongs to somebody else: read, not copied.

    A later change of it is noticed, unless it is made behind autograd's back, through
    ``tensor.data``.

    Args:
        tensor: Of any shape.
        what: What to call it in an error.
    """

    def __init__(self, tensor: Tensor, what: str) -> None:
        self.tensor = tensor.detach()
        self.version: int | None = self.tensor._version
        self._what = what

    def stale(self) -> RuntimeError:
        """What to raise when ``version`` is no longer that of ``tensor``."""
        return RuntimeError(
            f"{self._what} of shape {list(self.tensor.shape)} has changed since "
            "backward_hessian(), so this curvature no longer belongs to the model. Use "
            "it before optimizer.step(), or keep to_dense()."
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy owns its tensor, so nobody else changes it; or was stale already."""
        is_fresh = self.version in (None, self.tensor._version)
        return {**vars(self), "version": None if is_fresh else -1}


class SymmetricOperator(ABC):
    """A real symmetric [n, n] matrix, known by its products.

    A subclass gives ``product``, and overrides ``_dense``, ``_diagonal``,
    ``_eigvalsh``, ``solve_damped`` and ``system`` where its structure knows better.

    Args:
        size: n.
        like: A tensor or an operator of its dtype and on its device.
        reads: What a product reads and somebody else owns.

    Attributes:
        shape: ``torch.Size([n, n])``.
        dtype: Type of the entries.
        device: Where the factors live.
        reads: The same.

    Raises:
        ValueError: the dtype is narrower than float32.
    """

    def __init__(
        self, size: int, like: Tensor | SymmetricOperator, reads: Iterable[Watched] = ()
    ) -> None:
        if isinstance(like, Tensor) and is_narrow(like.dtype):
            raise ValueError(
                f"A matrix of {like.dtype} is too coarse for curvature: a solve would "
                "lose all digits. Convert it with .float()."
            )
        self.shape, self.reads = torch.Size((size, size)), list(reads)
        self.dtype: torch.dtype = like.dtype
        self.device: torch.device = like.device

    # hbp.algebra gives these.
    _given: Any = None
    inverse = logdet = sample = as_linear_operator = _given
    __add__ = __sub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = _given

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """A v for each row v, [k, n] → [k, n]. Arguments go unchecked."""

    @staticmethod
    def products(pairs: Sequence[tuple[SymmetricOperator, Tensor]]) -> list[Tensor]:
        """Products of several operators, each with rows of its own."""
        return [operator.product(rows) for operator, rows in pairs]

    def require_fresh(self) -> None:
        """Raise RuntimeError if a tensor has changed that a product would read."""
        for watched in self.reads:
            if watched.version not in (None, watched.tensor._version):
                raise watched.stale()

    @full_precision()
    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Multiply a vector, [n], or a stack of vectors as columns, [n, k].

        Raises:
            TypeError: ``vectors`` is no tensor.
            ValueError: it has the wrong shape, dtype or device.
            RuntimeError: a weight or an input has changed.
        """
        self._check(vectors, "right-hand side of @")
        if vectors.dim() == 1:
            return self.product(vectors[None])[0]
        return self.product(vectors.T).T

    @full_precision()
    def to_dense(self) -> Tensor:
        """The matrix itself, [n, n]. Treat it as read-only: it may be shared.

        Raises:
            MemoryError: it would need more than ``hbp.set_dense_limit`` allows.
            RuntimeError: a weight or an input has changed.
        """
        require_room(self.shape, self.dtype, "Use products, diagonal() or trace()")
        if "_matrix" not in vars(self):  # What was formed is independent of the model.
            self.require_fresh()
        return self._dense()

    @full_precision()
    def diagonal(self) -> Tensor:
        """The diagonal, [n]."""
        self.require_fresh()
        return self._diagonal()

    @full_precision()
    def trace(self) -> Tensor:
        """The sum of the eigenvalues, a scalar tensor."""
        return self.diagonal().sum()

    @full_precision()
    def eigvalsh(self) -> Tensor:
        """All eigenvalues in ascending order, [n]."""
        self.require_fresh()
        return self._eigvalsh()

    @full_precision()
    def solve(self, b: Tensor, alpha: float = 0.0) -> Tensor:
        """Solve [(1-α)A + αI] x = b directly.

        Args:
            b: Right-hand side, [n], or several as columns, [n, k].
            alpha: Damping α in [0, 1].

        Returns:
            x, of the shape of ``b``.

        Raises:
            TypeError: ``b`` is no tensor.
            ValueError: ``b`` or ``alpha`` is unsuitable.
            ArithmeticError: the matrix is singular to working precision.
        """
        self._check(b, "b")
        check_alpha(alpha)
        rows = b.reshape(len(b), -1).T.contiguous()
        x, margin = self.solve_damped(rows, 1 - alpha, alpha)
        if not bool(margin > 1):
            raise ArithmeticError(singular(alpha))
        return x.T.reshape(b.shape)

    @property
    def fits(self) -> bool:
        """Whether the dense matrix is within the limit; see ``set_dense_limit``."""
        return self.shape.numel() * self.dtype.itemsize <= settings.dense_limit

    # --- What a subclass may know better. ---------------------------------------------

    def solve_damped(
        self, rows: Tensor, weight: float | Tensor, shift: float
    ) -> Solved:
        """Solve [weight · A + shift · I] x = b for rows b, [k, n], without host reads.

        Arguments go unchecked.

        Returns:
            x, [k, n], and a margin, a scalar tensor. Unless it is above 1, the matrix
            is singular to working precision or not finite, and x means nothing.
        """
        damped = self.to_dense() * weight
        damped.diagonal().add_(shift)
        factors, pivots, _ = torch.linalg.lu_factor_ex(damped)
        solution, sizes = lu_solve(factors, pivots, rows.T).T, factors.diagonal()
        if shift == 0:  # ‖A‖ and 1/‖A⁻¹‖, by inverse iteration; cos k² is as random.
            norm = torch.linalg.vector_norm(damped, 1, dim=1).max()
            x = torch.arange(len(damped), device=rows.device).square().cos().to(rows)
            for _ in range(2):
                x = lu_solve(factors, pivots, (x / x.abs().max()).view(-1, 1))
            sizes = torch.stack([norm, 1 / x.abs().max()])
        return solution, regularity(sizes, shift)

    def system(self, b: Tensor) -> System:
        """A and b, [n], in coordinates of a subspace with the Krylov space of both."""
        self.require_fresh()
        rhs = torch.cat([b, b.new_zeros(1)])[None]
        return System(
            self, b.new_ones(1), rhs, lambda x, y, scale: x.add_(y[0, :-1], alpha=scale)
        )

    def _dense(self) -> Tensor:
        return torch.cat([self.product(part) for part in self.identity()])

    def _diagonal(self) -> Tensor:
        return self.to_dense().diagonal()

    def _eigvalsh(self) -> Tensor:
        return torch.linalg.eigvalsh(self.to_dense())

    def identity(self, widest: int = 0) -> Iterator[Tensor]:
        """The rows of the identity, [k, n], as many at a time as memory likes.

        Args:
            widest: Entries of the largest image of a row, if that is longer than n.
        """
        n = self.shape[0]
        step = rows_at_once(max(n, widest))
        for start in range(0, n, step):
            shape = min(step, n - start), n
            rows = torch.zeros(shape, dtype=self.dtype, device=self.device)
            rows[:, start : start + len(rows)].fill_diagonal_(1)
            yield rows

    def _check(self, vectors: Tensor, name: str) -> None:
        self.require_fresh()
        n = self.shape[0]
        if not isinstance(vectors, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(vectors).__name__}.")
        if vectors.dim() not in (1, 2) or vectors.shape[0] != n:
            raise ValueError(
                f"{name} has shape {list(vectors.shape)}; this operator of shape "
                f"[{n}, {n}] takes [{n}] or [{n}, k] (vectors as columns)."
            )
        if vectors.layout != torch.strided:
            raise ValueError(f"{name} is {vectors.layout}. Use .to_dense().")
        if (vectors.dtype, vectors.device) != (self.dtype, self.device):
            raise ValueError(
                f"{name} is {vectors.dtype} on {vectors.device}, but the operator is "
                f"{self.dtype} on {self.device}. Convert it with .to(...)."
            )

    def __repr__(self) -> str:
        kind = f"dtype={self.dtype}, device={str(self.device)!r}"
        return f"{type(self).__name__}(shape={list(self.shape)}, {kind})"


class DenseOperator(SymmetricOperator):
    """H, stored.

    Args:
        matrix: [n, n], n > 0, symmetric and finite. Only its kind and its shape are
            checked here.

    Raises:
        TypeError: ``matrix`` is no tensor.
        ValueError: ``matrix`` is empty, not square, or not of floating-point numbers.
    """

    def __init__(self, matrix: Tensor) -> None:
        require_floats("matrix", matrix, data=False)
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {list(matrix.shape)}.")
        if len(matrix) == 0:
            raise ValueError("matrix is empty.")
        super().__init__(len(matrix), matrix)
        self.matrix = matrix

    def product(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix

    def _dense(self) -> Tensor:
        return self.matrix


class DiagonalOperator(SymmetricOperator):
    """diag(r).

    Args:
        values: r, [n].
        nonnegative: Whether r ≥ 0 is known, so that nobody has to look.
    """

    def __init__(self, values: Tensor, nonnegative: bool = False) -> None:
        super().__init__(len(values), values)
        self.values, self.nonnegative = values, nonnegative

    def product(self, rows: Tensor) -> Tensor:
        return rows * self.values

    def _diagonal(self) -> Tensor:
        return self.values


class ZeroOperator(SymmetricOperator):
    """No curvature: what a path sends back for it is its second-order terms alone."""

    def product(self, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows)


class SampleBlocks(SymmetricOperator):
    """One matrix for each sample, as the blocks of a block-diagonal one; see eq-exact.

    Args:
        matrices: [N, n, n], symmetric and finite. Only their shape is checked here.

    Raises:
        ValueError: ``matrices`` has another shape.
    """

    def __init__(self, matrices: Tensor) -> None:
        if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2]:
            raise ValueError(f"blocks must be [N, n, n], got {list(matrices.shape)}.")
        super().__init__(matrices.shape[:2].numel(), matrices)
        self.matrices = matrices

    def product(self, rows: Tensor) -> Tensor:
        samples = rows.reshape(len(rows), *self.matrices.shape[:2]).transpose(0, 1)
        return (samples @ self.matrices).transpose(0, 1).reshape(rows.shape)


class Repeated(SymmetricOperator):
    """H/N for each of N samples: Jᵀ(·)J of them, over all J_n, is E[JᵀHJ]."""

    def __init__(self, outer: SymmetricOperator, samples: int) -> None:
        super().__init__(samples * outer.shape[0], outer, outer.reads)
        self.outer, self.samples = outer, samples

    def product(self, rows: Tensor) -> Tensor:
        each = rows.reshape(-1, self.outer.shape[0])
        return self.outer.product(each).reshape(rows.shape) / self.samples


class OperatorSum(SymmetricOperator):
    """A₁ + A₂ + … of operators of one size, at least one."""

    def __init__(self, terms: Sequence[SymmetricOperator]) -> None:
        reads = [watched for term in terms for watched in term.reads]
        super().__init__(terms[0].shape[0], terms[0], reads)
        self.terms = list(terms)

    def product(self, rows: Tensor) -> Tensor:
        return torch.stack([term.product(rows) for term in self.terms]).sum(0)

    def _dense(self) -> Tensor:
        return torch.stack([term.to_dense() for term in self.terms]).sum(0)

    def _diagonal(self) -> Tensor:
        return torch.stack([term.diagonal() for term in self.terms]).sum(0)


class MatrixFree(SymmetricOperator):
    """Any function that multiplies a vector by a symmetric matrix.

    Args:
        product: maps a vector, [n], to the product, [n].
        size: n.
        dtype: Type of the vectors.
        device: Device of the vectors.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(size, torch.empty(0, dtype=dtype, device=device))
        self._function = product

    def product(self, rows: Tensor) -> Tensor:
        with torch.enable_grad():  # It may well differentiate.
            results = [self._function(row) for row in rows]
        for result in results:
            if not isinstance(result, Tensor) or result.shape != rows.shape[1:]:
                got = list(result.shape) if isinstance(result, Tensor) else type(result)
                raise ValueError(
                    f"The product function returned {got} for a vector of shape "
                    f"{list(rows.shape[1:])}; it must return a tensor of that shape."
                )
        return torch.stack(results).detach()


class Congruence(SymmetricOperator):
    """JᵀHJ + R: curvature sent backward through one layer, eq-hbp.

    This is the idea that makes the package fast. With averaged Jacobians no step of the
    chain has a batch dimension, so [a product][eq-operator] is two passes of *one*
    virtual sample through the layers above. No matrix is formed unless it is small
    (``DENSE_FEATURES``) or somebody asks for it.

    Args:
        outer: H, the curvature w.r.t. the layer's output, [z, z].
        jacobian: J, [z, x].
        term: R, the modified second-order term, [x, x], if there is one.
    """

    def __init__(
        self,
        outer: SymmetricOperator,
        jacobian: Jacobian,
        term: SymmetricOperator | None = None,
    ) -> None:
        reads = [*jacobian.reads, *outer.reads, *(term.reads if term else ())]
        super().__init__(jacobian.in_size, outer, reads)
        self.outer, self.jacobian, self.term = outer, jacobian, term

    def product(self, rows: Tensor) -> Tensor:
        if self._is_small or "_matrix" in vars(self):
            return rows @ self._matrix
        return self._through_the_chain(rows)

    def _through_the_chain(self, rows: Tensor) -> Tensor:
        result = self.jacobian.vjp(self.outer.product(self.jacobian.jvp(rows)))
        return result if self.term is None else result.add_(self.term.product(rows))

    @cached_property
    def _is_small(self) -> bool:
        return self.shape[0] <= DENSE_FEATURES and self.fits and self._outer_is_small

    @property
    def _outer_is_small(self) -> bool:
        """Whether forming H is cheap next to what it is for, and within the limit."""
        small = self.outer.shape[0] <= 4 * max(self.shape[0], DENSE_FEATURES)
        return small and self.outer.fits

    def _dense(self) -> Tensor:
        return self._matrix

    @cached_property
    def _matrix(self) -> Tensor:
        return self._formed()

    def _formed(self) -> Tensor:
        if not self._outer_is_small:
            parts = self.identity(self.jacobian.out_size)
            return torch.cat([self._through_the_chain(part) for part in parts])
        outer = self.outer
        # What came through a weight is not kept: the activation below it will be.
        if isinstance(outer, Congruence) and outer.jacobian.matrix is not None:
            H = outer._formed()
        else:
            H = outer.to_dense()
        matrix = self.jacobian.vjp(self.jacobian.vjp(H).T)  # (HJ)ᵀJ
        if isinstance(self.term, DiagonalOperator):
            matrix.diagonal().add_(self.term.values)
            return matrix
        return matrix if self.term is None else matrix + self.term.to_dense()

    def _diagonal(self) -> Tensor:
        images = map(self.jacobian.jvp, self.identity(self.jacobian.out_size))
        diagonal = torch.cat([(v * self.outer.product(v)).sum(1) for v in images])
        return diagonal if self.term is None else diagonal + self.term.diagonal()


class KroneckerBlock(SymmetricOperator):
    """H ⊗ w FᵀF: the curvature w.r.t. a linear layer's weight.

    One row F = x̄ᵀ makes it the rank-one block H ⊗ x̄x̄ᵀ (averaged Jacobian,
    Chen et al. 2018), N rows F = X with w = 1/N the block H ⊗ E[xxᵀ] (averaged
    product, Botev et al. 2017). Vectors are flattened row-major, ``W.flatten()``:
    index (o, i) stands at o·in + i.

    With the eigenvectors of w FᵀF = QΛQᵀ, what lies outside the span of the rows is in
    the null space: there (1-α)A + αI is just α. So solves and conjugate gradients work
    on Y = BQ, out × rank numbers instead of out × in, and on the length of the
    remainder B⊥ = B - YQᵀ; for one row, see [the split][eq-coordinates]. Each column
    of Y has [a system of its own][eq-columns], with λ_j H. Projecting before dividing
    by α keeps digits that the algebraically equal B/α - … of eq-closed-form cancels.

    Args:
        outer: H, the curvature w.r.t. the layer's output, [out, out].
        rows: F, [m, in]. It is read, not copied.
        weight: w, positive.
    """

    def __init__(
        self, outer: SymmetricOperator, rows: Tensor, weight: float = 1.0
    ) -> None:
        self.sizes = outer.shape[0], rows.shape[1]
        reads = [Watched(rows, "An input"), *outer.reads]
        super().__init__(self.sizes[0] * self.sizes[1], outer, reads)
        self.outer, self.rows, self.weight = outer, rows.detach(), weight

    def product(self, rows: Tensor) -> Tensor:
        # eq-linear-product, for all rows at once.
        seen = rows.reshape(-1, *self.sizes) @ self.rows.T  # [k, out, m]
        bent = self.outer.product(seen.mT.reshape(-1, self.sizes[0]))
        bent = bent.reshape(len(rows), -1, self.sizes[0]).mT * self.weight
        return (bent @ self.rows).reshape(rows.shape)

    def _dense(self) -> Tensor:
        inner = self.rows.T @ self.rows * self.weight
        # torch.kron refuses a matrix that is stored by columns.
        return torch.kron(self.outer.to_dense().contiguous(), inner)

    def _diagonal(self) -> Tensor:
        moments = self.rows.square().sum(0) * self.weight
        return torch.outer(self.outer.diagonal(), moments).flatten()

    def _eigvalsh(self) -> Tensor:
        values = torch.outer(self.outer.eigvalsh(), self.spectrum[0]).flatten()
        zeros = values.new_zeros(self.shape[0] - len(values))
        return torch.cat([values, zeros]).sort().values

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """λ, [k], ascending, and Q, [in, k], orthonormal where λ > 0; k = min(m, in).

        QR keeps Q orthonormal for repeated and for zero rows; the eigenvectors of the
        Gram matrix FFᵀ, mapped to inputs, would not be.
        """
        rows = self.rows
        if len(rows) == 1:
            length = torch.linalg.vector_norm(rows)
            direction = torch.where(length > 0, rows / length, 0)
            return length.square().reshape(1) * self.weight, direction.T
        if len(rows) >= self.sizes[1]:
            values, Q = eigh_of_gram(rows.T @ rows * self.weight)
        else:
            basis, factor = torch.linalg.qr(rows.T)
            values, Q = eigh_of_gram(factor @ factor.T * self.weight)
            Q = basis @ Q
        # What is no more than round-off belongs to the null space.
        is_null = values <= len(values) * torch.finfo(values.dtype).eps * values[-1]
        return values.masked_fill(is_null, 0), Q.masked_fill(is_null, 0)

    def solve_damped(
        self, rows: Tensor, weight: float | Tensor, shift: float
    ) -> Solved:
        """H ⊗ Λ on the span of the rows F, 1/shift outside: eq-closed-form."""
        x, margins = torch.zeros_like(rows), []
        for target, b in zip(x, rows, strict=True):
            system = self.system(b)
            y, margin = solve_system(system, weight, shift)
            system.add_to(target, y, 1.0)
            margins.append(margin)
        return x, torch.stack(margins).min()

    def system(self, b: Tensor) -> System:
        """B, [out, in], as Y = BQ and the length of B⊥, which scales like α alone."""
        self.require_fresh()
        B, (values, Q) = b.view(self.sizes), self.spectrum
        Y = B @ Q
        length = _remainder_norm(B, Y, Q)
        if len(values) == B.shape[1]:
            length = torch.where((values > 0).all(), 0, length)
        rhs = torch.cat([Y.T, Y.new_zeros(len(values), 1)], dim=1)
        rhs[0, -1] = length

        def add_to(target: Tensor, y: Tensor, scale: float) -> None:
            # YQᵀ + cB⊥ = cB + (Y - cBQ)Qᵀ for c = y⊥/‖B⊥‖: two passes over the target
            # and one over B. The right-hand side cancels digits within the span of Q,
            # at most those that c·B has there to begin with.
            share = torch.where(length > 0, y[0, -1] / length, 0)
            inside = y[:, :-1].T - share * Y
            matrix = target.view(self.sizes).addcmul_(B, share, value=scale)
            matrix.addmm_(inside, Q.T, alpha=scale)

        return System(self.outer, values, rhs, add_to)


def solve_system(system: System, weight: float | Tensor, shift: float) -> Solved:
    """The y, [k, n + 1], with [weight · λ_j H + shift · I] y_j = b_j, and a margin.

    With several λ, in [the eigenbasis of H][eq-eigenbases] every matrix is diagonal.
    The margin is as of ``SymmetricOperator.solve_damped``.
    """
    b, null = system.rhs[:, :-1], system.rhs[:, -1:]
    if len(b) == 1:
        y, margin = system.operator.solve_damped(b, weight * system.scales, shift)
    else:
        values, vectors = decomposed(system.operator.to_dense())
        damped = weight * torch.outer(system.scales, values) + shift
        y, margin = (b @ vectors / damped) @ vectors.T, regularity(damped, shift)
    if shift == 0:
        return torch.cat([y, null], dim=1), torch.where(null.any(), 0, margin)
    return torch.cat([y, null / shift], dim=1), margin


def as_operator(hessian: object, loss_scale: float = 1.0) -> SymmetricOperator:
    """An output Hessian, [C, C] or [N, C, C], as an operator.

    Raises:
        TypeError: it is neither a tensor nor an operator.
        ValueError: a matrix is not square, symmetric and finite; or, not changed since,
            it has an attribute ``sent_scale``, by what ``loss.backward()`` multiplied
            the gradient, that is not ``loss_scale``.
    """
    if isinstance(hessian, SymmetricOperator):
        return hessian
    name = "output_hessian"
    if not isinstance(hessian, Tensor):
        raise TypeError(
            f"{name} is a {type(hessian).__name__}; pass a [C, C] tensor, as from "
            "batch_summed_hessian(loss, outputs), or an operator."
        )
    require_floats(name, hessian)
    matrix = hessian.detach()
    if matrix.dim() not in (2, 3) or matrix.shape[-2] != matrix.shape[-1]:
        raise ValueError(
            f"{name} has shape {list(matrix.shape)}; for C output features it must be "
            "[C, C], as from batch_summed_hessian(loss, outputs), or [N, C, C], as "
            "from per_sample_hessian(loss, outputs)."
        )
    if matrix.numel() == 0:
        raise ValueError(f"{name} of shape {list(matrix.shape)} is empty.")
    sizes = [matrix.abs().max(), (matrix - matrix.mT).abs().max()]
    sent = vars(hessian).get("sent_scale")
    if sent is None or hessian._version:
        sent = matrix.new_full((), math.nan)
    largest, asymmetry, factor = torch.stack([*sizes, sent]).tolist()
    if not largest < float("inf"):
        raise ValueError(f"{name} contains NaN or infinity. Check loss and inputs.")
    # Autograd's round-off is a few eps; a wrong matrix is off by far more.
    if asymmetry > torch.finfo(matrix.dtype).eps ** 0.5 * largest:
        raise ValueError(f"{name} is not symmetric.")
    if abs(factor / loss_scale - 1) > 0.01:  # Not if it is NaN, unknown.
        raise ValueError(
            f"{name} is that of a loss of which backward() sent {factor:.3g} times the "
            "gradient. Take both of the same loss, or set loss_scale to that number if "
            "the optimizer will get the gradient divided by it."
        )
    return DenseOperator(matrix) if matrix.dim() == 2 else SampleBlocks(matrix)


def require_room(shape: Sequence[int], dtype: torch.dtype, remedy: str) -> None:
    """Raise MemoryError if a dense tensor is beyond ``hbp.set_dense_limit``."""
    size = math.prod(shape) * dtype.itemsize
    if size > settings.dense_limit:
        raise MemoryError(
            f"A dense {list(shape)} matrix of {dtype} needs {size / 2**30:.1f} GiB, "
            f"more than {settings.dense_limit / 2**30:.2g} GiB. {remedy}, or raise the "
            "limit by hbp.set_dense_limit()."
        )


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless ``alpha``, the damping α, is in [0, 1]."""
    if not (is_number(alpha) and 0 <= alpha <= 1):
        raise ValueError(
            f"alpha={alpha!r} is outside [0, 1]. It weighs (1-α)H + αI: 0 is the bare "
            "curvature, 1 plain gradient descent; 0.02 is a common start."
        )


def regularity(pivots: Tensor, shift: float) -> Tensor:
    """The margin of ``solve_damped`` from pivots or eigenvalues, a scalar tensor."""
    sizes, slack = pivots.abs(), settings.NULL_SLACK if shift == 0 else 1
    return sizes.min() / (slack * torch.finfo(pivots.dtype).eps * sizes.max())


def singular(alpha: float) -> str:
    """What to say of a system whose margin is not above 1."""
    what = f"(1-α)H + αI is singular or not finite at alpha={alpha}, to all its digits."
    return f"{what} Use a larger alpha, more digits by .double(), or solver='cg'."


def decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors.

    In float32 LAPACK gives up on some finite matrices, such as the Gram matrix of
    saturated features, whose entries are 1, or tiny, or 0. In float64 it does not.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    # Documented, but torch's types do not know it.
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix), vectors.to(matrix)


def eigh_of_gram(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending and not negative, and eigenvectors of a Gram matrix.

    Where the matrix is not finite, for its squares may overflow, the values are NaN,
    and the solver says so; ``torch.linalg.eigh`` would raise an error of its own.
    """
    values, vectors = decomposed(matrix.nan_to_num(0.0, 0.0, 0.0))
    return values.clamp(min=0) + 0 * matrix.trace(), vectors


def _remainder_norm(B: Tensor, Y: Tensor, Q: Tensor) -> Tensor:
    """‖B⊥‖ of B⊥ = B - YQᵀ, but never 0 where B is not.

    y⊥/‖B⊥‖ tells by how much B⊥ itself, however small, is to be scaled. A length of
    1e-15 ‖B‖ has no say in any inner product.

    B⊥ is formed a few rows at a time, so that it stays in the cache and no array of the
    weight's size is made. Pythagoras would be cheaper, but multiplies the round-off of
    BQ by ‖B‖²/‖B⊥‖².
    """
    norm, rows = torch.linalg.vector_norm, max(1, REMAINDER_ENTRIES // B.shape[1])
    lengths = []
    for b, y in zip(B.split(rows), Y.split(rows), strict=True):
        if Q.shape[1] == 1:
            remainder = torch.addr(b, y[:, 0], Q[:, 0], alpha=-1)
        else:
            remainder = torch.addmm(b, y, Q.T, alpha=-1)
        lengths.append(norm(remainder))
    return torch.maximum(norm(torch.stack(lengths)), NEGLIGIBLE * norm(Y))
