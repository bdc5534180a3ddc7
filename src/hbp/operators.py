"""Symmetric operators: what travels backward, and what ``p.hessian`` is.

A curvature matrix is often far too large to write down, and rarely needs to be.
An operator answers the same questions from its factors:

| operator | matrix |
|---|---|
| ``DenseOperator`` | H, stored |
| ``DiagonalOperator`` | diag(d) |
| ``Congruence`` | JᵀHJ + diag(r): one step of the backward chain |
| ``OperatorSum`` | A₁ + A₂ + … |
| ``SampleBlocks`` | one matrix per sample, block-diagonal |
| ``RepeatedOperator`` | the same matrix for every sample |
| ``KroneckerBlock`` | H ⊗ E[xxᵀ] or H ⊗ x̄x̄ᵀ: a linear layer's weight |
| ``KroneckerProduct`` | H ⊗ S for a small matrix S |
| ``KroneckerDiagonal`` | H ⊗ diag(λ): copies of H, each scaled |
| ``DirectSum`` | independent blocks on a diagonal |
| ``MatrixFree`` | any function that multiplies a vector |

``Congruence`` is the idea that makes the package fast. With averaged Jacobians
the Hessian chain has no batch dimension, so a product at layer *l* costs two
passes of one virtual sample through the layers above, and no matrix of size
features × features is formed unless somebody asks for it with ``to_dense()``.

``Congruence`` reads a layer's weight; it does not copy it. Once that weight has
changed, products raise an error instead of mixing two points of parameter space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from hbp.checks import is_number
from hbp.maps import DiagonalMap, LinearMap, MatrixMap, Watched, columns_at_once
from hbp.precision import full_precision, is_narrow

_dense_limit: float = 2**29

DENSE_FEATURES: Final = 256
"""Up to this size ``Congruence`` forms its matrix before it multiplies.

A product through the chain reads every weight above twice and launches some five
kernels a layer; with the matrix it reads n² numbers in one. Conjugate gradients takes
tens of products. On the network of tutorial 02, on a CPU, a whole step is as fast with
128 as with 256, and slower by 1 or 2 % with 0 or with 512, where forming the matrix
takes eight times the arithmetic.
"""

REMAINDER_ENTRIES: Final = 2**19
"""Entries of a gradient's remainder that are formed at a time: 2 MiB in float32."""

NEGLIGIBLE: Final = 1e-15
"""A length, relative to others, that has no say in any inner product."""

MULTIPLE_SLACK: Final = 16
"""By how many eps of its terms' sizes a gradient may differ from δᵀX.

Measured in the network of tutorial 02, at initialisation and after ten epochs, with
and without centred inputs: 6 at most. For two random samples of 3072 inputs it can be
20; then the gradient counts as any other, which is slower and as exact.
"""

PART_COLUMNS: Final = (16, 112)
"""How many eigen-directions of E[xxᵀ] share a system, from the largest; then the rest.

Few inputs' directions have large eigenvalues, and need many iterations; most need one.
On the network of tutorial 02, in mid-training, a first part of 8 was slower, one of 32
as fast, and without parts a step took half as long again or more. The sizes are fixed,
so that no GPU is waited for.
"""


class Reduction:
    """A and b, restricted to a subspace that holds the Krylov space of A and b.

    The coordinates belong to an orthonormal basis, so conjugate gradients on
    ``(operator, rhs)`` takes the very steps that it would take on ``(A, b)``:
    the same coefficients and residual norms, in fewer numbers (see eq-krylov). This
    class is the case without structure, where the subspace is the whole space.

    A may fall into blocks with a system each. Conjugate gradients on each of these
    ``parts`` by itself finds, with as many iterations, a solution that is at least as
    good: each part has its own coefficients, and stops when it is done.

    Attributes:
        operator: A in the first k coordinates of the subspace, shape [k, k]. Any
            further coordinate belongs to the null space of A.
        rhs: b in coordinates, [k] or [k + 1].
        size: Entries of b itself.
    """

    def __init__(self, operator: SymmetricOperator, rhs: Tensor) -> None:
        self.operator = operator
        self.rhs = rhs
        self.size = len(rhs)

    def parts(self) -> list[tuple[SymmetricOperator, Tensor]]:
        """Independent systems, each an operator and a rhs as above."""
        return [(self.operator, self.rhs)]

    def join(self, solutions: Sequence[Tensor]) -> Tensor:
        """The coordinates, as of ``rhs``, from those of the parts."""
        return solutions[0]

    def solve_damped(self, alpha: float) -> tuple[Tensor, Tensor]:
        """The y with [(1-α)A + αI] y = b; see ``SymmetricOperator.solve_damped``."""
        columns = self.rhs[: self.operator.shape[0], None]
        y, margin = self.operator.solve_damped(columns, 1 - alpha, alpha)
        return self._complete(y.squeeze(1), margin, alpha)

    def _complete(
        self, y: Tensor, margin: Tensor, alpha: float
    ) -> tuple[Tensor, Tensor]:
        """With the coordinate in the null space, where the matrix is α."""
        null = self.rhs[len(y) :]
        if len(null) > 0 and alpha == 0:
            return self.rhs, torch.zeros_like(margin)
        return torch.cat([y, null / alpha]) if len(null) > 0 else y, margin

    def add_to(self, target: Tensor, y: Tensor, scale: float) -> None:
        """target, [n], += scale · the vector whose coordinates are ``y``."""
        target.add_(y, alpha=scale)


def solve_reductions(
    reductions: Sequence[Reduction], alpha: float
) -> list[tuple[Tensor, Tensor]]:
    """``solve_damped`` of each; small dense blocks of one size in one batch."""
    sizes: dict[int, list[int]] = {}
    for i, reduction in enumerate(reductions):
        if reduction.operator.is_small_and_dense:
            sizes.setdefault(reduction.operator.shape[0], []).append(i)
    solved: dict[int, tuple[Tensor, Tensor]] = {}
    for size, indices in sizes.items():
        if len(indices) > 1:
            group = [reductions[i] for i in indices]
            damped = torch.stack([r.operator.to_dense() for r in group]) * (1 - alpha)
            damped.diagonal(dim1=1, dim2=2).add_(alpha)
            factors, pivots, _ = torch.linalg.lu_factor_ex(damped)
            columns = torch.stack([r.rhs[:size, None] for r in group])
            y = torch.linalg.lu_solve(factors, pivots, columns).squeeze(2)
            for i, r, own, factor in zip(indices, group, y, factors, strict=True):
                margin = regularity(factor.diagonal(), alpha)
                solved[i] = r._complete(own, margin, alpha)
    return [
        solved[i] if i in solved else reduction.solve_damped(alpha)
        for i, reduction in enumerate(reductions)
    ]


class SymmetricOperator(ABC):
    """A real symmetric [n, n] matrix, known by its products.

    Attributes:
        shape: ``torch.Size([n, n])``.
        dtype: Type of the entries.
        device: Where the factors live.

    Raises:
        ValueError: the dtype is narrower than float32.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        if is_narrow(dtype):
            raise ValueError(
                f"A matrix of {dtype} is too coarse for curvature: a solve would lose "
                "all digits. Convert it with .float()."
            )
        self.shape = torch.Size((size, size))
        self.dtype = dtype
        self.device = device

    def __init_subclass__(cls) -> None:
        """Let no question be answered under autocast, whatever the class overrides."""
        super().__init_subclass__()
        for name in {"diagonal", "trace", "eigvalsh"} & vars(cls).keys():
            setattr(cls, name, full_precision()(vars(cls)[name]))

    @abstractmethod
    def _product(self, columns: Tensor) -> Tensor:
        """Multiply ``columns``, [n, k]; the arguments are already checked."""

    def _dense(self) -> Tensor:
        """The whole matrix, [n, n]."""
        return self._product(
            torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        )

    def to_dense_once(self) -> Tensor:
        """``to_dense()`` for a caller who keeps what it makes of the matrix."""
        return self.to_dense()

    # Most operators own what they read, so the default is to have nothing to check.
    def require_fresh(self) -> None:  # noqa: B027
        """Raise RuntimeError if a tensor has changed that a product would read."""

    def add_product(self, target: Tensor, columns: Tensor, scale: float) -> None:
        """target, [n, k], += scale · A · columns, [n, k]. Arguments go unchecked."""
        target.add_(self._product(columns), alpha=scale)

    @full_precision()
    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Multiply a vector, [n], or a stack of vectors as columns, [n, k].

        Raises:
            ValueError: ``vectors`` has the wrong shape, dtype or device.
        """
        self._check(vectors, "right-hand side of @")
        if vectors.dim() == 1:
            return self._product(vectors.unsqueeze(1)).squeeze(1)
        return self._product(vectors)

    @full_precision()
    def to_dense(self) -> Tensor:
        """The matrix itself, [n, n]. Treat it as read-only: it may be shared.

        Raises:
            MemoryError: it would need more than ``hbp.set_dense_limit`` allows.
        """
        if not self.fits:
            raise MemoryError(
                f"A dense [{self.shape[0]}, {self.shape[1]}] matrix of {self.dtype} "
                f"needs {self._dense_bytes / 2**30:.1f} GiB, more than the limit of "
                f"{_dense_limit / 2**30:.2g} GiB. Use products (operator @ vector), "
                "diagonal() or trace() instead, or raise it by hbp.set_dense_limit()."
            )
        return self._dense()

    @property
    def is_small_and_dense(self) -> bool:
        """Whether it is best solved together with others of its size."""
        return False

    @property
    def _dense_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @property
    def fits(self) -> bool:
        """Whether the dense matrix is within the limit; see ``set_dense_limit``."""
        return fits_dense(self._dense_bytes)

    def diagonal(self) -> Tensor:
        """The diagonal, [n]."""
        return self.to_dense().diagonal()

    def trace(self) -> Tensor:
        """The sum of the eigenvalues, a scalar tensor."""
        return self.diagonal().sum()

    def eigvalsh(self) -> Tensor:
        """All eigenvalues in ascending order, [n]."""
        return torch.linalg.eigvalsh(self.to_dense())

    @full_precision()
    def solve(self, b: Tensor, alpha: float = 0.0) -> Tensor:
        """Solve [(1-α)A + αI] x = b directly.

        Args:
            b: Right-hand side, [n], or several as columns, [n, k].
            alpha: Damping α in [0, 1].

        Returns:
            x, of the shape of ``b``.

        Raises:
            ValueError: ``b`` or ``alpha`` is unsuitable.
            ArithmeticError: the matrix is singular to working precision.
        """
        self._check(b, "b")
        check_alpha(alpha)
        columns = b.unsqueeze(1) if b.dim() == 1 else b
        x, margin = self.solve_damped(columns, 1 - alpha, alpha)
        if not bool(margin > 1):
            raise ArithmeticError(singular_message(alpha))
        return x.reshape(b.shape)

    def reduce(self, b: Tensor) -> Reduction:
        """Restrict A and b, [n], to a subspace that holds the Krylov space of both.

        A step of CG costs what the coordinates cost; see ``Reduction``.
        """
        return Reduction(self, b)

    def reductions(self, b: Tensor) -> list[Reduction]:
        """``reduce``, one for each independent block, in order."""
        reduction = self.reduce(b)
        reduction.size = len(b)
        return [reduction]

    def diagonal_blocks(self, sizes: Sequence[int]) -> list[SymmetricOperator]:
        """Operators of the blocks on the diagonal, of ``sizes`` rows, in order."""
        return [PrincipalBlock(self, start, n) for start, n in _spans(sizes)]

    def solve_damped(
        self, columns: Tensor, weight: float | Tensor, shift: float
    ) -> tuple[Tensor, Tensor]:
        """Solve [weight · A + shift · I] x = columns, [n, k], without host reads.

        Arguments go unchecked.

        Returns:
            x, [n, k], and a margin, a scalar tensor. Unless it is above 1, the matrix
            is singular to working precision or not finite, and x means nothing.
        """
        damped = self.to_dense() * weight
        damped.diagonal().add_(shift)
        factor, pivots, _ = torch.linalg.lu_factor_ex(damped)
        solution = torch.linalg.lu_solve(factor, pivots, columns)
        return solution, regularity(factor.diagonal(), shift)

    def _check(self, vectors: Tensor, name: str) -> None:
        size = self.shape[0]
        if not isinstance(vectors, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(vectors).__name__}.")
        if vectors.dim() not in (1, 2) or vectors.shape[0] != size:
            raise ValueError(
                f"{name} has shape {list(vectors.shape)}; this operator of shape "
                f"[{size}, {size}] takes [{size}] or [{size}, k] (vectors as columns)."
            )
        if vectors.dtype != self.dtype or vectors.device != self.device:
            raise ValueError(
                f"{name} is {vectors.dtype} on {vectors.device}, but the operator is "
                f"{self.dtype} on {self.device}. Convert it with .to(...)."
            )
        if vectors.layout != torch.strided:
            raise ValueError(f"{name} is {vectors.layout}. Use .to_dense().")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, "
            f"device={str(self.device)!r})"
        )


class DenseOperator(SymmetricOperator):
    """A symmetric matrix that is stored.

    Args:
        matrix: [n, n], n > 0, symmetric and finite. Only its kind and its shape are
            checked here.

    Raises:
        TypeError: ``matrix`` is no tensor.
        ValueError: ``matrix`` is empty, not square, or not of floating-point numbers.
    """

    def __init__(self, matrix: Tensor) -> None:
        if not isinstance(matrix, Tensor):
            raise TypeError(f"matrix is a {type(matrix).__name__}; pass a tensor.")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {list(matrix.shape)}.")
        if len(matrix) == 0:
            raise ValueError("matrix is empty.")
        if not matrix.is_floating_point():
            raise ValueError(
                f"matrix is {matrix.dtype}; it must have a floating-point dtype."
            )
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    @property
    def is_small_and_dense(self) -> bool:
        return self.shape[0] <= 2 * DENSE_FEATURES

    def _product(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns

    def _dense(self) -> Tensor:
        return self.matrix

    def diagonal_blocks(self, sizes: Sequence[int]) -> list[SymmetricOperator]:
        return [
            DenseOperator(self.matrix[start : start + n, start : start + n])
            for start, n in _spans(sizes)
        ]


class ZeroOperator(SymmetricOperator):
    """The [n, n] matrix of zeros, given n, dtype and device."""

    def _product(self, columns: Tensor) -> Tensor:
        return torch.zeros_like(columns)

    def _dense(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class DiagonalOperator(SymmetricOperator):
    """diag(d), given d of shape [n]."""

    def __init__(self, diagonal: Tensor) -> None:
        super().__init__(len(diagonal), diagonal.dtype, diagonal.device)
        self._diagonal = diagonal

    def _product(self, columns: Tensor) -> Tensor:
        return self._diagonal.unsqueeze(1) * columns

    def _dense(self) -> Tensor:
        return torch.diag(self._diagonal)

    def diagonal(self) -> Tensor:
        return self._diagonal


class SampleBlocks(SymmetricOperator):
    """One matrix per sample, as the blocks of a block-diagonal one: H_z of eq-exact.

    Args:
        blocks: [N, n, n], symmetric and finite. Only their shape is checked here.

    Raises:
        ValueError: ``blocks`` has another shape.
    """

    def __init__(self, blocks: Tensor) -> None:
        if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2]:
            raise ValueError(f"blocks must be [N, n, n], got {list(blocks.shape)}.")
        super().__init__(blocks.shape[:2].numel(), blocks.dtype, blocks.device)
        self.blocks = blocks

    def _product(self, columns: Tensor) -> Tensor:
        parts = columns.reshape(*self.blocks.shape[:2], -1)
        return (self.blocks @ parts).flatten(0, 1)

    def _dense(self) -> Tensor:
        return torch.block_diag(*self.blocks)

    def diagonal(self) -> Tensor:
        return self.blocks.diagonal(dim1=1, dim2=2).flatten()

    def eigvalsh(self) -> Tensor:
        return torch.linalg.eigvalsh(self.blocks).flatten().sort().values


class RepeatedOperator(SymmetricOperator):
    """scale · H for every one of N samples: I_N ⊗ (scale · H).

    Args:
        outer: H, [n, n].
        samples: N.
        scale: A factor.
    """

    def __init__(self, outer: SymmetricOperator, samples: int, scale: float) -> None:
        super().__init__(samples * outer.shape[0], outer.dtype, outer.device)
        self.outer = outer
        self.samples = samples
        self.scale = scale

    def _product(self, columns: Tensor) -> Tensor:
        # [N, n, k] → [n, N·k]: samples become more right-hand sides.
        parts = columns.reshape(self.samples, self.outer.shape[0], -1).transpose(0, 1)
        product = self.outer._product(parts.flatten(1)).reshape(parts.shape)
        return (product.transpose(0, 1) * self.scale).reshape(columns.shape)

    def _dense(self) -> Tensor:
        return torch.block_diag(*[self.outer.to_dense() * self.scale] * self.samples)

    def diagonal(self) -> Tensor:
        return (self.outer.diagonal() * self.scale).repeat(self.samples)

    def require_fresh(self) -> None:
        self.outer.require_fresh()


class CrossTerms(SymmetricOperator):
    """AᵀHB + BᵀHA, by which (A + B)ᵀH(A + B) exceeds AᵀHA + BᵀHB; see eq-skip.

    Args:
        outer: H, [z, z].
        first: A, [z, x].
        second: B, [z, x].
    """

    def __init__(
        self, outer: SymmetricOperator, first: LinearMap, second: LinearMap
    ) -> None:
        super().__init__(first.in_size, outer.dtype, outer.device)
        self.outer, self.first, self.second = outer, first, second

    def _product(self, columns: Tensor) -> Tensor:
        both = torch.cat(
            [self.first.forward(columns), self.second.forward(columns)], dim=1
        )
        of_first, of_second = self.outer._product(both).chunk(2, dim=1)
        return self.second.transpose(of_first) + self.first.transpose(of_second)

    def require_fresh(self) -> None:
        self.outer.require_fresh()
        self.first.require_fresh()
        self.second.require_fresh()


class OperatorSum(SymmetricOperator):
    """A₁ + A₂ + … of operators of one size.

    Args:
        terms: At least one.
    """

    def __init__(self, terms: Sequence[SymmetricOperator]) -> None:
        super().__init__(terms[0].shape[0], terms[0].dtype, terms[0].device)
        self.terms = list(terms)

    def _product(self, columns: Tensor) -> Tensor:
        total = self.terms[0]._product(columns)
        for term in self.terms[1:]:
            total = total + term._product(columns)
        return total

    def _dense(self) -> Tensor:
        return torch.stack([term.to_dense() for term in self.terms]).sum(0)

    def diagonal(self) -> Tensor:
        return torch.stack([term.diagonal() for term in self.terms]).sum(0)

    def require_fresh(self) -> None:
        for term in self.terms:
            term.require_fresh()


class Congruence(SymmetricOperator):
    """JᵀHJ + diag(r): curvature sent backward through one module.

    A [product][eq-operator] is Jᵀ(H(Jv)) + r ⊙ v. Once the matrix has been formed, by
    ``to_dense()`` or because it is small (``DENSE_FEATURES``), products use it.

    Args:
        outer: H, the curvature w.r.t. the module's output, [z, z].
        jacobian: J, [z, x].
        second_order: r, [x], the modified second-order term, if there is one.
        nonnegative: Whether r ≥ 0 is known. Then a solve can go through the narrower
            layer above.
    """

    def __init__(
        self,
        outer: SymmetricOperator,
        jacobian: LinearMap,
        second_order: Tensor | None = None,
        nonnegative: bool = False,
    ) -> None:
        super().__init__(jacobian.in_size, outer.dtype, outer.device)
        self.outer = outer
        self.jacobian = jacobian
        self.second_order = second_order
        self.nonnegative = nonnegative or second_order is None

    @cached_property
    def _matrix(self) -> Tensor:
        return self._form()

    def _form(self) -> Tensor:
        if not self._outer_is_small:
            return _columns_of(self)
        matrix = self.jacobian.congruence(self.outer.to_dense_once())
        if self.second_order is not None:
            matrix.diagonal().add_(self.second_order)
        return matrix

    def to_dense_once(self) -> Tensor:
        """Below a weight stands an activation, whose matrix will be kept in turn."""
        if isinstance(self.jacobian, MatrixMap) and "_matrix" not in self.__dict__:
            return self._form()
        return self.to_dense()

    @cached_property
    def _second_order_column(self) -> Tensor:
        assert self.second_order is not None
        return self.second_order.unsqueeze(1)

    @property
    def _outer_is_small(self) -> bool:
        """Whether forming H is cheap next to what it is for, and within the limit."""
        small = self.outer.shape[0] <= 4 * max(self.shape[0], DENSE_FEATURES)
        return small and self.outer.fits

    def _dense(self) -> Tensor:
        return self._matrix

    def _product(self, columns: Tensor) -> Tensor:
        formed = "_matrix" in self.__dict__
        small = self.shape[0] <= DENSE_FEATURES and self.fits
        if formed or (small and self._outer_is_small):
            self.require_fresh()
            return self._matrix @ columns
        return self._by_factors(columns)

    def _by_factors(self, columns: Tensor) -> Tensor:
        jacobian = self.jacobian
        result = jacobian.transpose(self.outer._product(jacobian.forward(columns)))
        if self.second_order is not None:
            result.addcmul_(self._second_order_column, columns)
        return result

    def require_fresh(self) -> None:
        """Raise RuntimeError if a tensor of the chain has changed."""
        self.jacobian.require_fresh()
        self.outer.require_fresh()

    def diagonal_blocks(self, sizes: Sequence[int]) -> list[SymmetricOperator]:
        if self._outer_is_small and self.fits:
            return DenseOperator(self.to_dense()).diagonal_blocks(sizes)
        return super().diagonal_blocks(sizes)

    def diagonal(self) -> Tensor:
        diagonal = self.jacobian.congruence_diagonal(self.outer)
        return diagonal if self.second_order is None else diagonal + self.second_order

    def solve_damped(
        self, columns: Tensor, weight: float | Tensor, shift: float
    ) -> tuple[Tensor, Tensor]:
        """Woodbury's identity, eq-woodbury: the layer above is at most half as wide.

        With D = weight · diag(r) + shift · I and G = weight · H,

            (D + JᵀGJ)⁻¹ b = D⁻¹(b - Jᵀu),   (I + G JD⁻¹Jᵀ) u = G JD⁻¹b,

        a system of the size of H. It needs D to be well away from 0, so r ≥ 0.
        """
        narrow = self._narrow_factors() if self.nonnegative and shift > 0 else None
        if narrow is None:
            return super().solve_damped(columns, weight, shift)
        outer, J = narrow
        D = columns.new_full((self.shape[0], 1), shift)
        if self.second_order is not None:
            D = D.add_(self.second_order.unsqueeze(1) * weight)
        G, scaled = outer.to_dense() * weight, J / D.T
        capacitance = G @ (scaled @ J.T)
        capacitance.diagonal().add_(1)
        factor, pivots, _ = torch.linalg.lu_factor_ex(capacitance)
        u = torch.linalg.lu_solve(factor, pivots, G @ (scaled @ columns))
        return (columns - J.T @ u) / D, regularity(factor.diagonal(), shift)

    def _narrow_factors(self) -> tuple[SymmetricOperator, Tensor] | None:
        """H and a dense J, [z, x], with 2z ≤ x and A = JᵀHJ + diag(r), or None."""
        outer, jacobian = self.outer, self.jacobian
        if isinstance(jacobian, DiagonalMap):
            if not (isinstance(outer, Congruence) and outer.second_order is None):
                return None
            factors = outer._narrow_factors()
            return factors and (factors[0], factors[1] * jacobian.diagonal)
        if isinstance(jacobian, MatrixMap) and 2 * outer.shape[0] <= self.shape[0]:
            return outer, jacobian.matrix
        return None


class KroneckerProduct(SymmetricOperator):
    """H ⊗ S. Vectors are flattened row-major from [rows of H, rows of S].

    Args:
        outer: H, [o, o].
        inner: S, [m, m], symmetric positive semi-definite.
    """

    def __init__(self, outer: SymmetricOperator, inner: Tensor) -> None:
        super().__init__(outer.shape[0] * inner.shape[0], outer.dtype, outer.device)
        self.outer = outer
        self.inner = inner

    def _product(self, columns: Tensor) -> Tensor:
        stack = _apply_inner(self.inner, self._stack(columns))
        return self.outer._product(stack.flatten(1)).reshape(columns.shape)

    def _stack(self, columns: Tensor) -> Tensor:
        return columns.reshape(self.outer.shape[0], self.inner.shape[0], -1)

    def _dense(self) -> Tensor:
        # torch.kron refuses a matrix that is stored by columns.
        return torch.kron(self.outer.to_dense().contiguous(), self.inner.contiguous())

    def diagonal(self) -> Tensor:
        return torch.outer(self.outer.diagonal(), self.inner.diagonal()).flatten()

    def eigvalsh(self) -> Tensor:
        values = torch.linalg.eigvalsh(self.inner)
        return KroneckerDiagonal(self.outer, values).eigvalsh()

    def solve_damped(
        self, columns: Tensor, weight: float | Tensor, shift: float
    ) -> tuple[Tensor, Tensor]:
        """In the eigenbasis of S the system is that of H ⊗ diag(λ); eq-eigenbases."""
        values, vectors = _decomposed(self.inner)
        stack = _apply_inner(vectors.T, self._stack(columns))
        solution, margin = KroneckerDiagonal(self.outer, values).solve_damped(
            stack.reshape(columns.shape), weight, shift
        )
        stack = _apply_inner(vectors, self._stack(solution))
        return stack.reshape(columns.shape), margin


class KroneckerDiagonal(SymmetricOperator):
    """H ⊗ diag(λ): k copies of H, copy j times λ_j.

    Vectors are flattened row-major from [rows of H, k].

    Args:
        outer: H, [o, o].
        values: λ, [k].
    """

    def __init__(self, outer: SymmetricOperator, values: Tensor) -> None:
        super().__init__(outer.shape[0] * len(values), outer.dtype, outer.device)
        self.outer = outer
        self.values = values

    @property
    def is_small_and_dense(self) -> bool:
        return len(self.values) == 1 and self.outer.is_small_and_dense

    def _outer_product(self, columns: Tensor) -> Tensor:
        """(H ⊗ I) · columns, as [o, k, columns]."""
        stack = columns.reshape(self.outer.shape[0], -1)
        return self.outer._product(stack).view(len(stack), len(self.values), -1)

    def _product(self, columns: Tensor) -> Tensor:
        product = self._outer_product(columns) * self.values.unsqueeze(1)
        return product.view(columns.shape)

    def add_product(self, target: Tensor, columns: Tensor, scale: float) -> None:
        """target += scale · A · columns."""
        product = self._outer_product(columns)
        stack = target.view(product.shape)
        stack.addcmul_(product, self.values.unsqueeze(1), value=scale)

    def _dense(self) -> Tensor:
        return torch.kron(self.outer.to_dense().contiguous(), self.values.diag())

    def diagonal(self) -> Tensor:
        return torch.outer(self.outer.diagonal(), self.values).flatten()

    def eigvalsh(self) -> Tensor:
        products = torch.outer(self.outer.eigvalsh(), self.values)
        return products.flatten().sort().values

    def solve_damped(
        self, columns: Tensor, weight: float | Tensor, shift: float
    ) -> tuple[Tensor, Tensor]:
        """In the eigenbasis of H the damped matrix is diagonal; eq-eigenbases."""
        if len(self.values) == 1:
            return self.outer.solve_damped(columns, weight * self.values, shift)
        outer_values, vectors = _decomposed(self.outer.to_dense())
        values = weight * torch.outer(outer_values, self.values) + shift
        stack = vectors.T @ columns.reshape(len(vectors), -1)
        stack = stack.view(*values.shape, -1) / values.unsqueeze(2)
        solution = vectors @ stack.flatten(1)
        return solution.view(columns.shape), regularity(values, shift)


class KroneckerBlock(SymmetricOperator):
    """H ⊗ w FᵀF: the curvature w.r.t. a linear layer's weight.

    One row F = x̄ᵀ makes it the rank-one block H ⊗ x̄x̄ᵀ (averaged Jacobian,
    Chen et al. 2018), N rows F = X with w = 1/N the block H ⊗ E[xxᵀ] (averaged
    product, Botev et al. 2017). Vectors are flattened row-major, ``W.flatten()``:
    index (o, i) stands at o·in + i.

    With the eigenvectors of w FᵀF = QΛQᵀ, what lies outside the span of the rows is in
    the null space: there (1-α)A + αI is just α. So solves and conjugate gradients work
    on Y = BQ, out × rank numbers instead of out × in, and on the remainder
    B⊥ = B - YQᵀ; for one row, see [the split][eq-coordinates]. Projecting before
    dividing by α keeps digits that the algebraically equal B/α - … cancels. Each column
    of Y has [a system of its own][eq-columns], with λ_j H.

    The gradient of the very batch has no remainder, for it is δᵀF. Then Q is not
    needed either; see ``_RowReduction``.

    Args:
        outer: H, the curvature w.r.t. the layer's output, [out, out].
        rows: F, [m, in]. It is read, not copied.
        weight: w, positive.
        output_gradient: δ, [m, out], if right-hand sides are likely to be multiples of
            δᵀF. Each is checked.
    """

    def __init__(
        self,
        outer: SymmetricOperator,
        rows: Tensor,
        weight: float = 1.0,
        output_gradient: Tensor | None = None,
    ) -> None:
        self.out_features, self.in_features = outer.shape[0], rows.shape[1]
        super().__init__(
            self.out_features * self.in_features, outer.dtype, outer.device
        )
        self.outer = outer
        self.weight = weight
        self.output_gradient = output_gradient
        self._rows = Watched(rows, "An input")

    @property
    def rows(self) -> Tensor:
        """F, [m, in].

        Raises:
            RuntimeError: F has changed since the operator was made.
        """
        return self._rows.value

    def _product(self, columns: Tensor) -> Tensor:
        # eq-linear-product, for all columns and rows at once.
        stack = _apply_inner(self.rows, self._stack(columns))
        outer = self.outer._product(stack.flatten(1)).reshape(stack.shape)
        return _apply_inner(self.rows.T, outer * self.weight).reshape(columns.shape)

    def _stack(self, columns: Tensor) -> Tensor:
        return columns.reshape(self.out_features, self.in_features, -1)

    def _dense(self) -> Tensor:
        inner = self.rows.T @ self.rows * self.weight
        return KroneckerProduct(self.outer, inner)._dense()

    @property
    def _second_moments(self) -> Tensor:
        """The diagonal of w FᵀF, [in]."""
        return self.rows.square().sum(0) * self.weight

    def diagonal(self) -> Tensor:
        return torch.outer(self.outer.diagonal(), self._second_moments).flatten()

    def trace(self) -> Tensor:
        return self.outer.trace() * self._second_moments.sum()

    def diagonal_blocks(self, sizes: Sequence[int]) -> list[SymmetricOperator]:
        if any(size % self.in_features for size in sizes):
            return super().diagonal_blocks(sizes)
        features = [size // self.in_features for size in sizes]
        delta = self.output_gradient
        deltas = [None] * len(sizes) if delta is None else delta.split(features, dim=1)
        blocks = zip(self.outer.diagonal_blocks(features), deltas, strict=True)
        return [
            KroneckerBlock(outer, self.rows, self.weight, own) for outer, own in blocks
        ]

    def eigvalsh(self) -> Tensor:
        values = self._restricted.eigvalsh()
        zeros = values.new_zeros(self.shape[0] - values.numel())
        return torch.cat([values, zeros]).sort().values

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """λ, [k], ascending, and Q, [in, k], with orthonormal columns; k = min(m, in).

        QR keeps Q orthonormal for repeated and for zero rows; the eigenvectors of the
        Gram matrix FFᵀ, mapped to inputs, would not be.
        """
        rows = self.rows
        if len(rows) == 1:
            length = torch.linalg.vector_norm(rows)
            direction = torch.where(length > 0, rows / length, 0)
            return length.square().reshape(1) * self.weight, direction.T
        if len(rows) >= self.in_features:
            return eigh_of_gram(rows.T @ rows * self.weight)
        basis, factor = torch.linalg.qr(rows.T)
        values, vectors = eigh_of_gram(factor @ factor.T * self.weight)
        return values, basis @ vectors

    @cached_property
    def _gram_spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of w FFᵀ, [m], ascending, and eigenvectors U, [m, m]."""
        return eigh_of_gram(self.rows @ self.rows.T * self.weight)

    @property
    def _restricted(self) -> KroneckerDiagonal:
        """A on the span of the rows: H ⊗ Λ."""
        return KroneckerDiagonal(self.outer, self._spectrum[0])

    def _project(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """Columns [n, c] as coordinates Y [out·k, c] and remainder B⊥ [n, c]."""
        _, basis = self._spectrum
        stack = _apply_inner(basis.T, self._stack(columns))
        coordinates = stack.reshape(-1, columns.shape[1])
        if basis.shape[1] == self.in_features:
            return coordinates, None
        return coordinates, columns - self._lift(coordinates)

    def _lift(self, coordinates: Tensor) -> Tensor:
        """YQᵀ: coordinates [out·k, c] in the full space, [n, c]."""
        _, basis = self._spectrum
        stack = coordinates.reshape(self.out_features, basis.shape[1], -1)
        return _apply_inner(basis, stack).reshape(self.shape[0], -1)

    def solve_damped(
        self, columns: Tensor, weight: float | Tensor, shift: float
    ) -> tuple[Tensor, Tensor]:
        """H ⊗ Λ on the span of the rows, 1/shift outside: eq-closed-form."""
        coordinates, remainder = self._project(columns)
        solution, margin = self._restricted.solve_damped(coordinates, weight, shift)
        solution = self._lift(solution)
        if remainder is None:
            return solution, margin
        if shift == 0:
            return solution, margin * 0
        return solution.add_(remainder, alpha=1 / shift), margin

    def reduce(self, b: Tensor) -> Reduction:
        """Restrict A and b, [n], to out × rank coordinates, and one for the remainder.

        The host reads whether b is a multiple of δᵀF, if there is a δ.
        """
        matrix = b.view(self.out_features, self.in_features)
        if self.in_features <= len(self.rows):
            return _FullReduction(self._restricted, self._spectrum[1], matrix)
        if self.output_gradient is not None:
            factor, is_multiple = self._compare(matrix, self.output_gradient)
            if bool(is_multiple):
                return _RowReduction(self, self.output_gradient.T * factor)
        return _SpanReduction(self._restricted, self._spectrum[1], matrix)

    def _compare(self, b: Tensor, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The c for which B, [out, in], may be c δᵀF, and whether it is.

        Both are multiplied by one random vector (Freivalds 1977), which costs one pass
        over B. The vector is the same every time, and torch's own generators are left
        alone. Where B or δ is not finite, or δᵀX is zero, the answer is no.
        """
        generator = torch.Generator(b.device).manual_seed(0)
        probe = torch.randn(
            self.in_features, generator=generator, dtype=b.dtype, device=b.device
        )
        inputs = self.rows @ probe
        expected, found = output_gradient.T @ inputs, b @ probe
        # In units of the largest entry, so that no square underflows.
        unit = expected.abs().max()
        expected, found = expected / unit, found / unit
        factor = (expected @ found) / (expected @ expected)
        gap = (found - factor * expected).abs().max()
        # Round-off is relative to the terms of δᵀX, which may cancel, not to the sum.
        terms = output_gradient.abs().T @ torch.linalg.vector_norm(self.rows, dim=1)
        scale = factor.abs() * terms.max() / unit
        return factor, gap < MULTIPLE_SLACK * torch.finfo(b.dtype).eps * scale


class _ColumnReduction(Reduction):
    """Coordinates Y, [out, k], of which each column has a system with λ_j H.

    It is eq-columns, solved for one part of the columns at a time.

    One more coordinate may stand for a part of b in the null space. It is solved with
    the smallest eigenvalues.

    Args:
        operator: H ⊗ diag(λ), λ ascending.
        coordinates: Y.
        null: [1] or [0].
    """

    def __init__(
        self, operator: KroneckerDiagonal, coordinates: Tensor, null: Tensor
    ) -> None:
        super().__init__(operator, torch.cat([coordinates.flatten(), null]))
        self._diagonal = operator
        self._size = coordinates.numel()

    def _columns(self, y: Tensor) -> Tensor:
        """The coordinates y but for that of the null space, as [out, k]."""
        return y[: self._size].view(-1, len(self._diagonal.values))

    @cached_property
    def _part_sizes(self) -> list[int]:
        """Columns of each part, those of the smallest eigenvalues first."""
        sizes: list[int] = []
        left = len(self._diagonal.values)
        for size in PART_COLUMNS:
            if left > size:
                sizes.append(size)
                left -= size
        return [left, *reversed(sizes)]

    def parts(self) -> list[tuple[SymmetricOperator, Tensor]]:
        outer, values = self._diagonal.outer, self._diagonal.values
        columns = self._columns(self.rhs).split(self._part_sizes, dim=1)
        rhs = [part.flatten() for part in columns]
        rhs[0] = torch.cat([rhs[0], self.rhs[self._size :]])
        operators = [
            KroneckerDiagonal(outer, part) for part in values.split(self._part_sizes)
        ]
        return list(zip(operators, rhs, strict=True))

    def join(self, solutions: Sequence[Tensor]) -> Tensor:
        y = torch.empty_like(self.rhs)
        parts = self._columns(y).split(self._part_sizes, dim=1)
        for part, solution in zip(parts, solutions, strict=True):
            part.copy_(solution[: part.numel()].view_as(part))
        y[self._size :] = solutions[0][parts[0].numel() :]
        return y


class _FullReduction(_ColumnReduction):
    """B, [out, in], as Y = BQ for a square Q, [in, in]: nothing remains."""

    def __init__(self, operator: KroneckerDiagonal, basis: Tensor, b: Tensor) -> None:
        super().__init__(operator, b @ basis, b.new_empty(0))
        self._basis = basis

    def add_to(self, target: Tensor, y: Tensor, scale: float) -> None:
        coordinates = self._columns(y)
        matrix = target.view_as(coordinates)
        matrix.addmm_(coordinates, self._basis.T, alpha=scale)


class _SpanReduction(_ColumnReduction):
    """B, [out, in], as Y = BQ, out × k numbers, and the length of B⊥ = B - YQᵀ.

    In units of ‖B⊥‖, so that the inner product of eq-coordinates is the usual one.
    """

    def __init__(self, operator: KroneckerDiagonal, basis: Tensor, b: Tensor) -> None:
        self._basis = basis
        self._b = b
        self._coordinates = b @ basis
        self._length = self._remainder_norm()
        super().__init__(operator, self._coordinates, self._length.reshape(1))

    def _remainder_norm(self) -> Tensor:
        """‖B⊥‖, but never 0 where B is not.

        y⊥/‖B⊥‖ tells by how much B⊥ itself, however small, is to be scaled. A length
        of 1e-15 ‖B‖ has no say in any inner product.

        B⊥ is formed a few rows at a time, so that it stays in the cache and no array
        of the weight's size is made. Pythagoras would be cheaper, but cannot tell a
        B⊥ below 1e-3 ‖B‖ from round-off in float32.
        """
        rows = max(1, REMAINDER_ENTRIES // self._b.shape[1])
        parts = zip(self._b.split(rows), self._coordinates.split(rows), strict=True)
        norms = [_norm(_remainder(b, y, self._basis)) for b, y in parts]
        floor = NEGLIGIBLE * _norm(self._coordinates)
        return torch.maximum(_norm(torch.stack(norms)), floor)

    def add_to(self, target: Tensor, y: Tensor, scale: float) -> None:
        """Two passes over ``target`` and one over B; nothing of that size is made.

        YQᵀ + cB⊥ = cB + (Y - cBQ)Qᵀ for c = y⊥/‖B⊥‖. The right-hand side cancels
        digits within the span of Q, at most those that c·B has there to begin with.
        """
        share = torch.where(self._length > 0, y[-1] / self._length, 0)
        inside = self._columns(y) - share * self._coordinates
        matrix = target.view_as(self._b)
        matrix.addcmul_(self._b, share, value=scale)
        if inside.shape[1] == 1:
            matrix.addr_(inside.squeeze(1), self._basis.squeeze(1), alpha=scale)
        else:
            matrix.addmm_(inside, self._basis.T, alpha=scale)


class _RowReduction(_ColumnReduction):
    """B = GF, [out, in], by the coefficients G, [out, m], of the rows F; see eq-rows.

    With w FFᵀ = UΛUᵀ, the rows of UᵀF are orthogonal and have the lengths √(λ_j/w).
    So column j of GU, times this length, is column j of Y in an orthonormal basis that
    need not be formed. Nothing is projected, and B itself is not needed either.

    Where λ_j is no more than round-off, so is row j of UᵀF; its direction means
    nothing. Such a column belongs to the null space. It is scaled like the others, by a
    length that has no say in any inner product.

    Args:
        block: Where F, w, U and Λ are; F is not zero.
        coefficients: G.
    """

    def __init__(self, block: KroneckerBlock, coefficients: Tensor) -> None:
        self._rows = block.rows
        values, self._vectors = block._gram_spectrum
        lengths = (values / block.weight).sqrt()
        is_null = values <= torch.finfo(values.dtype).eps * values[-1]
        self._lengths = torch.where(is_null, NEGLIGIBLE * lengths[-1], lengths)
        operator = KroneckerDiagonal(block.outer, torch.where(is_null, 0, values))
        coordinates = (coefficients @ self._vectors).mul_(self._lengths)
        # The rows span less than the whole space: one coordinate, 0, for the rest.
        super().__init__(operator, coordinates, values.new_zeros(1))

    def add_to(self, target: Tensor, y: Tensor, scale: float) -> None:
        """One pass over ``target``: it gains scale · (Y/√λ Uᵀ) F."""
        coefficients = (self._columns(y) / self._lengths) @ self._vectors.T
        matrix = target.view(len(coefficients), -1)
        matrix.addmm_(coefficients, self._rows, alpha=scale)


class PrincipalBlock(SymmetricOperator):
    """The rows and columns of A from ``start``, ``size`` of them.

    Args:
        outer: A.
        start: The first.
        size: How many.
    """

    def __init__(self, outer: SymmetricOperator, start: int, size: int) -> None:
        super().__init__(size, outer.dtype, outer.device)
        self.outer = outer
        self._own = slice(start, start + size)

    def _product(self, columns: Tensor) -> Tensor:
        whole = columns.new_zeros(self.outer.shape[0], columns.shape[1])
        whole[self._own] = columns
        return self.outer._product(whole)[self._own]

    def diagonal(self) -> Tensor:
        return self.outer.diagonal()[self._own]

    def require_fresh(self) -> None:
        self.outer.require_fresh()


class DirectSum(SymmetricOperator):
    """Independent operators as the blocks of one block-diagonal matrix.

    Args:
        blocks: The diagonal blocks, in order. At least one.

    Raises:
        ValueError: there is no block, or they differ in dtype or device.
    """

    def __init__(self, blocks: Sequence[SymmetricOperator]) -> None:
        if not blocks:
            raise ValueError("blocks is empty; a direct sum needs at least one.")
        kinds = {(block.dtype, block.device) for block in blocks}
        if len(kinds) > 1:
            raise ValueError(
                f"blocks differ in dtype or device: {sorted(map(str, kinds))}"
            )
        self.blocks = list(blocks)
        self._sizes = [block.shape[0] for block in blocks]
        super().__init__(sum(self._sizes), blocks[0].dtype, blocks[0].device)

    def _product(self, columns: Tensor) -> Tensor:
        parts = zip(self.blocks, columns.split(self._sizes), strict=True)
        return torch.cat([block._product(part) for block, part in parts])

    def _dense(self) -> Tensor:
        return torch.block_diag(*(block.to_dense() for block in self.blocks))

    def diagonal(self) -> Tensor:
        return torch.cat([block.diagonal() for block in self.blocks])

    def eigvalsh(self) -> Tensor:
        return torch.cat([block.eigvalsh() for block in self.blocks]).sort().values

    def reductions(self, b: Tensor) -> list[Reduction]:
        parts = zip(self.blocks, b.split(self._sizes), strict=True)
        return [r for block, part in parts for r in block.reductions(part)]

    def solve_damped(
        self, columns: Tensor, weight: float | Tensor, shift: float
    ) -> tuple[Tensor, Tensor]:
        """Block by block."""
        parts = zip(self.blocks, columns.split(self._sizes), strict=True)
        solved = [block.solve_damped(part, weight, shift) for block, part in parts]
        solutions, margins = zip(*solved, strict=True)
        return torch.cat(solutions), torch.stack(margins).min()


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
        super().__init__(size, dtype, device)
        self.product = product

    def _product(self, columns: Tensor) -> Tensor:
        return torch.stack([self._one(column) for column in columns.T], dim=1)

    def _one(self, vector: Tensor) -> Tensor:
        with torch.enable_grad():  # It may well differentiate.
            result = self.product(vector)
        if not isinstance(result, Tensor) or result.shape != vector.shape:
            got = list(result.shape) if isinstance(result, Tensor) else type(result)
            raise ValueError(
                f"The product function returned {got} for a vector of shape "
                f"{list(vector.shape)}; it must return a tensor of that shape."
            )
        return result.detach()


def _columns_of(operator: Congruence) -> Tensor:
    """The matrix by its products, a few columns at a time."""
    size = operator.shape[0]
    matrix = torch.eye(size, dtype=operator.dtype, device=operator.device)
    widest = max(size, operator.jacobian.out_size)
    for part in matrix.split(columns_at_once(widest), dim=1):
        part.copy_(operator._by_factors(part.clone()))
    return matrix


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where each of consecutive parts starts, and its size."""
    return list(zip(accumulate(sizes[:-1], initial=0), sizes, strict=True))


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values)


def _remainder(b: Tensor, y: Tensor, basis: Tensor) -> Tensor:
    """B - YQᵀ, [rows, in]."""
    if basis.shape[1] == 1:
        return torch.addr(b, y.squeeze(1), basis.squeeze(1), alpha=-1)
    return torch.addmm(b, y, basis.T, alpha=-1)


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
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
    values, vectors = _decomposed(matrix.nan_to_num(0.0, 0.0, 0.0))
    return values.clamp(min=0) + 0 * matrix.trace(), vectors


def _apply_inner(matrix: Tensor, stack: Tensor) -> Tensor:
    """Σ_i M_ji B_oik: [m, i] and [o, i, k] → [o, m, k], as one large product."""
    return (stack.transpose(1, 2) @ matrix.T).transpose(1, 2)


def set_dense_limit(nbytes: float) -> float:
    """Set how large a matrix may become before it stays an operator.

    ``to_dense()`` refuses to form a larger one. Rules that would form a larger one on
    their own, as the averaged product does, use products instead. 512 MiB at first:
    11,585 features in float32.

    Args:
        nbytes: The bound in bytes, for one matrix; positive.

    Returns:
        The bound that held before.

    Raises:
        ValueError: ``nbytes`` is no positive number.
    """
    global _dense_limit
    if not (is_number(nbytes) and nbytes > 0):
        raise ValueError(f"nbytes={nbytes!r} must be a positive number of bytes.")
    before, _dense_limit = _dense_limit, nbytes
    return before


def fits_dense(nbytes: int) -> bool:
    """Whether an array of ``nbytes`` is within the limit of ``set_dense_limit``."""
    return nbytes <= _dense_limit


def attach_hessian(parameter: Tensor, operator: SymmetricOperator | None) -> None:
    """Set ``parameter.hessian``, which no type stub knows."""
    vars(parameter)["hessian"] = operator


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless ``alpha``, the damping α, is in [0, 1]."""
    if not (is_number(alpha) and 0 <= alpha <= 1):
        raise ValueError(
            f"alpha={alpha!r} is outside [0, 1]. It weighs (1-α)H + αI: 0 is the bare "
            "curvature, 1 plain gradient descent; 0.02 is a common start."
        )


def regularity(pivots: Tensor, shift: float) -> Tensor:
    """The margin of ``solve_damped`` from pivots or eigenvalues, a scalar tensor."""
    sizes = pivots.abs()
    # Undamped, the null space of a curvature shows up as pivots of a few n·eps (at
    # most 2.4 in softmax Hessians of 2 to 200 classes). Damped, it stands at α.
    slack = 10 * pivots.numel() if shift == 0 else 1
    return sizes.min() / (slack * torch.finfo(pivots.dtype).eps * sizes.max())


def singular_message(alpha: float) -> str:
    """What to say of a system whose margin is not above 1."""
    return (
        f"(1-α)H + αI is singular or not finite at alpha={alpha}. Use a larger alpha, "
        "or solver='cg'."
    )
