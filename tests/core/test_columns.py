"""Systems that fall into columns: the averaged product H ⊗ E[xxᵀ]."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import all_equal, close, indefinite, randn, small_batch, spd, values
from torch import Tensor, nn

import hbp
from hbp.fast import RowsBlock
from hbp.operators import DenseOperator, KroneckerBlock

OUT, IN, ALPHA = 4, 12, 0.05
EXACTLY = {"cg_tol": 1e-13, "cg_atol": 0.0, "cg_maxiter": 2000}


INPUTS: dict[str, Callable[[], Tensor]] = {
    "one sample": lambda: randn(1, IN),
    "few samples": lambda: randn(7, IN),
    "repeated samples": lambda: randn(4, IN).repeat(2, 1),
    "a zero sample": lambda: torch.cat([randn(5, IN), randn(1, IN) * 0]),
    "nearly equal samples": lambda: randn(1, IN) + 1e-3 * randn(7, IN),
    "as many samples as inputs": lambda: randn(IN, IN),
    "many samples": lambda: randn(20, IN),
}


@pytest.fixture(params=INPUTS)
def inputs(request: pytest.FixtureRequest) -> Tensor:
    return INPUTS[request.param]()


def weight(x: Tensor, H: Tensor, told: bool = True) -> nn.Parameter:
    """A weight after a pass: its gradient is δᵀx, and the block may know δ."""
    delta = randn(len(x), OUT, dtype=x.dtype)
    p = nn.Parameter(torch.zeros(OUT, IN, dtype=x.dtype))
    p.grad = delta.T @ x
    kind = RowsBlock if told else KroneckerBlock
    p.hessian = kind(DenseOperator(H), x, 1 / len(x), *[delta] * told)
    return p


def system(p: nn.Parameter, alpha: float = ALPHA) -> tuple[Tensor, Tensor]:
    """The damped matrix, dense, and -g."""
    matrix = p.hessian.to_dense()
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    return (1 - alpha) * matrix + alpha * eye, -p.grad.flatten()


def step(p: nn.Parameter, alpha: float = ALPHA, **options: Any) -> hbp.optim.StepInfo:
    """One step of length 1 from 0: p is then the solution."""
    optimizer = hbp.CGNewton([p], 1.0, alpha, **options)
    optimizer.step()
    return optimizer.last_step[p]


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs, transposed, for whose span a basis is computed.

    Nothing else in a step needs QR.
    """
    made: list[torch.Size] = []
    qr = torch.linalg.qr

    def recorded(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        made.append(matrix.shape)
        return qr(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "qr", recorded)
    return made


# --------------------------------------------------------------------------------------
# The solution.
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("told", [True, False])
def test_the_solution_is_that_of_the_dense_block(
    inputs: Tensor, solver: str, told: bool
) -> None:
    p = weight(inputs, spd(OUT), told)
    matrix, b = system(p)
    info = step(p, solver=solver, **EXACTLY)
    # A residual of 1e-13 ‖g‖ over the smallest eigenvalue α; 1e-12 was the largest.
    close(p.flatten(), torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-10)
    assert info.converged
    assert info.step_norm == pytest.approx(float(p.detach().norm()), rel=1e-9)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("maxiter", [1, 2, 3, 4])
def test_the_quadratic_model_is_never_above_that_of_cg_on_the_whole(
    inputs: Tensor, told: bool, maxiter: int
) -> None:
    """Each column has its own coefficients: they minimise over a larger space."""
    p = weight(inputs, spd(OUT), told)
    matrix, b = system(p)
    info = step(p, cg_tol=1e-13, cg_atol=0.0, cg_maxiter=maxiter)
    d = p.detach().flatten()
    whole = hbp.cg(matrix, b, tol=1e-13, maxiter=maxiter).x
    found, other = (float(v @ matrix @ v / 2 - b @ v) for v in (d, whole))
    assert found <= other + 1e-12 * abs(other)
    # And all that is said of the step is true of it.
    assert info.iterations <= maxiter
    assert info.residual_norm == pytest.approx(float((b - matrix @ d).norm()), abs=1e-9)
    assert info.predicted_decrease == pytest.approx(-found, rel=1e-9)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("tol", "atol"), [(0.3, 0.0), (1e-3, 0.0), (1e-12, 0.3)])
def test_the_whole_residual_is_within_the_tolerance(
    inputs: Tensor, told: bool, tol: float, atol: float
) -> None:
    p = weight(inputs, spd(OUT), told)
    matrix, b = system(p)
    atol *= float(b.norm())
    info = step(p, cg_tol=tol, cg_atol=atol)
    residual = float((b - matrix @ p.detach().flatten()).norm())
    assert info.converged
    assert residual <= max(tol * float(b.norm()), atol) * (1 + 1e-9)
    assert info.residual_norm == pytest.approx(residual, abs=1e-9 * float(b.norm()))


def test_without_damping_the_step_stays_in_the_span(inputs: Tensor) -> None:
    """The matrix is singular, but the gradient is in its range."""
    told, other = (weight(inputs, torch.eye(OUT).double(), told) for told in (1, 0))
    other.grad = told.grad.clone()
    matrix, b = system(told, alpha=0.0)
    for p in (told, other):
        info = step(p, alpha=0.0, cg_tol=1e-9, cg_atol=0.0)
        assert info.step_norm < 1e8
        assert (info.converged, info.negative_curvature) == (True, False)
        # "nearly equal samples" have a condition of 1e7.
        assert (b - matrix @ p.detach().flatten()).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("samples", [2, 20])
def test_without_damping_no_step_leads_along_round_off(samples: int) -> None:
    """Repeated samples: eigenvalues that are 0 up to round-off have no direction."""
    p = weight(randn(2, IN).repeat(samples // 2 + 1, 1), torch.eye(OUT).double(), False)
    p.grad = randn(OUT, IN)
    info = step(p, alpha=0.0, cg_tol=1e-9, cg_atol=0.0)
    assert info.negative_curvature
    # An eigenvalue that is round-off, about 1e-16, would make a step of about 1e16.
    assert info.step_norm < 1e3


@pytest.mark.parametrize("told", [True, False])
def test_round_off_is_not_solved_for(inputs: Tensor, told: bool) -> None:
    """A singular H, beside which α is next to nothing, as under a loss of 1e37.

    In its null space, and where λ is 0, the gradient is round-off. What that may do is
    measured by the whole gradient, not by the column.
    """
    n = len(inputs)
    probabilities = randn(n, OUT).softmax(1)
    H = torch.diag(probabilities.mean(0)) - probabilities.T @ probabilities / n
    delta = 1e37 * (probabilities - torch.eye(OUT).double()[torch.arange(n) % OUT]) / n
    p = weight(inputs, 1e37 * H, told)
    p.grad = delta.T @ inputs
    if told:
        p.hessian = RowsBlock(p.hessian.outer, inputs, 1 / n, delta)
    matrix, b = system(p, alpha=0.1)
    info = step(p, alpha=0.1, cg_atol=0.0, cg_tol=1e-5)
    residual = float((b - matrix @ p.detach().flatten()).norm())
    assert info.converged
    assert residual <= 1e-5 * float(b.norm()) * (1 + 1e-9)
    # "nearly equal samples" have a condition of 1e7; 2e-8 was the largest.
    assert info.residual_norm == pytest.approx(residual, abs=1e-7 * float(b.norm()))


def test_a_singular_system_is_not_solved_directly() -> None:
    for told in (True, False):
        p = weight(randn(7, IN), spd(OUT), told)
        with pytest.raises(ArithmeticError, match="is singular or not finite"):
            step(p, alpha=0.0, solver="direct")
        assert not p.any()


def test_columns_of_negative_curvature_end_by_themselves() -> None:
    """With α = 0.5, -λ_j + 1 is negative for the large eigenvalues only."""
    x = torch.diag(torch.tensor([3.0, 3, 0.1, 0.1, 0.1])).double()
    x = torch.cat([x, torch.zeros(5, IN - 5).double()], dim=1) * 5**0.5
    for told in (True, False):
        p = weight(x, -torch.eye(OUT).double(), told)
        info = step(p, alpha=0.5, cg_tol=1e-9)
        assert info.negative_curvature
        assert not info.converged
        assert not p[:, :2].any()
        # CG stops at 1e-9.
        close(p[:, 2:], -p.grad[:, 2:] / (0.5 - 0.5 * 0.01), rtol=1e-8)


def test_an_indefinite_block_solved_directly(inputs: Tensor) -> None:
    for told in (True, False):
        p = weight(inputs, indefinite(OUT), told)
        matrix, b = system(p)
        expected = torch.linalg.solve(matrix, b)
        step(p, solver="direct")
        close(p.flatten(), expected, rtol=1e-6, atol=1e-8 * float(expected.norm()))


# --------------------------------------------------------------------------------------
# Which gradients are known to be δᵀx.
# --------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "none": (lambda g: g, True),
    "clipped": (lambda g: 0.37 * g, True),
    "turned": (lambda g: -1e-3 * g, True),
    "tiny": (lambda g: 1e-30 * g, True),
    "clipped, then changed": (lambda g: 1e-6 * g * (1 + 0.05 * (g > 0)), False),
    "clipped hard, then changed": (lambda g: 1e-15 * g * (1 + 0.05 * (g > 0)), False),
    "weight decay": (lambda g: g + 1e-4 * torch.randn_like(g), False),
    "one entry": (lambda g: g + 1e-2 * (g == g.max()), False),
    "one row gone": (lambda g: g * (torch.arange(OUT) > 0)[:, None], False),
    "another gradient": (lambda g: torch.randn_like(g), False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_gradient_is_solved_for(
    bases: list[torch.Size], change: str, dtype: torch.dtype
) -> None:
    """And only for one that is not δᵀx a basis is needed."""
    change_gradient, known = CHANGES[change]
    x, H, delta = randn(7, IN).to(dtype), spd(OUT).to(dtype), randn(7, OUT).to(dtype)
    p = nn.Parameter(torch.zeros(OUT, IN, dtype=dtype))
    p.hessian = RowsBlock(DenseOperator(H), x, 1 / 7, delta)
    p.grad = change_gradient(delta.T @ x)
    matrix, b = (t.double() for t in system(p))
    tol = 1e-10 if dtype == torch.float64 else 1e-5
    bases.clear()
    step(p, cg_tol=tol, cg_atol=0.0)
    assert bases == ([] if known else [(IN, 7)])
    expected = torch.linalg.solve(matrix, b)
    gap = p.detach().double().flatten() - expected
    assert gap.norm() <= 100 * tol * expected.norm()


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_blamed(spoiled: float) -> None:
    p = weight(randn(7, IN), spd(OUT))
    p.grad[1, 2] = spoiled
    with pytest.raises(ArithmeticError, match="the gradient of parameter 0"):
        step(p)


def test_inputs_whose_squares_overflow_are_an_arithmetic_error() -> None:
    for told in (True, False):
        p = weight(randn(7, IN).float() * 1e25, spd(OUT).float(), told)
        p.grad = torch.randn_like(p)
        with pytest.raises(ArithmeticError, match="No step was taken"):
            step(p)


def test_a_zero_gradient_is_no_step(inputs: Tensor) -> None:
    for told in (True, False):
        p = weight(inputs, spd(OUT), told)
        p.grad.zero_()
        if told:
            nothing = torch.zeros(len(inputs), OUT, dtype=inputs.dtype)
            p.hessian = RowsBlock(p.hessian.outer, inputs, 1 / len(inputs), nothing)
        info = step(p)
        assert not p.any()
        assert (info.converged, info.step_norm) == (True, 0)


def model_and_loss() -> tuple[hbp.HBPModule, Callable[[], None]]:
    """4-5-3 with two samples, so that both weights have fewer samples than inputs."""
    torch.manual_seed(3)
    model = hbp.HBPSequential(
        hbp.HBPLinear(4, 5), hbp.HBPSigmoid(), hbp.HBPLinear(5, 3)
    ).double()
    model.set_hbp_approximation(average_parameter_jacobian=False)
    x, y = small_batch(2)

    def send_back() -> None:
        model.zero_grad()
        outputs = model(x)
        loss = nn.CrossEntropyLoss()(outputs, y)
        H = hbp.output_hessian(nn.CrossEntropyLoss(), outputs, y)
        loss.backward()
        model.backward_hessian(H, modify_2nd_order_terms="abs")

    return model, send_back


def test_layers_tell_their_blocks(bases: list[torch.Size]) -> None:
    """A network's own gradients are recognised, and torch's generators untouched."""
    model, send_back = model_and_loss()
    send_back()
    expected = [
        -torch.linalg.solve(system(p)[0], p.grad.flatten()) for p in model.parameters()
    ]
    before, state = values(model), torch.get_rng_state()
    hbp.CGNewton(model.parameters(), 1.0, ALPHA, **EXACTLY).step()
    assert torch.equal(torch.get_rng_state(), state)
    assert bases == []
    for p, old, d in zip(model.parameters(), before, expected, strict=True):
        close((p - old).flatten(), d, rtol=1e-8, atol=1e-10)


def test_gradients_with_weight_decay(bases: list[torch.Size]) -> None:
    model, send_back = model_and_loss()
    send_back()
    for p in model.parameters():
        p.grad.add_(p.detach(), alpha=1e-4)
    expected = [
        -torch.linalg.solve(system(p)[0], p.grad.flatten()) for p in model.parameters()
    ]
    before = values(model)
    hbp.CGNewton(model.parameters(), 1.0, ALPHA, **EXACTLY).step()
    assert bases == [(4, 2), (5, 2)]
    for p, old, d in zip(model.parameters(), before, expected, strict=True):
        close((p - old).flatten(), d, rtol=1e-8, atol=1e-10)


# --------------------------------------------------------------------------------------
# What the block reads.
# --------------------------------------------------------------------------------------


def test_the_input_is_read_and_a_change_is_noticed() -> None:
    x = randn(7, IN)
    block = weight(x, spd(OUT)).hessian
    assert block.rows.data_ptr() == x.data_ptr()
    x[0, 0] += 1
    for use in (lambda: block @ randn(OUT * IN), block.diagonal, block.to_dense):
        with pytest.raises(RuntimeError, match=r"An input of shape \[7, 12\] has chan"):
            use()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))]
)
def test_a_copy_owns_its_input(copied: Callable) -> None:
    x = randn(7, IN)
    p = weight(x, spd(OUT))
    matrix, b = system(p)
    p.hessian = copied(p.hessian)
    x.zero_()
    step(p, **EXACTLY)
    close(p.flatten(), torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-10)


def test_steps_repeat_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        model, send_back = model_and_loss()
        send_back()
        hbp.CGNewton(model.parameters(), 1.0, ALPHA).step()
        runs.append(values(model))
    assert all_equal(*runs)


def test_rows_under_a_weight_that_has_changed_are_refused() -> None:
    """Also where the gradient is δᵀF, for which no basis is formed."""
    model = hbp.HBPSequential(
        hbp.HBPLinear(40, 5), hbp.HBPSigmoid(), hbp.HBPLinear(5, 3)
    )
    model.set_hbp_approximation(average_parameter_jacobian=False)
    optimizer = hbp.CGNewton([model[0].weight], lr=0.1, alpha=0.1)
    loss = torch.nn.functional.cross_entropy(
        outputs := model(torch.randn(6, 40)), torch.arange(6) % 3
    )
    hessian = hbp.batch_summed_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(hessian, modify_2nd_order_terms="abs")
    with torch.no_grad():
        model[2].weight += 1
    with pytest.raises(RuntimeError, match="changed"):
        optimizer.step()
