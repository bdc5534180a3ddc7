"""CGNewton: steps by hand, compressed against full, and life as an optimizer."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    SCHEMES,
    all_equal,
    close,
    columns_by_cg,
    indefinite,
    randn,
    send_back,
    small_batch,
    small_net,
    spd,
    trained,
    values,
)
from torch import Tensor, nn

import hbp
from hbp import CGNewton
from hbp.operators import DenseOperator, KroneckerBlock

EXACTLY = {"cg_tol": 1e-13, "cg_atol": 0.0}


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(randn(*shape))


def with_system(H: Tensor, g: Tensor) -> nn.Parameter:
    """A parameter with gradient g and curvature H."""
    p = parameter(len(g))
    p.grad, p.hessian = g, DenseOperator(H)
    return p


def moved(p: Tensor, step: Callable[[], Any]) -> Tensor:
    before = p.detach().clone()
    step()
    return p.detach() - before


def damped(p: nn.Parameter, alpha: float) -> np.ndarray:
    """(1-α)H + αI of the parameter, dense."""
    H = p.hessian.to_dense().numpy()
    return (1 - alpha) * H + alpha * np.eye(len(H))


# --------------------------------------------------------------------------------------
# The numbers.
# --------------------------------------------------------------------------------------


def test_one_step_by_hand() -> None:
    """One linear layer, everything written out in NumPy."""
    layer = hbp.HBPLinear(3, 2).double()
    x, y = randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    send_back(layer, x, y, treatment="zero")
    W, b, X = (t.detach().numpy().copy() for t in (layer.weight, layer.bias, x))
    lr, alpha = 0.3, 0.1
    logits = X @ W.T + b
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    delta = (p - np.eye(2)[y]) / 5
    H = (np.diag(p.sum(0)) - p.T @ p) / 5
    mean = X.mean(0)
    HW = np.kron(H, np.outer(mean, mean))
    dW = np.linalg.solve(
        (1 - alpha) * HW + alpha * np.eye(6), -(delta.T @ X).reshape(-1)
    )
    db = np.linalg.solve((1 - alpha) * H + alpha * np.eye(2), -delta.sum(0))
    CGNewton(layer.parameters(), lr, alpha, **EXACTLY).step()
    # A residual of 1e-13 ‖g‖ over the smallest eigenvalue α.
    close(layer.weight, W + lr * dW.reshape(2, 3), rtol=1e-11)
    close(layer.bias, b + lr * db, rtol=1e-11)


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_a_quadratic_is_solved_in_one_step(solver: str) -> None:
    H, minimum = spd(5), randn(5)
    p = parameter(5)
    p.grad, p.hessian = (H @ (p - minimum)).detach(), DenseOperator(H)
    CGNewton([p], lr=1.0, alpha=0.0, solver=solver, **EXACTLY).step()
    close(p, minimum, rtol=1e-10)


def test_linear_regression_is_solved_in_one_step() -> None:
    """The library's own chain, at one sample, where the block is the Hessian."""
    layer = hbp.HBPLinear(3, 2, bias=False).double()
    x, y = randn(1, 3), randn(1, 2)
    send_back(layer, x, y, nn.MSELoss(), "zero")
    # H ⊗ xxᵀ is singular, but g is in its range: CG needs no damping.
    CGNewton(layer.parameters(), lr=1.0, alpha=0.0, **EXACTLY).step()
    close(layer(x), y, rtol=1e-10)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("treatment", ["zero", "abs", "clip"])
def test_cg_and_direct_take_the_same_step(scheme: tuple, treatment: str) -> None:
    model, (x, y) = small_net(), small_batch()
    model.set_hbp_approximation(*scheme)
    send_back(model, x, y, treatment=treatment)
    twins = [copy.deepcopy(model) for _ in range(2)]
    for solver, twin in zip(("cg", "direct"), twins, strict=True):
        # A copy of a parameter has no curvature.
        send_back(twin, x, y, treatment=treatment)
        options = {**EXACTLY, "cg_maxiter": 1000}
        CGNewton(twin.parameters(), 0.5, 0.02, solver=solver, **options).step()
    before = values(model)
    for p, old, new, also in zip(
        model.parameters(), before, *map(values, twins), strict=True
    ):
        expected = np.linalg.solve(damped(p, 0.02), -p.grad.flatten())
        for found in (new, also):
            close((found - old).flatten(), 0.5 * expected, atol=1e-9)


def weight_with_block(
    rows: int, alpha: float, maxiter: int
) -> tuple[nn.Parameter, Tensor, CGNewton]:
    """A weight with H ⊗ FᵀF, its damped matrix, and an optimizer for so many steps."""
    H, F = spd(4), randn(rows, 5)
    p = parameter(4, 5)
    p.grad, p.hessian = randn(4, 5), KroneckerBlock(DenseOperator(H), F)
    optimizer = CGNewton([p], 1.0, alpha, cg_atol=0.0, cg_tol=1e-14, cg_maxiter=maxiter)
    return p, torch.tensor(damped(p, alpha)), optimizer


@pytest.mark.parametrize("maxiter", [1, 2, 3, 4, 5])
def test_compressed_iterates_are_those_of_the_full_block(maxiter: int) -> None:
    """Rank one, step by step: CG in out + 1 numbers is CG on out·in numbers."""
    p, dense, optimizer = weight_with_block(1, 0.05, maxiter)
    expected = hbp.cg(dense, -p.grad.flatten(), tol=1e-14, maxiter=maxiter)
    step = moved(p, optimizer.step).flatten()
    # Round-off grows with the steps; 3e-14 was the largest.
    close(step, expected.x, rtol=1e-9, atol=1e-11)
    info = optimizer.last_step[p]
    assert info.iterations == expected.iterations == maxiter
    # The last residual of a factor of rank one is round-off; 2e-12 was the largest.
    residual = pytest.approx(expected.residual_norm, rel=1e-9, abs=1e-11)
    assert info.residual_norm == residual


@pytest.mark.parametrize("rows", [3, 6], ids=["few rows", "many rows"])
@pytest.mark.parametrize("maxiter", [1, 2, 3, 4, 5])
def test_each_column_iterates_by_itself(rows: int, maxiter: int) -> None:
    """H ⊗ E[xxᵀ]: as many steps on (1-α)λ_j H + αI, for every j, as are allowed.

    That is never a worse step than conjugate gradients takes on the whole block.
    """
    alpha = 0.05
    p, dense, optimizer = weight_with_block(rows, alpha, maxiter)
    options = {"tol": 1e-14, "maxiter": maxiter}
    expected, alone = columns_by_cg(p.hessian, -p.grad.flatten(), alpha, **options)
    assert len(alone) == min(rows, 5)
    step = moved(p, optimizer.step).flatten()
    close(step, expected, rtol=1e-9, atol=1e-11)
    info = optimizer.last_step[p]
    assert info.iterations == max(found.iterations for found in alone)
    residual = math.hypot(*[found.residual_norm for found in alone])
    assert info.residual_norm == pytest.approx(residual, rel=1e-9, abs=1e-11)

    b = -p.grad.flatten()
    whole = hbp.cg(dense, b, **options).x
    model, joint = (float(d @ dense @ d / 2 - b @ d) for d in (step, whole))
    assert model <= joint + 1e-12 * abs(joint)


def test_compressed_cg_stops_with_full_cg() -> None:
    """In a trained network, at the tolerance of the tutorials."""
    model = trained()
    optimizer = CGNewton(
        model.parameters(), 1.0, 0.02, cg_atol=0.0, cg_tol=0.1, cg_maxiter=50
    )
    expected = [
        hbp.cg(torch.tensor(damped(p, 0.02)), -p.grad.flatten(), tol=0.1, maxiter=50)
        for p in model.parameters()
    ]
    before = values(model)
    optimizer.step()
    for p, old, result in zip(model.parameters(), before, expected, strict=True):
        close((p - old).flatten(), result.x, rtol=1e-9, atol=1e-12)
        info = optimizer.last_step[p]
        assert (info.iterations, info.converged) == (result.iterations, True)


def test_atol_stops_too() -> None:
    p = with_system(spd(5), randn(5))
    p.grad /= p.grad.norm()
    optimizer = CGNewton([p], 1.0, 0.0, cg_atol=0.9, cg_tol=1e-9)
    optimizer.step()
    coarse = optimizer.last_step[p]
    assert coarse.converged
    assert 0 < coarse.residual_norm <= 0.9
    assert coarse.iterations < 5


def test_plain_gradient_descent_at_alpha_one() -> None:
    p = with_system(indefinite(4), randn(4))
    step = moved(p, CGNewton([p], lr=0.5, alpha=1.0).step)
    close(step, -0.5 * p.grad)


def test_no_movement_at_learning_rate_zero() -> None:
    p = with_system(spd(4), randn(4))
    assert not moved(p, CGNewton([p], lr=0.0, alpha=0.1).step).any()


def test_a_zero_gradient_is_no_step() -> None:
    for p in (with_system(spd(4), torch.zeros(4).double()), parameter(2, 3)):
        if p.dim() == 2:
            p.grad = torch.zeros_like(p)
            p.hessian = KroneckerBlock(DenseOperator(spd(2)), randn(1, 3))
        for solver in ("cg", "direct"):
            optimizer = CGNewton([p], 1.0, 0.1, solver=solver)
            assert not moved(p, optimizer.step).any()
            assert optimizer.last_step[p].converged
            assert optimizer.last_step[p].step_norm == 0


def test_parameters_of_any_layout_move_alike() -> None:
    """A transposed parameter: the step goes by index, not by place in memory."""
    H, g = spd(6), randn(2, 3)
    plain, turned = nn.Parameter(randn(2, 3)), nn.Parameter(randn(3, 2).T)
    assert not turned.is_contiguous()
    steps = []
    for p in (plain, turned):
        p.grad, p.hessian = g.clone(), DenseOperator(H)
        steps.append(moved(p, CGNewton([p], 1.0, 0.1, **EXACTLY).step))
    close(steps[0], steps[1])


def test_float32_steps_follow_float64() -> None:
    """A whole step of a float32 network; 3e-7 was the largest deviation."""
    steps = []
    for double in (False, True):
        torch.manual_seed(1)
        model = small_net(double=False)
        x, y = small_batch(double=False)
        if double:
            model, x = model.double(), x.double()
        send_back(model, x, y, treatment="abs")
        before = values(model)
        CGNewton(model.parameters(), 1.0, 0.02, solver="direct").step()
        pairs = zip(values(model), before, strict=True)
        steps.append([(new - old).double() for new, old in pairs])
    for single, double in zip(*steps, strict=True):
        assert (single - double).norm() / double.norm() < 1e-5


# --------------------------------------------------------------------------------------
# What the last step says about itself.
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("maxiter", [1, 2, None])
def test_diagnostics(solver: str, maxiter: int | None) -> None:
    """Every number again, from the dense matrix and the movement itself."""
    model, lr, alpha = trained(), 0.3, 0.05
    optimizer = CGNewton(
        model.parameters(), lr, alpha, 0.0, 1e-9, cg_maxiter=maxiter, solver=solver
    )
    before = values(model)
    systems = [(damped(p, alpha), p.grad.flatten().numpy()) for p in model.parameters()]
    optimizer.step()
    assert list(optimizer.last_step) == list(model.parameters())
    for (p, info), old, (C, g) in zip(
        optimizer.last_step.items(), before, systems, strict=True
    ):
        d = ((p - old) / lr).detach().numpy().reshape(-1)
        residual = np.linalg.norm(C @ d + g)
        decrease = -(lr * g @ d + lr**2 / 2 * d @ C @ d)
        assert decrease > 0
        assert info.step_norm == pytest.approx(np.linalg.norm(d), rel=1e-9)
        assert info.residual_norm == pytest.approx(residual, rel=1e-6, abs=1e-12)
        assert info.predicted_decrease == pytest.approx(decrease, rel=1e-9)
        assert not info.negative_curvature
        if solver == "direct":
            assert (info.iterations, info.converged) == (0, True)
        else:
            assert info.converged == (residual <= 1e-9 * np.linalg.norm(g))
            assert maxiter is None or info.iterations <= maxiter


def test_negative_curvature_is_reported_and_good_steps_are_applied() -> None:
    H = torch.diag(torch.tensor([2.0, 1, -0.1], dtype=torch.float64))
    p = with_system(H, -torch.tensor([1.0, 1, 0.1], dtype=torch.float64))
    q = with_system(-spd(3), randn(3))
    optimizer = CGNewton([p, q], lr=1.0, alpha=0.0, **EXACTLY)
    still = q.detach().clone()
    step = moved(p, optimizer.step)
    info = optimizer.last_step[p]
    assert info.negative_curvature
    assert not info.converged
    assert info.iterations >= 1
    close(step, hbp.cg(H, -p.grad, tol=1e-13, maxiter=info.iterations).x)
    close(info.predicted_decrease, -(p.grad @ step + step @ H @ step / 2))
    # From the start only directions of negative curvature: no step at all.
    assert optimizer.last_step[q].iterations == 0
    assert optimizer.last_step[q].negative_curvature
    assert torch.equal(q, still)


# --------------------------------------------------------------------------------------
# Life as an optimizer.
# --------------------------------------------------------------------------------------

CHANGES = {
    "lr": 0.7,
    "alpha": 0.4,
    "cg_atol": 0.5,
    "cg_tol": 0.5,
    "cg_maxiter": 1,
    "solver": "direct",
}


@pytest.mark.parametrize("option", CHANGES)
def test_every_option_per_group(option: str) -> None:
    """Two groups in one optimizer step like two optimizers."""
    H, g, start = spd(6), randn(6), randn(6)
    common = {
        "lr": 0.1,
        "alpha": 0.1,
        "cg_atol": 1e-9,
        "cg_tol": 1e-9,
        "cg_maxiter": 4,
        "solver": "cg",
    }
    changed = {**common, option: CHANGES[option]}

    def fresh() -> nn.Parameter:
        p = with_system(H, g)
        p.data = start.clone()
        return p

    alone = [fresh(), fresh()]
    CGNewton(alone[:1], **common).step()
    CGNewton(alone[1:], **changed).step()
    assert not torch.allclose(alone[0], alone[1], rtol=1e-9)
    both = [fresh(), fresh()]
    groups = [{"params": both[:1]}, {"params": both[1:], option: CHANGES[option]}]
    CGNewton(groups, **common).step()
    assert all_equal(both, alone)


def test_groups_can_be_added_later() -> None:
    p, q = with_system(spd(2), randn(2)), with_system(spd(2), randn(2))
    optimizer = CGNewton([p], lr=0.1, alpha=1.0)
    optimizer.add_param_group({"params": [q], "lr": 0.2})
    close(moved(q, optimizer.step), -0.2 * q.grad)


def test_state_dict_round_trip() -> None:
    groups = [{"params": [parameter(2)]}, {"params": [parameter(3)], **CHANGES}]
    optimizer = CGNewton(groups, lr=0.1, alpha=0.2, cg_maxiter=9)
    other = CGNewton([{"params": [parameter(2)]}, {"params": [parameter(3)]}], 1.0, 0.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        del ours["params"], theirs["params"]
        assert ours == theirs
    assert other.last_step == {}


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (
            lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
            [0.4, 0.2, 0.1],
        ),
        (
            lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
            [0.4, 0.2, 0.4 / 3],
        ),
    ],
)
def test_schedulers(schedule: Callable, rates: list[float]) -> None:
    p = with_system(spd(3), randn(3))
    optimizer = CGNewton([p], lr=0.4, alpha=1.0)
    scheduler = schedule(optimizer)
    for rate in rates:
        close(moved(p, optimizer.step), -rate * p.grad)
        scheduler.step()


def test_closure() -> None:
    """Called once, with gradients enabled; its loss is returned."""
    model, (x, y) = small_net(), small_batch()
    twin = copy.deepcopy(model)
    optimizer = CGNewton(model.parameters(), lr=0.1, alpha=0.1)
    calls: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs = model(x)
        loss = nn.CrossEntropyLoss()(outputs, y)
        curvature = hbp.batch_summed_hessian(loss, outputs)
        loss.backward()
        model.backward_hessian(curvature, modify_2nd_order_terms="abs")
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        found = optimizer.step(closure)
    assert calls == [found.item()]
    send_back(twin, x, y, treatment="abs")
    assert CGNewton(twin.parameters(), lr=0.1, alpha=0.1).step() is None
    assert all_equal(values(model), values(twin))


def test_training_lowers_the_loss_as_predicted() -> None:
    """A short step: the predicted decrease is the real one to first order."""
    model, (x, y) = small_net(), small_batch(30)
    optimizer = CGNewton(model.parameters(), lr=1e-3, alpha=0.02)
    loss_func = nn.CrossEntropyLoss()
    send_back(model, x, y, loss_func, "abs")
    before = loss_func(model(x), y).item()
    optimizer.step()
    fall = before - loss_func(model(x), y).item()
    predicted = sum(info.predicted_decrease for info in optimizer.last_step.values())
    assert fall == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_hvp_by_hand_comes_before_p_hessian(solver: str) -> None:
    H, g = spd(6), randn(2, 3)
    p = parameter(2, 3)
    p.grad, p.hessian = g, DenseOperator(9 * H)
    seen: list[torch.Size] = []

    def hvp(v: Tensor) -> Tensor:
        seen.append(v.shape)
        return H @ v

    p.hvp = hvp
    optimizer = CGNewton([p], lr=1.0, alpha=0.1, solver=solver, **EXACTLY)
    C = 0.9 * H + 0.1 * torch.eye(6).double()
    expected = torch.linalg.solve(C, -g.flatten()).view(2, 3)
    close(moved(p, optimizer.step), expected, rtol=1e-9)
    assert set(seen) == {torch.Size([6])}
    optimizer.zero_grad()
    assert (p.grad, p.hessian, p.hvp) == (None, None, hvp)
    p.hvp = None
    p.grad, p.hessian = g, DenseOperator(H)
    close(moved(p, optimizer.step), expected, rtol=1e-9)


def test_hvp_by_double_backpropagation() -> None:
    """The exact Hessian of a loss that knows nothing of this package."""
    p = parameter(4)
    loss = (p.exp().sum() + p.prod()).square()
    (gradient,) = torch.autograd.grad(loss, p, create_graph=True)
    p.grad = gradient.detach()
    p.hvp = lambda v: torch.autograd.grad(gradient @ v, p, retain_graph=True)[0]
    H = torch.func.hessian(lambda p: (p.exp().sum() + p.prod()).square())(p.detach())
    expected = torch.linalg.solve(0.5 * H + 0.5 * torch.eye(4).double(), -p.grad)
    step = moved(p, CGNewton([p], 1.0, 0.5, solver="direct").step)
    close(step, expected, rtol=1e-9)


def test_zero_grad_clears_curvature() -> None:
    model = trained()
    CGNewton(model.parameters(), 0.1, 0.1).zero_grad()
    assert {(p.grad, p.hessian) for p in model.parameters()} == {(None, None)}


def test_frozen_and_unused_parameters_stay() -> None:
    model = small_net()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    unused = parameter(2)
    send_back(model, *small_batch(), treatment="abs")
    optimizer = CGNewton([*model.parameters(), unused], 0.5, 0.1)
    before = values(model)
    optimizer.step()
    same = [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert same == [True, False, False, True]
    assert set(optimizer.last_step) == {model[0].bias, model[2].weight}


def test_nothing_trainable_is_no_error() -> None:
    """Everything frozen: a step has nothing to do."""
    model = small_net().requires_grad_(False)
    CGNewton(model.parameters(), 0.1, 0.1).step()
    p = with_system(spd(2), randn(2))
    optimizer = CGNewton([p], 0.1, 0.1)
    p.requires_grad_(False)
    assert not moved(p, optimizer.step).any()


def _not_finite(p: nn.Parameter) -> None:
    p.hessian = DenseOperator(torch.full((3, 3), float("nan")).double())


@pytest.mark.parametrize("seed", range(4))
def test_a_gradient_with_a_part_in_the_null_space(seed: int) -> None:
    """There is no solution, and round-off must not make one: x was 1e8, "converged"."""
    torch.manual_seed(seed)
    probabilities = torch.randn(50, 10).softmax(1)
    H = torch.diag(probabilities.mean(0)) - probabilities.T @ probabilities / 50
    p = nn.Parameter(torch.zeros(10))
    p.grad, p.hessian = torch.randn(10), DenseOperator((H + H.T) / 2)
    optimizer = CGNewton([p], lr=1.0, alpha=0.0)
    optimizer.step()
    info = optimizer.last_step[p]
    assert info.negative_curvature
    assert not info.converged
    assert p.isfinite().all()
    # In the range of H there is a solution, and it is found.
    p.grad -= p.grad.mean()
    optimizer.step()
    info = optimizer.last_step[p]
    assert info.converged
    assert not info.negative_curvature


def _singular(p: nn.Parameter) -> None:
    p.hessian = DenseOperator(torch.ones(3, 3).double())


@pytest.mark.parametrize(
    ("spoil", "options", "error", "message"),
    [
        (_singular, {"alpha": 0.0, "solver": "direct"}, ArithmeticError, "singular"),
        (_not_finite, {"alpha": 0.1}, ArithmeticError, "NaN"),
        (
            lambda p: p.grad.fill_(float("nan")),
            {"alpha": 0.1},
            ArithmeticError,
            "gradient of .* has NaN or infinity",
        ),
        (
            lambda p: setattr(p, "hessian", None),
            {"alpha": 0.1},
            RuntimeError,
            "gradient but no curvature",
        ),
        (
            lambda p: setattr(p, "hvp", lambda v: v[:2]),
            {"alpha": 0.1},
            ValueError,
            r"product function returned \[2\]",
        ),
    ],
    ids=["singular", "curvature", "gradient", "missing", "hvp"],
)
def test_all_or_nothing(
    spoil: Callable, options: dict, error: type[Exception], message: str
) -> None:
    """The last of three systems fails: none of the parameters has moved."""
    parameters = [with_system(spd(3), randn(3)) for _ in range(3)]
    spoil(parameters[-1])
    optimizer = CGNewton(parameters, 0.1, **options)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(error, match=message) as caught:
        optimizer.step()
    assert all_equal([p.detach() for p in parameters], before)
    assert optimizer.last_step == {}
    if error is not ValueError:
        assert "parameter 2 of group 0, shape [3]" in str(caught.value)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
@pytest.mark.parametrize("stepped", [False, True])
def test_copies_train_on(copied: Callable, stepped: bool) -> None:
    """Model and optimizer together, before and after a step."""
    model = trained()
    optimizer = CGNewton(model.parameters(), 0.3, 0.1, solver="direct")
    if stepped:
        optimizer.step()
    twin, twin_optimizer = copied((model, optimizer))
    assert twin_optimizer.param_groups[0]["params"][0] is twin[0].weight
    assert twin_optimizer.last_step == {}
    assert str(twin_optimizer) == str(optimizer)
    for network, opt in ((model, optimizer), (twin, twin_optimizer)):
        torch.manual_seed(1)
        send_back(network, *small_batch(), treatment="abs")
        opt.step()
    assert all_equal(values(twin), values(model))
