"""Exact products: other judges than ``test_layers``, random networks, rough handling.

``exact`` sends curvature back sample by sample; the judges are products of automatic
differentiation on the same graph, BackPACK, and a recursion with dense Jacobians.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SCHEMES, TREATMENTS, close, randn, spd
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils._python_dispatch import TorchDispatchMode

import hbp
from hbp import reference
from hbp.core import operators
from hbp.operators import SymmetricOperator

Loss = Callable[[Tensor, Tensor], Tensor]

CROSS_ENTROPY = nn.CrossEntropyLoss()

# Measured relative to the largest entry: 9e-15 over 400 random networks, 1.2e-15
# against BackPACK, 6e-16 against the recursion.
PRODUCTS = 1e-12


def near(actual: Tensor, expected: Tensor, tolerance: float = PRODUCTS) -> float:
    """Assert that the two agree relative to the largest entry; how far they differ."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape
    scale = max(float(expected.abs().max()), 1e-3)
    error = float((actual - expected).abs().max()) / scale
    assert error <= tolerance, error
    return error


def forward(
    model: nn.Module, inputs: Tensor, labels: Tensor, loss_func: Loss = CROSS_ENTROPY
) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and backward pass: outputs, loss and its Hessians, [N, C, C]."""
    model.zero_grad()
    # Requiring the input's gradient gives δ to layers in front of the first weight.
    outputs = model(inputs.detach().requires_grad_())
    loss = loss_func(outputs, labels)
    hessians = hbp.per_sample_hessian(loss, outputs)
    loss.backward(retain_graph=True)
    return outputs, loss, hessians


def send_back(
    model: hbp.HBPModule,
    inputs: Tensor,
    treatment: str | None = None,
    exactly: bool = True,
    labels: Tensor | None = None,
) -> SymmetricOperator:
    """A whole pass for the cross-entropy; H_x."""
    if labels is None:
        labels = torch.arange(len(inputs)) % 3
    _, _, hessians = forward(model, inputs, labels)
    H = hessians if exactly else hessians.sum(0)
    found = model.backward_hessian(H, True, treatment)
    assert found is not None
    return found


# Judges: products by automatic differentiation, on the graph of the same pass.


def hessian_product(loss: Tensor, p: Tensor, v: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, p, create_graph=True)
    if not gradient.requires_grad:
        return torch.zeros_like(v)
    (product,) = torch.autograd.grad(
        gradient, p, v.reshape(p.shape), retain_graph=True, allow_unused=True
    )
    return torch.zeros_like(v) if product is None else product.flatten()


def ggn_product(outputs: Tensor, hessians: Tensor, p: Tensor, v: Tensor) -> Tensor:
    dual = torch.zeros_like(outputs).requires_grad_()
    (gradient,) = torch.autograd.grad(outputs, p, dual, create_graph=True)
    (Jv,) = torch.autograd.grad(gradient, dual, v.reshape(p.shape))
    HJv = (hessians @ Jv.flatten(1).unsqueeze(2)).reshape(outputs.shape)
    (product,) = torch.autograd.grad(outputs, p, HJv, retain_graph=True)
    return product.flatten()


def squared(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss that is no square of the outputs, summed over samples."""
    return (outputs.sin() - labels.unsqueeze(1)).square().sum()


ACTIVATIONS: list[Callable[..., hbp.HBPModule]] = [
    hbp.HBPSigmoid,
    hbp.HBPTanh,
    hbp.HBPReLU,
    hbp.HBPSoftplus,
    hbp.HBPGELU,
    lambda: hbp.HBPReLU(inplace=True),
    lambda: hbp.HBPSiLU(inplace=True),
    lambda: hbp.HBPELU(inplace=True),
]


def batch_norm(channels: int) -> hbp.HBPBatchNorm2d:
    """In eval mode, with statistics and parameters of no special value."""
    layer = hbp.HBPBatchNorm2d(channels)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return layer.eval()


@st.composite
def layers(
    draw: st.DrawFn, shape: tuple[int, int, int], count: int, depth: int
) -> tuple[list[hbp.HBPModule], tuple[int, int, int]]:
    """Layers for images of ``shape``, in random order, and what comes out."""
    steps: list[hbp.HBPModule] = []
    kinds = ["conv", "act", "norm", "max", "avg", "drop", "transposed"]
    for _ in range(draw(st.integers(1, count))):
        channels, height, width = shape
        kind = draw(st.sampled_from(kinds + ["residual"] * (depth > 0)))
        if kind == "conv":
            groups = draw(st.sampled_from([1, channels]))
            new = hbp.HBPConv2d(
                channels,
                groups * draw(st.integers(1, 2 if groups > 1 else 3)),
                (draw(st.integers(1, min(3, height))), draw(st.integers(1, 2))),
                stride=draw(st.integers(1, 2)),
                padding=(draw(st.integers(0, 1)), draw(st.integers(1, 2))),
                groups=groups,
                bias=draw(st.booleans()),
            )
        elif kind == "transposed":
            new = hbp.HBPConvTranspose2d(channels, 2, 2, stride=draw(st.integers(1, 2)))
        elif kind == "act":
            # As in torch, only where the layer above has no use for its output.
            free = bool(steps) and isinstance(
                steps[-1], hbp.HBPConv2d | hbp.HBPConvTranspose2d | hbp.HBPBatchNorm2d
            )
            new = draw(st.sampled_from(ACTIVATIONS[: None if free else 5]))()
        elif kind == "norm":
            new = batch_norm(channels)
        elif kind in ("max", "avg") and min(height, width) >= 2:
            pool = hbp.HBPMaxPool2d if kind == "max" else hbp.HBPAvgPool2d
            new = pool(
                2, stride=draw(st.integers(1, 2)), padding=draw(st.integers(0, 1))
            )
        elif kind == "drop":
            new = hbp.HBPDropout(0.3)
        elif kind == "residual":
            inner, reached = draw(layers(shape, 2, depth - 1))
            back = hbp.HBPSequential(
                *inner,
                hbp.HBPFlatten(),
                hbp.HBPLinear(torch.Size(reached).numel(), torch.Size(shape).numel()),
                hbp.HBPUnflatten(1, shape),
            )
            past = hbp.HBPConv2d(channels, channels, 1) if draw(st.booleans()) else None
            new = hbp.HBPResidual(back, past)
        else:
            continue
        with torch.no_grad():
            z = new.double()(torch.zeros(1, *shape, dtype=torch.float64))
        if z.numel() > 160:
            continue
        steps.append(new)
        shape = (z.shape[1], z.shape[2], z.shape[3])
    return steps or [hbp.HBPTanh()], shape


@st.composite
def networks(draw: st.DrawFn) -> tuple[hbp.HBPSequential, Tensor]:
    torch.manual_seed(draw(st.integers(0, 1000)))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(3, 5), st.integers(3, 5)))
    first, reached = draw(layers(shape, 5, 1))
    # A second convolution and a nonlinear layer make most networks worth the while.
    model = hbp.HBPSequential(
        hbp.HBPConv2d(shape[0], shape[0], 1),
        hbp.HBPSequential(*first),
        hbp.HBPSigmoid(),
        hbp.HBPFlatten(),
        hbp.HBPLinear(torch.Size(reached).numel(), 3),
    )
    return model.double(), randn(draw(st.integers(1, 4)), *shape)


@given(networks(), st.sampled_from([CROSS_ENTROPY, squared]))
def test_random_networks_against_autograd(
    network: tuple[hbp.HBPSequential, Tensor], loss_func: Loss
) -> None:
    model, inputs = network
    labels = torch.arange(len(inputs)) % 3
    outputs, loss, hessians = forward(model, inputs, labels, loss_func)
    vectors = [randn(p.numel(), 2) for p in model.parameters()]
    products = []
    # Both before the judge, whose passes would count as further gradients.
    for treatment in (None, "zero"):
        model.backward_hessian(hessians, modify_2nd_order_terms=treatment)
        blocks = [p.hessian for p in model.parameters()]
        products.append([H @ v for H, v in zip(blocks, vectors, strict=True)])
    for p, columns, of_hessian, of_ggn in zip(
        model.parameters(), vectors, *products, strict=True
    ):
        expected = [hessian_product(loss, p, v) for v in columns.T]
        near(of_hessian, torch.stack(expected, dim=1))
        expected = [ggn_product(outputs, hessians, p, v) for v in columns.T]
        near(of_ggn, torch.stack(expected, dim=1))


# BackPACK, which knows convolutions but neither residuals nor our per-sample PCHs.

PAIRS: list[tuple[Callable[[], hbp.HBPModule], Callable[[], nn.Module]]] = [
    (lambda: hbp.HBPConv2d(2, 4, 3, padding=1), lambda: nn.Conv2d(2, 4, 3, padding=1)),
    (hbp.HBPSigmoid, nn.Sigmoid),
    (lambda: hbp.HBPMaxPool2d(2), lambda: nn.MaxPool2d(2)),
    (
        lambda: hbp.HBPConv2d(4, 4, (2, 1), stride=(1, 2), groups=2),
        lambda: nn.Conv2d(4, 4, (2, 1), stride=(1, 2), groups=2),
    ),
    (hbp.HBPTanh, nn.Tanh),
    (hbp.HBPFlatten, nn.Flatten),
    (lambda: hbp.HBPLinear(8, 5), lambda: nn.Linear(8, 5)),
    (hbp.HBPReLU, nn.ReLU),
    (lambda: hbp.HBPLinear(5, 3, bias=False), lambda: nn.Linear(5, 3, bias=False)),
]


@pytest.mark.parametrize(("name", "treatment"), [("GGNMP", "zero"), ("HMP", None)])
def test_backpack(name: str, treatment: str | None) -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    model = hbp.HBPSequential(*(ours() for ours, _ in PAIRS)).double()
    plain = nn.Sequential(*(theirs() for _, theirs in PAIRS)).double()
    plain.load_state_dict(model.state_dict())
    inputs, labels = randn(5, 2, 6, 4), torch.arange(5) % 3
    send_back(model, inputs, treatment, labels=labels)
    loss = backpack.extend(nn.CrossEntropyLoss())(
        backpack.extend(plain)(inputs), labels
    )
    with backpack.backpack(getattr(extensions, name)()):
        loss.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        vectors = randn(p.numel(), 3)
        product = getattr(q, name.lower())(vectors.T.reshape(3, *q.shape))
        near(p.hessian @ vectors, product.detach().reshape(3, -1).T)


# The two PCHs from their definition, sample by sample.


def modified(matrix: Tensor, treatment: str) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    values = values.abs() if treatment == "abs" else values.clamp(min=0)
    return vectors @ torch.diag(values) @ vectors.T


def shapes_of(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The module on one flattened sample of the shape of ``x``."""
    return lambda flat: module(flat.reshape(1, *x.shape)).flatten()


def recursion(
    module: hbp.HBPModule,
    x: Tensor,
    delta: Tensor,
    H: Tensor,
    treatment: str,
    blocks: dict[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """H_x, J and δ w.r.t. the input of one sample; adds to the parameters' blocks."""
    if isinstance(module, hbp.HBPSequential):
        values = [x]
        for child in module:
            values.append(child(values[-1][None])[0].detach())
        J = torch.eye(len(delta), dtype=x.dtype)
        for child, at in zip(list(module)[::-1], values[-2::-1], strict=True):
            assert isinstance(child, hbp.HBPModule)
            H, J_child, delta = recursion(child, at, delta, H, treatment, blocks)
            J = J @ J_child
        return H, J, delta
    if isinstance(module, hbp.HBPResidual):
        assert not len(module.shortcut)  # The identity.
        recursion(module.branch, x, delta, H, treatment, blocks)
        none: dict[Tensor, Tensor] = {}
        R, J, _ = recursion(module.branch, x, delta, 0 * H, treatment, none)
        J = J + torch.eye(x.numel(), dtype=x.dtype)
        return J.T @ H @ J + R, J, J.T @ delta
    function = shapes_of(module, x)
    for name, p in module.named_parameters():

        def varied(value: Tensor, name: str = name) -> Tensor:
            return functional_call(module, {name: value}, (x[None],)).flatten()

        J = jacrev(varied)(p.detach()).reshape(len(delta), -1)
        blocks[p] = blocks.get(p, 0) + J.T @ H @ J
    J = jacrev(function)(x.flatten())
    R = jacrev(jacrev(lambda flat: function(flat) @ delta))(x.flatten())
    return J.T @ H @ J + modified(R, treatment), J, J.T @ delta


def residual_net() -> hbp.HBPSequential:
    """Nonlinear branches, one inside another's, convolutional and dense."""
    inner = hbp.HBPResidual(
        hbp.HBPSequential(hbp.HBPConv2d(2, 2, 3, padding=1), hbp.HBPSigmoid())
    )
    block = hbp.HBPResidual(
        hbp.HBPSequential(
            hbp.HBPTanh(), hbp.HBPConv2d(2, 2, 1, bias=False), hbp.HBPSiLU(), inner
        )
    )
    dense = hbp.HBPSequential(hbp.HBPLinear(8, 8), hbp.HBPSigmoid())
    return hbp.HBPSequential(
        hbp.HBPConv2d(1, 2, 2),
        hbp.HBPTanh(),
        block,
        hbp.HBPFlatten(),
        hbp.HBPResidual(dense),
        hbp.HBPLinear(8, 3),
    ).double()


@pytest.mark.parametrize("treatment", ["abs", "clip"])
def test_positive_curvature_with_nonlinear_branches(treatment: str) -> None:
    model = residual_net()
    inputs, labels = 2 * randn(3, 1, 3, 3), torch.tensor([0, 1, 2])
    outputs, loss, hessians = forward(model, inputs, labels)
    model.backward_hessian(hessians, modify_2nd_order_terms=treatment)
    (deltas,) = torch.autograd.grad(loss, outputs)
    found = [p.hessian for p in model.parameters()]
    blocks: dict[Tensor, Tensor] = {}
    for x, delta, H in zip(inputs, deltas, hessians, strict=True):
        recursion(model, x, delta, H, treatment, blocks)
    # None of the two is the Hessian, nor the GGN.
    for p, operator in zip(model.parameters(), found, strict=True):
        near(operator @ torch.eye(p.numel(), dtype=p.dtype), blocks[p])
    judge = reference.exact_blocks(model, CROSS_ENTROPY, inputs, labels, treatment)
    for name, p in model.named_parameters():
        near(judge.parameters[name], blocks[p])


@pytest.mark.parametrize("treatment", TREATMENTS[1:])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_averages_with_nonlinear_branches(
    scheme: tuple[bool, bool], treatment: str
) -> None:
    model = residual_net()
    model.set_hbp_approximation(*scheme)
    inputs, labels = 2 * randn(3, 1, 3, 3), torch.tensor([0, 1, 2])
    H = send_back(model, inputs, treatment, exactly=False, labels=labels)
    judge = reference.batch_blocks(
        model, CROSS_ENTROPY, inputs, labels, treatment, *scheme
    )
    close(H.to_dense(), judge.input)
    for name, p in model.named_parameters():
        close(p.hessian.to_dense(), judge.parameters[name])


# The optimizer, which knows nothing of exact operators.


def conv_net(**options: Any) -> hbp.HBPSequential:
    """A convolution, a residual block, pooling, two linear layers."""
    return hbp.HBPSequential(
        hbp.HBPConv2d(2, 3, 3, padding=1, **options),
        hbp.HBPTanh(),
        hbp.HBPResidual(
            hbp.HBPSequential(hbp.HBPConv2d(3, 3, 3, padding=1), hbp.HBPSigmoid())
        ),
        hbp.HBPMaxPool2d(2),
        hbp.HBPFlatten(),
        hbp.HBPLinear(12, 6),
        hbp.HBPSoftplus(),
        hbp.HBPLinear(6, 3),
    ).double()


IMAGES = (4, 2, 4, 5)


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("treatment", ["zero", "abs"])
def test_newton_steps(solver: Any, treatment: str) -> None:
    model = conv_net()
    send_back(model, randn(*IMAGES), treatment)
    alpha, lr = 0.1, 0.7
    expected = []
    for p in model.parameters():
        damped = (1 - alpha) * p.hessian.to_dense()
        damped = damped + alpha * torch.eye(p.numel(), dtype=p.dtype)
        step = torch.linalg.solve(damped, p.grad.flatten()).reshape(p.shape)
        expected.append(p.detach() - lr * step)
    optimizer = hbp.CGNewton(
        model.parameters(), lr, alpha, cg_atol=0, cg_tol=1e-13, solver=solver
    )
    optimizer.step()
    # Measured: 1.3e-13 by CG, 1.1e-16 directly.
    for p, value in zip(model.parameters(), expected, strict=True):
        close(p, value, rtol=1e-11, atol=1e-12)


def test_two_runs_are_bitwise_equal() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(3)
        model = conv_net()
        model.insert(1, hbp.HBPDropout())
        optimizer = hbp.CGNewton(model.parameters(), 0.5, 0.1)
        for _ in range(3):
            send_back(model, randn(*IMAGES), "abs")
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for left, right in zip(run(), run(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("treatment", ["none", "zero", "abs", "clip"])
def test_single_precision(exactly: bool, treatment: str) -> None:
    """Measured over ten seeds, relative to the largest entry: at most 1.2e-6."""
    model = conv_net()
    inputs = randn(*IMAGES)
    send_back(model, inputs, treatment, exactly)
    single = copy.deepcopy(model).float()
    send_back(single, inputs.float(), treatment, exactly)
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        assert q.hessian.dtype == torch.float32
        near(q.hessian.to_dense().double(), p.hessian.to_dense(), 5e-6)


# Rough handling.


def judged(model: hbp.HBPModule, inputs: Tensor, treatment: str | None = None) -> None:
    """Exact products of the model against automatic differentiation."""
    labels = torch.arange(len(inputs)) % 3
    _, loss, hessians = forward(model, inputs, labels)
    model.backward_hessian(hessians, modify_2nd_order_terms=treatment)
    for p in model.parameters():
        if p.requires_grad:
            v = randn(p.numel())
            near(p.hessian @ v, hessian_product(loss, p, v))
        else:
            assert p.hessian is None


DROPOUTS = [
    (hbp.HBPDropout, nn.Dropout, (3, 5)),
    (hbp.HBPDropout, nn.Dropout, (2, 3, 4, 5)),
    (hbp.HBPDropout1d, nn.Dropout1d, (3, 4, 5)),
    (hbp.HBPDropout2d, nn.Dropout2d, (2, 3, 4, 5)),
    (hbp.HBPDropout3d, nn.Dropout3d, (2, 3, 2, 2, 2)),
]


@pytest.mark.parametrize(("ours", "theirs", "shape"), DROPOUTS)
@pytest.mark.parametrize("options", [{}, {"p": 0.0}, {"p": 1.0}, {"inplace": True}])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dropout_draws_as_torch_does(
    ours: Any,
    theirs: Any,
    shape: tuple[int, ...],
    options: dict[str, Any],
    channels_last: bool,
) -> None:
    x = randn(*shape)
    if channels_last:  # The order in which entries are drawn may depend on strides.
        x = x.movedim(-1, 1).contiguous().movedim(1, -1)
    results = []
    for kind in (ours, theirs):
        torch.manual_seed(1)
        results.append((kind(**options)(x.clone()), torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_in_training() -> None:
    model = conv_net()
    model.insert(2, hbp.HBPDropout2d(0.4))
    model.insert(8, hbp.HBPDropout(0.4, inplace=True))
    judged(model, randn(*IMAGES))


INPLACE: list[Callable[..., hbp.HBPModule]] = [
    hbp.HBPReLU,
    hbp.HBPLeakyReLU,
    hbp.HBPELU,
    hbp.HBPSELU,
    hbp.HBPCELU,
    hbp.HBPSiLU,
    hbp.HBPMish,
    hbp.HBPHardtanh,
    hbp.HBPReLU6,
    hbp.HBPHardswish,
    hbp.HBPDropout,
]


@pytest.mark.parametrize("kind", INPLACE)
@pytest.mark.parametrize("treatment", [None, "abs"])
def test_in_place_activations(
    kind: Callable[..., hbp.HBPModule], treatment: str | None
) -> None:
    """After a convolution, a normalisation, in branches and after a sum."""

    def model(inplace: bool) -> hbp.HBPSequential:
        torch.manual_seed(0)
        branch = hbp.HBPSequential(
            hbp.HBPConv2d(2, 2, 3, padding=1), kind(inplace=inplace), batch_norm(2)
        )
        return hbp.HBPSequential(
            hbp.HBPConv2d(1, 2, 2),
            kind(inplace=inplace),
            hbp.HBPResidual(branch),
            kind(inplace=inplace),
            hbp.HBPFlatten(),
            hbp.HBPLinear(12, 4),
            kind(inplace=inplace),
            hbp.HBPLinear(4, 3),
        ).double()

    inputs = randn(3, 1, 3, 4)
    results = []
    for inplace in (True, False):
        net = model(inplace)
        torch.manual_seed(1)
        H = send_back(net, inputs, treatment)
        results.append([H, *(p.hessian for p in net.parameters())])
    for left, right in zip(*results, strict=True):
        close(left.to_dense(), right.to_dense())
    if treatment is None:
        judged(model(True), inputs)


def test_a_shortcut_that_overwrites_what_the_branch_returned() -> None:
    """z = 2 relu(x), whereas the rule would say x + relu(x)."""
    block = hbp.HBPResidual(hbp.HBPFlatten(), hbp.HBPReLU(inplace=True))
    with pytest.raises(RuntimeError, match="shortcut of this HBPResidual changes"):
        block(randn(3, 4))


def test_an_empty_sequential_in_front_of_a_branch() -> None:
    def path() -> hbp.HBPSequential:
        return hbp.HBPSequential(
            hbp.HBPSequential(), hbp.HBPLinear(4, 4), hbp.HBPSequential()
        )

    for shortcut in (None, path()):
        model = hbp.HBPSequential(
            hbp.HBPLinear(4, 4),
            hbp.HBPTanh(),
            hbp.HBPResidual(path(), shortcut),
            hbp.HBPLinear(4, 3),
        ).double()
        judged(model, randn(3, 4))


@pytest.mark.parametrize("frozen", range(8))
def test_frozen_parameters(frozen: int) -> None:
    model = conv_net(bias=False)
    parameters = list(model.parameters())
    for p in parameters[: frozen + 1][::-2]:
        p.requires_grad_(False)
    if any(p.requires_grad for p in parameters):
        judged(model, randn(*IMAGES))


def test_strange_strides() -> None:
    model = conv_net()
    inputs = randn(*IMAGES)
    send_back(model, inputs)
    expected = [p.hessian.to_dense() for p in model.parameters()]
    wide = randn(4, 2, 8, 10)
    wide[:, :, ::2, ::2] = inputs
    last = inputs.to(memory_format=torch.channels_last)
    turned = inputs.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for strange in (wide[:, :, ::2, ::2], last, turned):
        assert not strange.is_contiguous()
        for memory_format in (torch.contiguous_format, torch.channels_last):
            model.to(memory_format=memory_format)
            send_back(model, strange)
            for p, block in zip(model.parameters(), expected, strict=True):
                close(p.hessian.to_dense(), block)


@pytest.mark.parametrize("exactly", [True, False])
def test_one_sample(exactly: bool) -> None:
    """Of one sample the average is exact."""
    model = conv_net()
    inputs = randn(1, *IMAGES[1:])
    send_back(model, inputs, "abs", exactly)
    judge = reference.exact_blocks(
        model, CROSS_ENTROPY, inputs, torch.zeros(1, dtype=torch.long), "abs"
    )
    for name, p in model.named_parameters():
        close(p.hessian.to_dense(), judge.parameters[name])


def test_an_empty_batch() -> None:
    model = conv_net()
    outputs = model(randn(0, *IMAGES[1:]))
    loss = outputs.square().sum()
    with pytest.raises(ValueError, match="at least one sample"):
        hbp.per_sample_hessian(loss, outputs)
    outputs.sum().backward()
    with pytest.raises(ValueError, match="is empty"):
        model.backward_hessian(outputs.new_zeros(0, 3, 3))
    with pytest.raises(ValueError, match=r"batch .* is empty"):
        model.backward_hessian(torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("exactly", [True, False])
def test_values_that_are_not_finite(value: float, exactly: bool) -> None:
    """Even if outputs and loss hide them, nothing is left on the parameters."""
    model = hbp.HBPSequential(
        hbp.HBPConv2d(1, 2, 2), hbp.HBPTanh(), hbp.HBPFlatten(), hbp.HBPLinear(8, 3)
    ).double()
    send_back(model, randn(3, 1, 3, 3), None, exactly)
    before = [p.hessian for p in model.parameters()]
    inputs = randn(3, 1, 3, 3)
    inputs[1, 0, 2, 2] = value
    for p in model.parameters():
        p.grad = None
    outputs = model(inputs)
    outputs[0].sum().backward()
    H = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ArithmeticError, match="contains NaN or infinity"):
        model.backward_hessian(H.expand(3, 3, 3) if exactly else H)
    after = [p.hessian for p in model.parameters()]
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("layer", [hbp.HBPConv2d(3, 3, 1), hbp.HBPMaxPool2d(2, 1)])
def test_images_without_a_batch_dimension(layer: hbp.HBPModule) -> None:
    model = hbp.HBPSequential(layer, hbp.HBPFlatten())
    outputs = model(torch.randn(3, 2, 2, requires_grad=True))
    outputs.sum().backward()
    for H in (torch.eye(outputs.shape[1]), torch.eye(outputs.shape[1]).repeat(3, 1, 1)):
        with pytest.raises(ValueError, match="batch dimension"):
            model.backward_hessian(H, compute_input_hessian=True)


@pytest.mark.parametrize("exactly", [True, False])
def test_batch_norm_in_training_mode(exactly: bool) -> None:
    model = conv_net().train()
    model.insert(1, hbp.HBPBatchNorm2d(3).double())
    with pytest.raises(ValueError, match=r"Call eval\(\)") as refused:
        send_back(model, randn(*IMAGES), None, exactly)
    assert refused.value.__notes__ == ["It is layer '1' of the model."]
    assert all(p.hessian is None for p in model.parameters())


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))]
)
def test_copies(exactly: bool, duplicate: Callable[[Any], Any]) -> None:
    model = conv_net()
    model.insert(1, hbp.HBPAvgPool2d(1))
    model.insert(2, batch_norm(3).double())
    model.insert(9, hbp.HBPLayerNorm(6).double())
    send_back(model, randn(*IMAGES), "clip", exactly)
    for p in model.parameters():
        twin = duplicate(p.hessian)
        v = randn(p.numel())
        expected = p.hessian @ v
        assert torch.equal(twin @ v, expected)
        with torch.no_grad():  # The copy owns what it reads.
            saved = [q.clone() for q in model.parameters()]
            for q in model.parameters():
                q.add_(1)
        assert torch.equal(twin @ v, expected)
        send_back(model, randn(*IMAGES), "clip", exactly)
        with torch.no_grad():
            for q, value in zip(model.parameters(), saved, strict=True):
                q.copy_(value)
        send_back(model, randn(*IMAGES), "clip", exactly)


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("formed", [True, False])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_stale_weights(kind: str, formed: bool, exactly: bool) -> None:
    """A weight above has changed: no product mixes two points of parameter space."""
    above = 2 if kind == "conv" else 5
    model = conv_net()
    send_back(model, randn(*IMAGES), None, exactly)
    below = model[0].weight.hessian, model[0].bias.hessian
    if formed:
        for operator in below:
            operator @ randn(operator.shape[0])
    weight = model[5].weight if above == 5 else model[2].branch[0].weight
    with torch.no_grad():
        weight.mul_(1)
    for operator in below:
        with pytest.raises(RuntimeError, match="has changed since"):
            operator @ randn(operator.shape[0])


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_stale_inputs(kind: str) -> None:
    """Exact curvature reads the batch; averaged curvature keeps its mean."""
    images = kind == "conv"
    first = hbp.HBPConv2d(1, 1, 1) if images else hbp.HBPLinear(5, 4)
    model = hbp.HBPSequential(first, hbp.HBPTanh(), hbp.HBPFlatten())
    model.append(hbp.HBPLinear(4, 3)).double()
    inputs = randn(3, 1, 2, 2) if images else randn(3, 5)
    labels = torch.arange(3)

    def passed(exactly: bool) -> SymmetricOperator:
        model.zero_grad()
        outputs = model(inputs)
        loss = CROSS_ENTROPY(outputs, labels)
        H = hbp.per_sample_hessian(loss, outputs)
        loss.backward()
        model.backward_hessian(H if exactly else H.sum(0))
        operator = first.weight.hessian
        assert isinstance(operator, SymmetricOperator)
        return operator

    v = randn(first.weight.numel())
    operator = passed(exactly=True)
    operator @ v
    inputs.add_(1)
    with pytest.raises(RuntimeError, match=r"An input .* has changed since"):
        operator @ v
    operator = passed(exactly=False)
    expected = operator @ v
    inputs.add_(1)
    assert torch.equal(operator @ v, expected)


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("what", ["weight", "statistics"])
def test_a_change_between_the_passes(what: str, exactly: bool) -> None:
    """Inputs of one point of parameter space do not meet weights of another."""
    model = conv_net()
    model.insert(1, batch_norm(3).double())
    _, _, hessians = forward(model, randn(*IMAGES), torch.arange(4) % 3)
    with torch.no_grad():
        if what == "weight":
            model[6].weight.add_(1)
        else:
            model.train()(randn(*IMAGES))
    with pytest.raises(RuntimeError, match="has changed since the forward pass"):
        model.backward_hessian(hessians if exactly else hessians.sum(0))
    assert all(p.hessian is None for p in model.parameters())


@pytest.mark.parametrize("treatment", TREATMENTS[1:])
def test_input_hessian(treatment: str) -> None:
    """Of a nest of containers: block-diagonal over the samples, and exact."""
    model = hbp.HBPSequential(
        hbp.HBPSequential(hbp.HBPTanh(), hbp.HBPSequential(residual_net()[:3]))
    )
    model.append(hbp.HBPSequential(*residual_net()[3:])).double()
    inputs, labels = 2 * randn(2, 1, 3, 3), torch.arange(2)
    H = send_back(model, inputs, treatment, labels=labels)
    assert H.shape == (18, 18)
    blocks = (H @ torch.eye(18, dtype=torch.float64)).reshape(2, 9, 2, 9)
    for n in range(2):
        sample = slice(n, n + 1)
        judge = reference.exact_blocks(
            model,
            lambda z, y: CROSS_ENTROPY(z, y) / 2,
            inputs[sample],
            labels[sample],
            treatment,
        )
        close(blocks[n, :, n], judge.input)
        close(blocks[n, :, 1 - n], torch.zeros(9, 9, dtype=torch.float64))


# Sizes.


class Largest(TorchDispatchMode):
    """Records the largest allocation, in bytes, of all that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.nbytes = max(self.nbytes, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("average", [True, False])
def test_maxima_of_many_samples_are_counted(average: bool) -> None:
    """300 equal images pick the same places: their mean Jacobian is that of one."""
    pool, image = hbp.HBPMaxPool2d(2), randn(1, 2, 4, 4)
    pool.set_hbp_approximation(average_input_jacobian=average)
    found = []
    for count in (1, 300):
        torch.manual_seed(1)
        z = pool(image.expand(count, -1, -1, -1).clone().requires_grad_())
        z.sum().backward()
        H = pool.backward_hessian(spd(8), compute_input_hessian=True)
        assert H is not None
        found.append(H.to_dense())
    close(*found)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("exactly", [True, False])
def test_past_the_limit_there_are_products(
    exactly: bool, scheme: tuple[bool, bool]
) -> None:
    """Whatever the limit: it decides what is formed, not what comes out."""
    model = residual_net()
    model.insert(3, hbp.HBPMaxPool2d(1))
    model.set_hbp_approximation(*scheme)
    inputs = randn(3, 1, 3, 3)
    vectors = [randn(p.numel(), 2) for p in model.parameters()]

    _, _, hessians = forward(model, inputs, torch.arange(3))
    H = hessians if exactly else hessians.sum(0)

    def products() -> list[Tensor]:
        model.backward_hessian(H, True, "abs")
        pairs = zip(model.parameters(), vectors, strict=True)
        return [p.hessian @ v for p, v in pairs]

    expected = products()
    for limit in (1, 8 * 9**2, 8 * 18**2):
        before = hbp.set_dense_limit(limit)
        try:
            for left, right in zip(products(), expected, strict=True):
                near(left, right)
            for p in model.parameters():
                if 8 * p.numel() ** 2 <= limit:
                    p.hessian.to_dense()
                else:
                    with pytest.raises(MemoryError, match=r"needs 0\.0 GiB"):
                        p.hessian.to_dense()
        finally:
            hbp.set_dense_limit(before)


@pytest.mark.parametrize("scheme", [(True, True), (False, True)])
@pytest.mark.parametrize("exactly", [True, False])
def test_wide_layers_stay_products(exactly: bool, scheme: tuple[bool, bool]) -> None:
    """50,176 features for each of 8 samples: 1.5 MiB, a matrix of them 9 GiB."""
    model = hbp.HBPSequential(
        hbp.HBPConv2d(1, 64, 3, padding=1),
        hbp.HBPTanh(),
        hbp.HBPMaxPool2d(2),
        hbp.HBPFlatten(),
        hbp.HBPLinear(64 * 14 * 14, 3),
    )
    model.set_hbp_approximation(*scheme)
    inputs = torch.randn(8, 1, 28, 28)
    batch = 8 * 50_176 * 4
    with Largest() as largest:
        H = send_back(model, inputs, "abs", exactly)
        model[0].weight.hessian @ torch.randn(576)
    # One sample after another gets a product of its own where those are averaged.
    # Every layer adds to the columns: activations of N samples, for N of them.
    columns = 1 if exactly or scheme[0] else 8
    assert largest.nbytes <= 1.01 * columns * batch
    assert H.shape == (784 * (8 if exactly else 1),) * 2
    if exactly or scheme[0]:
        with Largest() as largest:
            model[0].bias.hessian.diagonal()
        assert largest.nbytes <= 4 * 2**24
    with pytest.raises(MemoryError, match=r"\[50176, 50176\] .* needs 9\.4 GiB"):
        outer_of(model).to_dense()


def outer_of(model: hbp.HBPSequential) -> SymmetricOperator:
    """An averaged operator of the first activation's input."""
    send_back(model, torch.randn(2, 1, 28, 28), "zero", exactly=False)
    above = hbp.HBPSequential(*list(model)[1:])
    x = torch.randn(2, 64, 28, 28)
    return send_back(above, x, "zero", exactly=False)


def test_dense_jacobians_are_not_copied_for_every_column(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(operators, "DENSE_FEATURES", 0)
    model = hbp.HBPSequential(
        hbp.HBPLinear(4, 64),
        hbp.HBPLayerNorm(64),
        hbp.HBPTanh(),
        hbp.HBPLinear(64, 3),
    )
    send_back(model, torch.randn(8, 4), "zero")
    vectors = torch.randn(256, 64)
    with Largest() as largest:
        model[0].weight.hessian @ vectors
    assert largest.nbytes == 4 * 8 * 64 * 64


def test_many_columns_cost_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched for all columns at once, not for each of them."""
    monkeypatch.setattr(operators, "DENSE_FEATURES", 0)

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    def calls(samples: int, size: int, columns: int) -> list[int]:
        model = hbp.HBPSequential(
            hbp.HBPConv2d(2, size, 3),
            hbp.HBPMaxPool2d(2),
            hbp.HBPSigmoid(),
            hbp.HBPResidual(hbp.HBPConv2d(size, size, 3, padding=1)),
            hbp.HBPFlatten(),
            hbp.HBPLayerNorm(size * 4),
            hbp.HBPLinear(size * 4, 3),
        )
        model.set_hbp_approximation(samples > 0, True)
        send_back(model, torch.randn(samples, 2, 6, 6), "abs")
        counts = []
        for p in model.parameters():
            Count.calls = 0
            with Count():
                p.hessian @ torch.randn(p.numel(), columns)
            counts.append(Count.calls)
        return counts

    few = calls(2, 2, 2)
    assert calls(5, 3, 7) == few


@pytest.mark.parametrize("treatment", ["none", "abs"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_gradient_that_is_not_finite_under_layer_norm(
    treatment: str, exact: bool
) -> None:
    """The eigenvalues of its second-order term would be an error of torch's own."""
    torch.manual_seed(0)
    model = hbp.HBPSequential(hbp.HBPLayerNorm(4), hbp.HBPLinear(4, 3)).double()
    model(randn(3, 4).requires_grad_()).square().sum().backward()
    model[0].last_record.output_gradient[0, 0] = torch.nan
    hessian = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ArithmeticError, match="second-order term of HBPLayerNorm"):
        model.backward_hessian(
            hessian.expand(3, 3, 3) if exact else hessian, True, treatment
        )
    assert all(p.hessian is None for p in model.parameters())
