"""Conjugate gradients on many systems at once: row by row what ``hbp.cg`` does."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from helpers import Row, Solved, indefinite, randn, solve_rows
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hbp
from hbp.core.cg import to_boundary
from hbp.operators import DenseOperator

NAN, INF = float("nan"), float("inf")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class Counting(DenseOperator):
    """A matrix that counts its products."""

    count = 0

    def product(self, rows: Tensor) -> Tensor:
        self.count += 1
        return super().product(rows)


def definite(n: int, condition: float, dtype: torch.dtype) -> Tensor:
    """Eigenvalues from 1 down to 1 / condition."""
    basis = torch.linalg.qr(randn(n, n)).Q
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    matrix = basis * values @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


def system(matrix: Tensor, b: Tensor | None = None, *options: float) -> Row:
    b = randn(len(matrix), dtype=matrix.dtype) if b is None else b
    return Row(Counting(matrix), b, *options)


def products(row: Row) -> int:
    assert isinstance(row.operator, Counting)
    return row.operator.count


def row(result: Solved, i: int) -> Solved:
    return Solved(*(field[i] for field in result))


def same(left: Solved, right: Solved) -> bool:
    """Bit for bit, NaN like NaN."""
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a.nan_to_num(7.7), b.nan_to_num(7.7)) for a, b in pairs)


class Problem(NamedTuple):
    """Systems that are solved together, and when each of them is done."""

    systems: list[Row]
    tol: float = 1e-4
    maxiter: int | None = None

    @property
    def budget(self) -> int:
        return self.maxiter or 10 * max(len(s.b) for s in self.systems)

    def solve(self, check_every: int = 1) -> Solved:
        return solve_rows(self.systems, self.tol, self.maxiter, check_every)

    def alone(self, i: int) -> hbp.CGResult:
        """``hbp.cg`` on the whole matrix."""
        s = self.systems[i]
        return hbp.cg(s.matrix, s.b, None, self.tol, s.atol, self.budget)

    def after(self, i: int, iterations: int) -> hbp.CGResult:
        """``hbp.cg`` after so many steps: with a tolerance that it never meets."""
        s = self.systems[i]
        return hbp.cg(s.matrix, s.b, tol=1e-30, maxiter=iterations)


# --------------------------------------------------------------------------------------
# Row by row like hbp.cg.
# --------------------------------------------------------------------------------------

# Largest deviations measured over 400 draws, relative: x 3e-3 in float32 and 1e-11 in
# float64; residual norms, relative to that of b, 2e-2 and 2e-10. Indefinite matrices
# without damping are the worst: a curvature near 0 amplifies round-off.
X_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-9}
R_TOLERANCE = {torch.float32: 5e-2, torch.float64: 1e-8}


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype) -> Problem:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    systems = []
    for _ in range(draw(st.integers(1, 5))):
        n, bent = draw(st.integers(1, 12)), draw(st.integers(0, 3)) == 0
        alpha = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
        # Without damping there is no solution: round-off alone says how CG ends.
        beyond = draw(st.integers(0, 2)) if alpha > 0 else 0
        condition = draw(st.sampled_from([1.0, 10.0, 100.0]))
        matrix = indefinite(n).to(dtype) if bent else definite(n, condition, dtype)
        b = randn(n + beyond, dtype=dtype) * 10.0 ** draw(st.integers(-6, 6))
        atol = draw(st.sampled_from([0.0, 0.0, 1e-3, 1.0]))
        systems.append(system(matrix, b, alpha, atol))
    tol = draw(st.sampled_from([0.5, 0.1, 1e-2, 1e-3]))
    return Problem(systems, tol, draw(st.sampled_from([None, None, 1, 2, 3, 4, 7])))


def assert_like_cg(problem: Problem, i: int, result: Solved) -> None:
    """Every field; at the stopping threshold round-off decides, so it has a margin."""
    s, found = problem.systems[i], row(result, i)
    dtype, n = s.b.dtype, len(s.b)
    iterations, scale = int(found.iterations), float(s.b.norm())
    slack = R_TOLERANCE[dtype] * scale
    target = max(problem.tol * scale, s.atol)

    if iterations == 0:
        assert not found.x.any()
        expected_residual = scale
    else:
        expected = problem.after(i, iterations)
        assert expected.iterations <= iterations
        gap = (found.x[:n] - expected.x).norm()
        assert gap <= X_TOLERANCE[dtype] * expected.x.norm()
        expected_residual = expected.residual_norm
    assert abs(float(found.residual_norm) - expected_residual) <= slack
    assert not found.x[n:].any()
    assert not found.on_boundary
    assert found.overlap == 0

    # When it stopped, and why.
    if found.converged:
        assert found.residual_norm <= target + slack
        assert not found.negative_curvature
        if iterations > 0:
            before = problem.after(i, iterations - 1) if iterations > 1 else None
            assert (before.residual_norm if before else scale) > target - slack
    elif found.negative_curvature:
        assert iterations < problem.budget
        assert problem.after(i, iterations + 1).negative_curvature
    else:
        assert iterations == problem.budget
        assert found.residual_norm > target - slack

    # What depends on x alone.
    assert float(found.norm) == pytest.approx(float(found.x.norm()), rel=1e-5)
    descent, size = float(found.x[:n] @ s.b), float(found.x.norm() * s.b.norm())
    assert float(found.descent) == pytest.approx(descent, rel=1e-5, abs=1e-5 * size)


@BOTH
@given(data=st.data())
def test_every_row_is_what_cg_does(data: st.DataObject, dtype: torch.dtype) -> None:
    problem = data.draw(problems(dtype))
    systems, result = problem.systems, problem.solve()
    assert result.x.shape == (len(systems), max(len(s.b) for s in systems))
    for i in range(len(systems)):
        assert_like_cg(problem, i, result)


@pytest.mark.parametrize("tol", [0.5, 1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("maxiter", [None, 1, 2, 5])
def test_the_same_counts_as_cg(tol: float, maxiter: int | None) -> None:
    """No threshold is near here, so that nothing needs a margin."""
    torch.manual_seed(3)
    sizes = [(3, 0.0), (8, 0.1), (20, 0.02), (1, 0.5), (12, 1.0)]
    systems = [system(definite(n, 30.0, torch.float64), None, a) for n, a in sizes]
    problem = Problem(systems, tol, maxiter)
    result = problem.solve()
    for i, s in enumerate(systems):
        expected, found = problem.alone(i), row(result, i)
        assert int(found.iterations) == expected.iterations
        assert bool(found.converged) == expected.converged
        assert not found.negative_curvature
        # After some 25 steps round-off is a few percent of the residual.
        gap = float(found.residual_norm) - expected.residual_norm
        assert abs(gap) <= 0.1 * tol * float(s.b.norm())


@BOTH
@given(data=st.data())
def test_looking_more_or_less_often_changes_nothing(
    data: st.DataObject, dtype: torch.dtype
) -> None:
    problem = data.draw(problems(dtype))
    first, *others = (problem.solve(every) for every in range(1, 8))
    assert all(same(first, other) for other in others)


@given(st.integers(0, 2**20))
def test_company_changes_nothing_but_round_off(seed: int) -> None:
    """Padding lengthens a row, and with it the order of its sums; no more."""
    torch.manual_seed(seed)
    systems = [system(definite(n, 20.0, torch.float64), None, 0.1) for n in (2, 40, 9)]
    together = solve_rows(systems, 1e-6)
    for i, s in enumerate(systems):
        by_itself = solve_rows([s], 1e-6)
        n = len(s.b)
        close = torch.testing.assert_close
        close(together.x[i, :n], by_itself.x[0], rtol=1e-10, atol=1e-10)
        assert together.iterations[i] == by_itself.iterations[0]


# --------------------------------------------------------------------------------------
# Edges.
# --------------------------------------------------------------------------------------


@BOTH
def test_zero_right_hand_side(dtype: torch.dtype) -> None:
    zero = system(definite(4, 5.0, dtype), torch.zeros(4, dtype=dtype))
    problem = Problem([zero, system(definite(6, 5.0, dtype))])
    result = problem.solve()
    found = row(result, 0)
    assert not found.x.any()
    assert [float(field) for field in found[1:]] == [0, 0, True, False, False, 0, 0, 0]
    assert_like_cg(problem, 1, result)
    # With nothing else to do, there is no product at all.
    alone = system(torch.eye(4).to(dtype), zero.b)
    solve_rows([alone], 1e-4)
    assert products(alone) == 0


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-30),
        (torch.float32, 1e18),
        (torch.float64, 1e-30),
        (torch.float64, 1e30),
        (torch.float64, 1e-200),
        (torch.float64, 1e200),
    ],
)
def test_scale_of_the_right_hand_side(dtype: torch.dtype, scale: float) -> None:
    """A power of 2 changes not a single bit, and the neighbour does not matter.

    (The place in the matrix of rows does: a product may add in another order.)
    """
    scale = 2.0 ** round(math.log2(scale))
    matrix, b = definite(9, 30.0, dtype), randn(9, dtype=dtype)
    plain = system(matrix, b, 0.02)
    one = row(solve_rows([plain, plain], 1e-4), 1)
    scaled = row(solve_rows([plain, plain._replace(b=b * scale)], 1e-4), 1)
    assert one.converged
    assert one.iterations == scaled.iterations > 0
    assert torch.equal(one.x * scale, scaled.x)
    assert one.residual_norm * scale == scaled.residual_norm
    assert one.norm * scale == scaled.norm
    assert (bool(scaled.converged), bool(scaled.negative_curvature)) == (True, False)
    # atol has the unit of b.
    target = float(one.residual_norm) * 1.5
    loose = system(matrix, b * scale, 0.02, target * scale)
    assert solve_rows([loose], 1e-30).iterations[0] == one.iterations
    huge = loose._replace(atol=1e30 * scale if scale < 1e100 else scale * 1e9)
    assert solve_rows([huge], 1e-30).iterations[0] == 0


def not_finite(where: str, bad: float, dtype: torch.dtype) -> Row:
    matrix, b = definite(5, 5.0, dtype), randn(5, dtype=dtype)
    {"rhs": b, "curvature": matrix}[where].view(-1)[0] = bad
    return system(matrix, b, 0.1)


@BOTH
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["rhs", "curvature"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_system_that_is_not_finite(
    dtype: torch.dtype, bad: float, where: str, place: int
) -> None:
    systems = [system(definite(5, 20.0, dtype), None, 0.1) for _ in range(3)]
    healthy = solve_rows(systems, 1e-4)
    systems[place] = not_finite(where, bad, dtype)
    result = solve_rows(systems, 1e-4)
    assert not result.residual_norm[place].isfinite()
    if not (where == "rhs" and math.isinf(bad)):
        assert not result.converged[place]
    for i in {0, 1, 2} - {place}:
        assert same(row(result, i), row(healthy, i))


def test_infinity_that_is_met_late_is_reported() -> None:
    """The first direction does not see the entry; the overflow comes with a later."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    matrix[0, 1] = matrix[1, 0] = 1.0
    b = torch.tensor([1e-300, 1.0, 1.0], dtype=torch.float64)
    matrix[2, 2] = 1e308
    result = solve_rows([system(matrix * 1.5, b)], 1e-12)
    assert not result.residual_norm[0].isfinite()


@pytest.mark.parametrize("check_every", [1, 2, 3, 5, 7])
def test_products_stay_within_the_budget(check_every: int) -> None:
    """None beyond it, whenever the host looks."""
    systems = [system(definite(30, 1e4, torch.float64)) for _ in range(3)]
    result = solve_rows(systems, 1e-12, 11, check_every)
    assert result.iterations.tolist() == [11] * 3
    assert not result.converged.any()
    assert not result.negative_curvature.any()
    assert [products(s) for s in systems] == [11] * 3


@pytest.mark.parametrize("check_every", [1, 2, 3, 5, 7])
def test_a_row_that_is_done_costs_products_up_to_the_next_look(
    check_every: int,
) -> None:
    """As many steps as there are eigenvalues, beside a row that goes on."""
    spectra = [[1.0], [1.0, 2.0], [1.0, 2.0, 3.0, 4.0]]
    systems = [
        system(torch.tensor(values).double().repeat(12 // len(values)).diag())
        for values in spectra
    ]
    longest = system(definite(12, 1e4, torch.float64))
    result = solve_rows([*systems, longest], 1e-10, 11, check_every)
    assert result.iterations.tolist() == [1, 2, 4, 11]
    for s, steps in zip(systems, (1, 2, 4), strict=True):
        until_a_look = math.ceil(steps / check_every) * check_every
        assert products(s) == min(until_a_look, 11)


def test_products_end_when_all_have_converged() -> None:
    """Eigenvalues 1 and 2: done after two steps, seen at the third."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 2.0, 1.0]).double())
    for check_every, expected in [(1, 2), (2, 2), (3, 3), (5, 5)]:
        s = system(matrix, torch.tensor([1.0, 1.0, 1.0, 1.0]).double())
        result = solve_rows([s], 1e-10, None, check_every)
        assert (int(result.iterations[0]), bool(result.converged[0])) == (2, True)
        assert products(s) == expected


@BOTH
@pytest.mark.parametrize("alpha", [0.02, 0.5, 1.0])
def test_a_coordinate_in_the_null_space(dtype: torch.dtype, alpha: float) -> None:
    """b longer than the operator: there the matrix is α."""
    short = system(definite(4, 10.0, dtype), randn(5, dtype=dtype), alpha)
    wide = system(definite(9, 10.0, dtype), None, alpha)
    result = solve_rows([short, wide], 1e-5)
    expected = torch.linalg.solve(short.matrix.double(), short.b.double())
    found = result.x[0]
    # tol · ‖b‖ over the smallest eigenvalue, α or 0.1.
    atol = 2e-5 * float(short.b.norm()) / min(alpha, 0.1)
    assert torch.allclose(found[:5].double(), expected, rtol=0, atol=atol)
    assert not found[5:].any()


def test_a_null_space_without_damping_is_negative_curvature() -> None:
    """b has a part there, so that there is no solution; the rest is not spoiled."""
    s = system(torch.eye(3).double(), torch.tensor([0.0, 0, 0, 1]).double())
    problem = Problem([s, system(definite(3, 5.0, torch.float64))])
    result = problem.solve()
    assert bool(result.negative_curvature[0])
    assert not result.x[0].any()
    assert_like_cg(problem, 1, result)


@BOTH
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_no_positive_curvature_is_no_step(dtype: torch.dtype, value: float) -> None:
    s = system(value * torch.eye(3, dtype=dtype))
    problem = Problem([s, system(definite(5, 5.0, dtype))])
    result = problem.solve()
    found = row(result, 0)
    assert not found.x.any()
    assert int(found.iterations) == 0
    assert bool(found.negative_curvature)
    assert not found.converged
    # A square root and a product with the unit.
    assert float(found.residual_norm) == pytest.approx(float(s.b.norm()), rel=1e-6)
    assert (float(found.norm), float(found.descent)) == (0, 0)
    assert_like_cg(problem, 1, result)


def test_late_negative_curvature_keeps_the_progress() -> None:
    matrix = torch.diag(torch.tensor([2.0, 1, -0.1], dtype=torch.float64))
    b = torch.tensor([1.0, 1, 0.1], dtype=torch.float64)
    problem = Problem([system(matrix, b)], 1e-8)
    expected = problem.alone(0)
    for check_every in range(1, 8):
        found = row(problem.solve(check_every), 0)
        assert bool(found.negative_curvature)
        assert int(found.iterations) == expected.iterations >= 1
        assert torch.allclose(found.x, expected.x, rtol=1e-12)
        assert float(found.residual_norm) == pytest.approx(expected.residual_norm)


def test_arguments_are_left_alone() -> None:
    s = system(definite(4, 5.0, torch.float64))
    b, matrix = s.b.clone(), s.operator.to_dense().clone()
    solve_rows([s, s], 1e-4)
    assert torch.equal(s.b, b)
    assert torch.equal(s.operator.to_dense(), matrix)
    assert not solve_rows([s._replace(b=b.requires_grad_())], 1e-4).x.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_start_beyond_the_boundary_by_round_off_is_on_it(dtype: torch.dtype) -> None:
    """An iterate may be rounded up; the way to the boundary is then 0, not NaN."""
    x = torch.tensor([[1 + torch.finfo(dtype).eps, 0]], dtype=dtype)
    p, radius = torch.tensor([[1e-9, 1]], dtype=dtype), torch.ones(1, 1, dtype=dtype)
    assert to_boundary(x, p, radius).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_radius_that_underflows_beside_the_gradient(dtype: torch.dtype) -> None:
    """Next to no step, but a finite one, and on the boundary."""
    largest, least = torch.finfo(dtype).max ** 0.5, torch.finfo(dtype).tiny
    H, b = (
        DenseOperator(torch.eye(3, dtype=dtype)),
        largest * torch.ones(3, dtype=dtype),
    )
    found = solve_rows([Row(H, b, radius=least)], tol=1e-5)
    assert found.on_boundary.all()
    # The radius in units of b is rounded up to the least number.
    assert 0 <= found.norm.item() <= 4 * least * largest
    assert found.x.isfinite().all()


def test_a_row_at_its_boundary_has_arrived() -> None:
    """It iterates no further, while another one goes on."""
    H, b = (
        DenseOperator(torch.diag(torch.arange(1.0, 6)).double()),
        torch.ones(5).double(),
    )
    found = solve_rows([Row(H, b, radius=0.1), Row(H, b)], tol=1e-10)
    assert found.on_boundary.tolist() == [True, False]
    assert found.iterations.tolist() == [1, 5]
    assert found.norm[0].item() == pytest.approx(0.1)
