"""Structure that saves work must not cost digits: Woodbury, remainders, small matrices.

Everything against a dense matrix in float64.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import close, columns_by_cg, indefinite, randn, send_back, spd
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hbp
from hbp.core import operators
from hbp.core.jacobians import Diagonal, Jacobian, Matrix, as_batch
from hbp.operators import (
    DenseOperator,
    DiagonalOperator,
    KroneckerBlock,
    SymmetricOperator,
)

NAN, INF = float("nan"), float("inf")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
ALPHAS = pytest.mark.parametrize("alpha", [1e-4, 1e-3, 0.02, 0.3, 1.0])


# --------------------------------------------------------------------------------------
# Woodbury's identity.
# --------------------------------------------------------------------------------------


def through(
    J: Jacobian, H: SymmetricOperator, r: Tensor | None = None, nonnegative: bool = True
) -> SymmetricOperator:
    """JᵀHJ + diag(r), as a pass makes it."""
    term = None if r is None else DiagonalOperator(r, nonnegative)
    return as_batch(None).congruence(J, H, term)


@pytest.fixture
def factored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the matrices that are factorised."""
    sizes: list[int] = []
    factor = torch.linalg.lu_factor_ex

    def recorded(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(matrix))
        return factor(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "lu_factor_ex", recorded)
    return sizes


def softmax_curvature(classes: int) -> Tensor:
    p = randn(classes + 5, classes).softmax(1)
    return torch.diag(p.mean(0)) - p.T @ p / len(p)


def chain(
    kind: str, dtype: torch.dtype, outer: Tensor | None = None
) -> tuple[SymmetricOperator, Tensor]:
    """6 features above 40, and the matrix in float64."""
    H = softmax_curvature(6) if outer is None else outer
    W, d, r = randn(6, 40) / 3, torch.rand(40).double() / 4, randn(40) / 10
    r = {"abs": r.abs(), "clip": r.clamp(min=0), "none": r}.get(kind)
    H, W, d = H.to(dtype), W.to(dtype), d.to(dtype)
    r = None if r is None else r.to(dtype)
    operator = through(Matrix(W, 1), DenseOperator(H))
    J = W.double()
    if kind != "weight alone":
        operator = through(Diagonal(d[None]), operator, r, kind != "none")
        J = J * d.double()
    dense = J.T @ H.double() @ J
    return operator, dense if r is None else dense + torch.diag(r.double())


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@ALPHAS
@BOTH
@pytest.mark.parametrize("kind", ["abs", "clip", "zero", "weight alone", "none"])
@pytest.mark.parametrize("weight", [1.0, 50.0, "tensor"])
def test_solves_through_the_narrow_layer(
    factored: list[int], kind: str, dtype: torch.dtype, alpha: float, weight: Any
) -> None:
    operator, dense = chain(kind, dtype)
    b = randn(2, 40, dtype=dtype)
    scale = 7.0 if weight == "tensor" else weight
    # As a system passes it: λ, of one number.
    factor = torch.full((1,), scale, dtype=dtype) if weight == "tensor" else scale
    factor = (1 - alpha) * factor
    found, margin = operator.solve_damped(b, factor, alpha)
    damped = (1 - alpha) * scale * dense + alpha * torch.eye(40).double()
    expected = torch.linalg.solve(damped, b.T.double()).T
    # An r of any sign makes no D to divide by.
    assert factored == ([40] if kind == "none" else [6])
    assert margin > 1
    # Measured: 0.5 · condition · eps at most, and 2 eps where the condition is near 1.
    condition = float(torch.linalg.cond(damped))
    assert relative_error(found, expected) <= (condition + 5) * torch.finfo(dtype).eps


@ALPHAS
@BOTH
def test_without_second_order_terms_a_solve_goes_through_the_output(
    factored: list[int], dtype: torch.dtype, alpha: float
) -> None:
    """The rank of JᵀHJ is that of the 3 × 3 matrix at the top, four layers above."""
    H, sizes = softmax_curvature(3).to(dtype), (3, 7, 12, 30)
    operator, J = through(Matrix(torch.eye(3, dtype=dtype), 1), DenseOperator(H)), None
    for rows, columns in itertools.pairwise(sizes):
        W, d = randn(rows, columns, dtype=dtype) / 2, torch.rand(columns).to(dtype)
        operator = through(Diagonal(d[None]), through(Matrix(W, 1), operator))
        J = W.double() * d.double() if J is None else J @ W.double() * d.double()
    assert J is not None
    damped = (1 - alpha) * J.T @ H.double() @ J + alpha * torch.eye(30).double()
    b = randn(2, 30, dtype=dtype)
    found, margin = operator.solve_damped(b, 1 - alpha, alpha)
    assert factored == [3]
    assert margin > 1
    condition = float(torch.linalg.cond(damped))
    expected = torch.linalg.solve(damped, b.T.double()).T
    assert relative_error(found, expected) <= (condition + 5) * torch.finfo(dtype).eps


def test_a_second_order_term_ends_the_way_to_the_output(factored: list[int]) -> None:
    """Its rank is full; only what has joined above the solve's own layer counts."""
    H, terms = DenseOperator(softmax_curvature(3)), [torch.rand(8).double(), None]
    operator, dense = H, H.matrix
    for rows, columns, r in zip((3, 8), (8, 20), terms, strict=True):
        W = randn(rows, columns)
        operator = through(
            Diagonal(torch.ones(1, columns).double()),
            through(Matrix(W, 1), operator),
            r,
        )
        dense = W.T @ dense @ W + (0 if r is None else torch.diag(r))
    b = randn(1, 20)
    found, _ = operator.solve_damped(b, 0.9, 0.1)
    assert factored == [8]
    damped = 0.9 * dense + 0.1 * torch.eye(20).double()
    close(found, torch.linalg.solve(damped, b.T).T)


def test_narrow_solves_are_no_less_accurate_than_dense_ones() -> None:
    """In float32; geometric means over 100 systems: 0.3 times the dense error."""
    for alpha in (1e-4, 1e-2, 0.3):
        logs = []
        for _ in range(20):
            operator, dense = chain("abs", torch.float32)
            b = randn(1, 40, dtype=torch.float32)
            damped = (1 - alpha) * dense + alpha * torch.eye(40).double()
            expected = torch.linalg.solve(damped, b.T.double()).T
            narrow, _ = operator.solve_damped(b, 1 - alpha, alpha)
            formed = DenseOperator(operator.to_dense())
            plain, _ = formed.solve_damped(b, 1 - alpha, alpha)
            ratio = relative_error(narrow, expected) / relative_error(plain, expected)
            logs.append(math.log(ratio))
        assert math.exp(sum(logs) / len(logs)) < 1


@pytest.mark.parametrize("alpha", [0.02, 0.3])
def test_several_vectors_and_an_indefinite_layer_above(
    factored: list[int], alpha: float
) -> None:
    """r ≥ 0 is all that is asked for; H may have eigenvalues of both signs."""
    operator, dense = chain("abs", torch.float64, indefinite(6))
    damped = (1 - alpha) * dense + alpha * torch.eye(40).double()
    b = randn(3, 40)
    found, margin = operator.solve_damped(b, 1 - alpha, alpha)
    assert factored == [6]
    assert margin > 1
    close(found, torch.linalg.solve(damped, b.T).T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("narrow", "wide", "size"), [(6, 12, 6), (6, 11, 11), (1, 2, 1), (3, 3, 3)]
)
def test_only_half_as_wide_is_narrow(
    factored: list[int], narrow: int, wide: int, size: int
) -> None:
    operator = through(Matrix(randn(narrow, wide), 1), DenseOperator(spd(narrow)))
    operator.solve_damped(randn(1, wide), 0.9, 0.1)
    through(Diagonal(randn(1, wide)), operator).solve_damped(randn(1, wide), 0.9, 0.1)
    assert factored == [size, size]


@pytest.mark.parametrize(("bent", "size"), [(False, 6), (True, 40)])
def test_two_activations_in_a_row(factored: list[int], bent: bool, size: int) -> None:
    """The upper one's second-order term is no part of a narrow matrix."""
    inner, dense = chain("abs" if bent else "zero", torch.float64)
    d, r = randn(40), randn(40).abs()
    operator = through(Diagonal(d[None]), inner, r)
    damped = 0.9 * (torch.outer(d, d) * dense + torch.diag(r))
    damped += 0.1 * torch.eye(40).double()
    b = randn(1, 40)
    found, _ = operator.solve_damped(b, 0.9, 0.1)
    assert factored == [size]
    close(found, torch.linalg.solve(damped, b.T).T, rtol=1e-9, atol=1e-10)


def test_without_damping_nothing_is_divided_by_it(factored: list[int]) -> None:
    operator, dense = chain("abs", torch.float64)
    dense = dense + torch.diag(torch.ones(40)).double()
    operator.term.values.add_(1)
    b = randn(1, 40)
    found, margin = operator.solve_damped(b, 1.0, 0.0)
    assert factored == [40]
    assert margin > 1
    close(found, torch.linalg.solve(dense, b.T).T, rtol=1e-9)


@BOTH
@pytest.mark.parametrize("kind", ["zero", "weight alone"])
def test_singular_systems_have_no_margin(kind: str, dtype: torch.dtype) -> None:
    """An eigenvalue of exactly -α/(1-α), in the layer above."""
    alpha = 0.25
    H, J = torch.zeros(2, 2, dtype=dtype), torch.zeros(2, 6, dtype=dtype)
    H[0, 0], H[1, 1], J[0, 0], J[1, 1] = -alpha / (1 - alpha), 1, 1, 1
    operator = through(Matrix(J, 1), DenseOperator(H))
    if kind == "zero":
        operator = through(Diagonal(torch.ones(1, 6, dtype=dtype)), operator)
    b = torch.ones(1, 6, dtype=dtype)
    _, margin = operator.solve_damped(b, 1 - alpha, alpha)
    assert not margin > 1
    with pytest.raises(ArithmeticError, match="singular"):
        operator.solve(b.T, alpha)
    # And without damping, of which there is too little to begin with.
    with pytest.raises(ArithmeticError, match="singular"):
        operator.solve(b.T)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", ["H", "W", "d", "r"])
def test_not_finite_pieces_have_no_margin_or_no_finite_solution(
    where: str, bad: float
) -> None:
    H, W, d, r = spd(3), randn(3, 8), randn(8), randn(8).abs()
    {"H": H, "W": W, "d": d, "r": r}[where].view(-1)[0] = bad
    inner = through(Matrix(W, 1), DenseOperator(H))
    operator = through(Diagonal(d[None]), inner, r)
    found, margin = operator.solve_damped(randn(1, 8), 0.9, 0.1)
    if where == "r" and math.isinf(bad):
        # An infinite curvature is a feature that does not move.
        assert found[0, 0] == 0 or not margin > 1
    else:
        assert not (margin > 1 and bool(found.isfinite().all()))
    if math.isnan(bad):
        assert not margin > 1


@pytest.mark.parametrize("treatment", [None, "none", "zero", "abs", "clip"])
def test_a_network_solves_through_its_narrow_layers(
    factored: list[int], treatment: str | None
) -> None:
    """30-20-8-3, whole steps: the sizes factorised, and the solutions."""
    model = hbp.HBPSequential(
        hbp.HBPLinear(30, 20),
        hbp.HBPSigmoid(),
        hbp.HBPLinear(20, 8),
        hbp.HBPSigmoid(),
        hbp.HBPLinear(8, 3),
    ).double()
    x, y = torch.rand(25, 30).double(), torch.arange(25) % 3
    send_back(model, x, y, treatment=treatment)
    alpha = 0.02
    expected = [
        torch.linalg.solve(
            (1 - alpha) * p.hessian.to_dense() + alpha * torch.eye(p.numel()).double(),
            -p.grad.flatten(),
        )
        for p in model.parameters()
    ]
    before = [p.detach().clone() for p in model.parameters()]
    factored.clear()
    hbp.CGNewton(model.parameters(), 1.0, alpha, solver="direct").step()
    own, through = [20, 20, 8, 8, 3, 3], [8, 8, 3, 3, 3, 3]
    ways = {None: own, "none": own, "zero": [3] * 6}
    assert factored == ways.get(treatment, through)
    for p, old, d in zip(model.parameters(), before, expected, strict=True):
        close((p - old).flatten(), d, rtol=1e-8, atol=1e-9)


# --------------------------------------------------------------------------------------
# The length of B⊥.
# --------------------------------------------------------------------------------------

SHAPES = [(3, 5, 1), (10, 784, 1), (10, 784, 8), (100, 100, 2), (64, 3072, 1)]
SHAPES += [(64, 3072, 64), (512, 1024, 1), (512, 1024, 8)]


@BOTH
@pytest.mark.parametrize(("out", "into", "count"), SHAPES)
def test_gradients_in_the_span_have_no_remainder(
    dtype: torch.dtype, out: int, into: int, count: int
) -> None:
    """Nothing is left but round-off, and that is not 0.

    Measured on up to [1024, 3072], 1 to 64 rows: at most 27 eps of B.
    """
    kinds = [randn(count, into), torch.rand(count, into).double()]
    kinds.append(kinds[0] * torch.logspace(0, -6, into, dtype=torch.float64))
    for rows in kinds:
        F, coefficients = rows.to(dtype), randn(out, count).abs().to(dtype)
        B = coefficients @ F
        block = KroneckerBlock(DenseOperator(torch.eye(out, dtype=dtype)), F)
        rhs = block.system(B.flatten()).rhs
        # One sum over all entries is off by 100 eps itself.
        norm = float(B.double().norm(dim=1).norm())
        assert 0 < float(rhs[:, -1].norm()) < 60 * torch.finfo(dtype).eps * norm
        inside = float(rhs[:, :-1].double().norm())
        assert inside == pytest.approx(norm, rel=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("relative", [1.0, 0.1, 0.01, 1e-3, 1e-4])
def test_a_remainder_is_seen_in_a_large_float32_gradient(relative: float) -> None:
    """‖B‖² - ‖BQ‖² would be off by more than a B⊥ of 1 % of B."""
    out, into = 1024, 3072
    s = torch.rand(1, into).double()
    s /= s.norm()
    remainder = torch.randn(out, into).double()
    remainder -= (remainder @ s.T) @ s
    remainder *= relative / remainder.norm()
    u = randn(out, 1)
    B = (u / u.norm() @ s + remainder).float()
    block = KroneckerBlock(DenseOperator(torch.eye(out)), s.float())
    length = float(block.system(B.flatten()).rhs[0, -1])
    # Measured with five random states: 7.4e-6.
    assert length == pytest.approx(relative, rel=3e-5)


def test_a_small_remainder_holds_up_convergence() -> None:
    """CG may not call itself done while the residual of B⊥ is above the tolerance."""
    rows, H = torch.rand(1, 784), spd(10).float() / 100
    s = rows.double() / rows.double().norm()
    remainder = torch.randn(10, 784).double()
    remainder -= (remainder @ s.T) @ s
    inside = randn(10, 1) @ s
    inside /= inside.norm()
    B = (inside + 3e-3 * remainder / remainder.norm()).float()
    p = nn.Parameter(torch.zeros(10, 784))
    p.grad, p.hessian = -B, KroneckerBlock(DenseOperator(H), rows)
    optimizer = hbp.CGNewton([p], 1.0, 0.02, cg_tol=1e-4, cg_atol=0.0)
    optimizer.step()
    S = rows.double().T @ rows.double()
    dense = 0.98 * torch.kron(H.double(), S) + 0.02 * torch.eye(7840).double()
    residual = B.double().flatten() - dense @ p.detach().double().flatten()
    info = optimizer.last_step[p]
    assert info.converged
    # It stops below 1e-4; float32 adds a few 1e-6 to what it believes.
    assert residual.norm() < 1.1e-4
    assert info.residual_norm == pytest.approx(float(residual.norm()), abs=1e-5)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("relative", [1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_a_small_remainder_is_scaled_like_a_large_one(
    solver: str, relative: float, count: int
) -> None:
    """float32, against float64 on the dense matrix, within B⊥ alone.

    CG stops after three steps, so that the polynomial, not convergence, is compared;
    with several rows that of each column.
    """
    out, into, alpha = 6, 50, 0.02
    rows = torch.rand(count, into).float()
    Q = torch.linalg.qr(rows.double().T).Q
    remainder = torch.randn(out, into).double()
    remainder -= remainder @ Q @ Q.T
    inside = randn(out, count) @ Q.T
    inside /= inside.norm()
    B = (inside + relative * remainder / remainder.norm()).float()
    H = (5 * spd(out)).float()
    p = nn.Parameter(torch.zeros(out, into))
    p.grad, p.hessian = -B, KroneckerBlock(DenseOperator(H), rows)
    options = {"cg_tol": 1e-12, "cg_atol": 0.0, "cg_maxiter": 3}
    hbp.CGNewton([p], 1.0, alpha, solver=solver, **options).step()

    S = rows.double().T @ rows.double()
    dense = (1 - alpha) * torch.kron(H.double(), S)
    dense += alpha * torch.eye(out * into).double()
    b, wide = (
        B.double().flatten(),
        KroneckerBlock(DenseOperator(H.double()), rows.double()),
    )
    if solver == "direct":
        expected = torch.linalg.solve(dense, b)
    elif count == 1:
        expected = hbp.cg(dense, b, tol=1e-12, maxiter=3).x
    else:
        expected, _ = columns_by_cg(wide, b, alpha, tol=1e-12, maxiter=3)
    gap = p.detach().double() - expected.view(out, into)
    assert gap.norm() <= 1e-3 * expected.norm()
    outside = expected.view(out, into) @ (torch.eye(into) - Q @ Q.T)
    error = (gap @ (torch.eye(into).double() - Q @ Q.T)).norm() / outside.norm()
    # An entry of B is known to 6e-8 of B, whatever is small beside it. Measured: an
    # error of 1e-7 of B at most, which is 10 % of a B⊥ of 1e-6.
    assert error <= 1e-4 + 3e-7 / relative


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_a_remainder_whose_square_underflows_is_scaled_too(
    solver: str, count: int
) -> None:
    """Inputs that are unit vectors, and a gradient of 1e-30 in the last feature.

    Its square is 0 in float32, but the step there is -1e-30/α, or with CG what three
    steps on the dense matrix in float64 make of it.
    """
    out, into, alpha = 4, 6, 0.02
    rows, H = torch.eye(count, into), spd(out).float()
    p = nn.Parameter(torch.zeros(out, into))
    p.grad, p.hessian = torch.zeros(out, into), KroneckerBlock(DenseOperator(H), rows)
    p.grad[:, 0], p.grad[:, -1] = torch.tensor([1.0, -2, 3, 0.5]), 1e-30
    options = {"cg_tol": 1e-12, "cg_atol": 0.0, "cg_maxiter": 3}
    hbp.CGNewton([p], 1.0, alpha, solver=solver, **options).step()
    expected = -p.grad[:, -1].double() / alpha
    if solver == "cg":
        wide = KroneckerBlock(DenseOperator(H.double()), rows.double())
        b = -p.grad.double().flatten()
        found, _ = columns_by_cg(wide, b, alpha, tol=1e-12, maxiter=3)
        expected = found.view(out, into)[:, -1]
        assert expected.abs().min() > 1e-30
    # Measured: 3e-8 at most.
    close(p[:, -1].double(), expected, rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------
# DENSE_FEATURES.
# --------------------------------------------------------------------------------------


def network() -> hbp.HBPSequential:
    torch.manual_seed(2)
    return hbp.HBPSequential(
        hbp.HBPLinear(9, 12),
        hbp.HBPSigmoid(),
        hbp.HBPLinear(12, 7),
        hbp.HBPTanh(),
        hbp.HBPLinear(7, 3),
    ).double()


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function's results with products through the chain and through the matrix."""

    def run(function: Any) -> tuple[Any, Any]:
        results = []
        for features in (0, 256):
            monkeypatch.setattr(operators, "DENSE_FEATURES", features)
            torch.manual_seed(3)
            results.append(function())
        return tuple(results)

    return run


def sent_back(treatment: str | None) -> hbp.HBPSequential:
    model = network()
    send_back(model, randn(10, 9), torch.arange(10) % 3, treatment=treatment)
    return model


TREATMENTS = pytest.mark.parametrize("treatment", [None, "zero", "abs", "clip"])


@TREATMENTS
def test_products_are_the_same_with_and_without_a_matrix(
    both_ways: Any, treatment: str | None
) -> None:
    def products() -> list[Tensor]:
        parameters = list(sent_back(treatment).parameters())
        return [p.hessian @ randn(p.numel(), 4) for p in parameters]

    for chained, formed in zip(*both_ways(products), strict=True):
        close(chained, formed)


@TREATMENTS
@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_steps_are_the_same_with_and_without_a_matrix(
    both_ways: Any, treatment: str | None, solver: str
) -> None:
    def step() -> tuple[list[Tensor], list[hbp.optim.StepInfo]]:
        model = sent_back(treatment)
        optimizer = hbp.CGNewton(
            model.parameters(), 0.1, 0.1, cg_tol=1e-3, solver=solver
        )
        optimizer.step()
        moved = [p.detach().clone() for p in model.parameters()]
        return moved, list(optimizer.last_step.values())

    (chained, chained_info), (formed, formed_info) = both_ways(step)
    for one, other in zip(chained, formed, strict=True):
        close(one, other, rtol=1e-9, atol=1e-11)
    for one, other in zip(chained_info, formed_info, strict=True):
        assert one.iterations == other.iterations
        assert (one.converged, one.negative_curvature) == (
            other.converged,
            other.negative_curvature,
        )
        assert one.step_norm == pytest.approx(other.step_norm, rel=1e-9)


class Operations(TorchDispatchMode):
    """Counts what torch does, views aside."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_matrix_is_formed_only_where_it_is_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once it is formed, a product is one multiplication."""
    for features, formed in [(0, False), (11, False), (12, True), (256, True)]:
        monkeypatch.setattr(operators, "DENSE_FEATURES", features)
        hessian = sent_back("abs")[0].bias.hessian
        counts = []
        for _ in range(3):
            with Operations() as operations:
                hessian.product(randn(1, 12))
            counts.append(operations.count - 1)  # Not the random numbers.
        first, *later = counts
        assert first > 1
        assert [count == 1 for count in later] == [formed] * 2


@pytest.mark.parametrize(("above", "formed"), [(40, True), (41, False)])
def test_no_large_matrix_is_formed_for_a_small_one(
    monkeypatch: pytest.MonkeyPatch, above: int, formed: bool
) -> None:
    """At most four times the features of the largest matrix that is formed at once."""
    monkeypatch.setattr(operators, "DENSE_FEATURES", 10)
    operator = through(Matrix(randn(above, 3), 1), DenseOperator(spd(above)))
    v = randn(1, 3)
    first = operator.product(v)
    with Operations() as operations:
        close(operator.product(v), first)
    assert (operations.count == 1) == formed


def test_errors_are_the_same_with_and_without_a_matrix(both_ways: Any) -> None:
    """Above all that curvature is stale after a step, though a matrix was formed."""

    def errors() -> list[str]:
        model = sent_back("abs")
        hessians = [p.hessian for p in model.parameters()]
        for hessian in hessians:
            hessian @ randn(hessian.shape[0])
        with pytest.raises(ValueError, match="right-hand side") as wrong:
            hessians[0] @ randn(5)
        hbp.CGNewton(model.parameters(), 0.1, 0.1).step()
        messages = []
        for hessian in hessians[:4]:
            with pytest.raises(RuntimeError) as caught:
                hessian @ randn(hessian.shape[0])
            messages.append(str(caught.value))
        # The output Hessian belongs to no weight.
        for hessian in hessians[4:]:
            hessian @ randn(hessian.shape[0])
        # A second step on the same curvature is refused too.
        optimizer = hbp.CGNewton(model.parameters(), 0.1, 0.1)
        before = [p.detach().clone() for p in model.parameters()]
        for p, hessian in zip(model.parameters(), hessians, strict=True):
            assert p.hessian is None
            p.hessian = hessian
        with pytest.raises(RuntimeError, match="has changed since") as again:
            optimizer.step()
        assert all(map(torch.equal, before, model.parameters()))
        return [*messages, str(wrong.value), str(again.value)]

    chained, formed = both_ways(errors)
    assert chained == formed
    assert "A weight of shape [7, 12] has changed since" in formed[0]
    assert "A weight of shape [3, 7] has changed since" in formed[2]
