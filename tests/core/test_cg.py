"""Conjugate gradients against SciPy's, and at the edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from helpers import close, indefinite, randn, spd
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hbp import CGResult, cg


class Counting:
    """A matrix that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.products = matrix, 0

    def __matmul__(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector


def system(n: int, condition: float, seed: int) -> tuple[Tensor, Tensor]:
    """SPD with logarithmically spaced eigenvalues, and a right-hand side."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(randn(n, n)).Q
    values = torch.logspace(0, -np.log10(condition), n, dtype=torch.float64)
    return basis * values @ basis.T, randn(n)


def scipy_cg(A: Tensor, b: Tensor, **options: Any) -> tuple[np.ndarray, int]:
    """The solution and the number of steps."""
    iterates: list[None] = []
    x, _ = scipy.sparse.linalg.cg(
        A.numpy(), b.numpy(), callback=lambda x: iterates.append(None), **options
    )
    return x, len(iterates)


@given(
    st.integers(1, 25),
    st.sampled_from([1.0, 10.0, 100.0]),
    st.sampled_from([0.5, 1e-1, 1e-3, 1e-6]),
    st.sampled_from([0.0, 1e-2, 1.0]),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_steps_as_scipy_does(
    n: int, condition: float, tol: float, atol: float, started: bool, seed: int
) -> None:
    A, b = system(n, condition, seed)
    x0 = randn(n) if started else None
    start = {"x0": x0.numpy().copy()} if started else {}
    expected, steps = scipy_cg(A, b, rtol=tol, atol=atol, **start)
    counting = Counting(A)
    result = cg(counting, b, x0=x0, tol=tol, atol=atol)
    assert result.iterations == steps
    assert counting.products == steps + started
    # Round-off grows with condition and number of steps; 4e-13 was the largest.
    close(result.x, expected, rtol=0, atol=1e-8 * max(1, np.abs(expected).max()))
    assert_true(result, A, b, tol, atol)


def assert_true(
    result: CGResult, A: Tensor, b: Tensor, tol: float, atol: float = 0.0
) -> None:
    """The fields say what a residual computed from scratch says."""
    residual = float((b - A @ result.x).norm())
    assert result.residual_norm == pytest.approx(residual, rel=1e-6, abs=1e-11)
    target = max(tol * float(b.norm()), atol)
    assert result.converged == (result.residual_norm <= target)
    assert isinstance(result.converged, bool)
    assert isinstance(result.residual_norm, float)
    assert not (result.converged and result.negative_curvature)


@pytest.mark.parametrize("maxiter", [1, 2, 3, 7])
def test_every_iterate_is_scipys(maxiter: int) -> None:
    A, b = system(12, 1e3, 0)
    expected, _ = scipy_cg(A, b, rtol=1e-12, maxiter=maxiter)
    counting = Counting(A)
    result = cg(counting, b, tol=1e-12, maxiter=maxiter)
    close(result.x, expected, rtol=1e-9)
    assert (result.iterations, counting.products) == (maxiter, maxiter)
    assert not result.converged
    assert_true(result, A, b, 1e-12)


@pytest.mark.parametrize("maxiter", [1, 2, 5])
def test_a_start_costs_one_of_the_products(maxiter: int) -> None:
    A, b = system(12, 1e3, 0)
    x0 = randn(12)
    kept, counting = x0.clone(), Counting(A)
    result = cg(counting, b, x0=x0, tol=1e-12, maxiter=maxiter)
    assert counting.products == maxiter
    assert result.iterations == maxiter - 1
    assert torch.equal(x0, kept)
    expected, _ = scipy_cg(A, b, rtol=1e-12, maxiter=maxiter - 1, x0=x0.numpy().copy())
    close(result.x, expected if maxiter > 1 else x0, rtol=1e-9)
    assert_true(result, A, b, 1e-12)


def test_default_maxiter_is_ten_n() -> None:
    """A tolerance out of reach, in a matrix too bad for CG to stop early."""
    torch.manual_seed(3)
    basis = torch.linalg.qr(randn(6, 6)).Q
    A = basis * torch.logspace(0, -14, 6, dtype=torch.float64) @ basis.T
    counting = Counting((A + A.T) / 2)
    cg(counting, randn(6), tol=1e-300)
    assert counting.products <= 60


@pytest.mark.parametrize("x0", [None, torch.ones(3).double()])
def test_zero_right_hand_side(x0: Tensor | None) -> None:
    counting = Counting(spd(3))
    result = cg(counting, torch.zeros(3).double(), x0=x0)
    assert result[1:] == (0, 0.0, True, False, False)
    assert not result.x.any()
    assert counting.products == 0


def test_b_and_a_start_at_the_solution_are_left_alone() -> None:
    A, b = spd(4), randn(4)
    x0, kept = torch.linalg.solve(A, b), b.clone()
    result = cg(A, b, x0=x0, tol=1e-10)
    assert result.iterations == 0
    assert result.converged
    close(result.x, x0, rtol=1e-15)
    result.x.zero_()
    assert x0.all()
    assert torch.equal(b, kept)


def test_negative_curvature_returns_the_last_good_iterate() -> None:
    """b meets curvature 1 first; then a direction is left with curvature below 0."""
    A = indefinite(6)
    torch.manual_seed(5)
    b = randn(6)
    result = cg(A, b, tol=1e-10)
    assert result.negative_curvature
    assert not result.converged
    same = cg(A, b, tol=1e-10, maxiter=max(1, result.iterations))
    if result.iterations:
        close(result.x, same.x)
    assert_true(result, A, b, 1e-10)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_no_curvature_at_all(value: float) -> None:
    result = cg(value * torch.eye(3), torch.ones(3))
    assert result.negative_curvature
    assert (result.iterations, result.converged) == (0, False)
    assert not result.x.any()
    assert result.residual_norm == pytest.approx(3**0.5)


def test_late_negative_curvature_keeps_the_progress() -> None:
    """The first step is good: it lowers the quadratic model, and is returned."""
    A = torch.diag(torch.tensor([2.0, 1, -0.1], dtype=torch.float64))
    b = torch.tensor([1.0, 1, 0.1], dtype=torch.float64)
    result = cg(A, b, tol=1e-8)
    assert result.negative_curvature
    assert result.iterations >= 1
    close(result.x, cg(A, b, tol=1e-8, maxiter=result.iterations).x)
    assert result.x @ A @ result.x / 2 - b @ result.x < 0


def test_singular_but_consistent() -> None:
    """b in the range of A: CG finds the solution of least norm."""
    A = torch.diag(torch.tensor([3.0, 1, 0], dtype=torch.float64))
    b = torch.tensor([1.0, 2, 0], dtype=torch.float64)
    result = cg(A, b, tol=1e-12)
    assert result.converged
    close(result.x, [1 / 3, 2, 0])


SCALES = [
    (dtype, of_matrix, of_b)
    for dtype in (torch.float32, torch.float64)
    for of_matrix in (1e-30, 1.0, 1e30)
    for of_b in (1e-30, 1.0, 1e30)
    # Float32 has no number for 10⁶⁰, and 0 for 10⁻⁶⁰.
    if dtype == torch.float64 or of_matrix == 1 or of_b in (1, of_matrix)
]


@pytest.mark.parametrize(("dtype", "of_matrix", "of_b"), SCALES)
def test_scales(dtype: torch.dtype, of_matrix: float, of_b: float) -> None:
    """Iterates scale with b and 1/A, as long as the solution has a number."""
    matrix, b = spd(6).to(dtype), randn(6, dtype=dtype)
    plain = cg(matrix, b, tol=1e-4, maxiter=3)
    result = cg(matrix * of_matrix, b * of_b, tol=1e-4, maxiter=3)
    assert result.iterations == 3
    rounding = 1e-4 if dtype == torch.float32 else 1e-12
    x = result.x.double() * of_matrix / of_b
    close(x, plain.x.double(), rtol=rounding, atol=rounding)
    expected = plain.residual_norm * of_b
    assert result.residual_norm == pytest.approx(expected, rel=rounding)


def test_a_solution_that_overflows_is_not_called_converged() -> None:
    with pytest.raises(ArithmeticError, match="NaN or infinity"):
        cg(1e-30 * torch.eye(3), torch.full((3,), 1e15))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["b", "x0", "A"])
def test_not_finite(bad: float, where: str) -> None:
    A, b, x0 = spd(3), randn(3), randn(3)
    {"A": A, "b": b, "x0": x0}[where].view(-1)[0] = bad
    with pytest.raises(ArithmeticError, match=r"NaN or infinity"):
        cg(A, b, x0=x0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, r"tol=0\.0 must be positive"),
        ({"tol": -1.0}, r"tol=-1\.0 must be positive"),
        ({"tol": float("nan")}, r"tol=nan must be positive"),
        ({"atol": -1e-9}, r"atol=-1e-09 must not be negative.*0\.0"),
        ({"atol": float("nan")}, r"atol=nan"),
        ({"maxiter": 0}, "maxiter=0 must be a positive integer, or None"),
        ({"maxiter": -3}, "maxiter=-3"),
        ({"maxiter": 2.0}, r"maxiter=2\.0"),
        ({"maxiter": True}, "maxiter=True"),
        ({"x0": torch.ones(4)}, r"x0 is \[4\].*must match b: \[3\]"),
        ({"x0": torch.ones(3).double()}, "x0 is .*float64.*float32"),
        ({"b": torch.ones(3, 1)}, r"b must be a .*vector \[n\], got shape \[3, 1\]"),
        ({"b": torch.ones(3, dtype=torch.int64)}, "int64"),
        ({"b": torch.ones(0)}, r"got shape \[0\]"),
        ({"b": torch.ones(4)}, r"\[?4\]?"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    arguments = {"A": torch.eye(3), "b": torch.ones(3), **options}
    with pytest.raises(ValueError, match=message):
        cg(**arguments)


def test_the_solution_carries_no_graph() -> None:
    """b may require a gradient; CG is not meant to be differentiated through."""
    result = cg(spd(3), randn(3).requires_grad_())
    assert not result.x.requires_grad
