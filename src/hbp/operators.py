"""Symmetric operators: what travels backward, and what ``p.hessian`` is.

A curvature matrix is often far too large to write down, and rarely needs to be.
An operator answers the same questions from its factors:

| operator | matrix |
|---|---|
| ``DenseOperator`` | H, stored |
| ``Congruence`` | JᵀHJ + diag(r): one step of the backward chain |
| ``KroneckerBlock`` | H ⊗ E[xxᵀ] or H ⊗ x̄x̄ᵀ: a linear layer's weight |
| ``KroneckerProduct`` | H ⊗ S for a small matrix S |
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
from numbers import Real
from typing import Final

import torch
from torch import Tensor

DENSE_LIMIT_BYTES: Final = 8 * 2**30
"""``to_dense()`` refuses to allocate a larger matrix than this."""


class Reduction:
    """A and b, restricted to a subspace that holds the Krylov space of A and b.

    The coordinates belong to an orthonormal basis, so conjugate gradients on
    ``(operator, rhs)`` takes the very steps that it would take on ``(A, b)``:
    the same coefficients and residual norms, in fewer numbers. This class is the
    case without structure, where the subspace is the whole space.

    Attributes:
        operator: A in coordinates of the subspace, shape [k, k].
        rhs: b in those coordinates, [k].
    """

    def __init__(self, operator: SymmetricOperator, rhs: Tensor) -> None:
        self.operator = operator
        self.rhs = rhs

    def add_to(self, target: Tensor, y: Tensor, scale: float) -> None:
        """target, [n], += scale · the vector whose coordinates are ``y``, [k]."""
        target.add_(y, alpha=scale)


class SymmetricOperator(ABC):
    """A real symmetric [n, n] matrix, known by its products.

    Attributes:
        shape: ``torch.Size([n, n])``.
        dtype: Type of the entries.
        device: Where the factors live.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = torch.Size((size, size))
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def _product(self, columns: Tensor) -> Tensor:
        """Multiply ``columns``, [n, k]; the arguments are already checked."""

    @abstractmethod
    def _dense(self) -> Tensor:
        """The whole matrix, [n, n]."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Multiply a vector, [n], or a stack of vectors as columns, [n, k].

        Raises:
            ValueError: ``vectors`` has the wrong shape, dtype or device.
        """
        self._check(vectors, "right-hand side of @")
        if vectors.dim() == 1:
            return self._product(vectors.unsqueeze(1)).squeeze(1)
        return self._product(vectors)

    def to_dense(self) -> Tensor:
        """The matrix itself, [n, n]. Treat it as read-only: it may be shared.

        Raises:
            MemoryError: it would need more than ``DENSE_LIMIT_BYTES``.
        """
        need = self.shape.numel() * self.dtype.itemsize
        if need > DENSE_LIMIT_BYTES:
            raise MemoryError(
                f"A dense [{self.shape[0]}, {self.shape[1]}] matrix of {self.dtype} "
                f"needs {need / 2**30:.1f} GiB, more than the "
                f"{DENSE_LIMIT_BYTES / 2**30:.0f} GiB that to_dense() allows. Use "
                "products (operator @ vector), diagonal() or trace() instead."
            )
        return self._dense()

    def diagonal(self) -> Tensor:
        """The diagonal, [n]."""
        return self.to_dense().diagonal()

    def trace(self) -> Tensor:
        """The sum of the eigenvalues, a scalar tensor."""
        return self.diagonal().sum()

    def eigvalsh(self) -> Tensor:
        """All eigenvalues in ascending order, [n]."""
        return torch.linalg.eigvalsh(self.to_dense())

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
        return self._solve(columns, alpha).reshape(b.shape)

    def reduce(self, b: Tensor) -> Reduction:
        """Restrict A and b, [n], to a subspace that holds the Krylov space of both.

        A step of CG costs what the coordinates cost; see ``Reduction``.
        """
        return Reduction(self, b)

    def _solve(self, columns: Tensor, alpha: float) -> Tensor:
        return solve_damped(self.to_dense(), columns, alpha)

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

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, "
            f"device={str(self.device)!r})"
        )


class DenseOperator(SymmetricOperator):
    """A symmetric matrix that is stored.

    Args:
        matrix: [n, n], symmetric and finite. Only its shape is checked here.

    Raises:
        ValueError: ``matrix`` is not square.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {list(matrix.shape)}.")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _product(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns

    def _dense(self) -> Tensor:
        return self.matrix


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

    @abstractmethod
    def congruence(self, matrix: Tensor) -> Tensor:
        """Jᵀ M J for a dense M, [z, z] → [x, x]."""

    @abstractmethod
    def congruence_diagonal(self, operator: SymmetricOperator) -> Tensor:
        """The diagonal of Jᵀ M J, [x]."""


class MatrixMap(LinearMap):
    """J = W, [z, x]. W belongs to a layer and is read, not copied.

    A later change of W is noticed, unless it is made behind autograd's back, through
    ``weight.data``.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.out_size, self.in_size = matrix.shape
        self._matrix = matrix.detach()
        self._version: int | None = self._matrix._version

    def __getstate__(self) -> dict[str, object]:
        """A copy owns its matrix; the check for changes is made here."""
        return {
            **self.__dict__,
            "_matrix": self._matrix.clone(),
            "_version": None if self._is_stale else 0,
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        """The copy's version counter starts anew, unless it was stale."""
        self.__dict__.update(state)
        if self._version is not None:
            self._version = self._matrix._version

    @property
    def _is_stale(self) -> bool:
        return self._matrix._version != self._version

    @property
    def matrix(self) -> Tensor:
        """W, [z, x].

        Raises:
            RuntimeError: W has changed since the operator was made.
        """
        if self._is_stale:
            raise RuntimeError(
                f"A weight of shape {list(self._matrix.shape)} has changed since "
                "backward_hessian(), so this curvature no longer belongs to the "
                "model. Use it before optimizer.step(), or keep to_dense()."
            )
        return self._matrix

    def forward(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns

    def transpose(self, columns: Tensor) -> Tensor:
        return self.matrix.T @ columns

    def congruence(self, matrix: Tensor) -> Tensor:
        return self.matrix.T @ (matrix @ self.matrix)

    def congruence_diagonal(self, operator: SymmetricOperator) -> Tensor:
        return (self.matrix * (operator @ self.matrix)).sum(0)


class DiagonalMap(LinearMap):
    """J = diag(d), given d of shape [n]."""

    def __init__(self, diagonal: Tensor) -> None:
        self.in_size = self.out_size = diagonal.shape[0]
        self.diagonal = diagonal

    def forward(self, columns: Tensor) -> Tensor:
        return self.diagonal.unsqueeze(1) * columns

    def transpose(self, columns: Tensor) -> Tensor:
        return self.forward(columns)

    def congruence(self, matrix: Tensor) -> Tensor:
        return torch.outer(self.diagonal, self.diagonal).mul_(matrix)

    def congruence_diagonal(self, operator: SymmetricOperator) -> Tensor:
        return self.diagonal.square() * operator.diagonal()


class Congruence(SymmetricOperator):
    """JᵀHJ + diag(r): curvature sent backward through one module.

    A product is Jᵀ(H(Jv)) + r ⊙ v. Once the matrix has been formed by
    ``to_dense()`` it is kept, and products use it.

    Args:
        outer: H, the curvature w.r.t. the module's output, [z, z].
        jacobian: J, [z, x].
        second_order: r, [x], the modified second-order term, if there is one.
    """

    def __init__(
        self,
        outer: SymmetricOperator,
        jacobian: LinearMap,
        second_order: Tensor | None = None,
    ) -> None:
        super().__init__(jacobian.in_size, outer.dtype, outer.device)
        self.outer = outer
        self.jacobian = jacobian
        self.second_order = second_order

    @cached_property
    def _matrix(self) -> Tensor:
        matrix = self.jacobian.congruence(self.outer.to_dense())
        if self.second_order is not None:
            matrix.diagonal().add_(self.second_order)
        return matrix

    def _dense(self) -> Tensor:
        return self._matrix

    def _product(self, columns: Tensor) -> Tensor:
        if "_matrix" in self.__dict__:
            return self._matrix @ columns
        jacobian = self.jacobian
        result = jacobian.transpose(self.outer._product(jacobian.forward(columns)))
        if self.second_order is not None:
            result = result.addcmul(self.second_order.unsqueeze(1), columns)
        return result

    def diagonal(self) -> Tensor:
        diagonal = self.jacobian.congruence_diagonal(self.outer)
        return diagonal if self.second_order is None else diagonal + self.second_order


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
        if self.inner.shape[0] == 1:
            return self.outer._product(columns) * self.inner
        stack = _apply_inner(self.inner, self._stack(columns))
        return self.outer._product(stack.flatten(1)).reshape(columns.shape)

    def _stack(self, columns: Tensor) -> Tensor:
        return columns.reshape(self.outer.shape[0], self.inner.shape[0], -1)

    def _dense(self) -> Tensor:
        return torch.kron(self.outer.to_dense(), self.inner)

    def diagonal(self) -> Tensor:
        return torch.outer(self.outer.diagonal(), self.inner.diagonal()).flatten()

    def eigvalsh(self) -> Tensor:
        inner = torch.linalg.eigvalsh(self.inner)
        return torch.outer(self.outer.eigvalsh(), inner).flatten().sort().values

    def _solve(self, columns: Tensor, alpha: float) -> Tensor:
        if self.inner.shape[0] == 1:
            return solve_damped(self.outer.to_dense() * self.inner, columns, alpha)
        # In both eigenbases the damped matrix is diagonal: (1-α) h_j s_m + α.
        outer_values, outer_vectors = torch.linalg.eigh(self.outer.to_dense())
        inner_values, inner_vectors = torch.linalg.eigh(self.inner)
        values = (1 - alpha) * torch.outer(outer_values, inner_values) + alpha
        require_regular(values, alpha)
        stack = _apply_inner(inner_vectors.T, self._stack(columns))
        stack = (outer_vectors.T @ stack.flatten(1)).reshape(stack.shape)
        stack = stack / values.unsqueeze(2)
        stack = _apply_inner(inner_vectors, stack)
        return (outer_vectors @ stack.flatten(1)).reshape(columns.shape)


class KroneckerBlock(SymmetricOperator):
    """H ⊗ FᵀF: the curvature w.r.t. a linear layer's weight.

    One row F = x̄ᵀ makes it the rank-one block H ⊗ x̄x̄ᵀ (averaged Jacobian,
    Chen et al. 2018), N rows F = X/√N the block H ⊗ E[xxᵀ] (averaged product,
    Botev et al. 2017). Vectors are flattened row-major, ``W.flatten()``: index
    (o, i) stands at o·in + i.

    With the factorisation Fᵀ = QR, FᵀF = Q(RRᵀ)Qᵀ, and what lies outside the span
    of the rows is in the null space: there (1-α)A + αI is just α. So solves and
    conjugate gradients work on Y = BQ, out × rank numbers instead of out × in, and
    on the remainder B⊥ = B - YQᵀ. Projecting before dividing by α keeps digits
    that the algebraically equal B/α - … cancels.

    Args:
        outer: H, the curvature w.r.t. the layer's output, [out, out].
        rows: F, [m, in].
    """

    def __init__(self, outer: SymmetricOperator, rows: Tensor) -> None:
        self.out_features, self.in_features = outer.shape[0], rows.shape[1]
        super().__init__(
            self.out_features * self.in_features, outer.dtype, outer.device
        )
        self.outer = outer
        self.rows = rows

    def _product(self, columns: Tensor) -> Tensor:
        stack = _apply_inner(self.rows, self._stack(columns))
        outer = self.outer._product(stack.flatten(1)).reshape(stack.shape)
        return _apply_inner(self.rows.T, outer).reshape(columns.shape)

    def _stack(self, columns: Tensor) -> Tensor:
        return columns.reshape(self.out_features, self.in_features, -1)

    def _dense(self) -> Tensor:
        return torch.kron(self.outer.to_dense(), self.rows.T @ self.rows)

    def diagonal(self) -> Tensor:
        inputs = self.rows.square().sum(0)
        return torch.outer(self.outer.diagonal(), inputs).flatten()

    def trace(self) -> Tensor:
        return self.outer.trace() * self.rows.square().sum()

    def eigvalsh(self) -> Tensor:
        values = self._restricted.eigvalsh()
        zeros = values.new_zeros(self.shape[0] - values.numel())
        return torch.cat([values, zeros]).sort().values

    @cached_property
    def _basis(self) -> tuple[Tensor | None, Tensor]:
        """Q, [in, m] with orthonormal columns, and S = RRᵀ, [m, m].

        Q is None, for the identity, where there are as many rows as inputs. QR
        keeps Q orthonormal for repeated and for zero rows; a Gram matrix would not.
        """
        if self.rows.shape[0] >= self.in_features:
            return None, self.rows.T @ self.rows
        basis, factor = torch.linalg.qr(self.rows.T)
        return basis, factor @ factor.T

    @property
    def _restricted(self) -> KroneckerProduct:
        """A on the span of the rows: H ⊗ S."""
        return KroneckerProduct(self.outer, self._basis[1])

    def _project(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """Columns [n, k] as coordinates Y [out·m, k] and remainder B⊥ [n, k]."""
        basis, _ = self._basis
        if basis is None:
            return columns, None
        stack = _apply_inner(basis.T, self._stack(columns))
        coordinates = stack.reshape(-1, columns.shape[1])
        return coordinates, columns - self._lift(coordinates)

    def _lift(self, coordinates: Tensor) -> Tensor:
        """YQᵀ: coordinates [out·m, k] in the full space, [n, k]."""
        basis, _ = self._basis
        if basis is None:
            return coordinates
        stack = coordinates.reshape(self.out_features, basis.shape[1], -1)
        return _apply_inner(basis, stack).reshape(self.shape[0], -1)

    def _solve(self, columns: Tensor, alpha: float) -> Tensor:
        coordinates, remainder = self._project(columns)
        solution = self._lift(self._restricted._solve(coordinates, alpha))
        if remainder is None:
            return solution
        require_regular(columns.new_tensor([1, alpha]), alpha)
        return solution.add_(remainder, alpha=1 / alpha)

    def reduce(self, b: Tensor) -> Reduction:
        basis, _ = self._basis
        if basis is None:
            return Reduction(self._restricted, b)
        return _KroneckerReduction(self._restricted, basis, b)


class _KroneckerReduction(Reduction):
    """B, [out, in], as Y = BQ, out × m numbers, and the length ‖B⊥‖ of the rest."""

    def __init__(self, restricted: KroneckerProduct, basis: Tensor, b: Tensor) -> None:
        self._basis = basis
        self._b = b.view(-1, basis.shape[0])
        self._coordinates = self._b @ basis
        self._length = self._remainder_norm().reshape(1)
        null_space = DenseOperator(b.new_zeros(1, 1))
        super().__init__(
            DirectSum([restricted, null_space]),
            torch.cat([self._coordinates.flatten(), self._length]),
        )

    def _remainder_norm(self) -> Tensor:
        norm = torch.linalg.vector_norm(self._b)
        share = torch.linalg.vector_norm(self._coordinates) / norm
        if share < 0.99:
            return norm * (1 - share.square()).sqrt()
        # Pythagoras would cancel here, so form B⊥.
        remainder = torch.addmm(self._b, self._coordinates, self._basis.T, alpha=-1)
        return torch.linalg.vector_norm(remainder)

    def add_to(self, target: Tensor, y: Tensor, scale: float) -> None:
        """Two passes over ``target`` and one over B; nothing of that size is made.

        YQᵀ + cB⊥ = cB + (Y - cBQ)Qᵀ for c = y⊥/‖B⊥‖. The right-hand side cancels
        digits within the span of Q, at most those that c·B has there to begin with.
        """
        share = torch.where(self._length > 0, y[-1] / self._length, 0)
        inside = y[:-1].view_as(self._coordinates) - share * self._coordinates
        matrix = target.view_as(self._b)
        matrix.addcmul_(self._b, share, value=scale)
        matrix.addmm_(inside, self._basis.T, alpha=scale)


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

    def _solve(self, columns: Tensor, alpha: float) -> Tensor:
        parts = zip(self.blocks, columns.split(self._sizes), strict=True)
        return torch.cat([block._solve(part, alpha) for block, part in parts])


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

    def _dense(self) -> Tensor:
        return self._product(
            torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        )


def _apply_inner(matrix: Tensor, stack: Tensor) -> Tensor:
    """Σ_i M_ji B_oik: [m, i] and [o, i, k] → [o, m, k], as one large product."""
    return (stack.transpose(1, 2) @ matrix.T).transpose(1, 2)


def attach_hessian(parameter: Tensor, operator: SymmetricOperator | None) -> None:
    """Set ``parameter.hessian``, which no type stub knows."""
    vars(parameter)["hessian"] = operator


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless ``alpha``, the damping α, is in [0, 1]."""
    if not (isinstance(alpha, Real) and 0 <= alpha <= 1):
        raise ValueError(
            f"alpha={alpha!r} is outside [0, 1]. It weighs (1-α)H + αI: 0 is the bare "
            "curvature, 1 plain gradient descent; 0.02 is a common start."
        )


def solve_damped(matrix: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """Solve [(1-α)M + αI] x = b for a dense symmetric M, [n, n], and b, [n, k].

    Cholesky where the matrix is positive definite, LU where it is not.

    Raises:
        ArithmeticError: the matrix is singular to working precision.
    """
    damped = (1 - alpha) * matrix
    damped.diagonal().add_(alpha)
    factor, info = torch.linalg.cholesky_ex(damped)
    if info == 0:
        require_regular(factor.diagonal().square(), alpha)
        return torch.cholesky_solve(columns, factor)
    factor, pivots, _ = torch.linalg.lu_factor_ex(damped)
    require_regular(factor.diagonal(), alpha)
    return torch.linalg.lu_solve(factor, pivots, columns)


def require_regular(pivots: Tensor, alpha: float) -> None:
    """Raise ArithmeticError if pivots (or eigenvalues) say singular, or NaN."""
    sizes = pivots.abs()
    # Undamped, the null space of a curvature shows up as pivots of a few n·eps (at
    # most 2.4 in softmax Hessians of 2 to 200 classes). Damped, it stands at α.
    slack = 10 * pivots.numel() if alpha == 0 else 1
    floor = slack * torch.finfo(pivots.dtype).eps * sizes.max()
    if not bool(sizes.min() > floor):
        raise ArithmeticError(
            f"(1-α)H + αI is singular or not finite at alpha={alpha} (smallest pivot "
            f"{float(sizes.min()):.1e}, largest {float(sizes.max()):.1e}). Use a "
            "larger alpha, or solver='cg'."
        )
