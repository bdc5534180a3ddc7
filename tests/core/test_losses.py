"""Output Hessians: the generic pass against torch.func, formulas against both."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close, randn
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hbp import (
    HBPLinear,
    HBPSigmoid,
    backward,
    batch_summed_hessian,
    output_hessian,
    per_sample_hessian,
    set_dense_limit,
)
from hbp.core import settings
from hbp.testing import check_layer

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


def _softmax_hessians(z: Tensor) -> Tensor:
    """Of a mean cross-entropy: (diag(p) - ppᵀ)/N of each sample."""
    p = z.detach().softmax(1)
    return (p.diag_embed() - p[:, :, None] * p[:, None]) / len(p)


def test_anomaly_detection_changes_nothing() -> None:
    """It reads gradients, and those of a batch of seeds have no numbers to read."""
    z, y = randn(4, 3).requires_grad_(), torch.tensor([0, 2, 1, 1])
    expected = _softmax_hessians(z)
    with torch.autograd.set_detect_anomaly(True):
        loss = F.cross_entropy(z, y)
        close(batch_summed_hessian(loss, z), expected.sum(0))
        close(per_sample_hessian(loss, z), expected)
        found = output_hessian(nn.SmoothL1Loss(reduction="sum"), z, z.detach() + 0.5)
        close(found, 4 * torch.eye(3))
        check_layer(HBPSigmoid(), randn(3, 4))
        assert torch.is_anomaly_enabled()
        assert torch.is_anomaly_check_nan_enabled()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("ignored", [-100, 1])
def test_every_type_of_labels(dtype: torch.dtype, ignored: int) -> None:
    """Those that torch's cross-entropy takes. As an index, uint8 would be a mask."""
    weight = _weights(3)
    z, y = randn(4, 3).requires_grad_(), torch.tensor([0, 2, 1, 1])
    loss_func = nn.CrossEntropyLoss(weight, ignore_index=ignored)
    expected = batch_summed_hessian(loss_func(z, y), z)
    close(output_hessian(loss_func, z, y.to(dtype)), expected)
    close(batch_summed_hessian(loss_func(z, y.to(dtype)), z), expected)


WIDTHS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("of_outputs", WIDTHS)
@pytest.mark.parametrize("of_targets", WIDTHS)
@pytest.mark.parametrize("of_weight", [None, *WIDTHS])
@pytest.mark.parametrize("loss", ["pos_weight", "weight", "squares", "probabilities"])
def test_every_mixture_of_types(
    loss: str,
    of_outputs: torch.dtype,
    of_targets: torch.dtype,
    of_weight: torch.dtype | None,
) -> None:
    """The dtype is that of the outputs, or float32, and so are the digits."""
    weight = None if of_weight is None else torch.tensor([0.5, 1, 2]).to(of_weight)
    z, t = randn(4, 3).to(of_outputs), torch.rand(4, 3).softmax(1).to(of_targets)
    wide, narrow = (
        {
            "pos_weight": lambda w: nn.BCEWithLogitsLoss(pos_weight=w),
            "weight": lambda w: nn.BCEWithLogitsLoss(w),
            "squares": lambda w: nn.MSELoss(),
            "probabilities": lambda w: nn.CrossEntropyLoss(w),
        }[loss],
        torch.promote_types(of_outputs, torch.float32),
    )
    try:
        wide(weight)(z, t)
    except RuntimeError:
        pytest.skip("torch's loss refuses this mixture")
    exact = z.double().requires_grad_()
    value = wide(None if weight is None else weight.double())(exact, t.double())
    found = output_hessian(wide(weight), z, t)
    assert found.dtype == narrow
    close(found.double(), batch_summed_hessian(value, exact), rtol=1e-5, atol=1e-6)


def test_a_loss_of_one_type_takes_half_precision() -> None:
    z = torch.tensor([[0.5, 3.0]], dtype=torch.bfloat16)
    found = output_hessian(nn.HuberLoss(reduction="sum"), z, torch.zeros_like(z))
    close(found, torch.diag(torch.tensor([1.0, 0])))


NOT_TWICE = {
    "multi_margin_loss": lambda z: F.multi_margin_loss(z, torch.tensor([0, 2]), p=2),
    "multilabel_margin_loss": lambda z: F.multilabel_margin_loss(
        z, torch.tensor([[0, -1, 0], [2, 1, -1]])
    ),
    "ctc_loss": lambda z: F.ctc_loss(
        z.log_softmax(1)[:, None],
        torch.tensor([[1]]),
        torch.tensor([2]),
        torch.tensor([1]),
    ),
}


@pytest.mark.parametrize("name", NOT_TWICE)
def test_a_loss_without_second_derivative_is_named(name: str) -> None:
    z = randn(2, 3).requires_grad_()
    for find in (batch_summed_hessian, per_sample_hessian):
        with pytest.raises(RuntimeError, match=rf"differentiate {name} twice.*zeros"):
            find(NOT_TWICE[name](z), z)
    with pytest.raises(RuntimeError, match=rf"differentiate {name} twice"):
        output_hessian(lambda z, _: NOT_TWICE[name](z), z, z)


class _OfTorch(torch.autograd.Function):
    """Σ z², whose derivative is torch's."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.square().sum()

    @staticmethod
    def backward(ctx: Any, sent: Tensor) -> Any:
        (z,) = ctx.saved_tensors
        return 2 * z * sent


class _Once(_OfTorch):
    """Σ z², which says that it can be differentiated once."""

    backward = staticmethod(once_differentiable(_OfTorch.backward))


class _OutsideTorch(_OfTorch):
    """Σ z², whose derivative torch does not see."""

    @staticmethod
    def backward(ctx: Any, sent: Tensor) -> Any:
        return torch.from_numpy(2 * ctx.saved_tensors[0].detach().numpy())


@pytest.mark.parametrize("function", [_Once, _OutsideTorch])
@pytest.mark.parametrize(
    "hessian_of",
    [
        lambda loss, z: batch_summed_hessian(loss(z), z),
        lambda loss, z: per_sample_hessian(loss(z), z),
        lambda loss, z: output_hessian(lambda z, _: loss(z), z, z),
        lambda loss, z: backward(HBPLinear(3, 2), z, loss(z)),
    ],
)
def test_a_loss_that_can_be_differentiated_once_is_refused(
    function: type[_OfTorch], hessian_of: Callable[[Any, Tensor], Any]
) -> None:
    """Its Hessian would be 0, in silence."""
    z = randn(4, 2).requires_grad_()
    with pytest.raises(RuntimeError, match=r"differentiated only once.*of your own"):
        hessian_of(function.apply, z)


def test_a_part_of_the_loss_that_can_be_differentiated_once_is_noticed() -> None:
    z = randn(4, 2).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated only once"):
        batch_summed_hessian(_Once.apply(z) + z.pow(4).sum(), z)


@pytest.mark.parametrize("loss", [_OfTorch.apply, lambda z: 3 * z.sum()])
def test_functions_of_torch_and_linear_losses_are_taken(
    loss: Callable[[Tensor], Tensor],
) -> None:
    z = randn(4, 2)
    expected = 8 * torch.eye(2) if loss == _OfTorch.apply else torch.zeros(2, 2)
    assert torch.equal(generic(loss, z), expected.to(z))


@pytest.mark.parametrize("anomaly", [False, True])
@pytest.mark.parametrize("extra", [(), (2,)])
def test_rows_in_chunks_are_the_rows(
    monkeypatch: pytest.MonkeyPatch, anomaly: bool, extra: tuple[int, ...]
) -> None:
    """7 rows of 4 samples, two at a time."""
    z = randn(4, 7, *extra).requires_grad_()
    whole = [f(_coupled(z), z) for f in (batch_summed_hessian, per_sample_hessian)]
    monkeypatch.setattr(settings, "ENTRIES_AT_ONCE", 2 * 8 * z.numel())
    with torch.autograd.set_detect_anomaly(anomaly):
        close(batch_summed_hessian(_coupled(z), z), whole[0])
        close(per_sample_hessian(_coupled(z), z), whole[1])
        close(whole[1].sum(0), whole[0])
    assert settings.rows_at_once(8 * z.numel()) == 2


def test_output_hessians_ask_the_limit_first() -> None:
    """[50, 50] in float32 is 10,000 bytes, [2, 50, 50] twice that."""
    z, y = torch.randn(2, 50, requires_grad=True), torch.tensor([1, 2])
    summed = {
        "generic": lambda: batch_summed_hessian(F.cross_entropy(z, y), z),
        "formula": lambda: output_hessian(nn.CrossEntropyLoss(), z, y),
        "no formula": lambda: output_hessian(nn.SmoothL1Loss(), z, z.detach()),
    }
    each = {"each": lambda: per_sample_hessian(F.cross_entropy(z, y), z)}
    for limit, forms in [(9_999, summed), (19_999, each)]:
        before = set_dense_limit(limit)
        try:
            for form in forms.values():
                with pytest.raises(MemoryError, match=r"50, 50\].*set_dense_limit"):
                    form()
            set_dense_limit(limit + 1)
            for form in forms.values():
                form()
        finally:
            set_dense_limit(before)
    # Of 21,504 outputs, none is formed.
    with pytest.raises(MemoryError, match=r"\[21504, 21504\].*1\.7 GiB"):
        output_hessian(
            nn.CrossEntropyLoss(),
            torch.zeros(2, 21, 32, 32),
            torch.zeros(2, 32, 32, dtype=torch.long),
        )


def _formula(loss: Tensor, outputs: Tensor) -> Tensor:
    return output_hessian(nn.CrossEntropyLoss(), outputs, torch.arange(len(outputs)))


@pytest.mark.parametrize("treatment", ["none", "ggn", "abs"])
@pytest.mark.parametrize(
    "hessian_of", [batch_summed_hessian, per_sample_hessian, _formula]
)
@pytest.mark.parametrize(
    ("factor", "loss_scale", "fits"),
    [
        (1.0, 1.0, True),
        (2.0**16, 2.0**16, True),
        (7.0, 1.0, False),
        (-1.0, 1.0, False),
        (1.0, 2.0, False),
    ],
)
def test_a_gradient_of_another_multiple_of_the_loss_is_refused(
    treatment: str,
    hessian_of: Callable[[Tensor, Tensor], Tensor],
    factor: float,
    loss_scale: float,
    fits: bool,
) -> None:
    layer = HBPLinear(3, 4)
    outputs = layer(randn(4, 3).float())
    loss = F.cross_entropy(outputs, torch.arange(4))
    hessian = hessian_of(loss, outputs)
    (factor * loss).backward()
    send = partial(
        layer.backward_hessian,
        hessian,
        modify_2nd_order_terms=treatment,
        loss_scale=loss_scale,
    )
    if fits:
        send()
        assert layer.weight.hessian is not None
    else:
        with pytest.raises(ValueError, match=rf"sent {factor:.3g} times the gradient"):
            send()
        assert layer.weight.hessian is None


@pytest.mark.parametrize(
    "scaled", [lambda H: 7 * H, lambda H: H.mul_(7)], ids=["new", "in place"]
)
def test_a_hessian_that_was_scaled_as_the_loss_is_taken(
    scaled: Callable[[Tensor], Tensor],
) -> None:
    layer = HBPLinear(3, 4)
    outputs = layer(randn(4, 3).float())
    loss = F.cross_entropy(outputs, torch.arange(4))
    hessian = scaled(batch_summed_hessian(loss, outputs))
    (7 * loss).backward()
    layer.backward_hessian(hessian)
    assert layer.bias.hessian is not None


def test_a_gradient_of_another_loss_is_nobodys_multiple() -> None:
    # An average of two losses, of which only one bends, and a penalty.
    layer = HBPLinear(3, 4)
    outputs = layer(randn(4, 3).float())
    loss = F.cross_entropy(outputs, torch.arange(4))
    hessian = batch_summed_hessian(loss, outputs)
    (loss + outputs[:, 0].sum() + layer.weight.square().sum()).backward()
    layer.backward_hessian(hessian)
    assert layer.bias.hessian is not None


def test_outputs_that_are_leaves_keep_no_hook() -> None:
    outputs = randn(4, 3).requires_grad_()
    for _ in range(3):
        batch_summed_hessian(outputs.exp().sum(), outputs)
    assert not outputs._backward_hooks


def _net() -> HBPLinear:
    return HBPLinear(4, 3)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_backward_pass_within_autocast_is_measured_with_all_digits(
    half: torch.dtype,
) -> None:
    for factor, fits in [(2.0**16, True), (2.0**16 * 7, False)]:
        model = _net()
        with torch.autocast("cpu", half):
            outputs = model(torch.randn(8, 4))
            loss = F.cross_entropy(outputs, torch.arange(8) % 3) * 0.01
            hessian = batch_summed_hessian(loss, outputs)
            (loss * factor).backward()
        send = partial(model.backward_hessian, hessian, loss_scale=2.0**16)
        if fits:
            send()
        else:
            with pytest.raises(ValueError, match="times the gradient"):
                send()


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15])
def test_a_multiple_is_noticed_whatever_the_size_of_the_loss(size: float) -> None:
    model = _net()
    outputs = model(torch.randn(8, 4))
    loss = F.cross_entropy(outputs, torch.arange(8) % 3) * size
    hessian = batch_summed_hessian(loss, outputs)
    (7 * loss).backward()
    with pytest.raises(ValueError, match="sent 7 times the gradient"):
        model.backward_hessian(hessian)


def test_one_number_is_parallel_to_every_other() -> None:
    model = HBPLinear(4, 1)
    outputs = model(torch.randn(1, 4))
    loss = (outputs - 1).square().mean()
    hessian = batch_summed_hessian(loss, outputs)
    (loss + outputs.abs().mean()).backward()  # a term without curvature
    model.backward_hessian(hessian)
    assert model.bias.hessian is not None


def test_a_matrix_without_a_version_is_taken() -> None:
    model = _net()
    F.mse_loss(model(torch.randn(8, 4)), torch.zeros(8, 3)).backward()
    with torch.inference_mode():
        hessian = 2 / 3 * torch.eye(3)
    model.backward_hessian(hessian, modify_2nd_order_terms="ggn")
    assert model.bias.hessian is not None


def test_a_loss_without_formula_is_watched_too() -> None:
    model, targets = _net(), torch.arange(8) % 3
    outputs = model(torch.randn(8, 4))
    hessian = output_hessian(F.cross_entropy, outputs, targets)
    (7 * F.cross_entropy(outputs, targets)).backward()
    with pytest.raises(ValueError, match="sent 7 times the gradient"):
        model.backward_hessian(hessian)
