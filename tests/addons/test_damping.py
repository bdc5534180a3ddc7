"""Trust regions and adaptive damping: values, and that they rescue what diverges."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from helpers import (
    Row,
    close,
    indefinite,
    randn,
    send_back,
    small_batch,
    small_net,
    solve_rows,
    spd,
)
from torch import Tensor, nn

import hbp
from hbp import CGNewton, LevenbergMarquardt
from hbp.operators import DenseOperator, KroneckerBlock


def steihaug(A: np.ndarray, b: np.ndarray, radius: float, tol: float) -> np.ndarray:
    """Steihaug's iteration in plain NumPy; the boundary by np.roots."""
    x, r, p = np.zeros_like(b), b.copy(), b.copy()
    for _ in range(10 * len(b)):
        if np.linalg.norm(r) <= tol * np.linalg.norm(b):
            return x
        curvature = p @ A @ p
        step = r @ r / curvature if curvature > 0 else math.inf
        if curvature <= 0 or np.linalg.norm(x + step * p) >= radius:
            longest = max(np.roots([p @ p, 2 * x @ p, x @ x - radius**2]).real)
            return x + longest * p
        x, old = x + step * p, r
        r = r - step * (A @ p)
        p = r + r @ r / (old @ old) * p
    return x


@pytest.mark.parametrize("radius", [1e-6, 0.1, 0.5, 1.0, 3.0, 1e6])
@pytest.mark.parametrize("matrix", [spd, indefinite])
def test_steihaug_by_itself_and_in_company(matrix, radius: float) -> None:
    systems = []
    for n in (2, 5, 9):
        systems.append(Row(DenseOperator(matrix(n)), randn(n), radius=radius))
    plain = Row(DenseOperator(spd(4)), randn(4), 0.1)
    found = solve_rows([*systems, plain], 1e-8)
    for i, s in enumerate(systems):
        A, n = s.operator.to_dense(), len(s.b)
        expected = steihaug(A.numpy(), s.b.numpy(), radius, 1e-8)
        single = hbp.cg(A, s.b, tol=1e-8, trust_radius=radius)
        scale = np.linalg.norm(expected)
        for x in (single.x, found.x[i, :n]):
            close(x / scale, expected / scale, rtol=0, atol=1e-7)
            assert float(x.norm()) <= radius * (1 + 1e-12)
        assert bool(found.on_boundary[i]) == single.on_boundary
        assert bool(found.negative_curvature[i]) == single.negative_curvature
        assert int(found.iterations[i]) == single.iterations
        if single.on_boundary:
            assert float(found.norm[i]) == pytest.approx(radius, rel=1e-12)
            # Not above the model at the Cauchy point, the best along b.
            curvature, size = float(s.b @ A @ s.b), float(s.b.norm())
            step = radius / size
            if curvature > 0:
                step = min(step, size**2 / curvature)
            cauchy = step * size**2 - step**2 / 2 * curvature
            model = float(single.x @ s.b - single.x @ A @ single.x / 2)
            assert model >= cauchy * (1 - 1e-12)
    assert torch.equal(found.x[3, :4], solve_rows([*systems, plain], 1e-8).x[3, :4])
    assert not found.on_boundary[3]


def test_interior_iterates_are_those_without_a_radius() -> None:
    """Bit for bit, in hbp.cg, in company and in a row beside one that is bounded."""
    A, b = spd(8), randn(8)
    plain = hbp.cg(A, b)
    assert torch.equal(plain.x, hbp.cg(A, b, trust_radius=1e6).x)
    free = Row(DenseOperator(A), b, 0.1)
    wide, tight = free._replace(radius=1e6), free._replace(radius=1e-3)
    expected = solve_rows([free, free, free], 1e-6)
    found = solve_rows([wide, free, tight], 1e-6)
    assert torch.equal(found.x[:2], expected.x[:2])
    assert found.on_boundary.tolist() == [False, False, True]


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("outer", [spd, indefinite])
@pytest.mark.parametrize("radius", [1e-2, 0.3, 1.0, 1e4])
def test_steps_of_blocks_keep_within_the_radius(rows: int, outer, radius: float):
    """Compressed, and in parts: norm and prediction from the movement itself."""
    p, lr, alpha = nn.Parameter(randn(4, 5)), 0.7, 0.05
    p.grad, p.hessian = (
        randn(4, 5),
        KroneckerBlock(DenseOperator(outer(4)), randn(rows, 5)),
    )
    H, g, old = p.hessian.to_dense(), p.grad.flatten(), p.detach().clone()
    C = (1 - alpha) * H + alpha * torch.eye(20).double()
    optimizer = CGNewton([p], lr, alpha, trust_radius=radius, cg_tol=1e-10)
    optimizer.step()
    info, s = optimizer.last_step[p], (p.detach() - old).flatten()
    d = s / lr
    assert info.step_norm == pytest.approx(float(d.norm()), rel=1e-9)
    assert info.step_norm <= radius * (1 + 1e-12)
    for matrix, told in ((C, info.predicted_decrease), (H, info.undamped_decrease)):
        assert told == pytest.approx(float(-(g @ s) - s @ matrix @ s / 2), rel=1e-7)
    # At least the Cauchy decrease of the whole, though the parts share the radius.
    curvature, size = float(g @ C @ g), float(g.norm())
    tau = radius / size if curvature <= 0 else min(radius / size, size**2 / curvature)
    model = float(-(g @ d) - d @ C @ d / 2)
    assert model >= (tau * size**2 - tau**2 / 2 * curvature) * (1 - 1e-9)


def saddle(p: Tensor) -> Tensor:
    """Two minima of -1/4, at (±1, 0), and a saddle between them."""
    return p[0] ** 4 / 4 - p[0] ** 2 / 2 + p[1] ** 2 / 2


def descend(
    function, start: list[float], steps: int, adapt: bool = False, **options
) -> tuple[float, nn.Parameter, list[float]]:
    """The last loss, the parameter, and α after every step."""
    p, alphas = nn.Parameter(torch.tensor(start).double()), []
    optimizer = CGNewton([p], **{"lr": 1.0, "cg_tol": 1e-10, "cg_atol": 0.0, **options})
    adapter = LevenbergMarquardt(optimizer) if adapt else None
    for _ in range(steps):
        loss = function(p)
        (p.grad,) = torch.autograd.grad(loss, p)
        p.hessian = DenseOperator(
            torch.autograd.functional.hessian(function, p.detach())
        )
        optimizer.step()
        if adapter is not None:
            adapter.step(loss.item(), function(p).item())
        alphas.append(optimizer.param_groups[0]["alpha"])
    return float(function(p.detach())), p, alphas


def test_a_trust_radius_leaves_negative_curvature() -> None:
    """Near the saddle, -g has negative curvature: without a radius, no step at all."""
    start = [0.125, 0.0]
    still, stuck, _ = descend(saddle, start, 20, alpha=1e-6)
    assert stuck.tolist() == start
    bounded, free, _ = descend(saddle, start, 20, alpha=1e-6, trust_radius=0.3)
    assert bounded == pytest.approx(-0.25, abs=1e-12)
    assert still > bounded
    close(free, [1.0, 0.0], rtol=1e-6, atol=1e-6)


def hill(p: Tensor) -> Tensor:
    """Convex, and nearly straight far from 0: Newton's method overshoots."""
    return (1 + p.square()).sqrt().sum()


def test_adaptive_damping_converges_where_a_fixed_one_overshoots() -> None:
    start, alpha = [3.0, -2.0], 0.02
    fixed, _, _ = descend(hill, start, 100, alpha=alpha)
    adapted, _, alphas = descend(hill, start, 100, adapt=True, alpha=alpha)
    assert fixed > float(hill(torch.tensor(start).double()))
    assert max(alphas) > 2 * alpha
    assert adapted == pytest.approx(2.0, abs=1e-6)


def test_curvature_above_one_is_not_damped_away() -> None:
    """A quadratic is its own model: α falls, though αI would lower the curvature."""
    loss, _, alphas = descend(
        lambda p: 5 * p.square().sum(), [1.0, 2.0], 6, adapt=True, alpha=0.5, lr=0.5
    )
    assert alphas == sorted(alphas, reverse=True)
    assert alphas[-1] < 0.2
    assert loss < 1.0


def test_ratio_by_hand_and_bounds() -> None:
    p = nn.Parameter(torch.zeros(1).double())
    p.grad, p.hessian = torch.ones(1).double(), DenseOperator(torch.ones(1, 1).double())
    optimizer = CGNewton([p], 1.0, 0.2)
    adapter = LevenbergMarquardt(optimizer, factor=2.0, max_alpha=0.4)
    group = optimizer.param_groups[0]
    with pytest.raises(RuntimeError, match=r"Call optimizer\.step"):
        adapter.step(1.0, 0.5)
    optimizer.step()
    assert optimizer.last_step[p].undamped_decrease == pytest.approx(0.5)
    assert adapter.step(1.0, 0.75) == pytest.approx(0.5)
    assert group["alpha"] == 0.2
    adapter.step(1.0, 0.5)
    assert group["alpha"] == pytest.approx(0.125 / 1.125)
    adapter.step(torch.tensor(1.0), torch.tensor(math.nan))
    assert group["alpha"] == pytest.approx(0.2)
    for _ in range(5):
        adapter.step(1.0, math.inf)
    assert group["alpha"] == 0.4
    assert math.isnan(adapter.step(1e9, 2e9))
    with pytest.raises(ValueError, match="loss_before=nan must be finite"):
        adapter.step(math.nan, 1.0)
    # α travels with the optimizer's state.
    q = nn.Parameter(torch.zeros(1))
    other = CGNewton([q], 1.0, 0.3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["alpha"] == 0.4


def test_a_network_without_treatment() -> None:
    """Indefinite blocks of a network: every step within the radius, and downhill."""
    model, (x, y) = small_net(), small_batch(12)
    optimizer = CGNewton(model.parameters(), 1.0, 0.05, trust_radius=0.1)
    loss_func, losses = nn.CrossEntropyLoss(), []
    for _ in range(20):
        send_back(model, x, y, treatment=None)
        losses.append(loss_func(model(x), y).item())
        optimizer.step()
        for info in optimizer.last_step.values():
            assert info.step_norm <= 0.1 * (1 + 1e-12)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_radius": 0.0}, r"trust_radius=0\.0 must be a positive.*None"),
        ({"trust_radius": math.inf}, "trust_radius=inf must be"),
        ({"trust_radius": True}, "trust_radius=True must be"),
        ({"trust_radius": 1.0, "solver": "direct"}, r"trust_radius=1\.0.*solver='cg'"),
    ],
)
def test_bad_radius(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CGNewton([nn.Parameter(torch.ones(1))], 0.1, 0.1, **options)


@pytest.mark.parametrize(
    ("alpha", "options", "message"),
    [
        (0.0, {}, r"alpha=0\.0 of group 0 is not within"),
        (1.0, {}, r"alpha=1\.0 of group 0"),
        (0.1, {"factor": 1.0}, r"factor=1\.0 must be above 1"),
        (0.1, {"max_alpha": 1.0}, r"max_alpha=1\.0 must satisfy"),
        (0.1, {"min_alpha": 0.0}, r"min_alpha=0\.0"),
    ],
)
def test_bad_adapter(alpha: float, options: dict, message: str) -> None:
    optimizer = CGNewton([nn.Parameter(torch.ones(1))], 0.1, alpha)
    with pytest.raises(ValueError, match=message):
        LevenbergMarquardt(optimizer, **options)


def test_a_start_and_a_radius_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"trust_radius=1\.0 needs a start at 0"):
        hbp.cg(spd(2), randn(2), x0=randn(2), trust_radius=1.0)


def test_a_step_from_before_the_adapter_is_not_judged() -> None:
    """What it started from is not known, so it could not be taken back."""
    p = nn.Parameter(torch.zeros(1))
    p.grad, p.hessian = torch.ones(1), DenseOperator(torch.ones(1, 1))
    optimizer = CGNewton([p], 1.0, 0.2)
    optimizer.step()
    after = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"after LevenbergMarquardt\(optimizer\)"):
        LevenbergMarquardt(optimizer).step(1.0, 2.0)
    assert p.equal(after)
    assert optimizer.param_groups[0]["alpha"] == 0.2


def test_a_step_that_was_foretold_to_climb_is_judged_too() -> None:
    """Three times too long: the model knows it, and the step is taken back."""
    p = nn.Parameter(torch.zeros(1).double())
    p.grad, p.hessian = torch.ones(1).double(), DenseOperator(torch.ones(1, 1).double())
    optimizer = CGNewton([p], 3.0, 0.2)
    adapter = LevenbergMarquardt(optimizer, factor=2.0)
    optimizer.step()
    assert p.item() == -3
    # The loss (p + 1)² / 2 is its own model.
    assert adapter.step(0.5, 2.0) == pytest.approx(1.0)
    assert p.item() == 0
    assert optimizer.param_groups[0]["alpha"] == pytest.approx(0.5 / 1.5)


def test_where_lengths_are_found_nothing_is_left_to_adapt() -> None:
    """Steps keep their promise whatever α is, so that α falls to its lower bound."""
    torch.manual_seed(0)
    model = hbp.convert(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    x, y = torch.randn(60, 6), torch.randint(3, (60,))
    optimizer = CGNewton(model.parameters())
    damping, ratios = LevenbergMarquardt(optimizer, min_alpha=1e-5), []
    for _ in range(40):
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        optimizer.zero_grad()
        hbp.backward(model, outputs, loss)
        optimizer.step()
        with torch.no_grad():
            after = nn.functional.cross_entropy(model(x), y)
        ratios.append(damping.step(loss, after))
    assert min(ratios) > 3 / 4
    assert optimizer.param_groups[0]["alpha"] == 1e-5
