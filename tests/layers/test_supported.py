"""What layers take: parameters, arguments, names of treatments, choices of a scheme.

Every parameter gets its curvature, or the Hessian pass refuses the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close, randn, seed, send_back, small_net, spd
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import hbp
from hbp import reference
from hbp.testing import check_layer


class ElementwisePReLU(hbp.ElementwiseRule, nn.PReLU):
    """No rule for its parameter."""


class GeneralGroupNorm(hbp.GeneralRule, nn.GroupNorm):
    """No rule for its parameters."""


class LinearScale(hbp.LinearRule, nn.PReLU):
    """No rule for its parameter."""


class OwnParameter(hbp.HBPSequential):
    """A container with a parameter of its own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.scale = nn.Parameter(torch.ones(()))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class BilinearScale(hbp.BilinearRule, Scale):
    """z = w ⊙ x."""


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def network(*between: nn.Module) -> hbp.HBPSequential:
    return hbp.HBPSequential(
        hbp.HBPLinear(5, 6), hbp.HBPTanh(), *between, hbp.HBPLinear(6, 3)
    ).double()


def sent_back(model: hbp.HBPModule) -> None:
    outputs = model(randn(4, 5))
    loss = F.cross_entropy(outputs, torch.tensor([0, 2, 1, 1]))
    hessian = hbp.batch_summed_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(hessian, modify_2nd_order_terms="abs")


CHANGES: dict[str, tuple[Callable[[], Any], str]] = {
    "weight norm": (
        lambda: parametrizations.weight_norm(network()[0]),
        r"the parametrizations of ParametrizedHBPLinear.*remove_parametrizations",
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(network()[0]),
        "the parametrizations of ParametrizedHBPLinear",
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(network()[0]),
        "the parametrizations of ParametrizedHBPLinear",
    ),
    "own": (
        lambda: parametrize.register_parametrization(network()[0], "bias", Doubled()),
        "the parametrizations of ParametrizedHBPLinear",
    ),
    "pruned": (
        lambda: prune.l1_unstructured(network()[0], "weight", 0.5),
        r"No rule gives 0\.weight_orig its curvature.*prune\.remove",
    ),
    "hooked weight norm": (
        lambda: weight_norm(network()[0]),
        r"No rule gives 0\.weight_g its curvature",
    ),
    "elementwise": (
        ElementwisePReLU,
        r"No rule gives 0\.weight its curvature.*parameter_jacobians",
    ),
    "general": (
        lambda: GeneralGroupNorm(2, 6),
        r"No rule gives 0\.weight its curvature",
    ),
    "linear": (LinearScale, r"gives 0\.weight its curvature"),
    "container": (
        lambda: OwnParameter(hbp.HBPIdentity()),
        r"No rule gives 0\.scale its curvature",
    ),
    "pruned bilinear": (
        lambda: prune.l1_unstructured(BilinearScale(), "weight", 0.5),
        r"weight of BilinearScale .*computed before each pass.*prune\.remove",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_parameter_without_curvature_is_refused(name: str) -> None:
    make, message = CHANGES[name]
    layer = make()
    features = 5 if isinstance(layer, hbp.HBPLinear) else 6
    model = network()
    model = hbp.HBPSequential(layer, *model[1:] if features == 5 else [model[-1]])
    model = hbp.HBPSequential(hbp.HBPLinear(5, features), model).double()
    with pytest.raises(TypeError, match=f"(?s){message.replace('0', '1.0', 1)}"):
        sent_back(model)
    assert all(getattr(p, "hessian", None) is None for p in model.parameters())


def test_a_refused_parametrization_is_left_as_it_was() -> None:
    """Spectral norm takes a step of its power iteration whenever it is read."""
    model = network()
    parametrizations.spectral_norm(model[2])
    outputs = model(randn(4, 5))
    loss = F.cross_entropy(outputs, torch.tensor([0, 2, 1, 1]))
    hessian = hbp.batch_summed_hessian(loss, outputs)
    loss.backward()
    before = [tensor.clone() for tensor in model[2].buffers()]
    with pytest.raises(TypeError, match="the parametrizations of"):
        model.backward_hessian(hessian)
    assert all(map(torch.equal, before, model[2].buffers()))


def test_what_is_frozen_needs_no_curvature() -> None:
    model = network(ElementwisePReLU())
    model[2].requires_grad_(False)
    prune.l1_unstructured(model[3], "weight", 0.5)
    model[3].weight_orig.requires_grad_(False)
    parametrizations.weight_norm(model[0])
    model[0].requires_grad_(False)  # Nothing reads it: the pass ends above.
    sent_back(model)
    assert model[3].bias.hessian is not None


@pytest.mark.parametrize("undo", ["weight norm", "pruned"])
def test_what_is_undone_has_curvature_again(undo: str) -> None:
    model = network()
    if undo == "pruned":
        prune.l1_unstructured(model[0], "weight", 0.5)
        prune.remove(model[0], "weight")
    else:
        parametrizations.weight_norm(model[0])
        parametrize.remove_parametrizations(model[0], "weight")
    sent_back(model)
    assert all(p.hessian.shape[0] == p.numel() for p in model.parameters())


# --------------------------------------------------------------------------------------
# Transposed convolutions of another output size.
# --------------------------------------------------------------------------------------

TRANSPOSED: dict[str, tuple[hbp.HBPModule, nn.Module, tuple[int, ...], list[int]]] = {
    "1d": (
        hbp.HBPConvTranspose1d(2, 2, 3, stride=3, padding=1),
        nn.ConvTranspose1d(2, 2, 3, stride=3, padding=1, output_padding=2),
        (3, 2, 2),
        [6],
    ),
    "2d": (
        hbp.HBPConvTranspose2d(1, 2, 3, stride=2),
        nn.ConvTranspose2d(1, 2, 3, stride=2, output_padding=(1, 0)),
        (3, 1, 2, 2),
        [6, 5],
    ),
    "2d with batch": (
        hbp.HBPConvTranspose2d(2, 2, 2, stride=2, groups=2, dilation=2, bias=False),
        nn.ConvTranspose2d(
            *(2, 2, 2), stride=2, groups=2, dilation=2, bias=False, output_padding=1
        ),
        (3, 2, 2, 1),
        [3, 2, 6, 4],
    ),
    "3d": (
        hbp.HBPConvTranspose3d(1, 1, 2, stride=2, output_padding=1),
        nn.ConvTranspose3d(1, 1, 2, stride=2, output_padding=(0, 1, 0)),
        (3, 1, 1, 2, 1),
        [2, 5, 2],
    ),
}


class Sized(hbp.HBPConvTranspose2d):
    """It is always called with an output size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, output_size=[6, 5])


@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("exact", [True, False])
def test_curvature_has_the_output_size_of_the_call(name: str, exact: bool) -> None:
    layer, plain, shape, size = TRANSPOSED[name]
    layer, plain = layer.double(), plain.double()
    plain.load_state_dict(layer.state_dict())
    x = randn(*shape)
    assert torch.equal(layer(x, output_size=size), plain(x))
    assert torch.equal(layer(x, size), plain(x))
    twin = hbp.convert(plain)
    features = plain(x)[0].numel()
    H = torch.stack([spd(features) for _ in x]) if exact else spd(features)
    found = []
    for module, input in ((layer, x), (twin, x)):
        module.zero_grad()
        given = {"output_size": size} if module is layer else {}
        module(input.clone().requires_grad_(), **given).sum().backward()
        of_input = module.backward_hessian(H, True)
        blocks = [p.hessian.to_dense() for p in module.parameters()]
        found.append([of_input.to_dense(), *blocks])
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


def test_curvature_of_an_output_size_by_automatic_differentiation() -> None:
    check_layer(Sized(1, 2, 3, stride=2), randn(3, 1, 2, 2))


def test_an_output_size_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="valid sizes range from"):
        hbp.HBPConvTranspose2d(1, 1, 3, stride=2)(torch.ones(1, 1, 3, 3), [9, 9])


# --------------------------------------------------------------------------------------
# Names of the generalized Gauss-Newton matrix, and choices of a scheme.
# --------------------------------------------------------------------------------------


def test_ggn_is_the_name_of_the_ggn() -> None:
    x, y = randn(4, 4), torch.arange(4) % 3
    model, blocks = small_net(), []
    for treatment in ("ggn", "zero"):
        of_input = send_back(model, x, y, treatment=treatment)
        blocks.append([of_input, *(p.hessian for p in model.parameters())])
        expected = reference.batch_blocks(model, F.cross_entropy, x, y, treatment)
        close(of_input.to_dense(), expected.input)
        for name, p in model.named_parameters():
            close(p.hessian.to_dense(), expected.parameters[name])
    for ggn, zero in zip(*blocks, strict=True):
        assert torch.equal(ggn.to_dense(), zero.to_dense())
    one = [
        reference.exact_blocks(model, F.cross_entropy, x[:1], y[:1], how).input
        for how in ("ggn", "zero")
    ]
    assert torch.equal(*one)


def choices(model: hbp.HBPModule) -> list[tuple[bool, bool]]:
    layers = [m for m in model.modules() if isinstance(m, hbp.HBPModule)]
    return [(m.average_input_jacobian, m.average_parameter_jacobian) for m in layers]


def test_a_choice_that_is_not_named_stays() -> None:
    model = hbp.HBPSequential(hbp.HBPSequential(hbp.HBPLinear(4, 5)), hbp.HBPSigmoid())
    both, linear, sigmoid = (True, True), (True, False), (False, True)
    model.set_hbp_approximation(average_parameter_jacobian=False)
    assert choices(model) == [both, both, linear, both]
    model.set_hbp_approximation(average_input_jacobian=False)
    assert choices(model) == [both, both, linear, sigmoid]
    for unchanged in [(), (None,), (None, None)]:
        model.set_hbp_approximation(*unchanged)
        assert choices(model) == [both, both, linear, sigmoid]
    model.set_hbp_approximation(True)
    assert choices(model) == [both, both, linear, both]
    model.set_hbp_approximation(False, True)
    assert choices(model) == [both, both, both, sigmoid]
    model.set_hbp_approximation(True, True)
    assert choices(model) == [both] * 4


def test_a_wrong_choice_changes_nothing() -> None:
    layer = hbp.HBPLayerNorm(3)
    with pytest.raises(TypeError, match="must be True, False or None"):
        layer.set_hbp_approximation(False, "yes")
    assert choices(layer) == [(True, True)]


# --------------------------------------------------------------------------------------
# Softmax, within each sample.
# --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Implicit dimension choice:UserWarning")
@pytest.mark.parametrize("kind", [hbp.HBPSoftmax, hbp.HBPLogSoftmax])
def test_a_softmax_over_the_samples_is_refused(kind: type[hbp.HBPModule]) -> None:
    for layer, shape in [
        (kind(0), (3, 4)),
        (kind(-2), (3, 4)),
        (kind(), (3, 2, 4)),  # Where torch takes 0.
    ]:
        layer(randn(*shape).requires_grad_()).square().sum().backward()
        features = math.prod(shape[1:])
        with pytest.raises(ValueError, match="goes over the samples of an input of"):
            layer.backward_hessian(torch.eye(features).double(), True)
    check_layer(kind(), randn(3, 4))
    check_layer(kind(), randn(2, 2, 2, 2))


@pytest.mark.parametrize("treatment", ["none", "zero", "abs", "clip"])
def test_hardsigmoid_has_the_curvature_of_its_pieces(treatment: str) -> None:
    """torch cannot differentiate it twice; the same function by a clamp it can."""

    def pieces(x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)

    found = []
    for activation in (hbp.HBPHardsigmoid(), hbp.HBPElementwise(pieces)):
        seed(0)
        model = hbp.HBPSequential(
            hbp.HBPLinear(4, 6), activation, hbp.HBPLinear(6, 3)
        ).double()
        x, y = 4 * randn(9, 4), torch.arange(9) % 3
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        H = hbp.batch_summed_hessian(loss, outputs)
        loss.backward()
        model.backward_hessian(H, modify_2nd_order_terms=treatment)
        found.append([p.hessian.to_dense() for p in model.parameters()])
    for left, right in zip(*found, strict=True):
        close(left, right)
