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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hbp.blocks import BlockDiagonal
from hbp.core.guards import full_precision, is_count, is_number
from hbp.core.operators import Congruence, KroneckerBlock, MatrixFree, check_alpha
from hbp.core.operators import SymmetricOperator as Operator

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
        sides = "<<>>>>>>"  # Names to the left, numbers to the right.
        lines = [
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in columns)
            for columns in (zip(line, sides, widths, strict=True) for line in cells)
        ]
        return "\n".join(lines)


@torch.no_grad()
@full_precision()
def extremal_eigenvalues(
    operator: Operator,
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
    if not (is_count(count) and count <= n):
        raise ValueError(
            f"count={count!r} must be an integer from 1 to {n}, the size of the "
            "operator. Use count=1 for the two ends of the spectrum."
        )
    if not (is_number(tolerance) and 0 <= tolerance < math.inf):
        raise ValueError(
            f"tolerance={tolerance!r} must be finite and not negative: it bounds "
            "‖Av - λv‖ / max|λ|. Use 1e-4, or 0.0 for working precision."
        )
    _check_positive("maxiter", maxiter, 1, "It bounds the products; 200 is usual.")
    spectrum = _spectrum(operator)
    if spectrum is not None:
        return spectrum.ends(count)
    if (
        isinstance(operator, KroneckerBlock)
        and min(operator.rows.shape) <= SMALL
        and count <= operator.outer.shape[0]
    ):
        ends = extremal_eigenvalues(operator.outer, count, tolerance, maxiter, seed)
        return _times_inner(ends, operator.rows * operator.weight**0.5)
    return _lanczos(operator, count, tolerance, maxiter, seed)


@torch.no_grad()
@full_precision()
def condition_number(operator: Operator, alpha: float, seed: int = 0) -> float | None:
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
        return spectrum.condition(alpha)
    return _condition_of_ends(extremal_eigenvalues(operator, seed=seed), alpha)


@torch.no_grad()
@full_precision()
def estimate_trace(
    operator: Operator, products: int = 48, seed: int = 0
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
    exact = (basis * (operator @ basis)).sum()
    samples = _signs(operator, third, generator)
    samples = samples - basis @ (basis.T @ samples)
    rest = (samples * (operator @ samples)).sum(0)
    error = rest.std() / math.sqrt(third)
    return TraceEstimate(float(_finite(exact + rest.mean())), float(error))


@torch.no_grad()
@full_precision()
def negative_mass(operator: Operator) -> NegativeMass:
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
    return spectrum.negative_mass()


@torch.no_grad()
@full_precision()
def compare_curvature(
    operator: Operator, reference: Operator, samples: int = 100, seed: int = 0
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
def inspect_curvature(
    model: nn.Module,
    alpha: float,
    seed: int = 0,
    *,
    only: Callable[[str], bool] = bool,
    maxiter: int = 50,
    progress: Callable[[CurvatureRow], object] = bool,
) -> CurvatureReport:
    """One row for each parameter that requires a gradient.

    Call it after ``backward_hessian`` and before ``optimizer.step()``.

    Args:
        model: Its parameters carry ``p.hessian``.
        alpha: Damping α in [0, 1], of the condition numbers.
        seed: See ``extremal_eigenvalues`` and ``estimate_trace``.
        only: Given a parameter's name, whether it gets a row; by default all do.
        maxiter: See ``extremal_eigenvalues``: products for each block whose spectrum is
            large. A ``?`` says that they were too few.
        progress: Called with each row as soon as it is known, as in ``progress=print``.

    Raises:
        TypeError: ``model`` is no module, ``p.hessian`` no operator, or ``seed`` no
            integer.
        ValueError: ``alpha`` is outside [0, 1], ``maxiter`` is unusable, or no
            parameter that requires a gradient is chosen.
        RuntimeError: a parameter has no curvature, or a weight has changed since.
        ArithmeticError: a block contains NaN or infinity.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; it must be a torch.nn.Module whose "
            "parameters carry p.hessian."
        )
    check_alpha(alpha)
    named, rows = model.named_parameters(), []
    chosen = [(k, p) for k, p in named if p.requires_grad and only(k)]
    if not chosen:
        raise ValueError(
            f"model={type(model).__name__} has no parameter that requires a gradient "
            f"and only={only!r} chooses. Inspect one that can be trained."
        )
    for name, parameter in chosen:
        rows.append(_row(name, parameter, alpha, seed, maxiter))
        progress(rows[-1])
    return CurvatureReport(alpha, tuple(rows))


def _row(name: str, p: Tensor, alpha: float, seed: int, maxiter: int) -> CurvatureRow:
    operator = getattr(p, "hessian", None)
    if operator is None:
        raise RuntimeError(
            f"Parameter {name!r} of shape {list(p.shape)} has no curvature. "
            "Call loss.backward() and then model.backward_hessian(output_hessian); if "
            "no layer gives it one, freeze it: requires_grad_(False)."
        )
    _check_operator(f"The hessian of parameter {name!r}", operator)
    spectrum = _spectrum(operator)
    condition: float | None
    mass: tuple[float | None, float | None]
    if spectrum is not None:
        ends, condition = spectrum.ends(1), spectrum.condition(alpha)
        mass = spectrum.negative_mass()
    else:
        ends = extremal_eigenvalues(operator, maxiter=maxiter, seed=seed)
        condition, mass = _condition_of_ends(ends, alpha), (None, None)
    trace, trace_error = _trace(operator, seed)
    values = trace, trace_error, float(ends.smallest), float(ends.largest)
    shape = tuple(p.shape)
    return CurvatureRow(name, shape, *values, ends.converged, condition, *mass)


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


def _spectrum_rows(operator: Operator) -> int:
    """Rows of the largest matrix that ``operator.eigvalsh()`` decomposes."""
    if isinstance(operator, KroneckerBlock):
        return max(_spectrum_rows(operator.outer), min(operator.rows.shape))
    if isinstance(operator, BlockDiagonal):
        return max(operator.sizes)
    return operator.shape[0]


class _Spectrum(NamedTuple):
    """All eigenvalues, [n] ascending, and the rows of the largest matrix decomposed."""

    values: Tensor
    rows: int

    def ends(self, count: int) -> ExtremalEigenvalues:
        smallest, largest = self.values[:count], self.values[-count:].flip(0)
        bound = _rounding(self.values, self.rows).repeat(count)
        return ExtremalEigenvalues(smallest, largest, bound, bound, True, 0)

    def negative_mass(self) -> NegativeMass:
        mass = float(self.values.clamp(max=0).abs().sum())
        total = float(self.values.abs().sum())
        return NegativeMass(mass, mass / total if total > 0 else 0.0)

    def condition(self, alpha: float) -> float:
        damped = (1 - alpha) * self.values + alpha
        least, most = damped.abs().aminmax()
        is_regular = bool(least > _rounding(damped, self.rows))
        return float(most / least) if is_regular else math.inf


def _spectrum(operator: Operator) -> _Spectrum | None:
    """The spectrum, if it is affordable.

    What round-off cannot tell from 0 is 0: no noise counts as negative curvature.
    """
    rows = _spectrum_rows(operator)
    if rows > SMALL:
        return None
    try:
        values = _finite(operator.eigvalsh())
    # Documented, but torch's types do not know it.
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ArithmeticError(_NOT_FINITE) from error
    return _Spectrum(values.where(values.abs() > _rounding(values, rows), 0), rows)


def _rounding(values: Tensor, rows: int) -> Tensor:
    """Round-off in eigenvalues of a matrix of so many rows: rows · eps · ‖A‖."""
    return rows * torch.finfo(values.dtype).eps * values.abs().max()


def _condition_of_ends(ends: ExtremalEigenvalues, alpha: float) -> float | None:
    low, high, *residuals = (float(values[0]) for values in ends[:4])
    low, high = (1 - alpha) * low + alpha, (1 - alpha) * high + alpha
    doubt = (1 - alpha) * max(residuals)
    if not ends.converged or (low <= doubt and high >= -doubt):
        return None
    return high / low if low > 0 else low / high


def _times_inner(ends: ExtremalEigenvalues, rows: Tensor) -> ExtremalEigenvalues:
    """The ends of H ⊗ FᵀF from those of H: products of eigenvalues.

    FᵀF ≥ 0, so a product with an eigenvalue of H that is not among its k largest is no
    larger than the k products that are.
    """
    inner = torch.linalg.svdvals(rows).square()
    if len(inner) < rows.shape[1]:
        inner = torch.cat([inner, inner.new_zeros(1)])

    def products(outer: Tensor, residuals: Tensor, largest: bool) -> list[Tensor]:
        values = torch.outer(outer, inner).flatten()
        values, order = values.topk(len(outer), largest=largest)
        return [values, torch.outer(residuals, inner).flatten()[order]]

    small = products(ends.smallest, ends.smallest_residuals, False)
    large = products(ends.largest, ends.largest_residuals, True)
    return ExtremalEigenvalues(small[0], large[0], small[1], large[1], *ends[4:])


def _lanczos(
    operator: Operator, count: int, tolerance: float, maxiter: int, seed: int
) -> ExtremalEigenvalues:
    """Block Lanczos; the projection T = VᵀAV, [m, m], is kept: its lower triangle.

    The remainder R of AV_last is what couples the space to the rest of A: a Ritz
    vector Vy has the residual ‖R y_last‖. Directions in which R is but round-off are
    dropped, so that an exhausted (invariant) space ends the iteration.
    """
    n = operator.shape[0]
    round_off = _round_off(operator)
    start = torch.randn(n, count, generator=_generator(seed), dtype=torch.float64)
    block = torch.linalg.qr(start.to(operator.device, operator.dtype)).Q
    basis = block[:, :0]
    projection = block.new_zeros(0, 0)
    done, products = False, 0
    while not done and products < maxiter:
        image = _finite(operator @ block)
        products += 1
        basis = torch.cat([basis, block], dim=1)
        rows = image.T @ basis  # eigh reads no more than the lower triangle.
        projection = torch.cat([pad(projection, (0, len(rows))), rows])
        values, vectors = torch.linalg.eigh(projection)
        order = torch.arange(len(values), device=values.device)
        extremes = torch.cat([order[:count], order.flip(0)[:count]])
        remainder = image - basis @ (basis.T @ image)
        directions, sizes, mixture = torch.linalg.svd(remainder, full_matrices=False)
        coupling = sizes.unsqueeze(1) * (mixture @ vectors[-block.shape[1] :, extremes])
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
    found, coordinates = values[extremes], vectors[:, extremes]
    ritz = basis @ coordinates
    residuals = _norms(_finite(operator @ ritz) - ritz * found)
    limit = (tolerance + round_off) * values.abs().max()
    converged = bool((residuals <= limit).all())
    ends = found[:count], found[count:], residuals[:count], residuals[count:]
    return ExtremalEigenvalues(*ends, converged, products + 1)


def _round_off(operator: Operator) -> float:
    """A residual of so many ‖A‖ cannot be told from round-off.

    In Krylov spaces exhausted by matrices of rank 1 to 10 and of 50 to 100 000 rows,
    the residuals measured were at most 0.91 times that; they grow as √n in float32.
    """
    return (64 + operator.shape[0] ** 0.5) * torch.finfo(operator.dtype).eps


def _trace(operator: Operator, seed: int) -> TraceEstimate:
    """The closed form, or an estimate where it would form a large matrix."""
    if isinstance(operator, KroneckerBlock):
        outer = _trace(operator.outer, seed)
        inner = float(operator.rows.square().sum() * operator.weight)
        return TraceEstimate(outer.value * inner, outer.standard_error * inner)
    # A diagonal that takes as many products as there are rows, of A or of J: in a
    # convolution of 36,864 weights 15 s, where an estimate to 8 digits takes 0.1 s.
    source = operator
    while isinstance(source, Congruence | KroneckerBlock | BlockDiagonal):
        source = source.outer
    free = isinstance(source, MatrixFree) and source.shape[0] > SMALL
    rows = operator.jacobian.out_size if isinstance(operator, Congruence) else 0
    if free or min(rows, operator.shape[0]) > SMALL:
        return estimate_trace(operator, seed=seed)
    return TraceEstimate(float(_finite(operator.trace())), 0.0)


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


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """‖a - b‖², ‖a‖², ‖b‖² and ⟨a, b⟩ of each pair of columns, [4, k]."""
    # Squares of a deep layer's curvature would vanish in float32.
    a, b = _finite(a).double(), _finite(b).double()
    pairs = (a - b, a - b), (a, a), (b, b), (a, b)
    return torch.stack([(left * right).sum(0) for left, right in pairs])


def _relative(samples: Tensor) -> Tensor:
    """Samples, [k], in units of their mean; all zeros stay zeros."""
    mean = samples.mean()
    return torch.where(mean > 0, samples / mean, 0)


def _signs(operator: Operator, count: int, generator: torch.Generator) -> Tensor:
    """Random signs, [n, count], for ``operator``: the same on every device."""
    signs = torch.randint(0, 2, (operator.shape[0], count), generator=generator)
    return (2 * signs - 1).to(operator.device, operator.dtype)


def _generator(seed: int) -> torch.Generator:
    is_integer = isinstance(seed, int) and not isinstance(seed, bool)
    if not (is_integer and -(2**63) <= seed < 2**63):
        raise TypeError(f"seed={seed!r} must be an integer, such as 0, of 64 bits.")
    # Data made with the same seed must not be the vectors drawn here: Lanczos that
    # starts at an eigenvector sees nothing else.
    return torch.Generator().manual_seed(seed ^ 0x9E3779B9)


def _check_positive(name: str, value: int, least: int, remedy: str) -> None:
    if not (is_count(value) and value >= least):
        raise ValueError(
            f"{name}={value!r} must be an integer of at least {least}. {remedy}"
        )


def _check_operator(name: str, operator: object) -> None:
    if not isinstance(operator, Operator):
        raise TypeError(
            f"{name} is a {type(operator).__name__}; it must be a SymmetricOperator, "
            "such as p.hessian. Wrap a matrix in hbp.operators.DenseOperator(matrix)."
        )
    if operator.device.type == "meta":
        raise ValueError(
            f"{name} is on the device meta, where no number can be read. Move the "
            "model to another one first."
        )
