"""Models and optimizers live as any in torch: copied, saved, moved, transformed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    all_equal,
    close,
    randn,
    send_back,
    small_batch,
    small_net,
    trained,
    values,
)
from torch import Tensor, nn
from torch.func import functional_call

import hbp
from hbp import CGNewton, reference


def _through_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _through_file],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("moment", ["fresh", "forward", "backward", "hessian", "step"])
def test_copies_at_any_moment(copied: Callable, moment: str) -> None:
    """The copy has the weights and the scheme, not the pass that was under way."""
    model = small_net()
    model.set_hbp_approximation(average_input_jacobian=False)
    x, y = small_batch()
    if moment != "fresh":
        loss = F.cross_entropy(model(x), y)
        if moment != "forward":
            loss.backward()
        if moment in ("hessian", "step"):
            model.backward_hessian(torch.eye(3).double(), modify_2nd_order_terms="abs")
        if moment == "step":
            CGNewton(model.parameters(), 0.1, 0.1).step()
    twin = copied(model)
    assert str(twin) == str(model)
    assert all_equal(values(twin), values(model))
    with pytest.raises(RuntimeError, match="before a forward pass"):
        twin.backward_hessian(torch.eye(3).double())
    found = send_back(twin, x, y, treatment="abs")
    close(found.to_dense(), send_back(model, x, y, treatment="abs").to_dense())


def test_curvature_stays_behind_when_a_model_is_pickled() -> None:
    """It would take the training batch along; by itself it can be kept."""
    model = trained()
    twin, kept = pickle.loads(pickle.dumps((model, model[0].weight.hessian)))
    assert twin[0].weight.hessian is None
    v = randn(20)
    expected = model[0].weight.hessian @ v
    close(kept @ v, expected)
    # It is a copy: training the original leaves it alone.
    CGNewton(model.parameters(), 0.1, 0.1).step()
    close(kept @ v, expected)


def test_state_dict_holds_weights_only(tmp_path: Path) -> None:
    model = trained()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt")  # Safe loading: tensors only.
    assert list(state) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(model.buffers()) == []
    plain = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    plain.load_state_dict(state)
    x, _ = small_batch()
    assert torch.equal(plain(x), model(x))


def _train(
    model: nn.Module, optimizer: CGNewton, schedule: object, epochs: range
) -> list[float]:
    losses = []
    for epoch in epochs:
        torch.manual_seed(epoch)
        x, y = small_batch(10)
        optimizer.zero_grad()
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        curvature = hbp.batch_summed_hessian(loss, outputs)
        loss.backward()
        model.backward_hessian(curvature, modify_2nd_order_terms="abs")
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_resumed_training_is_the_same_bit_for_bit(tmp_path: Path, solver: str) -> None:
    def fresh() -> tuple:
        torch.manual_seed(7)
        model = small_net()
        optimizer = CGNewton(model.parameters(), 0.5, 0.05, cg_tol=0.1, solver=solver)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return model, optimizer, schedule

    model, *rest = fresh()
    losses = _train(model, *rest, range(8))
    first, optimizer, schedule = fresh()
    _train(first, optimizer, schedule, range(3))
    parts = (first, optimizer, schedule)
    torch.save([part.state_dict() for part in parts], tmp_path / "checkpoint.pt")

    torch.manual_seed(8)
    second = small_net()
    optimizer = CGNewton(second.parameters(), 9.0, 0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    states = torch.load(tmp_path / "checkpoint.pt")
    for part, state in zip((second, optimizer, schedule), states, strict=True):
        part.load_state_dict(state)
    assert _train(second, optimizer, schedule, range(3, 8)) == losses[3:]
    assert all_equal(values(second), values(model))


def test_to_and_double() -> None:
    """Moved between passes, a model has the curvature of where it now is."""
    model = small_net(double=False)
    x, y = small_batch(double=False)
    single = send_back(model, x, y, treatment="abs")
    assert single.dtype == torch.float32
    assert model.double() is model
    twice = send_back(model, x.double(), y, treatment="abs")
    assert {p.hessian.dtype for p in model.parameters()} == {torch.float64}
    close(single.to_dense().double(), twice.to_dense(), rtol=1e-3, atol=1e-6)
    model.to(torch.float32)
    again = send_back(model, x, y, treatment="abs")
    assert torch.equal(again.to_dense(), single.to_dense())
    CGNewton(model.parameters(), 0.1, 0.1).step()


def test_curvature_from_before_a_change_of_dtype_is_refused() -> None:
    model = trained(double=False)
    model.double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"float32.*does not fit.*float64 on cpu"):
        CGNewton(model.parameters(), 0.1, 0.1).step()


def test_the_meta_device() -> None:
    """Models of any size can be made, and described, without memory."""
    with torch.device("meta"):
        model = hbp.HBPSequential(hbp.HBPLinear(10**6, 10**5), hbp.HBPReLU())
    assert model(torch.empty(2, 10**6, device="meta")).shape == (2, 10**5)


def test_no_grad_and_inference_record_nothing() -> None:
    """Validation between forward and the Hessian pass does not disturb it."""
    model = small_net()
    x, y = small_batch()
    expected = send_back(model, x, y, treatment="abs").to_dense()
    model.zero_grad()
    inputs = x.clone().requires_grad_()
    outputs = model(inputs)
    loss = F.cross_entropy(outputs, y)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(2 * x), model(2 * x))
    curvature = hbp.batch_summed_hessian(loss, outputs)
    loss.backward()
    with torch.no_grad():
        model(3 * x)
        found = model.backward_hessian(curvature, True, "abs")
    close(found.to_dense(), expected)
    assert model.eval()(x).requires_grad
    assert not model.training


def test_curvature_has_no_graph() -> None:
    """Whatever is computed from it keeps no activations alive."""
    found = send_back(small_net(), *small_batch(), treatment="abs")
    assert not found.to_dense().requires_grad
    model = trained()
    for p in model.parameters():
        product = p.hessian @ torch.ones(p.numel()).double()
        assert not product.requires_grad
        assert not p.hessian.to_dense().requires_grad


# --------------------------------------------------------------------------------------
# In-place operations.
# --------------------------------------------------------------------------------------


def _same_curvature(ours: hbp.HBPModule, theirs: nn.Module, x: Tensor) -> None:
    y = torch.arange(len(x)) % 2
    theirs.load_state_dict(ours.state_dict())
    found = send_back(ours, x, y, treatment="abs")
    expected = reference.batch_blocks(theirs, nn.CrossEntropyLoss(), x, y, "abs")
    close(found.to_dense(), expected.input)
    for name, p in ours.named_parameters():
        close(p.hessian.to_dense(), expected.parameters[name])


def _shifted(x: Tensor) -> Tensor:
    """Of both signs, so that a ReLU behind it matters."""
    return F.softplus(x) - 0.7


def test_in_place_relu_everywhere() -> None:
    """Behind a view, where torch rewrites the graph; behind a weight; as the last."""
    ours = hbp.HBPSequential(
        hbp.HBPElementwise(_shifted),
        hbp.HBPFlatten(),
        hbp.HBPReLU(inplace=True),
        hbp.HBPLinear(4, 3),
        hbp.HBPReLU(inplace=True),
        hbp.HBPLinear(3, 2),
        hbp.HBPReLU(inplace=True),
    ).double()
    theirs = nn.Sequential(
        *(hbp.HBPElementwise(_shifted), nn.Flatten(), nn.ReLU(), nn.Linear(4, 3)),
        *(nn.ReLU(), nn.Linear(3, 2), nn.ReLU()),
    ).double()
    _same_curvature(ours, theirs, randn(5, 2, 2))


def test_outputs_that_are_changed_in_place() -> None:
    """By a loss, say: δ is that of what the model gave."""
    model = hbp.HBPSequential(hbp.HBPTanh(), hbp.HBPLinear(4, 3)).double()
    x, _ = small_batch()
    inputs = x.clone().requires_grad_()
    outputs = model(inputs)
    scaled = outputs.mul_(3.0)
    loss = scaled.exp().sum()
    curvature = 9 * hbp.batch_summed_hessian(loss, scaled)
    loss.backward()
    found = model.backward_hessian(curvature, True).to_dense()
    expected = reference.batch_blocks(
        model, lambda z, y: (3 * z).exp().sum(), x, x
    ).input
    # The sum of exponentials is about 10³.
    close(found, expected, rtol=1e-10)


def test_an_elementwise_function_that_overwrites_its_input_is_refused() -> None:
    """Its derivatives at x need x."""
    layer = hbp.HBPElementwise(
        torch.sigmoid_, first=torch.ones_like, second=torch.zeros_like
    )

    def one_pass() -> None:
        layer(randn(3, 2).requires_grad_() * 1).square().sum().backward()
        layer.backward_hessian(torch.eye(2).double(), compute_input_hessian=True)

    with pytest.raises(RuntimeError, match=r"input in place.*out-of-place"):
        one_pass()


@pytest.mark.parametrize("part", ["inputs", "activations"])
def test_what_is_overwritten_before_its_use_is_refused(part: str) -> None:
    model = hbp.HBPSequential(hbp.HBPLinear(4, 3), hbp.HBPSigmoid()).double()
    x, _ = small_batch()
    outputs = model(x)
    outputs.sum().backward()
    with torch.no_grad():
        (x if part == "inputs" else outputs).zero_()
    with pytest.raises(RuntimeError, match=r"(input|output) .* changed in place"):
        model.backward_hessian(torch.eye(3).double())
    assert all(getattr(p, "hessian", None) is None for p in model.parameters())


# --------------------------------------------------------------------------------------
# torch.func.
# --------------------------------------------------------------------------------------


def test_function_transforms_go_through() -> None:
    """grad, vmap, jvp and hessian of an HBP model are those of the torch model."""
    ours = small_net()
    theirs = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    theirs.load_state_dict(ours.state_dict())
    x, y = small_batch()

    def results(model: nn.Module) -> list[Tensor]:
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            outputs = functional_call(model, parameters, (x[None],))
            return F.cross_entropy(outputs, y[None])

        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
        return [
            *per_sample(parameters, x, y).values(),
            torch.func.jvp(model, (x,), (x + 1,))[1],
            torch.func.hessian(lambda x: model(x).exp().sum())(x),
            torch.func.vmap(model)(x),
        ]

    for mine, other in zip(results(ours), results(theirs), strict=True):
        close(mine, other)


def test_function_transforms_do_not_disturb_a_pass() -> None:
    """Say, an exact Hessian for comparison, between backward and backward_hessian."""
    model = small_net()
    x, y = small_batch()
    expected = send_back(model, x, y, treatment="abs").to_dense()
    model.zero_grad()
    outputs = model(x.clone().requires_grad_())
    loss = F.cross_entropy(outputs, y)
    curvature = hbp.batch_summed_hessian(loss, outputs)
    loss.backward()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda p: functional_call(model, p, (x,)).sum())(parameters)
    torch.func.vmap(lambda x: functional_call(model, parameters, (x[None],)))(x)
    close(model.backward_hessian(curvature, True, "abs").to_dense(), expected)


@pytest.mark.filterwarnings("error")
def test_a_functional_call_with_a_computed_weight_warns_of_nothing() -> None:
    """torch warns whoever asks a tensor that is no leaf for its gradient."""
    model = small_net()
    weight = randn(*model[0].weight.shape).requires_grad_()
    inputs, _ = small_batch()
    outputs = functional_call(model, {"0.weight": 2 * weight}, (inputs,))
    outputs.sum().backward()
    assert weight.grad is not None


def test_seeds() -> None:
    import random

    import numpy as np

    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()

    hbp.set_seeds(3)
    first = draw()
    assert draw() != first
    hbp.set_seeds(3)
    assert draw() == first
    hbp.set_seeds(4)
    assert all(a != b for a, b in zip(draw(), first, strict=True))
    hbp.set_seeds()
    default = draw()
    hbp.set_seeds(0)
    assert draw() == default


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: hbp.HBPLinear(4, 3), (4,)), (lambda: hbp.HBPConv2d(1, 2, 2), (1, 3, 3))],
)
def test_means_do_not_read_the_inputs(
    make: Callable[[], hbp.HBPModule], shape: tuple[int, ...]
) -> None:
    """A buffer for the next batch may be filled before the step on this one."""
    layer, x = make().double(), randn(5, *shape)
    z = layer(x)
    z.square().sum().backward()
    layer.backward_hessian(torch.eye(z[0].numel()).double())
    v = randn(layer.weight.numel())
    expected = layer.weight.hessian @ v
    x.zero_()
    close(layer.weight.hessian @ v, expected)
    # The weight of a linear map is not in its own curvature.
    with torch.no_grad():
        layer.weight.zero_()
    close(layer.weight.hessian @ v, expected)
