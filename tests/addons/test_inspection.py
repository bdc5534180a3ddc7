"""Inspection of curvature, judged by NumPy on dense float64 matrices."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    indefinite,
    randn,
    send_back,
    small_batch,
    small_net,
    spd,
    trained,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import hbp
from hbp import (
    compare_curvature,
    condition_number,
    estimate_trace,
    extremal_eigenvalues,
    inspect,
    inspect_curvature,
    negative_mass,
)
from hbp.blocks import BlockDiagonal, split
from hbp.core.jacobians import Diagonal, Matrix
from hbp.operators import (
    Congruence,
    DenseOperator,
    DiagonalOperator,
    KroneckerBlock,
    MatrixFree,
    OperatorSum,
    SampleBlocks,
    SymmetricOperator,
)

# In float64, relative to the largest eigenvalue. Measured over all kinds below and five
# seeds: 2e-15, by decomposition and by Lanczos at tolerance 0; 7e-16 for the rest.
EXACT = 1e-13
# The condition number's own condition is the condition number. Measured: 5e-16.
CONDITION = 1e-14

DOCS = ROOT / "docs"


def matrix_free(H: Tensor) -> MatrixFree:
    return MatrixFree(lambda v: H @ v, len(H), H.dtype, H.device)


def _chain(H: Tensor) -> Congruence:
    """Back through a weight, an activation and another weight."""
    operator = Congruence(DenseOperator(H), Matrix(randn(len(H), 7), 1))
    bent = Congruence(operator, Diagonal(randn(1, 7)), DiagonalOperator(randn(7)))
    return Congruence(bent, Matrix(randn(7, 12), 1))


def _product(H: Tensor) -> KroneckerBlock:
    """H ⊗ S for a definite S."""
    return KroneckerBlock(DenseOperator(H), torch.linalg.cholesky(spd(3)).T)


KINDS: dict[str, Callable[[Tensor], SymmetricOperator]] = {
    "dense": DenseOperator,
    "chain": _chain,
    "one row": lambda H: KroneckerBlock(DenseOperator(H), randn(1, 5)),
    "several rows": lambda H: KroneckerBlock(DenseOperator(H), randn(3, 5)),
    "many rows": lambda H: KroneckerBlock(DenseOperator(H), randn(9, 5)),
    "product": _product,
    "sum": lambda H: OperatorSum([_chain(H), matrix_free(spd(12)), _product(H)]),
    "samples": lambda H: SampleBlocks(torch.stack([H, spd(4), 2 * H])),
    "blocks": lambda H: BlockDiagonal(_product(H), [5, 1, 6]),
    "split": lambda H: split(_product(H), [3, 9]),
    "matrix-free": matrix_free,
}
kinds = pytest.mark.parametrize("kind", KINDS)
makers = pytest.mark.parametrize("make", [spd, indefinite])


def build(kind: str, make: Callable[[int], Tensor]) -> tuple[Any, np.ndarray]:
    operator = KINDS[kind](make(4))
    return operator, operator.to_dense().numpy()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every operator as too large to decompose."""
    monkeypatch.setattr(inspect, "SMALL", 0)


class Untouchable(MatrixFree):
    """Has products only; whoever asks for the matrix fails."""

    def _dense(self) -> Tensor:
        raise AssertionError("a large matrix was formed")


def of_rank(n: int, factor: Tensor, signs: Tensor) -> Untouchable:
    """Fᵀ diag(signs) F for F, [rank, n]."""
    return Untouchable(
        lambda v: factor.T @ (signs * (factor @ v)), n, factor.dtype, factor.device
    )


def ends_are(found: Any, dense: np.ndarray, count: int, tolerance: float) -> None:
    values = np.linalg.eigvalsh(dense)
    atol = tolerance * max(np.abs(values).max(), 1e-300)
    for actual, expected in [
        (found.smallest, values[:count]),
        (found.largest, values[::-1][:count]),
    ]:
        assert actual.shape == (count,)
        np.testing.assert_allclose(actual.double().numpy(), expected, 0, atol)


# --------------------------------------------------------------------------------------
# Extremal eigenvalues.
# --------------------------------------------------------------------------------------


@kinds
@makers
@pytest.mark.parametrize("count", [1, 3])
def test_ends_by_decomposition(kind: str, make: Any, count: int) -> None:
    operator, dense = build(kind, make)
    found = extremal_eigenvalues(operator, count)
    ends_are(found, dense, count, EXACT)
    assert found.converged
    assert found.products == 0
    # What stands for the residual is a bound, and a tight one.
    bound = found.largest_residuals.numpy()
    assert (bound > 0).all()
    assert (bound < 1e-13 * np.abs(np.linalg.eigvalsh(dense)).max()).all()


@kinds
@makers
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.usefixtures("large")
def test_ends_by_lanczos(kind: str, make: Any, count: int) -> None:
    operator, dense = build(kind, make)
    found = extremal_eigenvalues(operator, count, tolerance=0.0)
    ends_are(found, dense, count, EXACT)
    assert found.converged
    assert 0 < found.products <= len(dense) + 2


@given(
    st.lists(st.floats(-1, 1).map(lambda x: round(x, 1)), min_size=20, max_size=60),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1e-1, 1e-3, 1e-6, 0.0]),
)
def test_lanczos_on_any_spectrum(
    spectrum: list[float], count: int, tolerance: float
) -> None:
    """Ten tenths on either side make clusters, zeros and copies.

    The values never leave the spectrum, the residuals are what they are said to be,
    and an eigenvalue stands within each. Round-off, measured over 400 spectra: 3e-15.
    """
    basis = torch.linalg.qr(randn(len(spectrum), len(spectrum))).Q
    matrix = basis * torch.tensor(spectrum, dtype=torch.float64) @ basis.T
    operator, dense = matrix_free((matrix + matrix.T) / 2), matrix.numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "SMALL", 0)
        found = extremal_eigenvalues(operator, count, tolerance)
    values = np.linalg.eigvalsh(dense)
    for actual, residuals in [
        (found.smallest.numpy(), found.smallest_residuals.numpy()),
        (found.largest.numpy(), found.largest_residuals.numpy()),
    ]:
        away = np.abs(values[:, None] - actual).min(0)
        assert (away <= residuals + 1e-14).all()
        limit = (tolerance + 1e-13) * np.abs(values).max()
        assert (residuals <= limit).all() == found.converged
    assert found.converged
    assert found.smallest[0] >= values[0] - 1e-14
    assert found.largest[0] <= values[-1] + 1e-14
    assert (found.smallest.diff() >= 0).all()
    assert (found.largest.diff() <= 0).all()
    if tolerance == 0:
        # With copies, up to count of them.
        ends_are(found, dense, count, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("n", [2000, 100_000])
def test_rank_one_ends_the_iteration(dtype: torch.dtype, count: int, n: int) -> None:
    """Of 100 000 rows, round-off in float32 once passed for a new direction.

    ``vector`` comes from seed 0, as the starting vectors do; they must differ.
    """
    vector = randn(1, n, dtype=dtype) / n**0.5
    operator = of_rank(n, vector, torch.ones(1, dtype=dtype))
    found = extremal_eigenvalues(operator, count)
    expected = torch.zeros(count, dtype=torch.float64)
    expected[0] = vector.double().square().sum()
    # Measured: 42 eps in float64, 203 in float32, which sums 100 000 squares.
    atol = 1000 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.largest.double(), expected, rtol=0, atol=atol)
    zeros = torch.zeros(count, dtype=torch.float64)
    torch.testing.assert_close(found.smallest.double(), zeros, rtol=0, atol=atol)
    assert found.converged
    assert found.products <= 4
    assert found.largest.dtype == dtype


@pytest.mark.parametrize("n", [7, 2000])
def test_round_off_is_no_direction(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Not even if it is underestimated: it lies within the space, and is dropped."""
    monkeypatch.setattr(inspect, "SMALL", 0)
    monkeypatch.setattr(inspect, "_round_off", lambda _: 0.0)
    factor = randn(2, n) / n**0.5
    operator = of_rank(n, factor, torch.ones(2, dtype=torch.float64))
    found = extremal_eigenvalues(operator, 3, tolerance=0.0)
    expected = torch.zeros(3, dtype=torch.float64)
    expected[:2] = torch.linalg.svdvals(factor).square()
    # Measured: 2e-15.
    torch.testing.assert_close(found.largest, expected, rtol=0, atol=1e-13)
    assert found.products <= 5


def test_working_precision_ends_the_iteration() -> None:
    """Two eigenvalues stand out, and 1500 more are not waited for."""
    values = torch.cat([torch.tensor([-5.0, 10.0]), torch.linspace(0, 1, 1500)])
    values = values.double()
    operator = Untouchable(lambda v: values * v, 1502, values.dtype, values.device)
    found = extremal_eigenvalues(operator, tolerance=0.0)
    assert float(found.smallest[0]) == pytest.approx(-5, abs=1e-12)
    assert float(found.largest[0]) == pytest.approx(10, abs=1e-12)
    assert found.converged
    assert found.products < 40


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("value", [0.0, -2.5])
@pytest.mark.parametrize("n", [1, 7])
def test_multiples_of_the_identity(value: float, n: int) -> None:
    operator = DenseOperator(value * torch.eye(n, dtype=torch.float64))
    for count in {1, n}:
        found = extremal_eigenvalues(operator, count)
        ends_are(found, operator.matrix.numpy(), count, EXACT)
        assert found.converged
        assert found.products == 2


@pytest.mark.usefixtures("large")
def test_copies_are_seen_up_to_count() -> None:
    """Three times 5, twice -1, and a bulk. One vector would see each once."""
    values = torch.cat([torch.tensor([5.0, 5, 5, -1, -1]), torch.linspace(0, 1, 60)])
    operator = DenseOperator(torch.diag(values.double()))
    found = extremal_eigenvalues(operator, 3)
    assert found.largest.tolist() == pytest.approx([5, 5, 5], abs=1e-6)
    assert found.smallest.tolist() == pytest.approx([-1, -1, 0], abs=1e-4)


@pytest.mark.parametrize("kind", ["dense", "chain", "several rows"])
@pytest.mark.usefixtures("large")
def test_lanczos_in_float32(kind: str) -> None:
    operator, _ = build(kind, indefinite)
    if isinstance(operator, KroneckerBlock):
        single: SymmetricOperator = KroneckerBlock(
            DenseOperator(operator.outer.to_dense().float()), operator.rows.float()
        )
    else:
        single = DenseOperator(operator.to_dense().float())
    found = extremal_eigenvalues(single, 2, tolerance=0.0)
    assert found.smallest.dtype == torch.float32
    # Measured: 3e-7.
    ends_are(found, single.to_dense().double().numpy(), 2, 3e-6)
    assert found.converged


def test_iteration_that_is_cut_short() -> None:
    """Ritz values lie inside the spectrum, and nobody is told otherwise."""
    values = torch.linspace(-1, 2, 1500, dtype=torch.float64)
    operator = Untouchable(lambda v: values * v, 1500, values.dtype, values.device)
    found = extremal_eigenvalues(operator, maxiter=5)
    assert not found.converged
    assert found.products == 6
    assert -1 < float(found.smallest[0]) < 0
    assert 1 < float(found.largest[0]) < 2
    assert float(found.largest_residuals[0]) > 1e-3
    enough = extremal_eigenvalues(operator)
    assert enough.converged
    # A bound of 2e-4 on the residual; the values are better. Measured: 6e-7.
    assert float(enough.largest[0]) == pytest.approx(2, abs=1e-5)
    assert float(enough.smallest[0]) == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 5, 9])
@makers
@pytest.mark.parametrize("count", [1, 4])
def test_weight_takes_lanczos_on_its_outputs(
    monkeypatch: pytest.MonkeyPatch, rows: int, make: Any, count: int
) -> None:
    """H is too large to decompose, the rows are not."""
    monkeypatch.setattr(inspect, "SMALL", 5)
    sizes = []

    def product(v: Tensor) -> Tensor:
        sizes.append(len(v))
        return H @ v

    H, F = make(6), randn(rows, 5)
    outer = MatrixFree(product, 6, H.dtype, H.device)
    found = extremal_eigenvalues(KroneckerBlock(outer, F), count, tolerance=0.0)
    # As many vectors of [6] as Lanczos takes on H: [30] is never multiplied.
    assert len(sizes) <= (6 + 2) * count
    ends_are(found, np.kron(H.numpy(), (F.T @ F).numpy()), count, EXACT)
    assert found.converged
    # Residuals are scaled by the eigenvalues of FᵀF, as the eigenvalues are.
    alone = extremal_eigenvalues(outer, tolerance=1e-1)
    block = extremal_eigenvalues(KroneckerBlock(outer, F), tolerance=1e-1)
    top = float(torch.linalg.matrix_norm(F, 2)) ** 2
    ratio = float(block.largest_residuals[0] / alone.largest_residuals[0])
    assert ratio == pytest.approx(top)


def test_rows_too_many_to_decompose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the block is multiplied as any other."""
    monkeypatch.setattr(inspect, "SMALL", 5)
    monkeypatch.delattr(torch.linalg, "svdvals")
    H, F = spd(3), randn(7, 6)
    found = extremal_eigenvalues(KroneckerBlock(DenseOperator(H), F), 1, 0.0)
    ends_are(found, np.kron(H.numpy(), (F.T @ F).numpy()), 1, EXACT)


def test_same_seed_same_numbers() -> None:
    values = torch.linspace(-1, 2, 1500, dtype=torch.float64)
    operator = matrix_free(torch.diag(values))
    state = torch.get_rng_state()
    calls: list[Callable[[int], Any]] = [
        lambda seed: extremal_eigenvalues(operator, maxiter=3, seed=seed).largest[0],
        lambda seed: estimate_trace(operator, 6, seed).value,
        lambda seed: estimate_trace(operator, 6, seed).standard_error,
    ]
    for call in calls:
        assert call(0) == call(0) != call(1)
    other = DenseOperator(spd(1500))
    first = compare_curvature(operator, other, 2, 0)
    assert first == compare_curvature(operator, other, 2, 0)
    assert first != compare_curvature(operator, other, 2, 1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    estimate_trace(operator, 6)
    extremal_eigenvalues(operator, maxiter=2)
    assert torch.equal(state, torch.get_rng_state())


# --------------------------------------------------------------------------------------
# Condition numbers.
# --------------------------------------------------------------------------------------


@kinds
@makers
@pytest.mark.parametrize("alpha", [0.02, 0.5, 1.0])
def test_condition(kind: str, make: Any, alpha: float) -> None:
    operator, dense = build(kind, make)
    damped = (1 - alpha) * dense + alpha * np.eye(len(dense))
    expected = np.linalg.cond(damped)
    rel = CONDITION * expected
    assert condition_number(operator, alpha) == pytest.approx(expected, rel=rel)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("sign", [1, -1])
def test_condition_of_a_large_definite_matrix(sign: int) -> None:
    """From the two ends, whose residuals are below 1e-4. Measured: 4e-7."""
    H = sign * (spd(50) + 0.5 * torch.eye(50, dtype=torch.float64))
    operator = matrix_free(H)
    # (1-α)A + αI is negative definite, too, for a small α.
    expected = np.linalg.cond(0.9 * H.numpy() + 0.1 * np.eye(50))
    assert condition_number(operator, 0.1) == pytest.approx(expected, rel=1e-5)


def test_condition_of_a_singular_matrix() -> None:
    assert condition_number(DenseOperator(torch.zeros(3, 3)), 0.0) == np.inf
    rank_one = KroneckerBlock(DenseOperator(spd(3)), randn(1, 5))
    assert condition_number(rank_one, 0.0) == np.inf
    flat = torch.ones(3, 3)  # Its zeros come out as 1e-8.
    assert condition_number(DenseOperator(flat), 0.0) == np.inf
    # The damping cancels an eigenvalue, up to round-off.
    values = torch.tensor([1, 2, -0.02 / 0.98], dtype=torch.float64)
    basis = torch.linalg.qr(randn(3, 3)).Q
    cancelled = DenseOperator(basis * values @ basis.T)
    assert condition_number(cancelled, 0.02) == np.inf


@pytest.mark.usefixtures("large")
def test_unknown_conditions_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert condition_number(DenseOperator(indefinite(9)), 0.02) is None
    assert condition_number(DenseOperator(indefinite(9)), 1.0) == 1
    flat = torch.ones(3, 3, dtype=torch.float64)
    assert condition_number(DenseOperator(flat), 0.0) is None
    # Residuals leave it open whether 1e-6 is above 0, though Lanczos has converged.
    values = torch.linspace(1e-6, 1, 1500, dtype=torch.float64)
    assert condition_number(matrix_free(torch.diag(values)), 0.0) is None
    assert condition_number(matrix_free(torch.diag(values)), 0.5) == pytest.approx(
        2, rel=1e-4
    )
    # They shrink with the matrix: 20 would leave it open, 1 % of it does not.
    steep = matrix_free(torch.diag(2e5 * values))
    assert float(extremal_eigenvalues(steep).smallest_residuals[0]) > 1
    assert condition_number(steep, 0.99) == pytest.approx(2000.99 / 0.992, rel=1e-2)


# --------------------------------------------------------------------------------------
# Traces.
# --------------------------------------------------------------------------------------


@kinds
@makers
def test_trace_is_exact_with_products_enough(kind: str, make: Any) -> None:
    operator, dense = build(kind, make)
    estimate = estimate_trace(operator, products=len(dense) + 6)
    scale = np.abs(dense).sum()
    assert estimate.value == pytest.approx(np.trace(dense), abs=EXACT * scale)
    assert estimate.standard_error == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trace_of_low_rank_is_exact(dtype: torch.dtype) -> None:
    """Rank 16 is what the first third of 48 products can hold. Measured: 4 eps."""
    factor = randn(16, 3000, dtype=dtype) / 3000**0.5
    signs = torch.tensor([1, -0.5] * 8, dtype=dtype)
    expected = float((signs.double() * factor.double().square().sum(1)).sum())
    estimate = estimate_trace(of_rank(3000, factor, signs))
    atol = 100 * torch.finfo(dtype).eps
    assert estimate.value == pytest.approx(expected, abs=atol)
    assert estimate.standard_error < atol


def test_trace_errors_are_calibrated() -> None:
    """Deviations in units of the standard error: mean 0, standard deviation 1.

    Measured over the 300 seeds: mean -0.04 and deviation 1.14. Sixteen samples give
    Student's distribution of 15 degrees of freedom, whose deviation is 1.07.
    """
    H = indefinite(100) + 30 * spd(100)
    operator, trace = DenseOperator(H), float(H.trace())
    estimates = [estimate_trace(operator, seed=seed) for seed in range(300)]
    z = np.array([(e.value - trace) / e.standard_error for e in estimates])
    assert abs(z.mean()) < 0.25
    assert 0.9 < z.std() < 1.3
    spent = []
    counting = MatrixFree(lambda v: spent.append(1) or H @ v, 100, H.dtype, H.device)
    estimate_trace(counting, products=50)
    assert len(spent) == 48


def test_more_products_less_error() -> None:
    operator = DenseOperator(indefinite(200))
    few = np.mean([estimate_trace(operator, 12, s).standard_error for s in range(20)])
    many = np.mean([estimate_trace(operator, 120, s).standard_error for s in range(20)])
    # √10 times less; measured: 0.31. The spectrum is flat: projection gains little.
    assert many < 0.4 * few


@pytest.mark.parametrize("method", ["trace", "diagonal"])
def test_closed_forms_build_nothing_quadratic(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The widest matrix that a trace may form belongs to the narrow output."""
    formed = []
    to_dense = SymmetricOperator.to_dense

    def watch(self: SymmetricOperator) -> Tensor:
        formed.append(self.shape[0])
        return to_dense(self)

    monkeypatch.setattr(SymmetricOperator, "to_dense", watch)
    output = DenseOperator(spd(10))
    wide = Congruence(output, Matrix(randn(10, 3000), 1))
    bent = DiagonalOperator(randn(3000))
    wide = Congruence(wide, Diagonal(randn(1, 3000)), bent)
    wider = Congruence(wide, Matrix(randn(3000, 2000) / 50, 1))
    for operator in (wide, wider, KroneckerBlock(wider, randn(4, 3))):
        result = getattr(operator, method)()
        assert result.numel() <= operator.shape[0]
    assert max(formed, default=0) <= 10


# --------------------------------------------------------------------------------------
# Negative mass.
# --------------------------------------------------------------------------------------


@kinds
@makers
def test_negative_mass(kind: str, make: Any) -> None:
    operator, dense = build(kind, make)
    values = np.linalg.eigvalsh(dense)
    total = np.abs(values).sum()
    found = negative_mass(operator)
    expected = -values[values < 0].sum()
    assert found.mass == pytest.approx(expected, abs=EXACT * total)
    assert found.share == pytest.approx(expected / total, abs=EXACT)


def test_round_off_is_no_negative_mass() -> None:
    """The zeros of a softmax Hessian come out as ±1e-8, on either side."""
    p = torch.rand(50, 200).softmax(1)
    H = torch.diag(p.mean(0)) - p.T @ p / 50
    assert float(torch.linalg.eigvalsh(H)[0]) != 0
    assert negative_mass(DenseOperator(H)) == (0, 0)
    assert negative_mass(DenseOperator(torch.zeros(3, 3))) == (0, 0)
    assert negative_mass(DenseOperator(-torch.eye(3))) == (3, 1)


def test_negative_mass_of_a_large_weight() -> None:
    """Three million rows: H ⊗ x̄x̄ᵀ has as many eigenvalues ≠ 0 as H."""
    H, x = indefinite(10), randn(1, 300_000)
    found = negative_mass(KroneckerBlock(DenseOperator(H), x))
    assert found.mass == pytest.approx(30 * float(x.square().sum()), rel=1e-10)
    assert found.share == pytest.approx(30 / 55)


@pytest.mark.parametrize("treatment", ["abs", "clip", "zero"])
def test_treatments_remove_negative_mass(treatment: str) -> None:
    model = small_net()
    batch = small_batch()
    mass = {}
    for how in ("none", treatment):
        send_back(model, *batch, treatment=how)
        mass[how] = [row.negative_mass for row in inspect_curvature(model, 0.1).rows]
    # The last layer's weight and bias stand above every activation.
    assert [m > 0 for m in mass["none"]] == [True, True, False, False]
    assert mass[treatment] == [0, 0, 0, 0]


# --------------------------------------------------------------------------------------
# Distances.
# --------------------------------------------------------------------------------------


@kinds
def test_comparison_by_decomposition(kind: str) -> None:
    (A, a), (B, b) = build(kind, spd), build(kind, indefinite)
    found = compare_curvature(A, B)
    norm = np.linalg.norm
    assert found.distance == pytest.approx(norm(a - b) / norm(b), rel=EXACT)
    cosine = (a * b).sum() / (norm(a) * norm(b))
    assert found.cosine == pytest.approx(cosine, abs=EXACT)
    assert found.distance_error == found.cosine_error == 0


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("field", ["distance", "cosine"])
def test_comparison_errors_are_calibrated(field: str) -> None:
    """As for the trace. Measured over 200 seeds: means 0.08 and 0.04, deviations
    0.97 and 1.04. To first order only, so the mean is not quite 0.
    """
    H = indefinite(40)
    A, B = DenseOperator(H + 20 * spd(40)), DenseOperator(H)
    a, b = A.matrix.numpy(), B.matrix.numpy()
    norm = np.linalg.norm
    exact = {
        "distance": norm(a - b) / norm(b),
        "cosine": (a * b).sum() / (norm(a) * norm(b)),
    }[field]
    found = [compare_curvature(A, B, seed=seed) for seed in range(200)]
    z = [(getattr(f, field) - exact) / getattr(f, f"{field}_error") for f in found]
    assert abs(np.mean(z)) < 0.35
    assert 0.8 < np.std(z) < 1.25


@pytest.mark.parametrize("n", [30, 1500])
@pytest.mark.parametrize("scale", [1, 1e-25])
def test_multiples(n: int, scale: float) -> None:
    """Squares of 1e-25 vanish in float32."""
    H = spd(n).float() * scale
    same = compare_curvature(DenseOperator(H), matrix_free(H), samples=20)
    assert same == pytest.approx((0, 0, 1, 0), abs=1e-5)
    itself = compare_curvature(DenseOperator(H), DenseOperator(H), samples=20)
    assert itself[:2] == (0, 0)
    twice = compare_curvature(DenseOperator(-2 * H), DenseOperator(H), samples=20)
    assert twice == pytest.approx((3, 0, -1, 0), abs=1e-6)


@pytest.mark.parametrize("n", [3, 1500])
def test_zero_reference(n: int) -> None:
    zero, one = DenseOperator(torch.zeros(n, n)), DenseOperator(torch.eye(n))
    assert compare_curvature(one, zero).distance == np.inf
    assert np.isnan(compare_curvature(one, zero).cosine)
    assert compare_curvature(zero, one)[:2] == (1, 0)
    assert np.isnan(compare_curvature(zero, zero).distance)


def test_large_comparison_needs_products_only() -> None:
    a, b = randn(1, 5000), randn(1, 5000)
    one = torch.ones(1, dtype=torch.float64)
    A, B = of_rank(5000, a, one), of_rank(5000, b, one)
    # ‖aaᵀ - bbᵀ‖² = ‖a‖⁴ + ‖b‖⁴ - 2(aᵀb)²
    aa, bb, ab = float(a @ a.T), float(b @ b.T), float(a @ b.T)
    expected = ((aa**2 + bb**2 - 2 * ab**2) / bb**2) ** 0.5
    found = compare_curvature(A, B, samples=400)
    assert abs(found.distance - expected) < 4 * found.distance_error < 0.5


# --------------------------------------------------------------------------------------
# The report.
# --------------------------------------------------------------------------------------


def report_is_right(model: nn.Module, alpha: float, rel: float) -> None:
    report = inspect_curvature(model, alpha)
    parameters = dict(model.named_parameters())
    assert [row.name for row in report.rows] == list(parameters)
    for row in report.rows:
        dense = parameters[row.name].hessian.to_dense().numpy()
        values = np.linalg.eigvalsh(dense)
        near = {"rel": rel, "abs": rel * np.abs(values).max()}
        assert row.shape == parameters[row.name].shape
        assert row.trace == pytest.approx(np.trace(dense), **near)
        assert row.smallest == pytest.approx(values[0], **near)
        assert row.largest == pytest.approx(values[-1], **near)
        assert row.converged
        assert row.trace_error == 0
        damped = np.abs((1 - alpha) * values + alpha)
        if row.condition is not None:
            assert row.condition == pytest.approx(damped.max() / damped.min(), rel=rel)
        if row.negative_mass is not None:
            negative = -values[values < 0].sum()
            assert row.negative_mass == pytest.approx(negative, **near)
            share = negative / np.abs(values).sum()
            assert row.negative_share == pytest.approx(share, abs=rel)


@pytest.mark.parametrize("treatment", ["none", "abs"])
@pytest.mark.parametrize("scheme", [True, False])
def test_report(treatment: str, scheme: bool) -> None:
    model = small_net()
    model.set_hbp_approximation(average_parameter_jacobian=scheme)
    send_back(model, *small_batch(), treatment=treatment)
    report_is_right(model, 0.1, 1e-12)
    rows = inspect_curvature(model, 0.1).rows
    assert all(row.condition is not None for row in rows)
    assert all(row.negative_mass is not None for row in rows)


@pytest.mark.usefixtures("large")
def test_report_of_large_blocks() -> None:
    """The same numbers, but for what products cannot tell. Measured: 4e-16."""
    model = trained("none")
    report_is_right(model, 0.3, 1e-12)
    rows = inspect_curvature(model, 0.3).rows
    assert [row.negative_mass for row in rows] == [None] * 4
    assert [row.negative_share for row in rows] == [None] * 4
    assert all(row.condition is not None for row in rows)


@pytest.mark.parametrize("wrap", [True, False])
def test_estimated_traces_say_so(wrap: bool) -> None:
    """A diagonal that takes 1100 products is estimated, here and under a weight."""
    H = spd(1100) if wrap else indefinite(1100)
    hidden = Untouchable(lambda v: H @ v, 1100, H.dtype, H.device)
    layer = hbp.HBPLinear(1, 1100).double()
    layer.bias.hessian = BlockDiagonal(hidden, [1100]) if wrap else hidden
    row = torch.full((1, 1), 2.0, dtype=torch.float64)
    layer.weight.hessian = KroneckerBlock(hidden, row)
    report = inspect_curvature(layer, 0.1)
    weight, bias = report.rows
    assert bias.trace_error > 0
    assert abs(bias.trace - float(H.trace())) < 4 * bias.trace_error
    assert weight.trace == pytest.approx(4 * bias.trace)
    assert weight.trace_error == pytest.approx(4 * bias.trace_error)
    assert bias.negative_mass is None
    line = str(report).splitlines()[2]
    assert f"{bias.trace:.3g}±{bias.trace_error:.1g}" in line
    assert line.split()[-2:] == ["-", "-"]


def test_table_is_aligned() -> None:
    report = inspect_curvature(trained("none"), 0.02)
    header, *lines = str(report).splitlines()
    assert header.split("  ")[0] == "parameter"
    assert "cond(α=0.02)" in header
    assert [line.split()[:2] for line in lines] == [
        ["0.weight", "5×4"],
        ["0.bias", "5"],
        ["2.weight", "3×5"],
        ["2.bias", "3"],
    ]
    assert len({len(line) for line in (header, *lines)}) == 1
    for line, row in zip(lines, report.rows, strict=True):
        trace, smallest, largest, condition, mass, share = line.split()[2:]
        numbers = [row.trace, row.smallest, row.largest, row.condition]
        for cell, number in zip(
            [trace, smallest, largest, condition, mass],
            [*numbers, row.negative_mass],
            strict=True,
        ):
            assert float(cell) == pytest.approx(number, rel=5e-3)
        assert share == f"{100 * row.negative_share:.1f}%"


def test_unconverged_eigenvalues_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spectrum that accumulates at 0 takes Lanczos longer than it is given."""
    values = torch.logspace(-12, 0, 1500, dtype=torch.float64) ** 4
    values = torch.cat([values, torch.linspace(0, 1e-3, 1500).double()])
    layer = hbp.HBPLinear(1, 3000, bias=False).double()
    operator = Untouchable(lambda v: values * v, 3000, values.dtype, values.device)
    layer.weight.hessian = operator
    short = extremal_eigenvalues(operator, maxiter=3)
    monkeypatch.setattr(inspect, "extremal_eigenvalues", lambda *_, **__: short)
    # Definite beyond doubt, so that only convergence is missing.
    report = inspect_curvature(layer, 0.9)
    assert not report.rows[0].converged
    assert report.rows[0].condition is None
    assert len(re.findall(r"\d\?", str(report))) == 2


def test_frozen_parameters_have_no_row() -> None:
    model = small_net()
    model[0].weight.requires_grad_(False)
    send_back(model, *small_batch())
    names = [row.name for row in inspect_curvature(model, 0.1).rows]
    assert names == ["0.bias", "2.weight", "2.bias"]


def test_the_page_shows_what_its_example_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (DOCS / "inspection.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (shown,) = re.findall(r"^```text\n(.*?)^```", page, re.M | re.S)
    assert len(code.splitlines()) <= 15
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == shown


# --------------------------------------------------------------------------------------
# Errors.
# --------------------------------------------------------------------------------------

A = DenseOperator(torch.eye(3))
NAN = DenseOperator(torch.full((3, 3), float("nan")))
BIG_NAN = MatrixFree(
    lambda v: v * float("inf"), 2000, torch.float32, torch.device("cpu")
)
BIG = MatrixFree(lambda v: v, 2000, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: extremal_eigenvalues(A, 0), ValueError, r"count=0 .* from 1 to 3"),
        (lambda: extremal_eigenvalues(A, 4), ValueError, r"count=4 .* Use count=1"),
        (lambda: extremal_eigenvalues(A, True), ValueError, "count=True"),
        (
            lambda: extremal_eigenvalues(A, tolerance=-1.0),
            ValueError,
            r"tolerance=-1\.0 must be .* Use 1e-4",
        ),
        (
            lambda: extremal_eigenvalues(A, tolerance=float("nan")),
            ValueError,
            "tolerance=nan",
        ),
        (
            lambda: extremal_eigenvalues(A, maxiter=0),
            ValueError,
            "maxiter=0 must be an integer of at least 1.*200 is usual",
        ),
        (lambda: extremal_eigenvalues(BIG, seed=0.5), TypeError, r"seed=0\.5 must"),
        (
            lambda: extremal_eigenvalues(torch.eye(3)),
            TypeError,
            r"operator is a Tensor; .*DenseOperator\(matrix\)",
        ),
        (lambda: extremal_eigenvalues(NAN), ArithmeticError, "NaN or inf.*Check"),
        (lambda: extremal_eigenvalues(BIG_NAN), ArithmeticError, "NaN or infinity"),
        (lambda: condition_number(None, 0.1), TypeError, "operator is a NoneType"),
        (lambda: condition_number(A, 1.5), ValueError, r"alpha=1\.5 is outside"),
        (lambda: estimate_trace(A, 5), ValueError, "products=5 .* at least 6"),
        (lambda: estimate_trace("A"), TypeError, "operator is a str"),
        (lambda: estimate_trace(A, seed="0"), TypeError, "seed='0' must"),
        (lambda: estimate_trace(NAN), ArithmeticError, "NaN or infinity"),
        (lambda: estimate_trace(BIG_NAN), ArithmeticError, "NaN or infinity"),
        (
            lambda: negative_mass(BIG),
            ValueError,
            r"MatrixFree\(shape=\[2000.* 2000 rows, more than 1024\. Use extremal",
        ),
        (lambda: negative_mass(3), TypeError, "operator is a int"),
        (lambda: negative_mass(NAN), ArithmeticError, "NaN or infinity"),
        (
            lambda: compare_curvature(A, BIG),
            ValueError,
            "must agree in shape.*same parameter",
        ),
        (
            lambda: compare_curvature(A, DenseOperator(torch.eye(3).double())),
            ValueError,
            "must agree in shape, dtype",
        ),
        (lambda: compare_curvature(A, None), TypeError, "reference is a NoneType"),
        (lambda: compare_curvature(None, A), TypeError, "operator is a NoneType"),
        (lambda: compare_curvature(A, A, 1), ValueError, "samples=1 .* at least 2"),
        (lambda: compare_curvature(A, NAN), ArithmeticError, "NaN or infinity"),
        (lambda: compare_curvature(BIG, BIG_NAN), ArithmeticError, "NaN or infinity"),
        (lambda: inspect_curvature("net", 0.1), TypeError, "model is a str"),
        (lambda: inspect_curvature(trained(), -0.1), ValueError, "alpha=-0.1"),
        (
            lambda: inspect_curvature(nn.ReLU(), 0.1),
            ValueError,
            "model=ReLU has no parameter .*can be trained",
        ),
        (
            lambda: inspect_curvature(small_net(), 0.1),
            RuntimeError,
            r"Parameter '0\.weight' of shape \[5, 4\] has no curvature\. Call "
            r"loss\.backward\(\) and then model\.backward_hessian",
        ),
        (
            lambda: inspect_curvature(nn.Linear(2, 2), 0.1),
            RuntimeError,
            r"'weight' .* no curvature.*requires_grad_\(False\)",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_hessian_that_is_no_operator() -> None:
    model = trained()
    vars(model[2].bias)["hessian"] = torch.eye(3)
    with pytest.raises(TypeError, match=r"hessian of parameter '2\.bias' is a Tensor"):
        inspect_curvature(model, 0.1)


def test_curvature_of_another_point() -> None:
    model = trained()
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="has changed since"):
        inspect_curvature(model, 0.1)


def test_a_choice_of_parameters_and_their_progress() -> None:
    model, seen = trained(), []
    whole = inspect_curvature(model, 0.1)
    some = inspect_curvature(
        model, 0.1, only=lambda name: name.endswith("bias"), progress=seen.append
    )
    expected = tuple(row for row in whole.rows if row.name.endswith("bias"))
    assert 0 < len(expected) < len(whole.rows)
    assert some.rows == tuple(seen) == expected
    with pytest.raises(ValueError, match=r"only=.* chooses"):
        inspect_curvature(model, 0.1, only=lambda name: False)


def test_the_trace_of_a_large_convolution_is_estimated() -> None:
    """Its diagonal takes a product for every output, of which there are 2,304."""
    model = hbp.convert(nn.Sequential(nn.Conv2d(16, 8, 3), nn.Flatten()))
    images = torch.randn(8, 16, 8, 8)
    outputs = model(images)
    loss = outputs.square().mean()
    hessian = hbp.per_sample_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(hessian)
    (row,) = inspect_curvature(model, 0.1, only=lambda name: name == "0.weight").rows
    exact = float(model[0].weight.hessian.trace())
    assert 0 < row.trace_error < 0.05 * exact
    assert abs(row.trace - exact) < 5 * row.trace_error
