"""The judge is judged: against torch.func, formulas, and itself."""

from __future__ import annotations

import pytest
import torch
from helpers import SCHEMES, TREATMENTS, all_equal, close, randn, values
from torch import Tensor, nn

import hbp
from hbp import reference


def _model(linear: type = nn.Linear) -> nn.Sequential:
    return nn.Sequential(
        nn.Tanh(), nn.Sequential(linear(3, 4), nn.Sigmoid()), linear(4, 2)
    ).double()


def _batch(n: int = 4) -> tuple[Tensor, Tensor]:
    return randn(n, 3), torch.arange(n) % 2


LOSS = nn.CrossEntropyLoss()


def test_hessian_blocks_by_torch_func() -> None:
    model, (x, y) = _model(), _batch()
    blocks = reference.hessian_blocks(model, LOSS, x, y)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    assert list(blocks) == list(parameters)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return LOSS(torch.func.functional_call(model, parameters, (x,)), y)

    full = torch.func.hessian(loss)(parameters)
    for name, p in parameters.items():
        close(blocks[name], full[name][name].reshape(p.numel(), p.numel()))


def test_blocks_of_logistic_regression_by_formula() -> None:
    """Σ_n p_n(1 - p_n) x_n x_nᵀ/N for one layer: Hessian and GGN are the same."""
    model = nn.Linear(3, 1, bias=False).double()
    x, y = randn(5, 3), torch.tensor([0.0, 1, 1, 0, 1]).double()[:, None]
    p = model(x).sigmoid().detach()
    expected = (x * p * (1 - p)).T @ x / 5
    loss_func = nn.BCEWithLogitsLoss()
    for blocks in (
        reference.hessian_blocks(model, loss_func, x, y),
        reference.ggn_blocks(model, loss_func, x, y),
        reference.exact_blocks(model, loss_func, x, y, "abs").parameters,
    ):
        close(blocks["weight"], expected)


@pytest.mark.parametrize("treatment", [None, "none", "zero"])
@pytest.mark.parametrize("model", [_model(), _model(hbp.HBPLinear)])
def test_recursion_without_averaging_is_exact(
    treatment: str | None, model: nn.Module
) -> None:
    """Sample by sample, the Hessian's and the GGN's blocks come out."""
    x, y = _batch()
    direct = reference.ggn_blocks if treatment == "zero" else reference.hessian_blocks
    expected = direct(model, LOSS, x, y)
    found = reference.exact_blocks(model, LOSS, x, y, treatment)
    assert set(found.parameters) == set(expected)
    for name, block in found.parameters.items():
        close(block, expected[name])
    if treatment != "zero":
        full = reference.hessian(lambda x: LOSS(model(x), y))(x)
        close(found.input, sum(full[n, :, n] for n in range(len(x))))


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_are_exact_for_one_sample(
    treatment: str | None, scheme: tuple[bool, bool]
) -> None:
    model, (x, y) = _model(), _batch(1)
    exact = reference.exact_blocks(model, LOSS, x, y, treatment)
    found = reference.batch_blocks(model, LOSS, x, y, treatment, *scheme)
    close(found.input, exact.input)
    for name, block in found.parameters.items():
        close(block, exact.parameters[name])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_by_formula(scheme: tuple[bool, bool]) -> None:
    """Tanh and a linear layer: E[φ'φ'ᵀ] ⊙ H̄ and H̄ ⊗ E[xxᵀ], or of the means."""
    average_input, average_parameter = scheme
    model = nn.Sequential(nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = _batch(5)
    found = reference.batch_blocks(model, LOSS, x, y, "zero", *scheme)
    z = x.tanh()
    p, slope, W = model(x).softmax(1).detach(), 1 - z**2, model[1].weight.detach()
    H = torch.diag(p.mean(0)) - p.T @ p / 5
    zz = torch.outer(z.mean(0), z.mean(0)) if average_parameter else z.T @ z / 5
    close(found.parameters["1.weight"], torch.kron(H, zz))
    mean = slope.mean(0)
    ss = torch.outer(mean, mean) if average_input else slope.T @ slope / 5
    close(found.input, ss * (W.T @ H @ W))


def test_pchs_bound_the_hessian() -> None:
    """mod(R) - R is positive semi-definite for 'abs' and for 'clip'; GGN ≤ both."""
    model, (x, y) = _model(), _batch()
    found = {t: reference.exact_blocks(model, LOSS, x, y, t) for t in TREATMENTS}
    for pch in ("abs", "clip"):
        for smaller in ("none", "zero"):
            for name, block in found[pch].parameters.items():
                gap = block - found[smaller].parameters[name]
                assert torch.linalg.eigvalsh(gap).min() > -1e-13
    # |R| = 2 max(R, 0) - R, one layer back, where H is the same for all.
    at = {t: found[t].parameters["1.0.bias"] for t in TREATMENTS}
    close(at["abs"], 2 * at["clip"] - at["none"])
    assert torch.linalg.eigvalsh(at["abs"] - at["clip"]).max() > 1e-3


def test_convolution_and_softmax_layers_are_judged_too() -> None:
    """Any layer has dense Jacobians: second-order terms need not be diagonal."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Softmax(1), nn.Linear(8, 2)
    ).double()
    x, y = randn(2, 1, 3, 3), torch.tensor([0, 1])
    exact = reference.exact_blocks(model, LOSS, x, y)
    for name, block in reference.hessian_blocks(model, LOSS, x, y).items():
        close(exact.parameters[name], block)
    for treatment in ("abs", "clip"):
        pch = reference.exact_blocks(model, LOSS, x, y, treatment)
        assert torch.linalg.eigvalsh(pch.input).min() > -1e-13


def test_models_are_left_alone() -> None:
    model = hbp.convert(_model())
    x, y = _batch()
    before = values(model)
    outputs = model(x)
    LOSS(outputs, y).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    reference.batch_blocks(model, LOSS, x, y)
    reference.hessian_blocks(model, LOSS, x, y)
    reference.ggn_blocks(model, LOSS, x, y)
    assert all_equal(values(model), before)
    assert all_equal([p.grad for p in model.parameters()], gradients)
    # And a pass that had begun can go on.
    model.backward_hessian(torch.eye(2).double(), modify_2nd_order_terms="abs")


def test_a_layer_may_occur_twice_in_the_chain() -> None:
    act = nn.Tanh()
    twice = nn.Sequential(nn.Linear(3, 2), act, nn.Linear(2, 2), act).double()
    once = nn.Sequential(twice[0], nn.Tanh(), twice[2], nn.Tanh())
    x, y = _batch()
    expected = reference.exact_blocks(once, LOSS, x, y)
    close(reference.exact_blocks(twice, LOSS, x, y).input, expected.input)
