"""Output Hessians: the generic pass against torch.func, formulas against both."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import close, randn
from torch import Tensor, nn

from hbp import HBPLinear, batch_summed_hessian, output_hessian

# Two orders of summation of at most 50 numbers below 10; 5e-16 was the largest.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def by_definition(loss_func: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """Σ_n of the n-th diagonal block of the full Hessian."""
    count, features = len(outputs), outputs[0].numel()
    full = torch.func.hessian(loss_func)(outputs.detach())
    full = full.reshape(count, features, count, features)
    return sum(full[n, :, n] for n in range(count))


def generic(loss_func: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    outputs = outputs.detach().requires_grad_()
    return batch_summed_hessian(loss_func(outputs), outputs)


def _coupled(z: Tensor) -> Tensor:
    """Mixes the features of a sample, with a different function for each sample."""
    rows = z.flatten(1) if z.dim() > 1 else z[:, None]
    weights = torch.arange(1.0, rows.shape[1] + 1, dtype=z.dtype).sin()
    shift = torch.arange(len(rows), dtype=z.dtype)
    return ((rows @ weights) ** 3 / 7 + (rows.sum(1) + shift).sin()).mean()


LOSSES = {
    "coupled": _coupled,
    "softplus sum": lambda z: F.softplus(z).sum(),
    "huber": lambda z: F.smooth_l1_loss(z, torch.zeros_like(z)),
    "square": lambda z: F.mse_loss(z, torch.ones_like(z)),
    "linear": lambda z: 3 * z.mean(),
    "one entry tensor": lambda z: z.exp().sum().reshape(1, 1),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(4,), (4, 3), (1, 5), (3, 2, 2, 3)])
def test_generic_pass(loss: str, shape: tuple[int, ...]) -> None:
    z = randn(*shape)
    expected = by_definition(lambda z: LOSSES[loss](z).sum(), z)
    found = generic(LOSSES[loss], z)
    close(found, expected, **TIGHT)
    assert not found.requires_grad
    assert found.dtype == z.dtype


def test_generic_pass_of_a_linear_loss_with_parameters() -> None:
    """The gradient has a graph, but not one that leads to the outputs."""
    w = randn(3).requires_grad_()
    z = randn(4, 3).requires_grad_()
    close(batch_summed_hessian((z * w).sum(), z), torch.zeros(3, 3))
    close(batch_summed_hessian((z * w).square().sum(), z), torch.diag(8 * w**2))


def test_generic_pass_leaves_no_trace() -> None:
    """Neither gradients nor the graph change: backward() still works, as before."""
    layer = HBPLinear(4, 3).double()
    x, y = randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    loss = F.cross_entropy(layer(x), y)
    loss.backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    z = layer(x)
    loss = F.cross_entropy(z, y)
    first = batch_summed_hessian(loss, z)
    assert layer.weight.grad is None
    assert torch.equal(batch_summed_hessian(loss, z), first)
    loss.backward()
    assert torch.equal(layer.weight.grad, expected)


def _weights(classes: int) -> Tensor:
    return torch.linspace(0.2, 2, classes, dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["labels", "ignored", "ignored 7", "probability"])
@pytest.mark.parametrize("extra", [(), (2,), (2, 3)])
def test_cross_entropy(
    reduction: str, smoothing: float, weighted: bool, target: str, extra: tuple
) -> None:
    count, classes = 5, 4
    options: dict = {"reduction": reduction, "label_smoothing": smoothing}
    if weighted:
        options["weight"] = _weights(classes)
    z = randn(count, classes, *extra)
    y = torch.randint(classes, (count, *extra))
    if target == "probability":
        y = randn(count, classes, *extra).softmax(1)
    elif target != "labels":
        ignored = 7 if target == "ignored 7" else 1
        options["ignore_index"] = ignored
        y[::2] = ignored
    loss_func = nn.CrossEntropyLoss(**options)
    expected = generic(lambda z: loss_func(z, y), z)
    close(output_hessian(loss_func, z, y), expected, **TIGHT)
    if not extra:
        close(by_definition(lambda z: loss_func(z, y), z), expected, **TIGHT)


def test_cross_entropy_by_hand() -> None:
    """E[diag(p) - ppᵀ] of three samples, written out."""
    z = torch.tensor([[0.0, 1], [2, 0], [0.5, 0.5]], dtype=torch.float64)
    p = 1 / (1 + (z[:, 1] - z[:, 0]).exp())  # Of class 0.
    h = (p * (1 - p)).mean()
    expected = torch.stack([torch.stack([h, -h]), torch.stack([-h, h])])
    y = torch.tensor([0, 1, 1])
    close(output_hessian(nn.CrossEntropyLoss(), z, y), expected, **TIGHT)
    close(generic(lambda z: F.cross_entropy(z, y), z), expected, **TIGHT)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3)])
def test_mean_squared_error(reduction: str, shape: tuple[int, ...]) -> None:
    loss_func, z, y = nn.MSELoss(reduction=reduction), randn(*shape), randn(*shape)
    expected = generic(lambda z: loss_func(z, y), z)
    close(output_hessian(loss_func, z, y), expected, **TIGHT)
    features = z[0].numel()
    scale = 8 if reduction == "sum" else 2 / features
    close(expected, scale * torch.eye(features).double(), **TIGHT)


@pytest.mark.parametrize(("left", "right"), [((4, 1), (4, 3)), ((4, 1), (4,))])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mean_squared_error_of_targets_that_broadcast(
    left: tuple, right: tuple, reduction: str
) -> None:
    """torch warns of it and then counts every pair; so must the formula."""
    loss_func, z, y = nn.MSELoss(reduction=reduction), randn(*left), randn(*right)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = generic(lambda z: loss_func(z, y), z)
        close(output_hessian(loss_func, z, y), expected, **TIGHT)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, (3,), (4, 3), (4, 1), (1,)])
@pytest.mark.parametrize("pos_weight", [None, (3,), (1,)])
@pytest.mark.parametrize("extra", [(), (2,)])
def test_binary_cross_entropy(
    reduction: str, weight: tuple | None, pos_weight: tuple | None, extra: tuple
) -> None:
    shape = (4, *extra, 3)
    # A weight per sample lines up with the front of the extra dimension's shape.
    if weight is not None and len(weight) == 2:
        weight = (4, *extra, weight[1])
    loss_func = nn.BCEWithLogitsLoss(
        weight=weight and torch.rand(weight, dtype=torch.float64),
        pos_weight=pos_weight and 1 + torch.rand(pos_weight, dtype=torch.float64),
        reduction=reduction,
    )
    z, y = randn(*shape), torch.rand(shape, dtype=torch.float64)
    expected = generic(lambda z: loss_func(z, y), z)
    close(output_hessian(loss_func, z, y), expected, **TIGHT)


class _Steeper(nn.CrossEntropyLoss):
    """A subclass that computes something else."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(3 * input, target)


def _by_label(z: Tensor, y: Tensor) -> Tensor:
    return (F.softplus(z) * y[:, None]).sum()


@pytest.mark.parametrize(
    "loss_func",
    [_Steeper(), F.cross_entropy, _by_label, nn.NLLLoss()],
    ids=["subclass", "function", "other", "linear"],
)
def test_any_other_loss_goes_the_generic_way(loss_func: Callable) -> None:
    z, y = randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    expected = by_definition(lambda z: loss_func(z, y), z)
    close(output_hessian(loss_func, z, y), expected, **TIGHT)
    with torch.no_grad():
        close(output_hessian(loss_func, z, y), expected, **TIGHT)


@pytest.mark.parametrize(
    ("loss_func", "targets"),
    [
        (nn.CrossEntropyLoss(), torch.tensor([0, 1])),
        (nn.MSELoss(), torch.ones(2, 3)),
        (nn.BCEWithLogitsLoss(), torch.ones(2, 3)),
    ],
)
def test_formulas_keep_float32_and_the_graph_out(
    loss_func: nn.Module, targets: Tensor
) -> None:
    z = randn(2, 3, dtype=torch.float32).requires_grad_()
    found = output_hessian(loss_func, z, targets)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    expected = generic(lambda z: loss_func(z, targets), z)
    close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("loss_func", "targets"),
    [
        (nn.CrossEntropyLoss(), torch.tensor([0, 5])),
        (nn.CrossEntropyLoss(), torch.tensor([0, 1, 2])),
        (nn.MSELoss(), torch.ones(2, 7)),
        (nn.BCEWithLogitsLoss(), torch.ones(2, 7)),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), torch.ones(2, 1)),
    ],
)
def test_targets_that_the_loss_refuses(loss_func: nn.Module, targets: Tensor) -> None:
    """A formula may not answer where the loss has no value."""
    z = randn(2, 3, dtype=torch.float32)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        loss_func(z, targets)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        output_hessian(loss_func, z, targets)


def test_samples_without_weight_have_no_hessian() -> None:
    """Every label ignored: the mean is 0/0, as is torch's loss."""
    ignore = nn.CrossEntropyLoss(ignore_index=1)
    for find in (output_hessian, lambda f, z, y: generic(partial(f, target=y), z)):
        with pytest.raises(ArithmeticError, match=r"(?i)nan"):
            find(ignore, randn(2, 3), torch.tensor([1, 1]))
