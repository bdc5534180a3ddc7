"""Which systems of a step are solved together, and that it makes no difference."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from helpers import close, randn, spd
from torch import Tensor, nn

import hbp
from hbp.core import newton
from hbp.core.settings import CHECK_EVERY
from hbp.operators import DenseOperator, KroneckerBlock

Groups = list[tuple[int, int, int]]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Systems and numbers of the largest, in every call, and how often the host looks.

    One of the numbers stands for the null space.
    """
    calls: Groups = []
    solve = newton.cg_rows

    def recorded(product_of: Any, b: Tensor, *options: Any) -> Any:
        given = signature(solve).bind(product_of, b, *options).arguments
        calls.append((*b.shape, given["check_every"]))
        return solve(product_of, b, *options)

    monkeypatch.setattr(newton, "cg_rows", recorded)
    return calls


def with_system(H: Tensor, g: Tensor) -> nn.Parameter:
    p = nn.Parameter(torch.zeros_like(g))
    p.grad, p.hessian = g, DenseOperator(H)
    return p


def step(parameters: list[nn.Parameter], **options: Any) -> hbp.CGNewton:
    options = {"cg_tol": 1e-6, "cg_atol": 0.0, **options}
    optimizer = hbp.CGNewton(parameters, 1.0, 0.1, **options)
    optimizer.step()
    return optimizer


def test_small_systems_share_large_ones_and_functions_do_not(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newton, "TOGETHER", 7)
    parameters = [with_system(spd(n), randn(n)) for n in (3, 7, 6, 4)]
    H = spd(3)
    parameters[3].hvp = spd(4).__matmul__
    parameters.append(with_system(H, randn(3)))
    step(parameters)
    assert groups == [(3, 7, CHECK_EVERY), (1, 8, 1), (1, 5, 1)]
    close(
        parameters[4],
        torch.linalg.solve(0.9 * H + 0.1 * torch.eye(3), -parameters[4].grad),
        atol=1e-5,
    )


def test_two_dtypes_in_one_optimizer(groups: Groups) -> None:
    double = [with_system(spd(n), randn(n)) for n in (3, 5)]
    single = with_system(spd(4).float(), randn(4).float())
    step([double[0], single, double[1]])
    assert groups == [(2, 6, CHECK_EVERY), (1, 5, CHECK_EVERY)]
    for p in (*double, single):
        H = p.hessian.to_dense()
        expected = torch.linalg.solve(0.9 * H + 0.1 * torch.eye(len(H)), -p.grad)
        close(p.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_a_direct_solve_without_damping_says_singular() -> None:
    """H ⊗ x̄x̄ᵀ has a null space, and the gradient a part in it."""
    p = nn.Parameter(torch.zeros(2, 3).double())
    p.grad, p.hessian = randn(2, 3), KroneckerBlock(DenseOperator(spd(2)), randn(1, 3))
    optimizer = hbp.CGNewton([p], 1.0, 0.0, solver="direct")
    with pytest.raises(ArithmeticError, match="is singular or not finite at alpha"):
        optimizer.step()
    assert not p.any()


def test_damped_systems_of_condition_a_million_are_no_reason_to_refuse() -> None:
    """float32 with 40 unknowns: the slack for undamped systems is not theirs."""
    values = torch.zeros(40)
    values[:3] = 1.0
    operator = DenseOperator(torch.diag(values))
    close(operator.solve(torch.ones(40), 1e-6)[3:], torch.full((37,), 1e6), rtol=1e-4)


def test_what_is_predicted_for_a_learning_rate() -> None:
    """At lr = 2 the quadratic model is back where it was."""
    p = with_system(spd(4), randn(4))
    optimizer = hbp.CGNewton([p], 2.0, 0.1, solver="direct")
    optimizer.step()
    assert optimizer.last_step[p].predicted_decrease == pytest.approx(0, abs=1e-12)


def test_another_dtype_beside_it_changes_no_bit() -> None:
    """Systems of one dtype are solved together, and no other one joins them."""

    def moved(*dtypes: torch.dtype) -> list[nn.Parameter]:
        torch.manual_seed(0)
        H, g = spd(7), randn(7)
        parameters = [with_system(H.to(dtype), g.to(dtype)) for dtype in dtypes]
        step(parameters, cg_maxiter=3)
        return parameters

    single, double = moved(torch.float32, torch.float64)
    assert single.equal(*moved(torch.float32))
    assert double.equal(*moved(torch.float64))
