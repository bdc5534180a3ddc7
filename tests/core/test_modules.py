"""Layers and random networks of them, against torch.nn and the dense definitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SCHEMES, TREATMENTS, close, randn, send_back
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import hbp
from hbp import reference
from hbp.operators import MatrixFree

# --------------------------------------------------------------------------------------
# Random networks: a nested list of names and sizes, built with either library.
# --------------------------------------------------------------------------------------


def _slope(x: Tensor) -> Tensor:
    return x.sigmoid()


def _bend(x: Tensor) -> Tensor:
    return x.sigmoid() * (1 - x.sigmoid())


ACTIVATIONS = {
    "sigmoid": (nn.Sigmoid, hbp.HBPSigmoid),
    "tanh": (nn.Tanh, hbp.HBPTanh),
    "relu": (nn.ReLU, hbp.HBPReLU),
    "relu_": (lambda: nn.ReLU(inplace=True), lambda: hbp.HBPReLU(inplace=True)),
    "softplus": (nn.Softplus, lambda: hbp.HBPElementwise(F.softplus)),
    "softplus'": (nn.Softplus, lambda: hbp.HBPElementwise(F.softplus, _slope, _bend)),
    "gelu": (nn.GELU, lambda: hbp.HBPElementwise(F.gelu)),
}
# In front of an in-place layer stands a linear one, which never needs its output.
OUT_OF_PLACE = [name for name in ACTIVATIONS if name != "relu_"]
LOSSES = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "cross-entropy sum": nn.CrossEntropyLoss(reduction="sum"),
    "squares": lambda z, y: (z - 0.3).square().sum() / (len(z) + y.sum()),
    "logistic": lambda z, y: F.softplus(z * (1 + y[:, None]) @ _mixing(z)).sum(),
    # Neither convex nor separable over outputs: δ and H̄ of any sign.
    "wavy": lambda z, y: (z.sum(1) * (z * _mixing(z)[0]).sin().sum(1)).mean(),
}


def _mixing(z: Tensor) -> Tensor:
    size = z.shape[1]
    return torch.arange(size * size, dtype=z.dtype).view(size, size).cos()


@dataclass
class Case:
    """A network in both libraries, with the same weights, and a batch."""

    spec: list[Any]
    frozen: list[bool]
    shape: tuple[int, ...]
    samples: int
    loss: str
    seed: int

    def build(self, ours: bool) -> nn.Module:
        torch.manual_seed(self.seed)
        # Float32 first: the initialisation must agree as users get it.
        model = _build(self.spec, ours)
        for parameter, frozen in zip(model.parameters(), self.frozen, strict=True):
            parameter.requires_grad_(not frozen)
        return model.double()

    def batch(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(self.seed + 1)
        return randn(self.samples, *self.shape), torch.arange(self.samples) % 2


def _build(spec: Any, ours: bool) -> nn.Module:
    if isinstance(spec, list):
        children = [_build(child, ours) for child in spec]
        return (hbp.HBPSequential if ours else nn.Sequential)(*children)
    if isinstance(spec, tuple):
        return (hbp.HBPLinear if ours else nn.Linear)(spec[0], spec[1], bias=spec[2])
    if spec == "flatten":
        return (hbp.HBPFlatten if ours else nn.Flatten)()
    return ACTIVATIONS[spec][ours]()


@st.composite
def cases(draw: st.DrawFn, least: int = 1, most: int = 1) -> Case:
    shape = draw(st.sampled_from([(1,), (3,), (2, 2)]))
    layers: list[Any] = []
    before = draw(st.sampled_from(["", "tanh", "softplus"]))
    layers += [before] if before else []
    layers += ["flatten"] if len(shape) > 1 else []
    width = int(np.prod(shape))
    parameters = 0
    for _ in range(draw(st.integers(1, 3))):
        out, bias = draw(st.integers(1, 4)), draw(st.booleans())
        layers.append((width, out, bias))
        layers += draw(st.lists(st.sampled_from(list(ACTIVATIONS)), max_size=1))
        layers += draw(st.lists(st.sampled_from(OUT_OF_PLACE), max_size=1))
        width, parameters = out, parameters + 1 + bias
    layers.append((width, 2, True))
    parameters += 2
    # Two cuts put the layers between them, or all behind, into a nested sequential.
    first, second = sorted(draw(st.integers(0, len(layers))) for _ in range(2))
    spec = [*layers[:first], [*layers[first:second]], *layers[second:]]
    if draw(st.booleans()):
        spec = [spec]
    frozen = draw(st.lists(st.booleans(), min_size=parameters, max_size=parameters))
    if not draw(st.booleans()):
        frozen = [False] * parameters
    return Case(
        spec,
        frozen,
        shape,
        draw(st.integers(least, most)),
        draw(st.sampled_from(list(LOSSES))),
        draw(st.integers(0, 2**20)),
    )


def blocks_of(model: nn.Module) -> dict[str, Tensor]:
    """p.hessian, dense, of every parameter that has one."""
    operators = {n: getattr(p, "hessian", None) for n, p in model.named_parameters()}
    return {n: o.to_dense() for n, o in operators.items() if o is not None}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def assert_blocks(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Trainable parameters, and no others, have their blocks."""
    found = blocks_of(model)
    assert set(found) == trainable(model)
    for name, block in found.items():
        close(block, expected[name])


@given(cases(1, 3))
def test_random_network_is_the_torch_network(case: Case) -> None:
    """Initialisation, state_dict, forward and gradient: bit for bit."""
    (x, y), results = case.batch(), []
    for ours in (True, False):
        model = case.build(ours)
        inputs = x.clone().requires_grad_()
        outputs = model(inputs)
        loss = LOSSES[case.loss](outputs, y)
        if ours:  # The Hessian passes must not disturb the gradient.
            curvature = hbp.batch_summed_hessian(loss, outputs)
        loss.backward()
        if ours:
            model.backward_hessian(curvature, modify_2nd_order_terms="clip")
        gradients = {n: p.grad for n, p in model.named_parameters()}
        results.append(
            {**model.state_dict(), "z": outputs, "x.grad": inputs.grad}
            | {f"{name}.grad": gradient for name, gradient in gradients.items()}
        )
    ours, theirs = results
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        other = theirs[name]
        assert value is other is None or torch.equal(value, other), name


@given(cases())
def test_random_network_has_the_exact_hessian_of_one_sample(case: Case) -> None:
    """Against torch.func.hessian of the torch.nn twin."""
    model, twin = case.build(ours=True), case.build(ours=False)
    x, y = case.batch()
    loss_func = LOSSES[case.loss]
    input_hessian = send_back(model, x, y, loss_func)
    size = x.numel()

    def by_input(inputs: Tensor) -> Tensor:
        # A clone, for layers that work in place.
        return loss_func(twin(inputs.clone()), y)

    exact = torch.func.hessian(by_input)(x).reshape(size, size)
    close(input_hessian.to_dense(), exact)

    parameters = {name: p.detach() for name, p in twin.named_parameters()}

    def block(name: str) -> Tensor:
        def by_parameter(parameter: Tensor) -> Tensor:
            varied = {**parameters, name: parameter}
            return loss_func(functional_call(twin, varied, (x.clone(),)), y)

        count = parameters[name].numel()
        return torch.func.hessian(by_parameter)(parameters[name]).reshape(count, count)

    assert_blocks(model, {name: block(name) for name in trainable(model)})


@given(cases(), st.sampled_from(TREATMENTS))
def test_random_network_has_the_treated_curvature_of_one_sample(
    case: Case, treatment: str | None
) -> None:
    """Against the recursion with dense Jacobians, and J'HJ of the whole model."""
    model, twin = case.build(ours=True), case.build(ours=False)
    x, y = case.batch()
    loss_func = LOSSES[case.loss]
    input_hessian = send_back(model, x, y, loss_func, treatment)
    expected = reference.exact_blocks(twin, loss_func, x, y, treatment)
    close(input_hessian.to_dense(), expected.input)
    assert_blocks(model, expected.parameters)
    if treatment == "zero":
        assert_blocks(model, reference.ggn_blocks(twin, loss_func, x, y))


@given(cases(2, 4), st.sampled_from(TREATMENTS), st.sampled_from(SCHEMES))
def test_random_network_has_the_batch_curvature(
    case: Case, treatment: str | None, scheme: tuple[bool, bool]
) -> None:
    """Several samples: the dense definition of each scheme, in either form."""
    model, twin = case.build(ours=True), case.build(ours=False)
    model.set_hbp_approximation(*scheme)
    x, y = case.batch()
    loss_func = LOSSES[case.loss]
    expected = reference.batch_blocks(twin, loss_func, x, y, treatment, *scheme)
    input_hessian = send_back(model, x, y, loss_func, treatment)

    # First as products of the implicit chain, then of the dense matrices.
    operators = {n: getattr(p, "hessian", None) for n, p in model.named_parameters()}
    operators = {n: o for n, o in operators.items() if o is not None}
    pairs = [(o, expected.parameters[n]) for n, o in operators.items()]
    for operator, dense in [*pairs, (input_hessian, expected.input)]:
        vectors = randn(operator.shape[0], 2)
        close(operator @ vectors, dense @ vectors)
        close(operator.diagonal(), dense.diagonal())
        close(operator.to_dense(), dense)
        close(operator @ vectors, dense @ vectors)
    assert set(operators) == trainable(model)


@given(
    cases(1, 4),
    st.sampled_from(["zero", "abs", "clip"]),
    st.sampled_from(SCHEMES),
)
def test_ggn_and_pch_blocks_are_positive_semidefinite(
    case: Case, treatment: str, scheme: tuple[bool, bool]
) -> None:
    case.loss = "cross-entropy"  # A convex loss, as the statement needs.
    model = case.build(ours=True)
    model.set_hbp_approximation(*scheme)
    operators = [send_back(model, *case.batch(), LOSSES[case.loss], treatment)]
    operators += [p.hessian for p in model.parameters() if p.requires_grad]
    for operator in operators:
        eigenvalues = operator.eigvalsh()
        # Round-off: the smallest seen was -8e-17 of the largest.
        assert eigenvalues.min() >= -1e-13 * max(1, eigenvalues.max())


# --------------------------------------------------------------------------------------
# The same, written out in NumPy: shares nothing with hbp.reference.
# --------------------------------------------------------------------------------------


def _mod(diagonal: np.ndarray, treatment: str | None) -> np.ndarray:
    if treatment == "zero":
        return np.zeros_like(diagonal)
    if treatment == "abs":
        return np.abs(diagonal)
    return np.maximum(diagonal, 0) if treatment == "clip" else diagonal


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_layers_by_hand(treatment: str | None, scheme: tuple[bool, bool]) -> None:
    """Sums over samples and indices as in the formulas of the paper."""
    average_input, average_parameter = scheme
    model = hbp.HBPSequential(
        hbp.HBPSigmoid(), hbp.HBPLinear(3, 4), hbp.HBPTanh(), hbp.HBPLinear(4, 2)
    ).double()
    model.set_hbp_approximation(*scheme)
    x, y = randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    input_hessian = send_back(model, x, y, treatment=treatment)

    W1, b1, W2, b2 = (p.detach().numpy() for p in model.parameters())
    N = len(x)
    a0 = 1 / (1 + np.exp(-x.numpy()))
    a1 = np.tanh(a0 @ W1.T + b1)
    logits = a1 @ W2.T + b2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    delta = (p - np.eye(2)[y]) / N  # δ w.r.t. the outputs, with the 1/N of the mean.
    H = sum(np.diag(p[n]) - np.outer(p[n], p[n]) for n in range(N)) / N

    def weight_block(H: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        if average_parameter:
            S = np.outer(inputs.mean(0), inputs.mean(0))
        else:
            S = sum(np.outer(v, v) for v in inputs) / N
        out, into = len(H), inputs.shape[1]
        block = np.zeros((out * into, out * into))
        for o in range(out):
            for i in range(into):
                for o2 in range(out):
                    for i2 in range(into):
                        block[o * into + i, o2 * into + i2] = H[o, o2] * S[i, i2]
        return block

    def through(
        H: np.ndarray, slope: np.ndarray, bend: np.ndarray, delta: np.ndarray
    ) -> np.ndarray:
        if average_input:
            first = np.diag(slope.mean(0)) @ H @ np.diag(slope.mean(0))
        else:
            first = sum(np.diag(s) @ H @ np.diag(s) for s in slope) / N
        return first + np.diag(_mod((bend * delta).sum(0), treatment))

    expected = {"3.bias": H, "3.weight": weight_block(H, a1)}
    H, delta = W2.T @ H @ W2, delta @ W2
    slope = 1 - a1**2
    H = through(H, slope, -2 * a1 * slope, delta)
    delta = delta * slope
    expected |= {"1.bias": H, "1.weight": weight_block(H, a0)}
    H, delta = W1.T @ H @ W1, delta @ W1
    slope = a0 * (1 - a0)
    H = through(H, slope, slope * (1 - 2 * a0), delta)

    assert_blocks(model, {name: torch.tensor(b) for name, b in expected.items()})
    close(input_hessian.to_dense(), H)


def test_treatments_differ() -> None:
    """A guard for the tests above: with this batch no two treatments agree."""
    model = hbp.HBPSequential(hbp.HBPTanh(), hbp.HBPLinear(6, 2)).double()
    x, y = randn(3, 6), torch.tensor([0, 1, 0])
    found = [
        send_back(model, x, y, treatment=treatment).to_dense()
        for treatment in (None, "zero", "abs", "clip")
    ]
    gaps = [(a - b).abs().max() for i, a in enumerate(found) for b in found[:i]]
    assert min(gaps) > 1e-3


def test_abs_of_the_sum_is_not_the_sum_of_abs() -> None:
    """Two samples whose second-order terms cancel: nothing is left to modify."""
    layer = hbp.HBPTanh()
    x = torch.tensor([[0.7], [-0.7]], dtype=torch.float64)
    weight = 3.0

    def loss_func(z: Tensor, y: Tensor) -> Tensor:
        return weight * z.sum()  # δ = 3 at both, φ'' of opposite sign, H̄ = 0.

    batch = send_back(layer, x, x, loss_func, "abs").to_dense()
    close(batch, [[0.0]])
    exact = reference.exact_blocks(layer, loss_func, x, x, "abs").input
    z = np.tanh(0.7)
    close(exact, [[2 * weight * 2 * z * (1 - z**2)]])


# --------------------------------------------------------------------------------------
# Layers one by one.
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives(name: str) -> None:
    """φ' and φ'' against torch.func.grad, far out too."""
    theirs, ours = (make() for make in ACTIVATIONS[name])
    points = torch.tensor([-50.0, -3, -0.5, 0.1, 2, 50], dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        return theirs(x.clone())

    x = points[:, None]
    values = value(x) if ours.derivatives_from_output else x
    slope = ours.first_derivative(values)
    bend = ours.second_derivative(values, slope)
    first = torch.func.grad(value)
    close(slope.flatten(), torch.stack([first(t) for t in points]))
    second = torch.stack([torch.func.grad(first)(t) for t in points])
    close(torch.zeros(6) if bend is None else bend.flatten(), second)


@pytest.mark.parametrize(
    ("function", "slope", "bend"),
    [
        (lambda x: 3 * x, 3.0, 0.0),
        (lambda x: torch.ones_like(x), 0.0, 0.0),
        (lambda x: x.square(), 1.4, 2.0),
    ],
    ids=["linear", "constant", "square"],
)
def test_derivatives_by_autograd_of_simple_functions(
    function: Any, slope: float, bend: float
) -> None:
    layer = hbp.HBPElementwise(function)
    x = torch.full((1, 2), 0.7, dtype=torch.float64)
    close(layer.first_derivative(x), [[slope] * 2])
    close(layer.second_derivative(x, layer.first_derivative(x)), [[bend] * 2])


def test_elementwise_derivatives_can_be_given_one_by_one() -> None:
    x = randn(2, 3)
    layer = hbp.HBPElementwise(torch.exp, first=lambda x: x * 0 + 7)
    close(layer.first_derivative(x), x * 0 + 7)
    close(layer.second_derivative(x, x), x.exp())
    layer = hbp.HBPElementwise(torch.exp, second=lambda x: x * 0 + 7)
    close(layer.first_derivative(x), x.exp())
    close(layer.second_derivative(x, x), x * 0 + 7)


def test_relu_at_zero_is_flat() -> None:
    """As torch's gradient: φ'(0) = 0."""
    x = torch.zeros(1, 2, dtype=torch.float64)
    H = send_back(hbp.HBPReLU(), x, x, lambda z, y: (z + 1).square().sum())
    close(H.to_dense(), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("start", "end", "shape"),
    [(1, -1, (2, 3)), (2, -1, (2, 2, 3)), (1, 2, (2, 2, 3)), (1, -1, (4,))],
)
def test_flatten_keeps_the_order_of_features(
    start: int, end: int, shape: tuple[int, ...]
) -> None:
    layer, twin = hbp.HBPFlatten(start, end), nn.Flatten(start, end)
    x, w = randn(3, *shape), randn(int(np.prod(shape)))

    def loss_func(z: Tensor, y: Tensor) -> Tensor:
        return (z.flatten(1) @ w).exp().sum()

    assert torch.equal(layer(x), twin(x))
    H = send_back(layer, x, x, loss_func).to_dense()
    factors = (x.flatten(1) @ w).exp().sum()
    close(H, factors * torch.outer(w, w))


def test_layers_alone_are_modules_with_curvature() -> None:
    """A single layer needs no container, as in tutorial 01."""
    layer = hbp.HBPLinear(3, 2).double()
    x, y = randn(4, 3), torch.tensor([0, 1, 0, 1])
    send_back(layer, x, y)
    p = layer(x).softmax(1).mean(0).detach()
    P = torch.stack([torch.outer(q, q) for q in layer(x).softmax(1)]).mean(0).detach()
    close(layer.bias.hessian.to_dense(), torch.diag(p) - P)
    mean = x.mean(0)
    expected = torch.kron(torch.diag(p) - P, torch.outer(mean, mean))
    close(layer.weight.hessian.to_dense(), expected)


def test_input_hessian_only_on_request() -> None:
    model = hbp.HBPSequential(hbp.HBPLinear(4, 3)).double()
    send_back(model, randn(2, 4), torch.tensor([0, 2]))
    H = torch.eye(3, dtype=torch.float64)
    assert model.backward_hessian(H) is None
    found = model.backward_hessian(H, compute_input_hessian=True)
    weight = model[0].weight
    close(found.to_dense(), weight.T @ weight)


def test_backward_hessian_can_be_called_again_with_another_treatment() -> None:
    model = hbp.HBPSequential(
        hbp.HBPLinear(3, 4), hbp.HBPTanh(), hbp.HBPLinear(4, 2)
    ).double()
    x, y = randn(3, 3), torch.tensor([0, 1, 1])
    loss_func = nn.CrossEntropyLoss()
    send_back(model, x, y, treatment="abs")
    outputs = model(x).detach()
    curvature = hbp.output_hessian(loss_func, outputs, y)
    send_back(model, x, y, treatment="abs")
    model.backward_hessian(curvature, modify_2nd_order_terms="zero")
    expected = reference.batch_blocks(model, loss_func, x, y, "zero")
    assert_blocks(model, expected.parameters)


def test_an_operator_can_be_sent_back_instead_of_a_matrix() -> None:
    model = hbp.HBPSequential(hbp.HBPLinear(3, 4), hbp.HBPTanh()).double()
    send_back(model, randn(3, 3), torch.tensor([0, 1, 1]))
    H = torch.diag(torch.arange(1.0, 5, dtype=torch.float64))
    model.backward_hessian(H, modify_2nd_order_terms="abs")
    expected = blocks_of(model)
    operator = MatrixFree(lambda v: H @ v, 4, H.dtype, H.device)
    model.backward_hessian(operator, modify_2nd_order_terms="abs")
    assert_blocks(model, expected)


def test_sequential_slices_and_indexes_like_torch() -> None:
    """A slice shares layers and records: its Hessian pass continues the chain."""
    model = hbp.HBPSequential(
        hbp.HBPLinear(4, 3), hbp.HBPTanh(), hbp.HBPLinear(3, 2)
    ).double()
    x, y = randn(2, 4), torch.tensor([0, 1])
    whole = send_back(model, x, y, treatment="clip").to_dense()
    expected = blocks_of(model)
    curvature = model[-1].bias.hessian.to_dense()
    head, tail = model[:2], model[2:]
    assert isinstance(head, hbp.HBPSequential)
    assert len(head) == 2
    assert head[0] is model[0]
    for parameter in model.parameters():
        parameter.hessian = None
    between = tail.backward_hessian(curvature, True, "clip")
    assert set(blocks_of(model)) == {"2.weight", "2.bias"}
    close(head.backward_hessian(between, True, "clip").to_dense(), whole)
    assert_blocks(model, expected)


def test_named_and_nested_children_keep_their_names() -> None:
    from collections import OrderedDict

    def named(sequential: type, linear: type) -> nn.Module:
        inner = sequential(OrderedDict(deep=linear(2, 2)))
        return sequential(OrderedDict(first=inner, last=linear(2, 1)))

    ours = named(hbp.HBPSequential, hbp.HBPLinear)
    theirs = named(nn.Sequential, nn.Linear)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_the_chain_stops_at_the_first_trainable_layer() -> None:
    """What lies in front needs no curvature, not even a rule for it."""

    class NoRule(hbp.HBPModule, nn.Identity):
        def forward(self, input: Tensor) -> Tensor:
            return self.record(input, super().forward(input) * 1, keep=None)

    model = hbp.HBPSequential(NoRule(), hbp.HBPLinear(4, 3)).double()
    outputs = model(randn(2, 4))
    outputs.sum().backward()
    H = torch.eye(3, dtype=torch.float64)
    model.backward_hessian(H)
    close(model[1].bias.hessian.to_dense(), H)
    with pytest.raises(TypeError, match="NoRule defines no rule jacobian"):
        model.backward_hessian(H, compute_input_hessian=True)


def test_zero_grad_clears_curvature() -> None:
    model = hbp.HBPSequential(hbp.HBPLinear(4, 3)).double()
    send_back(model, randn(2, 4), torch.tensor([0, 2]))
    model.zero_grad()
    assert [(p.grad, p.hessian) for p in model.parameters()] == [(None, None)] * 2
    send_back(model, randn(2, 4), torch.tensor([0, 2]))
    model.zero_grad(set_to_none=False)
    assert all(p.hessian is None and not p.grad.any() for p in model.parameters())


def test_printed_model_shows_the_approximation() -> None:
    model = hbp.HBPSequential(
        hbp.HBPLinear(3, 2),
        hbp.HBPSequential(hbp.HBPReLU(inplace=True), hbp.HBPElementwise(torch.exp)),
        hbp.HBPSigmoid(),
        hbp.HBPFlatten(),
    )
    assert str(model) == (
        "HBPSequential(\n"
        "  (0): HBPLinear(in_features=3, out_features=2, bias=True, "
        "avg_param_jac: True)\n"
        "  (1): HBPSequential(\n"
        "    (0): HBPReLU(inplace=True, avg_input_jac: True)\n"
        "    (1): HBPElementwise(exp, avg_input_jac: True)\n"
        "  )\n"
        "  (2): HBPSigmoid(avg_input_jac: True)\n"
        "  (3): HBPFlatten(start_dim=1, end_dim=-1)\n"
        ")"
    )
    model.set_hbp_approximation(
        average_input_jacobian=False, average_parameter_jacobian=False
    )
    assert str(model).count("jac: False") == 4
    assert "True" not in str(model).replace("bias=True", "").replace("ace=True", "")
