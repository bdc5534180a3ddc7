"""Arithmetic of operators: sums, multiples, inverses, and normal samples.

It joins every ``SymmetricOperator``, so ``p.hessian`` has it, too. Nothing is computed
before somebody asks for numbers, and then from structure where there is one: of
H ⊗ FᵀF, say, from the eigenvalues of the two factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from hbp.core import operators as core
from hbp.core.guards import full_precision, is_count, is_number
from hbp.core.operators import KroneckerBlock, SymmetricOperator


class Scaled(SymmetricOperator):
    """c A.

    Args:
        outer: A.
        factor: c.
    """

    def __init__(self, outer: SymmetricOperator, factor: float) -> None:
        super().__init__(outer.shape[0], outer, outer.reads)
        self.outer, self.factor = outer, factor

    def product(self, rows: Tensor) -> Tensor:
        return self.outer.product(rows) * self.factor

    def _dense(self) -> Tensor:
        return self.outer.to_dense() * self.factor

    def _diagonal(self) -> Tensor:
        return self.outer.diagonal() * self.factor

    def _eigvalsh(self) -> Tensor:
        return (self.outer.eigvalsh() * self.factor).sort().values

    def solve_damped(self, rows: Tensor, weight: Any, shift: float) -> core.Solved:
        """By A, whose short cuts need a positive weight."""
        if self.factor < 0:
            return super().solve_damped(rows, weight, shift)
        return self.outer.solve_damped(rows, weight * self.factor, shift)


class Inverse(SymmetricOperator):
    """[(1-α)A + αI]⁻¹, by a solve at every product.

    Args:
        outer: A.
        alpha: Damping α in [0, 1].
    """

    def __init__(self, outer: SymmetricOperator, alpha: float) -> None:
        super().__init__(outer.shape[0], outer, outer.reads)
        self.outer, self.alpha = outer, alpha

    def product(self, rows: Tensor) -> Tensor:
        return self.outer.solve(rows.T, self.alpha).T

    def _eigvalsh(self) -> Tensor:
        values = _damped(self.outer, self.alpha)
        if not bool(core.regularity(values, self.alpha) > 1):
            raise ArithmeticError(core.singular(self.alpha))
        return (1 / values).sort().values


class Algebra(SymmetricOperator):
    """What every ``SymmetricOperator`` can do besides; this class only lists it.

    Examples:
        >>> import torch, hbp
        >>> A = hbp.operators.DenseOperator(torch.tensor([[3.0, 1.0], [1.0, 3.0]]))
        >>> B = hbp.operators.DiagonalOperator(torch.tensor([1.0, 2.0]))
        >>> (2 * A - B).to_dense()
        tensor([[5., 2.],
                [2., 4.]])
        >>> A.inverse() @ torch.tensor([4.0, 4.0])
        tensor([1., 1.])
        >>> A.sample(1000).shape  # Of N(0, A⁻¹), as columns.
        torch.Size([2, 1000])
    """

    def __add__(self, other: object) -> SymmetricOperator:
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        one, two = ((x.shape, x.dtype, x.device) for x in (self, other))
        if one != two:
            raise ValueError(
                f"Cannot add {other!r} to {self!r}: their shapes, dtypes and devices "
                "must agree. Take operators of one parameter, or convert one's matrix."
            )
        return core.OperatorSum([self, other])

    def __sub__(self, other: Any) -> SymmetricOperator:
        return self + -other

    def __mul__(self, other: object) -> SymmetricOperator:
        if is_number(other) or (isinstance(other, Tensor) and other.dim() == 0):
            return Scaled(self, float(other))
        return NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> SymmetricOperator:
        return self * (1 / other)

    def __neg__(self) -> SymmetricOperator:
        return Scaled(self, -1.0)

    def inverse(self, alpha: float = 0.0) -> SymmetricOperator:
        """[(1-α)A + αI]⁻¹ as an operator, for which nothing is computed as yet.

        A product with it is a ``solve``, and costs as much: a factorisation is not
        kept. For many products take the matrix, ``A.inverse(alpha).to_dense()``.

        Args:
            alpha: Damping α in [0, 1].

        Raises:
            ValueError: ``alpha`` is outside [0, 1].
            ArithmeticError: the matrix is singular to working precision. It is raised
                by the first product, or whatever else is asked for first.
        """
        core.check_alpha(alpha)
        return Inverse(self, alpha)

    @full_precision()
    def logdet(self, alpha: float = 0.0) -> Tensor:
        """log det[(1-α)A + αI], a scalar tensor, from the eigenvalues of A.

        Args:
            alpha: Damping α in [0, 1].

        Raises:
            ValueError: ``alpha`` is outside [0, 1].
            ArithmeticError: the matrix is not positive definite to working precision.
            MemoryError: a matrix would be formed that ``hbp.set_dense_limit`` forbids.
        """
        core.check_alpha(alpha)
        return _definite(_damped(self, alpha), alpha).log().sum()

    @full_precision()
    def sample(
        self, count: int, alpha: float = 0.0, generator: Generator | None = None
    ) -> Tensor:
        """Draw from N(0, [(1-α)A + αI]⁻¹), as Laplace's approximation does.

        By eigenvectors: of H and FᵀF for the weight of a linear layer, H ⊗ FᵀF; of any
        other operator the matrix is formed and decomposed, at every call anew.

        Args:
            count: How many samples.
            alpha: Damping α in [0, 1].
            generator: Of random numbers on the operator's device; by default its global
                one.

        Returns:
            The samples as columns, [n, count].

        Raises:
            ValueError: ``count`` or ``alpha`` is unsuitable.
            ArithmeticError: the matrix is not positive definite to working precision.
            MemoryError: a matrix would be formed that ``hbp.set_dense_limit`` forbids.
        """
        if not is_count(count):
            raise ValueError(f"count={count!r} must be a positive integer of samples.")
        core.check_alpha(alpha)
        self.require_fresh()
        A: SymmetricOperator = self
        weight = 1 - alpha
        while isinstance(A, Scaled):
            weight, A = weight * A.factor, A.outer
        one = torch.ones(1, 1, dtype=A.dtype, device=A.device)
        block = A if isinstance(A, KroneckerBlock) else KroneckerBlock(A, one)
        noise = one.new_empty(count, *block.sizes).normal_(generator=generator)
        scales, Q = block.spectrum
        values, V = core.decomposed(block.outer.to_dense())
        null = block.sizes[1] - len(scales)
        damped = weight * torch.outer(pad(scales, (0, null)), values) + alpha
        roots = _definite(damped, alpha).sqrt()[: len(scales)]
        # QᵀEᵀV is noise as well. What of E is outside the span of Q sees only α, and is
        # next to nothing where Q spans everything.
        seen = (noise @ Q).mT @ V
        outside = alpha**-0.5 if bool((scales == 0).any()) or null else 0.0
        inside = ((seen / roots - seen * outside) @ V.T).mT @ Q.T
        return (noise * outside + inside).flatten(1).T

    def as_linear_operator(self) -> Any:
        """The matrix as a ``scipy.sparse.linalg.LinearOperator``, for NumPy arrays.

        Arrays are copied to the operator's device and dtype, and products back.

        Raises:
            ImportError: SciPy is not installed.
            TypeError: from a product, with complex numbers.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("It takes SciPy: pip install scipy") from error
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype

        def times(array: Any) -> Any:
            array = array.astype(dtype, order="C", casting="same_kind")
            return (self @ torch.from_numpy(array).to(self.device)).numpy(force=True)

        products = dict.fromkeys(("matvec", "rmatvec", "matmat", "rmatmat"), times)
        return LinearOperator(tuple(self.shape), dtype=dtype, **products)


def _damped(A: SymmetricOperator, alpha: float) -> Tensor:
    """The eigenvalues of (1-α)A + αI."""
    is_diagonal = isinstance(A, core.DiagonalOperator)
    return (1 - alpha) * (A.diagonal() if is_diagonal else A.eigvalsh()) + alpha


def _definite(values: Tensor, alpha: float) -> Tensor:
    """The same eigenvalues, of (1-α)A + αI, if all are positive beyond round-off."""
    if not bool((values.min() > 0) & (core.regularity(values, alpha) > 1)):
        raise ArithmeticError(
            f"(1-α)H + αI at alpha={alpha} is not positive definite to all its digits. "
            "Use a larger alpha, or curvature that has no negative eigenvalues, as "
            "with modify_2nd_order_terms='abs'."
        )
    return values


for _name, _method in vars(Algebra).items():
    if callable(_method):
        setattr(SymmetricOperator, _name, _method)
