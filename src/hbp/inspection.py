"""Looking at curvature: eigenvalues, traces, distances, one row per layer.

``p.hessian`` is an operator that may be far too large to decompose. Two routes lead
to its numbers:

- A block whose eigenvalues follow from matrices of at most ``SMALL`` rows is answered
  exactly. A linear layer's weight, H ⊗ FᵀF, often is: H and the rows F are small.
- Of any other block only products are asked for. Eigenvalues at the ends of the
  spectrum come from Lanczos' method, with residuals; traces and norms from random
  vectors, with standard errors.

Nothing here changes an operator or a model, and nothing draws from the global
random number generator: the same seed gives the same numbers.

Sources: Lanczos, J. Res. Nat. Bur. Standards 45 (1950); Golub & Underwood, The block
Lanczos method (1977); Parlett, The Symmetric Eigenvalue Problem (1980), for "twice is
enough" and the bounds; Hutchinson, Commun. Statist. Simul. 19 (1990); Meyer, Musco,
Musco & Woodruff, Hutch++, arXiv 2010.09649.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from hbp.blocks import BlockDiagonal
from hbp.core.guards import full_precision
from hbp.core.operators import (
    Congruence,
    KroneckerBlock,
    MatrixFree,
    SymmetricOperator,
    check_alpha,
)

SMALL: Final = 1024
"""Up to this many rows a matrix is decomposed: 0.1 s on one core, in float64."""


class ExtremalEigenvalues(NamedTuple):
    """What ``extremal_eigenvalues`` returns, on the operator's dtype and device.

    Attributes:
        smallest: The smallest eigenvalues, the smallest first, [count].
        largest: The largest eigenvalues, the largest first, [count].
        smallest_residuals: ‖Av - λv‖ for unit v, [count]. An eigenvalue of A lies
            within that distance of λ. Where A was decomposed, the round-off,
            rows · eps · ‖A‖, stands here.
        largest_residuals: The same for ``largest``, [count].
        converged: Whether every residual is at most tolerance · max|λ|, up to
            round-off.
        products: Products with ``count`` columns that were spent; 0 if A was
            decomposed.
    """

    smallest: Tensor
    largest: Tensor
    smallest_residuals: Tensor
    largest_residuals: Tensor
    converged: bool
    products: int


class TraceEstimate(NamedTuple):
    """What ``estimate_trace`` returns.

    Attributes:
        value: The estimate.
        standard_error: Its standard deviation, itself estimated. 0 if exact.
    """

    value: float
    standard_error: float


class NegativeMass(NamedTuple):
    """What ``negative_mass`` returns.

    Attributes:
        mass: Σ |λ| over the negative eigenvalues.
        share: mass / Σ |λ| over all of them, in [0, 1]; 0 for the zero matrix.
    """

    mass: float
    share: float


class CurvatureComparison(NamedTuple):
    """What ``compare_curvature`` returns. Standard errors are 0 where exact.

    Attributes:
        distance: ‖A - B‖ / ‖B‖ in the Frobenius norm.
        distance_error: Standard error of ``distance``.
        cosine: ⟨A, B⟩ / (‖A‖ ‖B‖), in [-1, 1].
        cosine_error: Standard error of ``cosine``.
    """

    distance: float
    distance_error: float
    cosine: float
    cosine_error: float


@dataclass(frozen=True)
class CurvatureRow:
    """The curvature of one parameter.

    Attributes:
        name: As in ``model.named_parameters()``.
        shape: Shape of the parameter.
        trace: Sum of the eigenvalues.
        trace_error: Standard error of ``trace``, 0 where it is exact.
        smallest: Smallest eigenvalue.
        largest: Largest eigenvalue.
        converged: Whether the two have converged, see ``ExtremalEigenvalues``.
        condition: Of (1-α)H + αI, see ``condition_number``.
        negative_mass: See ``NegativeMass``; None where it is not affordable.
        negative_share: The same.
    """

    name: str
    shape: tuple[int, ...]
    trace: float
    trace_error: float
    smallest: float
    largest: float
    converged: bool
    condition: float | None
    negative_mass: float | None
    negative_share: float | None


@dataclass(frozen=True)
class CurvatureReport:
    """What ``inspect_curvature`` returns; ``str(report)`` is a table.

    In the table ``±`` precedes the standard error of an estimated trace, ``?``
    follows eigenvalues that have not converged, and ``-`` stands for an unknown.

    Attributes:
        alpha: The damping of the condition numbers.
        rows: One per parameter, in the order of ``model.named_parameters()``.
    """

    alpha: float
    rows: tuple[CurvatureRow, ...]

    def __str__(self) -> str:
        header: tuple[str, ...] = ("parameter", "shape", "trace", "smallest", "largest")
        header += (f"cond(α={self.alpha:g})", "negative mass", "share")
        cells = [header, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for line in cells:
            # Names to the left, numbers to the right.
            left = [cell.ljust(w) for cell, w in zip(line[:2], widths, strict=False)]
            right = [
                cell.rjust(w) for cell, w in zip(line[2:], widths[2:], strict=True)
            ]
            lines.append("  ".join(left + right))
        return "\n".join(lines)


@torch.no_grad()
@full_precision()
def extremal_eigenvalues(
    operator: SymmetricOperator,
    count: int = 1,
    tolerance: float = 1e-4,
    maxiter: int = 200,
    seed: int = 0,
) -> ExtremalEigenvalues:
    """The smallest and the largest eigenvalues of an operator.

    A small spectrum is computed by decomposition. Otherwise by block Lanczos with
    full reorthogonalisation from ``count`` random vectors, or, for H ⊗ FᵀF, by
    Lanczos on H alone. Blocks of vectors see an eigenvalue as often as it occurs, up
    to ``count`` times. The basis takes n · count · maxiter numbers at worst.

    A small residual proves that an eigenvalue is near, not that none lies further
    out: a Lanczos result could in principle miss an end of the spectrum to which the
    random start is almost orthogonal.

    Args:
        operator: A, [n, n], float32 or float64.
        count: How many at each end, from 1 to n. The two ends overlap if 2·count > n.
        tolerance: Largest residual in units of max|λ|. Round-off, (64 + √n) eps, is
            added to it.
        maxiter: Largest number of products with [n, count].
        seed: Of the starting vectors.

    Returns:
        Eigenvalues with residuals. If ``maxiter`` ends the iteration, ``converged``
        is False, and ``smallest`` is too large and ``largest`` too small.

    Raises:
        TypeError: ``operator`` is no operator, or ``seed`` no integer.
        ValueError: ``count``, ``tolerance`` or ``maxiter`` is out of range.
        ArithmeticError: the operator contains NaN or infinity.
    """
    _check_operator("operator", operator)
    n = operator.shape[0]
    if not (_is_int(count) and 1 <= count <= n):
        raise ValueError(
            f"count={count!r} must be an integer from 1 to {n}, the size of the "
            "operator. Use count=1 for the two ends of the spectrum."
        )
    if not (isinstance(tolerance, Real) and 0 <= tolerance < math.inf):
        raise ValueError(
            f"tolerance={tolerance!r} must be finite and not negative: it bounds "
            "‖Av - λv‖ / max|λ|. Use 1e-4, or 0.0 for working precision."
        )
    _check_positive("maxiter", maxiter, 1, "It bounds the products; 200 is usual.")
    spectrum = _spectrum(operator)
    if spectrum is not None:
        values, rounding = spectrum
        bound = torch.full_like(values[:count], rounding)
        largest = values[-count:].flip(0)
        return ExtremalEigenvalues(values[:count], largest, bound, bound, True, 0)
    if (
        isinstance(operator, KroneckerBlock)
        and min(operator.rows.shape) <= SMALL
        and count <= operator.outer.shape[0]
    ):
        ends = extremal_eigenvalues(operator.outer, count, tolerance, maxiter, seed)
        return _times_inner(ends, operator.rows * operator.weight**0.5, count)
    return _lanczos(operator, count, tolerance, maxiter, _generator(seed))


@torch.no_grad()
@full_precision()
def condition_number(
    operator: SymmetricOperator, alpha: float, seed: int = 0
) -> float | None:
    """The condition number of (1-α)A + αI: largest over smallest |eigenvalue|.

    A small spectrum gives it for any matrix. Of a large one only the ends are known,
    and they decide only if the damped matrix is definite.

    Args:
        operator: A, [n, n], float32 or float64.
        alpha: Damping α in [0, 1].
        seed: See ``extremal_eigenvalues``.

    Returns:
        The condition number, ``inf`` if the damped matrix is singular to working
        precision, or None: a large matrix is not known to be definite, because it
        is indefinite, or nearer to singular than the residuals can tell.

    Raises:
        TypeError: ``operator`` is no operator, or ``seed`` no integer.
        ValueError: ``alpha`` is outside [0, 1].
        ArithmeticError: the operator contains NaN or infinity.
    """
    _check_operator("operator", operator)
    check_alpha(alpha)
    spectrum = _spectrum(operator)
    if spectrum is not None:
        return _condition_of_spectrum(spectrum[0], _spectrum_rows(operator), alpha)
    return _condition_of_ends(extremal_eigenvalues(operator, seed=seed), alpha)


@torch.no_grad()
@full_precision()
def estimate_trace(
    operator: SymmetricOperator, products: int = 48, seed: int = 0
) -> TraceEstimate:
    """The trace from products with random signs, by Hutch++.

    For operators without entries, ``MatrixFree`` above all: any other has a closed
    form in ``operator.trace()``. A third of the products finds the directions Q that
    matter most, a third takes their trace exactly, and a third samples the rest as
    Hutchinson does. The trace of a matrix of rank ≤ products/3 comes out exact.

    Args:
        operator: A, [n, n], float32 or float64.
        products: How many products to spend, at least 6. From n on, the trace is
            computed exactly.
        seed: Of the random signs.

    Returns:
        An estimate without bias, and its standard error. With few products, or a few
        dominant entries on the diagonal's complement, the error is itself uncertain.

    Raises:
        TypeError: ``operator`` is no operator, or ``seed`` no integer.
        ValueError: ``products`` is no integer or below 6.
        ArithmeticError: the operator contains NaN or infinity.
    """
    _check_operator("operator", operator)
    _check_positive("products", products, 6, "A standard error takes two samples.")
    generator = _generator(seed)
    n = operator.shape[0]
    if n <= products:
        return TraceEstimate(float(_finite(operator.to_dense()).trace()), 0.0)
    third = products // 3
    sketch = _finite(operator @ _signs(operator, third, generator))
    basis = torch.linalg.qr(sketch).Q
    exact = _columnwise(basis, operator @ basis).sum()
    samples = _signs(operator, third, generator)
    samples = samples - basis @ (basis.T @ samples)
    rest = _columnwise(samples, operator @ samples)
    error = rest.std() / math.sqrt(third)
    return TraceEstimate(float(_finite(exact + rest.mean())), float(error))


@torch.no_grad()
@full_precision()
def negative_mass(operator: SymmetricOperator) -> NegativeMass:
    """How much of a block's curvature is negative: Σ|λ < 0|, and its share of Σ|λ|.

    The treatments ``"abs"``, ``"clip"`` and ``"zero"`` are there to remove it: compare
    the blocks of two calls of ``backward_hessian``. Eigenvalues that round-off cannot
    tell from 0 count as 0.

    Args:
        operator: A, whose spectrum is small: see ``SMALL``.

    Raises:
        TypeError: ``operator`` is no operator.
        ValueError: the spectrum is too large to be computed.
        ArithmeticError: the operator contains NaN or infinity.
    """
    _check_operator("operator", operator)
    spectrum = _spectrum(operator)
    if spectrum is None:
        raise ValueError(
            f"operator={operator!r}: all its eigenvalues would take the decomposition "
            f"of a matrix of {_spectrum_rows(operator)} rows, more than {SMALL}. Use "
            "extremal_eigenvalues(), or operator.eigvalsh() if you can wait."
        )
    return _negative_mass(spectrum[0])


@torch.no_grad()
@full_precision()
def compare_curvature(
    operator: SymmetricOperator,
    reference: SymmetricOperator,
    samples: int = 100,
    seed: int = 0,
) -> CurvatureComparison:
    """How far an operator A is from a reference B, say the exact block.

    Up to ``SMALL`` rows both are made dense. Above, norms and inner products are
    means over random signs v: ‖A - B‖² = E‖(A - B)v‖² and ⟨A, B⟩ = E⟨Av, Bv⟩
    (Hutchinson 1990). The same v serve all of them, so that errors cancel in the
    ratios; what is left is propagated to first order.

    Args:
        operator: A, [n, n], float32 or float64.
        reference: B, [n, n], of the same dtype and device.
        samples: Products with each of the two, at least 2, where n is large.
        seed: Of the random signs.

    Returns:
        Relative Frobenius distance and cosine similarity. They are what division by
        zero makes them: the distance to B = 0 is inf, and what is 0/0 is nan.

    Raises:
        TypeError: an argument is no operator, or ``seed`` no integer.
        ValueError: shapes, dtypes or devices differ, or ``samples`` is below 2.
        ArithmeticError: an operator contains NaN or infinity.
    """
    _check_operator("operator", operator)
    _check_operator("reference", reference)
    kinds = [(list(x.shape), x.dtype, x.device) for x in (operator, reference)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"operator={operator!r} and reference={reference!r} must agree in shape, "
            "dtype and device. Compare blocks of the same parameter."
        )
    _check_positive("samples", samples, 2, "A standard error takes two of them.")
    generator = _generator(seed)
    exact = operator.shape[0] <= SMALL
    if exact:
        squares = _squares(operator.to_dense(), reference.to_dense())
    else:
        parts = []
        for start in range(0, samples, 16):  # No array of n · samples is made.
            v = _signs(operator, min(16, samples - start), generator)
            parts.append(_squares(operator @ v, reference @ v))
        squares = torch.cat(parts, dim=1)
    gap, aa, bb, ab = squares
    distance = (gap.sum() / bb.sum()).sqrt()
    length = (aa.sum() * bb.sum()).sqrt()
    cosine = ab.sum() / length
    if exact:
        return CurvatureComparison(float(distance), 0.0, float(cosine), 0.0)
    # The derivatives of both ratios, applied to each sample (the delta method).
    of_distance = distance / 2 * (_relative(gap) - _relative(bb))
    of_cosine = ab / length * samples - cosine * (_relative(aa) + _relative(bb)) / 2
    errors = [float(x.std() / math.sqrt(samples)) for x in (of_distance, of_cosine)]
    return CurvatureComparison(float(distance), errors[0], float(cosine), errors[1])


@torch.no_grad()
@full_precision()
def inspect_curvature(model: nn.Module, alpha: float, seed: int = 0) -> CurvatureReport:
    """One row for each parameter that requires a gradient.

    Call it after ``backward_hessian`` and before ``optimizer.step()``.

    Args:
        model: Its parameters carry ``p.hessian``.
        alpha: Damping α in [0, 1], of the condition numbers.
        seed: See ``extremal_eigenvalues`` and ``estimate_trace``.

    Raises:
        TypeError: ``model`` is no module, ``p.hessian`` no operator, or ``seed`` no
            integer.
        ValueError: ``alpha`` is outside [0, 1], or no parameter requires a gradient.
        RuntimeError: a parameter has no curvature, or a weight has changed since.
        ArithmeticError: a block contains NaN or infinity.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; it must be a torch.nn.Module whose "
            "parameters carry p.hessian."
        )
    check_alpha(alpha)
    parameters = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"model={type(model).__name__} has no parameter that requires a gradient. "
            "Inspect a model that can be trained."
        )
    rows = [_row(name, p, alpha, seed) for name, p in parameters]
    return CurvatureReport(alpha, tuple(rows))


def _row(name: str, parameter: Tensor, alpha: float, seed: int) -> CurvatureRow:
    operator = getattr(parameter, "hessian", None)
    if operator is None:
        raise RuntimeError(
            f"Parameter {name!r} of shape {list(parameter.shape)} has no curvature. "
            "Call loss.backward() and then model.backward_hessian(output_hessian); if "
            "no layer gives it one, freeze it: requires_grad_(False)."
        )
    _check_operator(f"The hessian of parameter {name!r}", operator)
    trace = _trace(operator, seed)
    spectrum = _spectrum(operator)
    condition: float | None
    mass, share = None, None
    if spectrum is not None:
        values, converged = spectrum[0][[0, -1]], True
        condition = _condition_of_spectrum(spectrum[0], _spectrum_rows(operator), alpha)
        mass, share = _negative_mass(spectrum[0])
    else:
        ends = extremal_eigenvalues(operator, seed=seed)
        values, converged = torch.cat([ends.smallest, ends.largest]), ends.converged
        condition = _condition_of_ends(ends, alpha)
    smallest, largest = values.tolist()
    return CurvatureRow(
        name=name,
        shape=tuple(parameter.shape),
        trace=trace.value,
        trace_error=trace.standard_error,
        smallest=smallest,
        largest=largest,
        converged=converged,
        condition=condition,
        negative_mass=mass,
        negative_share=share,
    )


def _cells(row: CurvatureRow) -> tuple[str, ...]:
    doubt = "" if row.converged else "?"
    return (
        row.name,
        "×".join(map(str, row.shape)),
        f"{row.trace:.3g}" + (f"±{row.trace_error:.1g}" if row.trace_error else ""),
        f"{row.smallest:.3g}{doubt}",
        f"{row.largest:.3g}{doubt}",
        "-" if row.condition is None else f"{row.condition:.3g}",
        "-" if row.negative_mass is None else f"{row.negative_mass:.3g}",
        "-" if row.negative_share is None else f"{row.negative_share:.1%}",
    )


def _spectrum_rows(operator: SymmetricOperator) -> int:
    """Rows of the largest matrix that ``operator.eigvalsh()`` decomposes."""
    if isinstance(operator, KroneckerBlock):
        return max(_spectrum_rows(operator.outer), min(operator.rows.shape))
    if isinstance(operator, BlockDiagonal):
        return max(operator.sizes)
    return operator.shape[0]


def _spectrum(operator: SymmetricOperator) -> tuple[Tensor, float] | None:
    """All eigenvalues, [n] ascending, and their round-off; None if unaffordable.

    What round-off cannot tell from 0 is 0: no noise counts as negative curvature.
    """
    rows = _spectrum_rows(operator)
    if rows > SMALL:
        return None
    try:
        values = operator.eigvalsh()
    # Documented, but torch's types do not know it.
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ArithmeticError(_NOT_FINITE) from error
    rounding = _rounding(_finite(values), rows)
    return values.where(values.abs() > rounding, 0), float(rounding)


def _rounding(values: Tensor, rows: int) -> Tensor:
    """Round-off in eigenvalues of a matrix of so many rows: rows · eps · ‖A‖."""
    return rows * torch.finfo(values.dtype).eps * values.abs().max()


def _negative_mass(values: Tensor) -> NegativeMass:
    mass = float(values.clamp(max=0).abs().sum())
    total = float(values.abs().sum())
    return NegativeMass(mass, mass / total if total > 0 else 0.0)


def _condition_of_spectrum(values: Tensor, rows: int, alpha: float) -> float:
    damped = (1 - alpha) * values + alpha
    least, most = damped.abs().aminmax()
    return float(most / least) if bool(least > _rounding(damped, rows)) else math.inf


def _condition_of_ends(ends: ExtremalEigenvalues, alpha: float) -> float | None:
    low = (1 - alpha) * float(ends.smallest[0]) + alpha
    high = (1 - alpha) * float(ends.largest[0]) + alpha
    doubt = (1 - alpha) * float(
        torch.maximum(ends.smallest_residuals[0], ends.largest_residuals[0])
    )
    if not ends.converged or (low <= doubt and high >= -doubt):
        return None
    return high / low if low > 0 else low / high


def _times_inner(
    ends: ExtremalEigenvalues, rows: Tensor, count: int
) -> ExtremalEigenvalues:
    """The ends of H ⊗ FᵀF from those of H: products of eigenvalues.

    FᵀF ≥ 0, so a product with an eigenvalue of H that is not among its ``count``
    largest is no larger than the ``count`` products that are.
    """
    inner = torch.linalg.svdvals(rows).square()
    if len(inner) < rows.shape[1]:
        inner = torch.cat([inner, inner.new_zeros(1)])

    def products(outer: Tensor, residuals: Tensor, largest: bool) -> list[Tensor]:
        values = torch.outer(outer, inner).flatten()
        order = values.sort(descending=largest).indices[:count]
        return [values[order], torch.outer(residuals, inner).flatten()[order]]

    small, small_residuals = products(ends.smallest, ends.smallest_residuals, False)
    large, large_residuals = products(ends.largest, ends.largest_residuals, True)
    return ExtremalEigenvalues(
        small, large, small_residuals, large_residuals, ends.converged, ends.products
    )


def _lanczos(
    operator: SymmetricOperator,
    count: int,
    tolerance: float,
    maxiter: int,
    generator: torch.Generator,
) -> ExtremalEigenvalues:
    """Block Lanczos; the projection T = VᵀAV is kept whole, [m, m].

    The remainder R of AV_last is what couples the space to the rest of A: a Ritz
    vector Vy has the residual ‖R y_last‖. Directions in which R is but round-off are
    dropped, so that an exhausted (invariant) space ends the iteration.
    """
    n = operator.shape[0]
    round_off = _round_off(operator)
    start = torch.randn(n, count, generator=generator, dtype=torch.float64)
    block = torch.linalg.qr(start.to(operator.device, operator.dtype)).Q
    basis = block[:, :0]
    projection = block.new_zeros(0, 0)
    done = False
    products = 0
    while not done and products < maxiter:
        image = _finite(operator @ block)
        products += 1
        basis = torch.cat([basis, block], dim=1)
        projection = _bordered(projection, basis.T @ image)
        values, vectors = torch.linalg.eigh(projection)
        ends = _ends(len(values), count, values.device)
        remainder = image - basis @ (basis.T @ image)
        directions, sizes, mixture = torch.linalg.svd(remainder, full_matrices=False)
        coupling = sizes.unsqueeze(1) * (mixture @ vectors[-block.shape[1] :, ends])
        # Both are lower bounds of ‖A‖; early Ritz values alone can be far below.
        scale = torch.maximum(values.abs().max(), _norms(image).max())
        block = directions[:, sizes > round_off * scale]
        # Twice is enough (Parlett): once before the division by sizes, once after.
        # What then shrinks was round-off after all, and lay within the space.
        block = block - basis @ (basis.T @ block)
        block, lengths, _ = torch.linalg.svd(block, full_matrices=False)
        block = block[:, lengths > 0.5]
        # Nothing is left to find in an exhausted space: round-off counts as converged.
        enough = max(tolerance, round_off) * scale
        converged = bool((_norms(coupling) <= enough).all())
        done = converged or block.shape[1] == 0
    found, coordinates = values[ends], vectors[:, ends]
    ritz = basis @ coordinates
    residuals = _norms(_finite(operator @ ritz) - ritz * found)
    return ExtremalEigenvalues(
        found[:count],
        found[count:],
        residuals[:count],
        residuals[count:],
        bool((residuals <= (tolerance + round_off) * values.abs().max()).all()),
        products + 1,
    )


def _round_off(operator: SymmetricOperator) -> float:
    """A residual of so many ‖A‖ cannot be told from round-off.

    In Krylov spaces exhausted by matrices of rank 1 to 10 and of 50 to 100 000 rows,
    the residuals measured were at most 0.91 times that; they grow as √n in float32.
    """
    return (64 + operator.shape[0] ** 0.5) * torch.finfo(operator.dtype).eps


def _bordered(projection: Tensor, columns: Tensor) -> Tensor:
    """T, [m, m], with k new ``columns``, [m + k, k], and their mirror image."""
    m, k = len(projection), columns.shape[1]
    result = columns.new_empty(m + k, m + k)
    result[:m, :m] = projection
    result[:m, m:] = columns[:m]
    result[m:, :m] = columns[:m].T
    result[m:, m:] = (columns[m:] + columns[m:].T) / 2
    return result


def _ends(size: int, count: int, device: torch.device) -> Tensor:
    """Indices of the smallest, ascending, and of the largest, descending."""
    indices = torch.arange(size, device=device)
    return torch.cat([indices[:count], indices.flip(0)[:count]])


def _trace(operator: SymmetricOperator, seed: int) -> TraceEstimate:
    """The closed form, or an estimate where it would form a large matrix."""
    if isinstance(operator, KroneckerBlock):
        outer = _trace(operator.outer, seed)
        inner = float(operator.rows.square().sum() * operator.weight)
        return TraceEstimate(outer.value * inner, outer.standard_error * inner)
    if _has_hidden_diagonal(operator):
        return estimate_trace(operator, seed=seed)
    return TraceEstimate(float(_finite(operator.trace())), 0.0)


def _has_hidden_diagonal(operator: SymmetricOperator) -> bool:
    """Whether the diagonal takes as many products as there are rows, and many."""
    if isinstance(operator, Congruence | KroneckerBlock | BlockDiagonal):
        return _has_hidden_diagonal(operator.outer)
    return isinstance(operator, MatrixFree) and operator.shape[0] > SMALL


_NOT_FINITE: Final = (
    "The curvature contains NaN or infinity. Check the weights, the inputs and the "
    "loss that it comes from."
)


def _finite(tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise ArithmeticError(_NOT_FINITE)
    return tensor


def _norms(columns: Tensor) -> Tensor:
    return torch.linalg.vector_norm(columns, dim=0)


def _columnwise(left: Tensor, right: Tensor) -> Tensor:
    """The inner product of each pair of columns, [n, k] → [k]."""
    return (left * right).sum(0)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """‖a - b‖², ‖a‖², ‖b‖² and ⟨a, b⟩ of each pair of columns, [4, k]."""
    # Squares of a deep layer's curvature would vanish in float32.
    a, b = _finite(a).double(), _finite(b).double()
    pairs = (a - b, a - b), (a, a), (b, b), (a, b)
    return torch.stack([_columnwise(left, right) for left, right in pairs])


def _relative(samples: Tensor) -> Tensor:
    """Samples, [k], in units of their mean; all zeros stay zeros."""
    mean = samples.mean()
    return torch.where(mean > 0, samples / mean, 0)


def _signs(
    operator: SymmetricOperator, count: int, generator: torch.Generator
) -> Tensor:
    """Random signs, [n, count], for ``operator``: the same on every device."""
    signs = torch.randint(0, 2, (operator.shape[0], count), generator=generator)
    return (2 * signs - 1).to(operator.device, operator.dtype)


def _generator(seed: int) -> torch.Generator:
    if not (_is_int(seed) and -(2**63) <= seed < 2**63):
        raise TypeError(f"seed={seed!r} must be an integer, such as 0, of 64 bits.")
    # Data made with the same seed must not be the vectors drawn here: Lanczos that
    # starts at an eigenvector sees nothing else.
    return torch.Generator().manual_seed(seed ^ 0x9E3779B9)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_positive(name: str, value: int, least: int, remedy: str) -> None:
    if not (_is_int(value) and value >= least):
        raise ValueError(
            f"{name}={value!r} must be an integer of at least {least}. {remedy}"
        )


def _check_operator(name: str, operator: object) -> None:
    if not isinstance(operator, SymmetricOperator):
        raise TypeError(
            f"{name} is a {type(operator).__name__}; it must be a SymmetricOperator, "
            "such as p.hessian. Wrap a matrix in hbp.operators.DenseOperator(matrix)."
        )
    if operator.device.type == "meta":
        raise ValueError(
            f"{name} is on the device meta, where no number can be read. Move the "
            "model to another one first."
        )
