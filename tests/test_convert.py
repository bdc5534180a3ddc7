"""convert(): the same function, the same parameters, curvature on top."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import all_equal, close, randn, send_back, values
from torch import nn

import hbp
from hbp import reference


def _torch_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(4, 5, bias=False),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 3), nn.Tanh()),
        nn.Sigmoid(),
        nn.Linear(3, 2),
    ).double()


def test_the_twin_computes_the_same_with_the_same_parameters() -> None:
    model = _torch_model()
    rng = torch.get_rng_state()
    twin = hbp.convert(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert isinstance(twin, hbp.HBPSequential)
    x = randn(3, 2, 2)
    assert torch.equal(twin(x), model(x))
    pairs = zip(model.named_parameters(), twin.named_parameters(), strict=True)
    for (name, p), (twin_name, q) in pairs:
        assert name == twin_name
        assert p is q
    assert list(model.state_dict()) == list(twin.state_dict())
    described = str(twin).replace("HBP", "")
    for scheme in (", avg_param_jac: True", ", avg_input_jac: True"):
        described = described.replace(scheme, "")
    assert described.replace("avg_input_jac: True", "") == str(model)


def test_training_the_twin_trains_the_model() -> None:
    model = _torch_model()
    twin = hbp.convert(model)
    x, y = randn(3, 4), torch.tensor([0, 1, 0])
    before = values(model)
    send_back(twin, x, y, treatment="abs")
    hbp.CGNewton(twin.parameters(), lr=0.1, alpha=0.1).step()
    assert not all_equal(values(model), before)
    assert torch.equal(twin(x), model(x))


def test_curvature_of_the_twin() -> None:
    model = _torch_model()
    twin = hbp.convert(model)
    x, y = randn(3, 2, 2), torch.tensor([0, 1, 0])
    send_back(twin, x, y, treatment="clip")
    loss_func = nn.CrossEntropyLoss()
    expected = reference.batch_blocks(model, loss_func, x, y, "clip").parameters
    for name, p in twin.named_parameters():
        close(p.hessian.to_dense(), expected[name])


def test_the_model_itself_is_left_alone() -> None:
    model = _torch_model()
    before = [type(m) for m in model.modules()]
    hbp.convert(model)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_mode_dtype_and_frozen_are_kept(training: bool, frozen: bool) -> None:
    model = _torch_model().train(training)
    model[1].requires_grad_(not frozen)
    twin = hbp.convert(model)
    assert [m.training for m in twin.modules()] == [training] * 9
    assert twin[1].weight.requires_grad is not frozen
    assert twin[1].bias is None
    assert {p.dtype for p in twin.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(2, 3),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.ReLU(inplace=True),
        nn.Flatten(2, 3),
        nn.Sequential(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_single_layers(layer: nn.Module) -> None:
    twin = hbp.convert(layer)
    assert type(twin).__name__ == f"HBP{type(layer).__name__}"
    for name in ("inplace", "start_dim", "end_dim", "in_features", "out_features"):
        assert getattr(twin, name, None) == getattr(layer, name, None)


def test_hbp_layers_are_taken_over() -> None:
    layer = hbp.HBPLinear(2, 2)
    layer.set_hbp_approximation(average_parameter_jacobian=False)
    act = hbp.HBPElementwise(torch.exp)
    twin = hbp.convert(nn.Sequential(layer, act, nn.Linear(2, 1)))
    assert twin[0] is layer
    assert twin[1] is act
    twice = hbp.convert(twin)
    assert [type(m) for m in twice] == [type(m) for m in twin]
    assert hbp.convert(layer) is layer


def test_an_activation_that_occurs_twice_stays_in_both_places() -> None:
    """One nn.ReLU() for a whole network is common."""
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 3), act, nn.Linear(3, 2), act).double()
    twin = hbp.convert(model)
    x, y = randn(3, 4), torch.tensor([0, 1, 0])
    assert torch.equal(twin(x), model(x))
    send_back(twin, x, y, treatment="abs")
    separate = nn.Sequential(model[0], nn.Tanh(), model[2], nn.Tanh())
    expected = reference.batch_blocks(
        separate, nn.CrossEntropyLoss(), x, y, "abs"
    ).parameters
    for name, p in twin.named_parameters():
        close(p.hessian.to_dense(), expected[name])


class _Custom(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.GELU())), r"1\.0: GELU"),
        (nn.Sequential(nn.Dropout(0.3)), r"0: Dropout\(p=0\.3"),
        (_Custom(1, 2), r"the model: _Custom"),
        (nn.Sequential(nn.LazyLinear(2)), r"0: LazyLinear"),
        (nn.ModuleList([nn.Linear(1, 1)]), "the model: ModuleList"),
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "the model"),
    ],
    ids=["nested", "dropout", "subclass", "lazy", "list", "parametrized"],
)
def test_unsupported_layers_are_named(model: nn.Module, named: str) -> None:
    supported = (
        r"nn\.Linear, nn\.Sigmoid, nn\.Tanh, nn\.ReLU, nn\.Flatten, nn\.Sequential"
    )
    with pytest.raises(TypeError, match=rf"(?s){named}.*Supported are .*{supported}"):
        hbp.convert(model)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_are_not_lost_silently(register: str) -> None:
    model = _torch_model()
    getattr(model[2][1], register)(lambda *args: None)
    with pytest.raises(ValueError, match=r"2\.1 \(Linear\) has hooks.*Remove"):
        hbp.convert(model)


def test_shared_weights_are_found_by_the_hessian_pass() -> None:
    first = nn.Linear(3, 3).double()
    second = copy.deepcopy(first)
    second.weight = first.weight
    twin = hbp.convert(nn.Sequential(first, nn.Sigmoid(), second))
    with pytest.raises(ValueError, match="share a parameter"):
        send_back(twin, randn(2, 3), torch.tensor([0, 1]))
